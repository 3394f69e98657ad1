"""Calls NVRTC from its wheel, without CuPy or a GPU: tests compile exactly what users' machines do."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from cuflash._nvrtc import preload_builtins

KERNELS = Path(__file__).resolve().parents[2] / "kernels_cu"
# -lineinfo gives the emulator CUDA line numbers. No -ftz and no fast-math: those would change results.
OPTIONS = ("-std=c++17", "-lineinfo", f"-I{KERNELS}")


class CompileError(RuntimeError):
    """NVRTC refused a source; the message is its log."""


def find_library(major: int) -> Path:
    """Path of the wheel's libnvrtc of a major CUDA version.

    Raises
    ------
    FileNotFoundError
        No NVRTC wheel of that version is installed.
    """
    for folder in map(Path, sys.path):
        for pattern in (
            f"nvidia/cuda_nvrtc/lib/libnvrtc.so.{major}",
            f"nvidia/cu{major}/lib/libnvrtc.so.{major}",
        ):
            if (folder / pattern).exists():
                return folder / pattern
    raise FileNotFoundError(
        f"NVRTC {major} is not installed (pip install nvidia-cuda-nvrtc-cu{major})"
    )


class Nvrtc:
    """One NVRTC library.

    Parameters
    ----------
    major : int
        CUDA major version, 12 or 13.

    Attributes
    ----------
    version : tuple of int
    log : str
        Compiler log of the last compilation.
    """

    def __init__(self, major: int = 12) -> None:
        path = find_library(major)
        self._lib = ctypes.CDLL(str(path))
        preload_builtins(path.parent)
        for name in ("nvrtcGetErrorString",):
            getattr(self._lib, name).restype = ctypes.c_char_p
        numbers = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(numbers[0]), ctypes.byref(numbers[1])))
        self.version = (numbers[0].value, numbers[1].value)
        self.log = ""

    def ptx(
        self,
        source: str,
        arch: str = "compute_80",
        options: tuple[str, ...] = (),
        name: str = "kernel.cu",
    ) -> str:
        """PTX of a CUDA source."""
        return self._compile(source, arch, options, name, "PTX").rstrip(b"\0").decode()

    def cubin(
        self,
        source: str,
        arch: str = "sm_80",
        options: tuple[str, ...] = (),
        name: str = "kernel.cu",
    ) -> bytes:
        """Cubin of a CUDA source: runs ptxas, which checks what the PTX front end does not."""
        return self._compile(source, arch, options, name, "CUBIN")

    def _check(self, code: int) -> None:
        if code:
            raise CompileError(self._lib.nvrtcGetErrorString(code).decode())

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _compile(
        self, source: str, arch: str, options: tuple[str, ...], name: str, what: str
    ) -> bytes:
        program = ctypes.c_void_p()
        self._check(
            self._lib.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), 0, None, None
            )
        )
        try:
            # The caller's -I comes first: the sources of another tree must not be mixed with ours.
            arguments = [o.encode() for o in (f"-arch={arch}", *options, *OPTIONS)]
            array = (ctypes.c_char_p * len(arguments))(*arguments)
            code = self._lib.nvrtcCompileProgram(program, len(arguments), array)
            self.log = self._get(program, "ProgramLog").rstrip(b"\0").decode()
            if code:
                raise CompileError(self.log)
            return self._get(program, what)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))
