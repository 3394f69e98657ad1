"""What this installation found: the first thing to know about a surprising result, and what to
paste into a bug report.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

from cuflash import _cache, _nvrtc

# Distributions whose versions decide what runs, where installed.
PACKAGES = (
    "numpy",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cublas-cu12",
    "nvidia-cublas",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device as found.

    Parameters
    ----------
    ordinal : int
    name : str
    capability : str
        "9.0".
    memory : int
        Bytes in total.
    """

    ordinal: int
    name: str
    capability: str
    memory: int


@dataclass(frozen=True, slots=True)
class Config:
    """What `show_config` found; prints as a table.

    Parameters
    ----------
    cuflash, python, system : str
        Versions and platform.
    cpu : str
        Processor and the number of cores this process may use.
    gpus : tuple of Gpu
    driver, runtime, nvrtc : str or None
        CUDA version the driver supports, of CuPy's runtime, and of the NVRTC that compiles
        kernels; None where missing.
    no_gpu : str or None
        Why there is no GPU.
    cache : str
        Directory of compiled kernels.
    cache_writable : bool
    packages : tuple of (name, version)
    """

    cuflash: str
    python: str
    system: str
    cpu: str
    gpus: tuple[Gpu, ...]
    driver: str | None
    runtime: str | None
    nvrtc: str | None
    no_gpu: str | None
    cache: str
    cache_writable: bool
    packages: tuple[tuple[str, str], ...]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of every line."""
        devices = [
            (
                "device",
                f"{g.name}, capability {g.capability}, {g.memory / 2**30:.0f} GiB",
            )
            for g in self.gpus
        ] or [("device", f"no GPU: {self.no_gpu}")]
        writable = (
            "" if self.cache_writable else " (cannot be written: kernels stay in memory only)"
        )
        return [
            ("cuflash", self.cuflash),
            ("Python", self.python),
            ("system", self.system),
            ("CPU", self.cpu),
            *devices,
            ("CUDA driver", self.driver or "none"),
            ("CUDA runtime", self.runtime or "none"),
            ("NVRTC", self.nvrtc or "none: kernels cannot be compiled"),
            ("kernel cache", self.cache + writable),
            ("packages", ", ".join(f"{name} {version}" for name, version in self.packages)),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{label:<13} {value}" for label, value in self.rows())


def show_config() -> Config:
    """What cuflash runs on: devices, driver, CUDA, NVRTC, cache directory, package versions.

    Returns
    -------
    Config
        Its fields for programs; printed, one line per fact.

    Examples
    --------
    >>> import cuflash
    >>> print(cuflash.show_config())  # doctest: +SKIP
    cuflash       0.1.0
    Python        3.12.1
    ...
    """
    from cuflash import __version__

    gpus, driver, runtime, no_gpu = _cuda()
    folder = _cache.directory()
    return Config(
        cuflash=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cpu=f"{_processor()}, {cores()} cores",
        gpus=gpus,
        driver=driver,
        runtime=runtime,
        nvrtc=_nvrtc_version(),
        no_gpu=no_gpu,
        cache=str(folder),
        cache_writable=_writable(folder),
        packages=tuple(_installed()),
    )


def cores() -> int:
    """CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return os.cpu_count() or 1


@functools.cache
def cupy_or_reason() -> tuple[Any, str | None]:
    """CuPy when it is installed and sees a GPU, else None and the reason why not."""
    try:
        import cupy
    except ImportError as error:
        if {"cupy-cuda12x", "cupy-cuda13x"} & dict(_installed()).keys():
            return None, f"CuPy is installed and does not import ({error})"
        return None, "CuPy is not installed (pip install 'cuflash[cuda12]' or [cuda13])"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return None, f"CuPy {cupy.__version__} finds no usable device ({error})"
    return (cupy, None) if count else (None, f"CuPy {cupy.__version__} finds no device")


def _cuda() -> tuple[tuple[Gpu, ...], str | None, str | None, str | None]:
    cupy, reason = cupy_or_reason()
    if cupy is None:
        return (), None, None, reason
    runtime = cupy.cuda.runtime
    gpus = []
    for ordinal in range(runtime.getDeviceCount()):
        found = runtime.getDeviceProperties(ordinal)
        gpus.append(
            Gpu(
                ordinal,
                found["name"].decode(),
                f"{found['major']}.{found['minor']}",
                int(found["totalGlobalMem"]),
            )
        )
    return (
        tuple(gpus),
        _version(runtime.driverGetVersion()),
        _version(runtime.runtimeGetVersion()),
        None,
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvrtc_version() -> str | None:
    try:
        return ".".join(map(str, _nvrtc.binding().getVersion()))
    except (ImportError, RuntimeError, OSError):
        return None  # no CuPy, or CuPy without an NVRTC to load


def _writable(folder: Any) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _processor() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.split(":", 1)[1].strip()
        except OSError:
            pass  # the platform module knows less, and that will do
    return platform.processor() or platform.machine()


def _installed() -> list[tuple[str, str]]:
    from importlib import metadata  # at the top it would be a sixth of the time of `import cuflash`

    found = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append((name, metadata.version(name)))
    return found
