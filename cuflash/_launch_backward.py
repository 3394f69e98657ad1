"""Backward on the stream: workspaces, gradient buffers, the launches of a backward Plan.

A gradient has the shape and memory order of its argument. Kernels write straight into it unless its
columns are not contiguous (then into a buffer that is copied back) or its argument was broadcast
along a batch axis (then into one gradient per batch element, which are summed in float32, in a
fixed order). Gradients of a bias, of sinks and of score parameters come as partial sums that do not
depend on the order of blocks; see `_launch_gradients.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cuflash import _dtypes, _launch_maps, _params, _plan
from cuflash._device import Device
from cuflash._extras import Extra
from cuflash._launch import fill_shape, is_empty, run, steps_of, vector_flags
from cuflash._launch_gradients import OptionGradients
from cuflash._launch_options import OptionInputs
from cuflash._problem import Problem
from cuflash._views import (
    TRAILING,
    OrderedEmpty,
    View,
    Views,
    contiguous_view,
    kernel_view,
    result_view,
)

# The argument and the name of its gradient's view.
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "alibi_slopes": "dslope"}
# In the order of the params struct: inputs, gradients, workspace.
INPUTS = ("q", "k", "v", "out", "dout", "lse", "dlse", "alibi_slopes")
WORKSPACE = ("lse_log2", "delta", "dq_accum", "slope_partial", "dq_turns")
PLAIN_POINTERS = len(INPUTS) + len(GRADIENTS) + len(WORKSPACE)
# Workspaces are parts of one allocation, each on its own line of the cache.
ALIGNMENT = 256
# Places of the arguments and of the gradient buffers in `_prepare.BACKWARD_ARRAYS`.
_ARGUMENTS = {"q": 1, "k": 2, "v": 3, "alibi_slopes": 9}
_BUFFERS = {"q": 12, "k": 13, "v": 14}


class Target:
    """Where a kernel writes one gradient, and how that becomes the user's array."""

    def __init__(self, problem: Problem, argument: Any, given: Any | None, name: str) -> None:
        shape = tuple(argument.shape)
        self.new = OrderedEmpty(shape, argument)
        has_columns = TRAILING[name] == 3
        if given is not None:
            own = kernel_view(given, has_columns)
        else:
            own = result_view(self.new.view) if has_columns else self.new.view
        batch = shape[: len(shape) - TRAILING[name]]
        full = () if problem.packed is not None and has_columns else problem.batch
        # Slopes sum over what they are broadcast along in their own kernel.
        broadcast = name != "dslope" and batch != full
        self.view: View = contiguous_view(full + shape[len(batch) :]) if broadcast else own

    def finish(self, written: Any, result: Any) -> None:
        """Bring what the kernel wrote into the user's array."""
        if written is result:
            return
        if written.shape == result.shape:
            result[...] = written
            return
        # Axes the argument has not, and those along which it was broadcast.
        missing = written.ndim - result.ndim
        own = zip(written.shape[missing:], result.shape, strict=True)
        axes = (*range(missing), *(missing + n for n, (a, b) in enumerate(own) if a != b))
        wide = np.float64 if written.dtype == np.float64 else np.float32
        total = written.astype(wide).sum(axis=axes, dtype=wide)
        result[...] = total.reshape(result.shape).astype(result.dtype)


