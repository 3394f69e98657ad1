"""Compiles C++ with g++ and keeps the results by hash, so a kernel is built once per change and machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
_FLAGS = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-w"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-march=x86-64-v3")  # F16C and FMA in hardware
# Registers that a kernel never wrote hold a pattern, not zero and not luck.
_KERNEL_FLAGS = ["-ftrivial-auto-var-init=pattern"]


class BuildError(RuntimeError):
    """g++ failed: a mistake of the emulator itself, never of a kernel."""


def cache_directory() -> Path:
    """Where compiled emulator code is kept ($CUFLASH_EMU_CACHE or ~/.cache/cuflash-emulator)."""
    path = Path(os.environ.get("CUFLASH_EMU_CACHE") or Path.home() / ".cache" / "cuflash-emulator")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _digest(*parts: str) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode())
        h.update(b"\0")
    return h.hexdigest()[:24]


def _compile(arguments: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        out = Path(folder) / target.name
        run = subprocess.run(["g++", *arguments, "-o", str(out)], capture_output=True, text=True)
        if run.returncode:
            raise BuildError(run.stderr[:4000])
        os.replace(out, target)  # atomic: several test processes may build the same thing


@cache
def runtime_text() -> str:
    """All runtime sources, for hashing."""
    return "\0".join(p.name + p.read_text() for p in sorted(RUNTIME.glob("*.[ch]*")))


def _headers() -> str:
    return "\0".join(p.name + p.read_text() for p in sorted(RUNTIME.glob("*.h")))


def _object(source: Path) -> Path:
    """One compiled file of the runtime: a change of one file must not cost the compilation of all."""
    path = cache_directory() / f"{source.stem}_{_digest(source.read_text(), _headers(), *_FLAGS)}.o"
    if not path.exists():
        _compile([*_FLAGS, "-O2", "-frounding-math", "-c", str(source)], path)
    return path


@cache
def runtime() -> tuple[ctypes.CDLL, Path]:
    """The runtime library: built when its sources changed, loaded once, its symbols visible to kernels."""
    path = cache_directory() / f"libcuflash_emu_{_digest(runtime_text(), *_FLAGS)}.so"
    if not path.exists():
        _compile(["-shared", *(str(_object(p)) for p in sorted(RUNTIME.glob("*.cpp")))], path)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL), path


def optimisation(source: str) -> str:
    """Compiler option by size: generated code is a small part of the running time, so compilation decides."""
    return "-Og" if source.count("\n") < 20000 else "-O0"


def kernel_library(source: str) -> ctypes.CDLL:
    """Compile and load the C++ of a module."""
    level = optimisation(source)
    path = (
        cache_directory()
        / f"kernel_{_digest(source, _headers(), level, *_FLAGS, *_KERNEL_FLAGS)}.so"
    )
    runtime()
    if not path.exists():
        source_path = path.with_suffix(".cpp")
        source_path.write_text(source)
        _compile(
            [*_FLAGS, *_KERNEL_FLAGS, level, "-shared", f"-I{RUNTIME}", str(source_path)], path
        )
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
