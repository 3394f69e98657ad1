"""What runs on the stream: allocate, fill one params struct, launch a Plan.

A prepared call has everything that does not depend on addresses: the loaded kernels, the packed
struct, which arrays need an internal copy. A warm call then costs an allocation, a few additions of
bytes and the launch itself.

Kernels take any row, head and batch strides, but columns must be contiguous and strides whole
elements; an array that breaks this is copied (inputs) or computed beside and copied back (outputs),
on the same stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuflash import _dtypes, _launch_maps, _params, _plan
from cuflash._device import Device, Kernel
from cuflash._extras import Extra
from cuflash._launch_options import FAR, OptionInputs
from cuflash._launch_parts import PartsMerge
from cuflash._problem import Problem
from cuflash._views import (
    TRAILING,
    OrderedEmpty,
    Views,
    kernel_view,
    result_view,
)

# Of a call without options: the first six.
_PLAIN_POINTERS = 6


def fill_shape(struct: np.ndarray, problem: Problem, views: Views, flags: int) -> None:
    """Write the Shape part of a params struct."""
    lowest, highest = -problem.len_q - 1, problem.len_k + 1
    left, right, offset = problem.left, problem.right, problem.q_offset
    if problem.packed is not None:
        # Each sequence adds what its own lengths shift (FLAG_ALIGN_END), and clamps again.
        lowest, highest = -FAR, FAR
        struct["q_offset"] = max(-FAR, min(FAR, offset))
    elif problem.alibi:
        struct["q_offset"] = offset

    def clamp(bound: int) -> int:
        return max(lowest, min(highest, bound))

    struct["batch_extent"] = views.batch_extent
    struct["batch"] = math.prod(problem.batch)
    struct["heads"], struct["heads_kv"] = problem.heads, problem.heads_kv
    struct["group"] = problem.heads // problem.heads_kv
    struct["len_q"], struct["len_k"] = problem.len_q, problem.len_k
    struct["head_dim"], struct["head_dim_v"] = problem.head_dim, problem.head_dim_v
    struct["band_low"] = lowest if left is None else clamp(offset - left)
    struct["band_high"] = highest if right is None else clamp(offset + right)
    struct["scale"] = problem.scale
    struct["softcap"] = problem.softcap or 0.0
    struct["scale_f64"], struct["softcap_f64"] = problem.scale, problem.softcap or 0.0
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

    kernel: Kernel
    grid: int
    block: int
    shared_memory: int
    pack: _params.Packer


def run(steps: Sequence[Step], pointers: Sequence[int]) -> None:
    """Queue the launches of a Plan, whose params all begin with the same pointers."""
    head = steps[0].pack.head(*pointers)
    for step in steps:
        step.kernel(step.grid, step.block, step.shared_memory, head + step.pack.tail)


def steps_of(
    plan: _plan.Plan,
    device: Device,
    struct: np.ndarray,
    pointers: int,
    *fill: Callable[[np.ndarray, _plan.Launch], None],
) -> list[Step]:
    """Load a Plan's kernels and pack the struct once per launch: they differ in the schedule, and in
    what the functions `fill` write.
    """
    steps = []
    for launch in plan.launches:
        schedule = launch.schedule
        struct["schedule"]["tiles"] = schedule.tiles
        struct["schedule"]["heads_per_section"] = schedule.heads_per_section
        struct["schedule"]["longest_last"] = schedule.longest_last
        struct["schedule"]["splits"] = schedule.splits
        for write in fill:
            write(struct, launch)
        kernel = device.load(launch.spec)
        packer = _params.Packer(struct, pointers)
        steps.append(Step(kernel, launch.grid, launch.block, launch.shared_memory, packer))
    return steps


def result_shape(problem: Problem) -> tuple[int, ...]:
    """Of out, in the order (*B, H, L, Dv); of packed sequences (H, total, Dv)."""
    if problem.packed is not None:
        return problem.heads, problem.packed.total_q, problem.head_dim_v
    return (*problem.batch, problem.heads, problem.len_q, problem.head_dim_v)


def is_empty(problem: Problem) -> bool:
    """Whether no pair of query and key exists, so that nothing is launched."""
    rows: tuple[int, ...] = (problem.len_q, problem.len_k)
    if problem.packed is not None:
        rows += (problem.packed.total_q, problem.packed.total_k)
    return 0 in (*problem.batch, problem.heads, *rows)


def rows_of_sequences(device: Device, problem: Problem, arrays: Mapping[str, Any]) -> Any:
    """Bool (total_q,): which rows of packed sequences lie before the end of the last one."""
    assert problem.packed is not None
    return device.xp.arange(problem.packed.total_q) < arrays["cu_seqlens_q"][-1:]


class PreparedForward:
    """A forward call with everything but the arrays; reusable for arrays of the same metadata."""

    def __init__(
        self,
        device: Device,
        problem: Problem,
        arrays: Mapping[str, Any],
        out: Any | None,
        extra: Extra,
    ) -> None:
        self._device, self._problem = device, problem
        out_shape = result_shape(problem)
        self._lse_shape = out_shape[:-1]
        self._lse_dtype = _dtypes.BY_NAME[problem.dtype].lse
        self._new_out = OrderedEmpty(out_shape, arrays["q"])
        self._empty = is_empty(problem)
        self.is_simple = False  # nothing of the arrays matters but their addresses
        if self._empty:
            return
        plan = _plan.plan(problem, device)  # first, as it refuses what the struct cannot hold
        slopes = arrays.get("alibi_slopes")
        given = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"], "out": out, "slope": slopes}
        given = {name: array for name, array in given.items() if array is not None}
        found = {name: kernel_view(a, TRAILING[name] == 3) for name, a in given.items()}
        if out is None:
            found["out"] = result_view(self._new_out.view)
        self._options = OptionInputs(device, problem, arrays, extra)
        max_axes = _launch_maps.most_batch_axes(plan)
        self._views = Views(problem, found | self._options.found, max_axes)
        addresses = {name: device.pointer(array) for name, array in given.items()}
        flags = vector_flags(self._views, arrays["q"].dtype.itemsize, addresses)
        flags |= self._options.flags
        if slopes is not None and slopes.dtype != _dtypes.FLOAT32:
            flags |= _params.FLAG_SLOPES_ELEMENT
        struct = np.zeros((), _params.FORWARD)
        for name in found:
            self._views.fill(struct[f"{name}_strides"], name)
        fill_shape(struct["shape"], problem, self._views, flags)
        self._parts = PartsMerge(device, problem, plan, self._views) if plan.scratch else None
        self._options.bind(struct, self._views, plan, extra)
        self._has_options = problem.has_options
        self.is_simple = not (self._has_options or self._views.copies)
        count = len(_params.FORWARD_POINTERS) if self._has_options else _PLAIN_POINTERS
        # Where keys are shared out, the last launch is the merge of the parts.
        walks = replace(plan, launches=plan.launches[:1])
        self._steps = steps_of(walks, device, struct, count, self._options.fill_launch)
        spec = plan.launches[0].spec
        if spec.kernel == "forward_sm90":
            (step,) = self._steps
            kernel = _launch_maps.mapped_forward(device, step.kernel, problem, self._views, spec)
            self._steps = [replace(step, kernel=kernel)]

    def _walk(self, pointers: Sequence[int]) -> None:
        run(self._steps, pointers)

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        slopes: Any | None,
        out: Any | None,
        arrays: Mapping[str, Any] | None,
        extra: Extra,
    ) -> tuple[Any, Any]:
        """Run on the current stream; returns (out, lse). `arrays`: those of the options, if any."""
        device = self._device
        with device.activate():
            if out is None:
                out = self._new_out(device, q.dtype)
            lse = device.empty(self._lse_shape, self._lse_dtype)
            if self._empty or self._problem.packed is not None:
                # Of packed sequences, rows past the last one keep this.
                out[...] = 0
                lse[...] = -np.inf
            if self._empty:
                if arrays is not None and arrays["sinks"] is not None:
                    lse[...] = arrays["sinks"][:, None]
                    if self._problem.packed is not None:
                        inside = rows_of_sequences(device, self._problem, arrays)
                        lse[...] = device.xp.where(inside, lse, -np.inf)
                return out, lse
            target = out
            if self._views.copies:
                views = self._views
                q, k, v = (views.input(n, a, device) for n, a in (("q", q), ("k", k), ("v", v)))
                if slopes is not None:
                    slopes = views.input("slope", slopes, device)
                if views.views["out"].copied:
                    target = device.empty(views.views["out"].shape, out.dtype)
                    if self._problem.packed is not None:
                        target[...] = 0
            at = device.pointer
            slope_at = 0 if slopes is None else at(slopes)
            pointers: tuple[int, ...] = (at(q), at(k), at(v), at(target), at(lse), slope_at)
            held: list[Any] = []  # copies and maps, alive until the launch is queued
            if self._has_options and arrays is not None:
                pointers = (*pointers, *self._options.pointers(arrays, extra, held))
            if self._parts is None:
                run(self._steps, pointers)
            else:
                self._parts(self._walk, pointers)
            if target is not out:
                out[...] = target
            return out, lse