class PreparedBackward:
    """A backward call with everything but the arrays; reusable for arrays of the same metadata."""

    def __init__(
        self,
        device: Device,
        problem: Problem,
        arrays: Mapping[str, Any],
        given: Mapping[str, Any],
        extra: Extra,
    ) -> None:
        self._device, self._problem = device, problem
        self._real = _dtypes.BY_NAME[problem.dtype].lse
        self._empty = is_empty(problem)
        self.is_simple = False
        self._targets = {
            name: Target(problem, arrays[name], given.get(name), GRADIENTS[name])
            for name in problem.wrt
            if name in GRADIENTS
        }
        self._gradients = OptionGradients(device, problem, arrays, given)
        if self._empty:
            return
        inputs = {
            "slope" if name == "alibi_slopes" else name: arrays[name]
            for name in INPUTS
            if arrays[name] is not None
        }
        found = {name: kernel_view(a, TRAILING[name] == 3) for name, a in inputs.items()}
        for name, target in self._targets.items():
            found[GRADIENTS[name]] = target.view
        self._options = OptionInputs(device, problem, arrays, extra)
        plan = _plan.plan(problem, device)
        others = self._options.found | self._gradients.bind(plan)
        self._views = Views(problem, found | others, _launch_maps.most_batch_axes(plan))
        addresses = {name: device.pointer(array) for name, array in inputs.items()}
        addresses |= {GRADIENTS[n]: device.pointer(a) for n, a in given.items() if n in GRADIENTS}
        flags = vector_flags(self._views, arrays["q"].dtype.itemsize, addresses)
        flags |= self._options.flags
        if "slope" in inputs and inputs["slope"].dtype != _dtypes.FLOAT32:
            flags |= _params.FLAG_SLOPES_ELEMENT
        struct = np.zeros((), _params.BACKWARD)
        for name in found:
            self._views.fill(struct[f"{name}_strides"], name)
        fill_shape(struct["shape"], problem, self._views, flags)
        self._options.bind(struct, self._views, plan, extra)
        self._gradients.fill(struct, self._views)
        self._place_workspace(plan)
        self._has_options = problem.has_options
        count = len(_params.BACKWARD_POINTERS) if self._has_options else PLAIN_POINTERS
        fill = (self._options.fill_launch, self._gradients.fill_launch)
        self._steps = steps_of(plan, device, struct, count, *fill)
        self._map_arrays(plan)
        self.is_simple = not (self._has_options or self._views.copies)
        slots = {name: slot for slot, name in enumerate(GRADIENTS)}
        self._simple_targets = [
            (name, target.new, _ARGUMENTS[name], _BUFFERS.get(name), slots[name])
            for name, target in self._targets.items()
        ]

    def _map_arrays(self, plan: _plan.Plan) -> None:
        """Hopper's kernel reads by tensor maps."""
        for n, launch in enumerate(plan.launches):
            if launch.spec.kernel == "backward_sm90":
                step, blocks = self._steps[n], map(launch.spec.constant, ("BLOCK_Q", "BLOCK_K"))
                kernel = _launch_maps.mapped_backward(
                    self._device, step.kernel, self._problem, self._views, *blocks
                )
                self._steps[n] = replace(step, kernel=kernel)

    def _place_workspace(self, plan: _plan.Plan) -> None:
        """Byte offsets of the workspaces in one allocation; None for those not needed."""
        sizes = {s.name: math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in plan.scratch}
        offsets, total = {}, 0
        for name, size in sizes.items():
            offsets[name] = total
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self._workspace_shape = (total // self._real.itemsize,)
        self._offsets = [offsets.get(name) for name in WORKSPACE]

    def simple(self, arrays: Sequence[Any]) -> dict[str, Any]:
        """The same as a call, from the tuple of `_prepare.BACKWARD_ARRAYS` in standard order, where
        nothing has to be copied: most calls of a training loop, every microsecond of which counts.
        """
        device = self._device
        at = device.pointer
        dout, q, k, v, out, lse, dlse, _, _, slopes = arrays[:10]
        with device.activate():
            results, grads_at = {}, [0] * len(GRADIENTS)
            for name, new, place, buffer, slot in self._simple_targets:
                result = None if buffer is None else arrays[buffer]
                if result is None:
                    result = new(device, arrays[place].dtype)
                results[name] = result
                grads_at[slot] = at(result)
            workspace = device.empty(self._workspace_shape, self._real)
            base = at(workspace)
            dlse_at = 0 if dlse is None else at(dlse)
            slopes_at = 0 if slopes is None else at(slopes)
            inputs = (at(q), at(k), at(v), at(out), at(dout), at(lse), dlse_at, slopes_at)
            places = [0 if offset is None else base + offset for offset in self._offsets]
            run(self._steps, (*inputs, *grads_at, *places))
        return results

    def __call__(
        self, arrays: Mapping[str, Any], given: Mapping[str, Any], extra: Extra
    ) -> dict[str, Any]:
        """Run on the current stream; returns the gradient of every name in `wrt`."""
        device = self._device
        with device.activate():
            results = {
                name: self._result(target, arrays[name], given.get(name))
                for name, target in self._targets.items()
            }
            if self._empty:
                for result in results.values():
                    result[...] = 0
                return results | self._gradients.empty(arrays, given)
            written = results
            if self._views.copies:
                written = {name: self._written(name, result) for name, result in results.items()}
            if self._problem.packed is not None:
                # Rows past the last sequence keep this.
                for array in written.values():
                    array[...] = 0
            held: list[Any] = []  # copies and workspace, alive until the launches are queued
            pointers = self._pointers(arrays, written, held)
            pending: dict[str, Any] = {}
            if self._has_options:
                pointers += self._options.pointers(arrays, extra, held)
                last, pending = self._gradients.start(arrays, given, held)
                pointers += last
            run(self._steps, pointers)
            if written is not results:
                for name, target in self._targets.items():
                    target.finish(written[name], results[name])
            return results | self._gradients.finish(pending) if pending else results

    def _result(self, target: Target, argument: Any, given: Any | None) -> Any:
        """The array to return: the user's, or a new one."""
        return target.new(self._device, argument.dtype) if given is None else given

    def _written(self, name: str, result: Any) -> Any:
        """What a kernel writes one gradient to: the result itself, or an array beside it."""
        place = self._views.views[GRADIENTS[name]]
        return self._device.empty(place.shape, result.dtype) if place.copied else result

    def _pointers(
        self, arrays: Mapping[str, Any], written: Mapping[str, Any], held: list[Any]
    ) -> list[int]:
        """Inputs, gradients and workspace, in the order of the params struct."""
        device, views = self._device, self._views
        at = device.pointer
        found = []
        for name in INPUTS:
            array = arrays[name]
            if array is not None and views.copies:
                array = views.input("slope" if name == "alibi_slopes" else name, array, device)
                held.append(array)
            found.append(0 if array is None else at(array))
        for name in GRADIENTS:
            found.append(at(written[name]) if name in written else 0)
        workspace = device.empty(self._workspace_shape, self._real)
        held.append(workspace)
        base = at(workspace)
        return found + [0 if offset is None else base + offset for offset in self._offsets]
