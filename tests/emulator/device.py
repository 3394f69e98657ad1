"""The device seam on the emulator: what `cuflash` runs through when tests send NumPy arrays to an
emulated GPU.

    with use_device(EmulatedDevice("sm_80", seed=1)):
        out = cuflash.attention(q, k, v)      # NumPy arrays, the PTX of the shipped kernel

Checks, planning, workspaces and launch configuration are the package's own; only allocation,
compilation and launch are replaced.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from cuflash import _cache, _compile
from cuflash._device import Limits
from cuflash._tensor_maps import Layout

from .memory import Memory
from .module import Limits as ModuleLimits
from .module import Module
from .nvrtc import Nvrtc
from .tensormap import tensor_map

KIB = 1024
# Shared memory one block may opt in to (CUDA programming guide, table of technical specifications).
SHARED_MEMORY = {
    "sm_75": 64 * KIB,
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_90a": 227 * KIB,
    "sm_120": 99 * KIB,
}

_ptx: dict[tuple[_compile.Specialization, int], str] = {}
_serial = itertools.count()
_modules: dict[tuple[_compile.Specialization, int], Module] = {}


def cache_folder() -> Path:
    """Where PTX and compiled modules are kept between runs."""
    chosen = os.environ.get("CUFLASH_EMU_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "cuflash-emulator"


def ptx(spec: _compile.Specialization, major: int = 12) -> str:
    """The PTX of a kernel, compiled with the options the package uses, kept on disk by content."""
    found = _ptx.get((spec, major))
    if found is None:
        nvrtc = Nvrtc(major=major)
        text = _compile.source(spec)
        arch = "compute_" + spec.arch.removeprefix("sm_")
        entry = _cache.key(text, arch, " ".join(_compile.OPTIONS), str(nvrtc.version))
        path = cache_folder() / f"{spec.name}-{entry}.ptx"
        if path.exists():
            found = path.read_text()
        else:
            options = (*_compile.OPTIONS, f"-I{_compile.ROOT}")
            found = nvrtc.ptx(text, arch=arch, options=options, name=f"{spec.name}.cu")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(found)
            os.replace(temporary, path)
        _ptx[spec, major] = found
    return found


class EmulatedKernel:
    """One kernel of a module, launched with its device's memory and schedule."""

    def __init__(self, device: EmulatedDevice, spec: _compile.Specialization) -> None:
        self._device, self._spec = device, spec
        key = (spec, device.nvrtc_major)
        if key not in _modules:
            _modules[key] = Module(ptx(*key))
        self._module = _modules[key]

    def __call__(self, grid: int, block: int, shared_memory: int, params: bytes) -> None:
        """Launch and wait; see `cuflash._device.Kernel`."""
        device = self._device
        self._module.memory = device.memory  # modules are shared by the devices of a process
        counters = self._module.launch(
            self._spec.name,
            grid,
            block,
            shared_memory,
            params,
            seed=device.seed,
            counters=device.count,
            limits=ModuleLimits(shared_memory=device.limits.shared_memory),
        )
        device.launches.append((self._spec.name, grid, counters))


class EmulatedDevice:
    """A GPU that is a program; see `cuflash._device.Device`.

    Parameters
    ----------
    arch : str
        "sm_75", "sm_80", ... "sm_90a": what kernels are compiled for.
    seed : int
        Order in which threads run; 0 is round-robin.
    count : bool
        Count bank conflicts, sectors and instructions into `launches`.
    """

    xp = np

    def __init__(
        self, arch: str = "sm_80", *, seed: int = 0, count: bool = False, nvrtc_major: int = 12
    ) -> None:
        self.name, self.arch = f"emulated {arch}", arch
        self.seed, self.count, self.nvrtc_major = seed, count, nvrtc_major
        # A number that no later device has: prepared calls are cached under it.
        self.key = ("emulated", next(_serial))
        # A few multiprocessors, and an L2 so small that sections of several heads occur in tests.
        self.limits = Limits(sm_count=4, shared_memory=SHARED_MEMORY[arch], l2_bytes=64 * KIB)
        self.memory = Memory()
        self.launches: list[tuple[str, int, Any]] = []
        self._kernels: dict[_compile.Specialization, EmulatedKernel] = {}

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to make current."""
        return contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Memory full of NaN with red zones around it."""
        return self.memory.empty(shape, dtype)

    def pointer(self, array: np.ndarray) -> int:
        """Address of the first element; the array's own bytes become accessible."""
        self.memory.register(array)
        return array.__array_interface__["data"][0]

    def tensor_map(self, pointer: int, layout: Layout) -> bytes:
        """In the emulator's own encoding, within the limits of the driver's."""
        kind, dims, strides, box, swizzle = layout
        return tensor_map(pointer, kind, dims, strides, box, swizzle=swizzle).tobytes()

    def load(self, spec: _compile.Specialization) -> EmulatedKernel:
        """Translate once per process, bind once per device."""
        if spec not in self._kernels:
            self._kernels[spec] = EmulatedKernel(self, spec)
        return self._kernels[spec]
