"""The end of a forward whose keys were shared out: workspace for the parts, and their merge."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from cuflash import _params
from cuflash._device import Device
from cuflash._plan_values import Plan
from cuflash._problem import Problem
from cuflash._views import Views

# Places of out and lse among the pointers of a forward launch.
OUT, LSE = 3, 4
_RESULTS = struct.Struct("<2Q")


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
        values = np.zeros((), _params.MERGE)
        values["rows"], values["parts"], values["head_dim_v"] = rows, self._parts, columns
        views.fill(values["out_strides"], "out")
        values["batch_extent"] = views.batch_extent
        values["heads"], values["len_q"] = problem.heads, problem.len_q
        values["outs_are_float"] = True
        most = _params.MERGE_MAX_PARTS
        self._tail = _params.Packer(values, 2 * most + 2).tail
        # Addresses of the parts' out and lse in the workspace; those of parts there are not, nobody reads.
        part = np.arange(most, dtype=np.uint64)
        self._lse_at = self._parts * self._part_bytes
        lses = np.uint64(self._lse_at) + part * np.uint64(self._row_bytes)
        self._places = np.concatenate([part * np.uint64(self._part_bytes), lses])

    def __call__(self, first: Callable[[Sequence[int]], None], pointers: Sequence[int]) -> None:
        """Queue `first`, which writes parts, and their merge into the call's own out and lse."""
        # Alive until both are queued; then the pool hands it out again in the order of the stream.
        workspace = self._device.empty((self._size,), self._dtype)
        at = self._device.pointer(workspace)
        first((*pointers[:OUT], at, at + self._lse_at, *pointers[LSE + 1 :]))
        results = _RESULTS.pack(pointers[OUT], pointers[LSE])
        params = (self._places + at).tobytes() + results + self._tail
        self._kernel(self._launch.grid, self._launch.block, 0, params)
