"""CuPy's binding of NVRTC, of CuPy's own CUDA generation.

Where NVRTC wheels of two generations are installed (PyTorch brings one, `cuda12` another), CuPy
loads the newer. A driver that serves CuPy's generation may refuse cubins of the newer one, so the
matching library is loaded first; CuPy then finds it in the process and takes it. (When something
else has loaded the newer one already, the driver evidently serves it, and CuPy takes that.)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

# CUDA generation -> the distribution that carries its NVRTC.
_WHEELS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}


@functools.cache
def binding() -> Any:
    """The module `cupy.cuda.nvrtc`; raises ImportError without CuPy."""
    import cupy

    generation = cupy.cuda.driver.get_build_version() // 1000
    if sys.platform == "linux" and generation in _WHEELS:
        _preload(_WHEELS[generation], f"libnvrtc.so.{generation}")
    from cupy.cuda import nvrtc

    nvrtc.getVersion()  # CuPy chooses at its first call; from here on the choice is made
    return nvrtc


def _preload(distribution: str, library: str) -> None:
    """Load a wheel's library if that wheel is installed; otherwise CuPy finds its own."""
    from importlib import metadata

    try:
        files = metadata.files(distribution) or ()
    except metadata.PackageNotFoundError:
        return
    for file in files:
        path = Path(str(file.locate()))
        if file.name == library and path.exists():
            ctypes.CDLL(str(path))
            preload_builtins(path.parent)
            return


def preload_builtins(folder: Path) -> None:
    """Load what NVRTC looks up by name when it compiles: wheels of 13.0 do not say that it lies beside them."""
    for path in folder.glob("libnvrtc-builtins.so.*"):
        with contextlib.suppress(OSError):  # NVRTC may still find another one
            ctypes.CDLL(str(path))
