"""Results whose memory order follows an argument's, for NumPy and CuPy alike.

A caller who hands in a transposed view of a (B, L, H, D) buffer transposes the result back;
allocated in the order of the argument, that last transpose is free and contiguous. `empty_like`
does this in both libraries, but they treat broadcast (stride 0) axes differently, so the rule is
written out here once.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def axes_by_stride(reference: Any) -> list[int]:
    """Axes of `reference` from the slowest in memory to the fastest.

    Axes of extent 1 or stride 0 say nothing about the order and keep their place beside their
    neighbours.
    """
    order: list[int] = []
    for axis in range(reference.ndim):
        place = len(order)
        for other in range(len(order) - 1, -1, -1):
            stride, other_stride = (
                abs(reference.strides[axis]),
                abs(reference.strides[order[other]]),
            )
            ambiguous = (
                stride == 0
                or other_stride == 0
                or reference.shape[axis] <= 1
                or reference.shape[order[other]] <= 1
            )
            if ambiguous:
                continue
            if stride <= other_stride:
                break
            place = other
        order.insert(place, axis)
    return order


def empty_like_order(shape: tuple[int, ...], dtype: Any, reference: Any, xp: Any = np) -> Any:
    """Uninitialised dense array of `shape` whose axes lie in memory in the order of `reference`'s.

    Parameters
    ----------
    shape
        Shape of the result; as many axes as `reference`.
    dtype
        Its dtype.
    reference
        Array (anything with `shape`, `strides`, `ndim`) whose axis order is followed.
    xp
        The array module that allocates: `numpy` or `cupy`.
    """
    if len(shape) != reference.ndim:
        return xp.empty(shape, dtype=dtype)
    order = axes_by_stride(reference)
    dense = xp.empty(tuple(shape[axis] for axis in order), dtype=dtype)
    return dense.transpose(tuple(int(a) for a in np.argsort(order)))
