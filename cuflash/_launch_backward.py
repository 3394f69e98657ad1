"""Backward on the stream: workspaces, gradient buffers, the launches of a backward Plan.

A gradient has the shape and memory order of its argument. Kernels write straight into it unless its
columns are not contiguous (then into a buffer that is copied back) or its argument was broadcast
along a batch axis (then into one gradient per batch element, which are summed in float32, in a
fixed order).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash import _params, _plan
from cuflash._device import Device
from cuflash._launch import (
    TRAILING,
    OrderedEmpty,
    View,
    Views,
    contiguous_view,
    fill_shape,
    kernel_view,
    result_view,
    steps_of,
    vector_flags,
)
from cuflash._problem import Problem

# The argument and the name of its gradient's view; where the params struct has another name, that.
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "alibi_slopes": "dslope"}
POINTER = {"alibi_slopes": "dslopes"}


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
        self.full = problem.batch + shape[len(batch) :]
        # Slopes sum over what they are broadcast along in their own kernel.
        broadcast = name != "dslope" and batch != problem.batch
        self.view: View = contiguous_view(self.full) if broadcast else own

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
        total = written.astype(np.float32).sum(axis=axes, dtype=np.float32)
        result[...] = total.reshape(result.shape).astype(result.dtype)


class PreparedBackward:
    """A backward call with everything but the arrays; reusable for arrays of the same metadata."""

    def __init__(
        self,
        device: Device,
        problem: Problem,
        arrays: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        self._device, self._problem = device, problem
        self._empty = (
            problem.len_q == 0 or problem.len_k == 0 or 0 in problem.batch or problem.heads == 0
        )
        self._targets = {
            name: Target(problem, arrays[name], given.get(name), GRADIENTS[name])
            for name in problem.wrt
        }
        if self._empty:
            return
        inputs = {
            "slope" if name == "alibi_slopes" else name: array
            for name, array in arrays.items()
            if array is not None
        }
        found = {name: kernel_view(a, TRAILING[name] == 3) for name, a in inputs.items()}
        for name, target in self._targets.items():
            found[GRADIENTS[name]] = target.view
        self._views = Views(problem, found)
        addresses = {name: device.pointer(array) for name, array in inputs.items()}
        addresses |= {GRADIENTS[n]: device.pointer(a) for n, a in given.items() if a is not None}
        flags = vector_flags(self._views, arrays["q"].dtype.itemsize, addresses)
        if "slope" in inputs and inputs["slope"].dtype.itemsize == 2:
            flags |= _params.FLAG_SLOPES_16BIT
        struct = np.zeros((), _params.BACKWARD)
        for name in found:
            self._views.fill(struct[f"{name}_strides"], name)
        fill_shape(struct["shape"], problem, self._views, flags)
        plan = _plan.plan(problem, device)
        self._scratch = [(s.name, s.shape, np.dtype(s.dtype)) for s in plan.scratch]
        self._steps = steps_of(plan, device, struct, len(_params.BACKWARD_POINTERS))

    def __call__(self, arrays: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Run on the current stream; returns the gradient of every name in `wrt`."""
        device = self._device
        with device.activate():
            results = self._results(arrays, given)
            if self._empty:
                for result in results.values():
                    result[...] = 0
                return results
            written = {name: self._written(name, result) for name, result in results.items()}
            self._launch(arrays, written)
            for name, target in self._targets.items():
                target.finish(written[name], results[name])
            return results

    def _results(self, arrays: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays to return: the user's, or new ones."""
        results = {}
        for name, target in self._targets.items():
            result = given.get(name)
            if result is None:
                result = target.new(self._device, arrays[name].dtype)
            results[name] = result
        return results

    def _written(self, name: str, result: Any) -> Any:
        """What a kernel writes one gradient to: the result itself, or an array beside it."""
        place = self._views.views[GRADIENTS[name]]
        return self._device.empty(place.shape, result.dtype) if place.copied else result

    def _launch(self, arrays: Mapping[str, Any], written: Mapping[str, Any]) -> None:
        """Copy what must be copied, allocate workspace, and queue every kernel."""
        device, views = self._device, self._views
        at = dict.fromkeys(_params.BACKWARD_POINTERS, 0)
        held = []  # copies and workspace, alive until the launches are queued
        for name, array in arrays.items():
            if array is None:
                continue
            if views.copies:
                view = "slope" if name == "alibi_slopes" else name
                array = views.input(view, array, device)
                held.append(array)
            at[name] = device.pointer(array)
        for name, array in written.items():
            at[POINTER.get(name, GRADIENTS[name])] = device.pointer(array)
        for name, shape, dtype in self._scratch:
            workspace = device.empty(shape, dtype)
            held.append(workspace)
            at[name] = device.pointer(workspace)
        pointers = tuple(at.values())
        for step in self._steps:
            step(pointers)
