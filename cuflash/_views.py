"""Arrays as kernels see them: element strides, batch axes merged, copies where memory is too odd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import _params
from cuflash._device import Device
from cuflash._order import axes_by_stride
from cuflash._problem import Problem


@dataclass(frozen=True, slots=True)
class View:
    """Shape and strides of an array as a kernel will see it, after any internal copy."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    copied: bool


def kernel_view(array: Any, has_columns: bool = True) -> View:
    """How a kernel sees `array`: as it is when its columns are contiguous, else as a C-ordered copy."""
    shape, itemsize = tuple(array.shape), array.dtype.itemsize
    columns_ok = not has_columns or shape[-1] <= 1 or array.strides[-1] == itemsize
    if columns_ok and all(s % itemsize == 0 for s in array.strides):
        return View(shape, tuple(s // itemsize for s in array.strides), False)
    return contiguous_view(shape)


def contiguous_view(shape: tuple[int, ...], copied: bool = True) -> View:
    """A C-ordered array of `shape`."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(1, extent)
    return View(shape, tuple(reversed(strides)), copied)


def result_view(view: View) -> View:
    """Where a kernel writes a result of this layout: there, or beside it when columns are not contiguous.

    A result follows its argument's memory order, whichever that is.
    """
    return view if view.shape[-1] <= 1 or view.strides[-1] == 1 else contiguous_view(view.shape)


def batch_strides(view: View, batch: tuple[int, ...], trailing: int) -> list[int]:
    """Strides along the Problem's batch axes; 0 where the array is broadcast."""
    own = view.shape[: len(view.shape) - trailing]
    steps = view.strides[: len(own)]
    return [0 if extent == 1 else step for extent, step in zip(own, steps, strict=True)] or [
        0 for _ in batch
    ]


def merge_axes(
    batch: Sequence[int], strides: Mapping[str, Sequence[int]]
) -> tuple[list[int], dict[str, list[int]]]:
    """Fewest batch axes that give the same addresses in every array.

    Two neighbouring axes are one when every array steps over the outer by the inner's whole length.
    """
    extents: list[int] = []
    merged: dict[str, list[int]] = {name: [] for name in strides}
    for axis, extent in enumerate(batch):
        if extent == 1:
            continue
        steps = {name: s[axis] for name, s in strides.items()}
        if extents and all(merged[name][-1] == steps[name] * extent for name in strides):
            extents[-1] *= extent
            for name in strides:
                merged[name][-1] = steps[name]
        else:
            extents.append(extent)
            for name in strides:
                merged[name].append(steps[name])
    return extents, merged


def pair_view(array: Any, rank: int) -> View:
    """How a kernel sees an array over pairs, which may lack leading axes: (*B, H, Lq, Lk).

    Axes it is broadcast along have extent 1 and stride 0, whether the caller's array has them or not.
    """
    shape = (1,) * (rank - array.ndim) + tuple(array.shape)
    steps = (0,) * (rank - array.ndim) + tuple(s // array.dtype.itemsize for s in array.strides)
    shape = tuple(
        1 if step == 0 and axis < rank - 2 else n
        for axis, (n, step) in enumerate(zip(shape, steps, strict=True))
    )
    strides = tuple(0 if n == 1 else step for n, step in zip(shape, steps, strict=True))
    return View(shape, strides, False)


# The last axes of each array that are not batch axes: (H, L, D), (H, Lq, Lk), (H, L) or (H,).
PAIRS = ("mask", "bias", "dbias")
TRAILING = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv", *PAIRS), 3),
    **dict.fromkeys(("lse", "dlse"), 2),
    **dict.fromkeys(("slope", "dslope"), 1),
}


class Views:
    """The kernel views of a call's arrays with their batch axes merged to at most `max_axes`."""

    def __init__(
        self,
        problem: Problem,
        views: Mapping[str, View],
        max_axes: int = _params.MAX_BATCH_AXES,
    ):
        self._problem, self._max_axes = problem, max_axes
        self.views = dict(views)
        if not self._merge():
            # Too many unmergeable axes for the kernels: C-ordered copies merge into one.
            for name, view in views.items():
                full = problem.batch + view.shape[len(view.shape) - TRAILING[name] :]
                copy = contiguous_view(full)
                if name in PAIRS:
                    # Kernels step along the axes of a pair that a mask or bias is broadcast along.
                    pairs = zip(full, copy.strides, strict=True)
                    strides = tuple(0 if n == 1 else step for n, step in pairs)
                    copy = View(full, strides, True)
                self.views[name] = copy
            self._merge()
        self.copies = any(view.copied for view in self.views.values())

    def _merge(self) -> bool:
        steps = {
            name: batch_strides(view, self._problem.batch, TRAILING[name])
            for name, view in self.views.items()
        }
        self.extents, self.batch = merge_axes(self._problem.batch, steps)
        return len(self.extents) <= self._max_axes

    def fill(self, struct: np.ndarray, name: str) -> None:
        """Write one array's Strides."""
        pad = _params.MAX_BATCH_AXES - len(self.extents)
        view = self.views[name]
        struct["batch"] = [0] * pad + self.batch[name]
        if name in PAIRS:
            struct["head"], struct["row"], struct["key"] = view.strides[-3:]
        elif TRAILING[name] == 3:
            struct["head"], struct["row"] = view.strides[-3:-1]
            if view.shape[-2] == 1:
                # Any number, which need not be one of whole 16-byte pieces; and copies of 16 bytes have
                # their addresses checked for rows past the end too.
                struct["row"] = 0
        elif TRAILING[name] == 2:
            struct["head"], struct["row"] = view.strides[-2:]
        else:
            struct["head"] = view.strides[-1]

    @property
    def batch_extent(self) -> list[int]:
        """Merged extents, slowest first, padded with 1."""
        return [1] * (_params.MAX_BATCH_AXES - len(self.extents)) + self.extents

    def input(self, name: str, array: Any, device: Device) -> Any:
        """The array a kernel reads: itself, or a fresh copy (whose rows are aligned, as flagged)."""
        if array is None or not self.views[name].copied:
            return array
        copy = device.empty(self.views[name].shape, array.dtype)
        copy[...] = array
        return copy


class OrderedEmpty:
    """Allocates a dense result whose axes lie in memory in the order of a reference array's."""

    def __init__(self, shape: tuple[int, ...], reference: Any) -> None:
        order = (
            axes_by_stride(reference) if len(shape) == reference.ndim else list(range(len(shape)))
        )
        self._dense = tuple(shape[axis] for axis in order)
        self._inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
        self._plain = order == list(range(len(order)))
        dense = contiguous_view(self._dense).strides
        self.view = View(shape, tuple(dense[place] for place in self._inverse), False)

    def __call__(self, device: Device, dtype: Any) -> Any:
        dense = device.empty(self._dense, dtype)
        return dense if self._plain else dense.transpose(self._inverse)
