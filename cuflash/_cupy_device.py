"""The device seam on a real GPU, through CuPy.

CuPy owns memory, streams and modules; cuflash brings cubins. CuPy is imported when the first CUDA
array arrives, never before.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver
from cupy.cuda.function import Module

from cuflash import _compile, _nvrtc, _tensor_maps
from cuflash._device import Limits
from cuflash._errors import UnsupportedError

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAX_DYNAMIC_SHARED_MEMORY = 8
_DEFAULT_SHARED_MEMORY = 48 * 1024


class CupyKernel:
    """One loaded function; a call launches it on CuPy's current stream."""

    __slots__ = ("_function", "_type")

    def __init__(self, function: Any, params_bytes: int, shared_memory: int) -> None:
        self._function = function
        # A one-element array of a void type is passed to the kernel by value.
        self._type = np.dtype((np.void, params_bytes))
        if shared_memory > _DEFAULT_SHARED_MEMORY:
            # More than 48 KiB must be asked for, per function and per device.
            driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED_MEMORY, shared_memory)

    def __call__(self, grid: int, block: int, shared_memory: int, params: bytes) -> None:
        """Launch; see `cuflash._device.Kernel`."""
        self._function((grid,), (block,), (np.frombuffer(params, self._type),), shared_memory)


class CupyDevice:
    """One CUDA device as cuflash sees it; see `cuflash._device.Device`."""

    xp = cupy

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.key = ("cuda", ordinal)
        properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
        self.name = properties["name"].decode()
        self.arch = architecture(int(properties["major"]), int(properties["minor"]))
        self.limits = Limits(
            sm_count=int(properties["multiProcessorCount"]),
            shared_memory=int(properties["sharedMemPerBlockOptin"]),
            l2_bytes=int(properties["l2CacheSize"]),
        )
        self._kernels: dict[_compile.Specialization, CupyKernel] = {}

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Current device for the length of a block (nothing to do when it is already)."""
        if cupy.cuda.runtime.getDevice() == self.ordinal:
            return contextlib.nullcontext()
        return cupy.cuda.Device(self.ordinal)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Uninitialised array from CuPy's pool."""
        return cupy.empty(shape, dtype)

    def pointer(self, array: Any) -> int:
        """Device address of the first element."""
        return array.data.ptr

    def tensor_map(self, pointer: int, layout: _tensor_maps.Layout) -> bytes:
        """By the driver, or from the cache."""
        try:
            return _tensor_maps.encoded(pointer, layout)
        except _tensor_maps.NoContextError:
            # A thread's first call, whose memory came from the pool: nothing has bound the device's
            # context to the thread yet, as CuPy does at a launch.
            cupy.cuda.runtime.free(0)
            return _tensor_maps.encoded(pointer, layout)

    def load(self, spec: _compile.Specialization) -> CupyKernel:
        """Build and load once per device."""
        kernel = self._kernels.get(spec)
        if kernel is None:
            from cuflash._params import STRUCTS

            cubin = _compile.build(spec)
            with self.activate():
                module = Module()
                module.load(cubin)
                function = module.get_function(spec.name)
                itemsize = STRUCTS[_compile.PARAMS[spec.kernel]].itemsize
                shared = dict(spec.constants).get("SHARED_BYTES", 0)
                kernel = CupyKernel(function, itemsize, shared)
            kernel = self._kernels.setdefault(spec, kernel)
        return kernel


def architecture(major: int, minor: int) -> str:
    """The newest architecture this NVRTC can compile for that a device of `major.minor` runs.

    A cubin runs on every later minor of its major, so an unknown minor takes the nearest older one.
    9.0 gets the architecture-specific "sm_90a".
    """
    if major * 10 + minor == 90:
        return "sm_90a"
    nvrtc = _nvrtc.binding()
    known = [int(a) for a in nvrtc.getSupportedArchs()]
    usable = [a for a in known if a // 10 == major and a % 10 <= minor]
    if not usable:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise UnsupportedError(
            f"this GPU has compute capability {major}.{minor}, and NVRTC {version} compiles for {known}.\n"
            "  Way out: a newer nvidia-cuda-nvrtc wheel, or NumPy arrays (CPU backend)."
        )
    return f"sm_{max(usable)}"


@functools.cache
def device(ordinal: int) -> CupyDevice:
    """The one CupyDevice of a CUDA device."""
    return CupyDevice(ordinal)


def device_of(array: Any) -> CupyDevice:
    """The device that holds a CuPy array."""
    return device(array.data.device_id)
