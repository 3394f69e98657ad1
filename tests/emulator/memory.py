"""The emulator's "device memory": ordinary NumPy arrays, of which it knows every live byte.

A global access outside all of them is an error, so an overrun of a single element is caught at the instruction.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

# Bytes of nobody around every allocation: a kernel that runs past its end meets them before it meets a neighbour.
RED_ZONE = 512


def byte_range(array: np.ndarray) -> tuple[int, int]:
    """First byte and end of the memory that an array's elements span (strides may be negative or zero)."""
    low = high = array.__array_interface__["data"][0]
    if array.size == 0:
        return low, low
    for n, stride in zip(array.shape, array.strides, strict=True):
        low += min(0, (n - 1) * stride)
        high += max(0, (n - 1) * stride)
    return low, high + array.itemsize


class Memory:
    """The live allocations of an emulated device."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[int, int, int], tuple[int, int, bool]] = {}

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        """A new array filled with 0xFF bytes (NaN for floats), with red zones on both sides.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : data type

        Returns
        -------
        ndarray
            Aligned to 256 bytes, as cudaMalloc aligns. It stays registered while it, or a view of it, is alive.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.full(size + 2 * RED_ZONE + 256, 0xFF, np.uint8)
        start = -(-(raw.ctypes.data + RED_ZONE) // 256) * 256 - raw.ctypes.data
        array = raw[start : start + size].view(dtype).reshape(shape)
        self._add(raw.ctypes.data + start, raw.ctypes.data + start + size, False, raw)
        return array

    def register(self, array: np.ndarray, *, read_only: bool = False) -> np.ndarray:
        """Make the bytes that `array` spans accessible to kernels, until the array is garbage collected.

        Parameters
        ----------
        array : ndarray
            Any strides. Nothing is copied.
        read_only : bool
            A kernel that writes to it fails with OutOfBounds.

        Returns
        -------
        ndarray
            `array` itself.
        """
        low, high = byte_range(array)
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self._add(low, high, read_only, owner)
        return array

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A registered C-contiguous copy of a NumPy array in new device memory."""
        out = self.empty(array.shape, array.dtype)
        out[...] = array
        return out

    def _add(self, low: int, high: int, read_only: bool, owner: np.ndarray) -> None:
        if low == high:
            return
        key = (low, high, id(owner))
        if key not in self._ranges:
            weakref.finalize(owner, self._ranges.pop, key, None)
        self._ranges[key] = (low, high, read_only)

    def table(self, extra: list[tuple[int, int, bool]]) -> np.ndarray:
        """Sorted, disjoint ranges as rows (first byte, end, read-only), for the runtime.

        Overlapping ranges (views of one array) are merged; they are writable where any of them is.
        """
        merged: list[list[int]] = []
        for low, high, read_only in sorted([*self._ranges.values(), *extra]):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
                merged[-1][2] = int(merged[-1][2] and read_only)
            else:
                merged.append([low, high, int(read_only)])
        return np.array(merged, np.uint64).reshape(-1, 3)
