"""The end of a forward whose keys were shared out: workspace for the parts, and their merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cuflash import _params
from cuflash._device import Device
from cuflash._plan_values import Plan
from cuflash._problem import Problem
from cuflash._views import Views

# Places of out and lse among the pointers of a forward launch.
OUT, LSE = 3, 4


class PartsMerge:
    """Workspace and merge launch of one kind of call, ready but for addresses."""

    def __init__(self, device: Device, problem: Problem, plan: Plan, views: Views) -> None:
        self._device = device
        self._launch = plan.launches[1]
        self._kernel = device.load(self._launch.spec)
        self._dtype = np.dtype(plan.scratch[0].dtype)
        self._parts, rows, columns = plan.scratch[0].shape
        self._row_bytes = self._dtype.itemsize * rows
        self._part_bytes = self._row_bytes * columns
        self._size = self._parts * rows * (columns + 1)
        struct = np.zeros((), _params.MERGE)
        struct["rows"], struct["parts"], struct["head_dim_v"] = rows, self._parts, columns
        views.fill(struct["out_strides"], "out")
        struct["batch_extent"] = views.batch_extent
        struct["heads"], struct["len_q"] = problem.heads, problem.len_q
        struct["outs_are_float"] = True
        self._pack = _params.Packer(struct, 2 * _params.MERGE_MAX_PARTS + 2)

    def __call__(self, first: Callable[[Sequence[int]], None], pointers: Sequence[int]) -> None:
        """Queue `first`, which writes parts, and their merge into the call's own out and lse."""
        count, part, row = self._parts, self._part_bytes, self._row_bytes
        # Alive until both are queued; then the pool hands it out again in the order of the stream.
        workspace = self._device.empty((self._size,), self._dtype)
        out_at = self._device.pointer(workspace)
        lse_at = out_at + count * part
        first((*pointers[:OUT], out_at, lse_at, *pointers[LSE + 1 :]))
        unused = (0,) * (_params.MERGE_MAX_PARTS - count)
        outs = (*range(out_at, lse_at, part), *unused)
        lses = (*range(lse_at, lse_at + count * row, row), *unused)
        params = self._pack(*outs, *lses, pointers[OUT], pointers[LSE])
        self._kernel(self._launch.grid, self._launch.block, 0, params)
