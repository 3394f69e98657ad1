"""What runs on the stream: allocate, fill one params struct, launch a Plan.

A prepared call has everything that does not depend on addresses: the loaded kernels, the packed
struct, which arrays need an internal copy. A warm call then costs an allocation, a few additions of
bytes and the launch itself.

Kernels take any row, head and batch strides, but columns must be contiguous and strides whole
elements; an array that breaks this is copied (inputs) or computed beside and copied back (outputs),
on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import _dtypes, _params, _plan
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


# The last axes of each array that are not batch axes: (H, L, D), (H, L) or (H,).
TRAILING = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), 3),
    **dict.fromkeys(("lse", "dlse"), 2),
    **dict.fromkeys(("slope", "dslope"), 1),
}


class Views:
    """The kernel views of a call's arrays with their batch axes merged to at most four."""

    def __init__(self, problem: Problem, views: Mapping[str, View]):
        self._problem = problem
        self.views = dict(views)
        if not self._merge():
            # Too many unmergeable axes for the params struct: C-ordered copies merge into one.
            for name, view in views.items():
                full = problem.batch + view.shape[len(view.shape) - TRAILING[name] :]
                self.views[name] = contiguous_view(full)
            self._merge()
        self.copies = any(view.copied for view in self.views.values())

    def _merge(self) -> bool:
        steps = {
            name: batch_strides(view, self._problem.batch, TRAILING[name])
            for name, view in self.views.items()
        }
        self.extents, self.batch = merge_axes(self._problem.batch, steps)
        return len(self.extents) <= _params.MAX_BATCH_AXES

    def fill(self, struct: np.ndarray, name: str) -> None:
        """Write one array's Strides."""
        pad = _params.MAX_BATCH_AXES - len(self.extents)
        view = self.views[name]
        struct["batch"] = [0] * pad + self.batch[name]
        if TRAILING[name] == 3:
            struct["head"], struct["row"] = view.strides[-3:-1]
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


def fill_shape(struct: np.ndarray, problem: Problem, views: Views, flags: int) -> None:
    """Write the Shape part of a params struct."""
    lowest, highest = -problem.len_q - 1, problem.len_k + 1

    def clamp(bound: int) -> int:
        return max(lowest, min(highest, bound))

    struct["batch_extent"] = views.batch_extent
    struct["batch"] = int(np.prod(problem.batch, dtype=np.int64))
    struct["heads"], struct["heads_kv"] = problem.heads, problem.heads_kv
    struct["group"] = problem.heads // problem.heads_kv
    struct["len_q"], struct["len_k"] = problem.len_q, problem.len_k
    struct["head_dim"], struct["head_dim_v"] = problem.head_dim, problem.head_dim_v
    left, right, offset = problem.left, problem.right, problem.q_offset
    struct["band_low"] = lowest if left is None else clamp(offset - left)
    struct["band_high"] = highest if right is None else clamp(offset + right)
    struct["q_offset"] = offset if problem.alibi else 0
    struct["scale"] = problem.scale
    struct["softcap"] = problem.softcap or 0.0
    struct["flags"] = flags


def vector_flags(views: Views, itemsize: int, addresses: Mapping[str, int]) -> int:
    """FLAG_*_VECTOR of every array whose rows are whole 16-byte pieces on 16-byte boundaries."""
    flags = 0
    for name, bit in _params.VECTOR_FLAGS.items():
        view = views.views.get(name)
        if view is None:
            continue
        steps = (step for step, n in zip(view.strides[:-1], view.shape[:-1], strict=True) if n > 1)
        # What is still to be allocated starts on a boundary.
        aligned_base = view.copied or addresses.get(name, 0) % 16 == 0
        whole = view.shape[-1] * itemsize % 16 == 0
        if whole and aligned_base and all(step * itemsize % 16 == 0 for step in steps):
            flags |= bit
    return flags


@dataclass(frozen=True, slots=True)
class Step:
    """One launch, ready but for its pointers."""

    kernel: Callable[[int, int, int, bytes], None]
    grid: int
    block: int
    shared_memory: int
    pack: _params.Packer

    def __call__(self, pointers: Sequence[int]) -> None:
        self.kernel(self.grid, self.block, self.shared_memory, self.pack(*pointers))


def steps_of(plan: _plan.Plan, device: Device, struct: np.ndarray, pointers: int) -> list[Step]:
    """Load a Plan's kernels and pack the struct once per launch (they differ in the schedule)."""
    steps = []
    for launch in plan.launches:
        schedule = launch.schedule
        struct["schedule"]["tiles"] = schedule.tiles
        struct["schedule"]["heads_per_section"] = schedule.heads_per_section
        struct["schedule"]["longest_last"] = schedule.longest_last
        kernel = device.load(launch.spec)
        packer = _params.Packer(struct, pointers)
        steps.append(Step(kernel, launch.grid, launch.block, launch.shared_memory, packer))
    return steps


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


class PreparedForward:
    """A forward call with everything but the arrays; reusable for arrays of the same metadata."""

    def __init__(
        self, device: Device, problem: Problem, arrays: Mapping[str, Any], out: Any | None
    ) -> None:
        self._device, self._problem = device, problem
        self._out_shape = (*problem.batch, problem.heads, problem.len_q, problem.head_dim_v)
        self._lse_shape = self._out_shape[:-1]
        self._lse_dtype = _dtypes.BY_NAME[problem.dtype].lse
        self._new_out = OrderedEmpty(self._out_shape, arrays["q"])
        self._empty = 0 in self._lse_shape or problem.len_k == 0
        if self._empty:
            return
        slopes = arrays.get("alibi_slopes")
        given = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"], "out": out, "slope": slopes}
        given = {name: array for name, array in given.items() if array is not None}
        found = {name: kernel_view(a, TRAILING[name] == 3) for name, a in given.items()}
        if out is None:
            found["out"] = result_view(self._new_out.view)
        self._views = Views(problem, found)
        addresses = {name: device.pointer(array) for name, array in given.items()}
        flags = vector_flags(self._views, arrays["q"].dtype.itemsize, addresses)
        if slopes is not None and slopes.dtype.itemsize == 2:
            flags |= _params.FLAG_SLOPES_16BIT
        struct = np.zeros((), _params.FORWARD)
        for name in found:
            self._views.fill(struct[f"{name}_strides"], name)
        fill_shape(struct["shape"], problem, self._views, flags)
        plan = _plan.plan(problem, device)
        (self._step,) = steps_of(plan, device, struct, len(_params.FORWARD_POINTERS))

    def __call__(
        self, q: Any, k: Any, v: Any, slopes: Any | None, out: Any | None
    ) -> tuple[Any, Any]:
        """Run on the current stream; returns (out, lse)."""
        device = self._device
        with device.activate():
            if out is None:
                out = self._new_out(device, q.dtype)
            lse = device.empty(self._lse_shape, self._lse_dtype)
            if self._empty:
                out[...] = 0
                lse[...] = -np.inf
                return out, lse
            target = out
            if self._views.copies:
                views = self._views
                q, k, v = (views.input(n, a, device) for n, a in (("q", q), ("k", k), ("v", v)))
                if slopes is not None:
                    slopes = views.input("slope", slopes, device)
                if views.views["out"].copied:
                    target = device.empty(views.views["out"].shape, out.dtype)
            at = device.pointer
            slope_at = 0 if slopes is None else at(slopes)
            self._step((at(q), at(k), at(v), at(target), at(lse), slope_at))
            if target is not out:
                out[...] = target
            return out, lse
