"""Tensor maps: what the copy engine of Hopper (TMA) must know of an array, encoded by the driver.

A map holds an address, extents, strides, the box that one instruction moves and how the box lies in
shared memory. Encoding is a host function without side effects, about a microsecond; a call that
repeats finds its maps in a cache. The key of the cache is everything a map holds, so an address that
the memory pool has given to another array finds the right map or none.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, NamedTuple

BYTES = 128
# Kernels declare maps at multiples of this (params.cuh), as the driver of CUDA 12 does; that of CUDA 13 says 128.
ALIGNMENT = 64
_DRIVER_ALIGNMENT = 128
RANK = 5  # the largest

# CUtensorMapDataType
TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}
# CUtensorMapSwizzle, by its span in bytes
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_NOT_INTERLEAVED = 0
_PROMOTE_TO_256_BYTES = 3  # CUtensorMapL2promotion: lines fetched together into the L2 cache
_FILL_WITH_ZEROS = 0
_INVALID_CONTEXT = 201  # CUresult


class NoContextError(RuntimeError):
    """The calling thread has no CUDA context yet."""


class Layout(NamedTuple):
    """Everything in a tensor map but the address. Axes are innermost first.

    Parameters
    ----------
    kind : {"float16", "bfloat16", "float32"}
    dims : tuple of int
        Extents in elements.
    strides : tuple of int
        Byte strides of every axis but the innermost, which is contiguous; multiples of 16.
    box : tuple of int
        Extents of the box that one instruction moves, at most 256 each.
    swizzle : {0, 32, 64, 128}
        Span in bytes; no smaller than a row of the box.
    """

    kind: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 128


@functools.cache
def _driver_function() -> Any:
    """cuTensorMapEncodeTiled of the driver that CuPy has loaded."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    function = ctypes.CDLL(name).cuTensorMapEncodeTiled
    numbers = ctypes.POINTER(ctypes.c_uint64)
    words = ctypes.POINTER(ctypes.c_uint32)
    function.restype = ctypes.c_int
    function.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
        *(numbers, numbers, words, words),
        *[ctypes.c_int] * 4,
    ]
    return function


@functools.lru_cache(maxsize=4096)
def encoded(pointer: int, layout: Layout) -> bytes:
    """The 128 bytes of a tensor map.

    Raises
    ------
    NoContextError
        The thread has no CUDA context.
    RuntimeError
        The driver refused; planning should have known.

    Examples
    --------
    >>> layout = Layout("float16", (64, 1000), (128,), (64, 128))
    >>> len(encoded(0x7F0000000000, layout))  # doctest: +SKIP
    128
    """
    rank = len(layout.dims)
    space = (ctypes.c_uint8 * (BYTES + _DRIVER_ALIGNMENT))()
    address = -(-ctypes.addressof(space) // _DRIVER_ALIGNMENT) * _DRIVER_ALIGNMENT
    status = _driver_function()(
        address,
        TYPES[layout.kind],
        rank,
        pointer,
        (ctypes.c_uint64 * rank)(*layout.dims),
        (ctypes.c_uint64 * max(1, rank - 1))(*layout.strides),
        (ctypes.c_uint32 * rank)(*layout.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),  # every element: no steps inside a box
        _NOT_INTERLEAVED,
        SWIZZLES[layout.swizzle],
        _PROMOTE_TO_256_BYTES,
        _FILL_WITH_ZEROS,
    )
    if status:
        error = NoContextError if status == _INVALID_CONTEXT else RuntimeError
        raise error(
            f"cuTensorMapEncodeTiled returned {status} for an array at {pointer:#x}, {layout}"
        )
    return ctypes.string_at(address, BYTES)
