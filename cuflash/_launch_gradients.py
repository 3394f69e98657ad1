"""Gradients of a bias, of sinks and of score parameters on the device: workspace for partial sums, and
their last sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash import _dtypes, _params, _side_kernels
from cuflash._candidates import ELEMENTS
from cuflash._device import Device
from cuflash._errors import UnsupportedError
from cuflash._launch import rows_of_sequences
from cuflash._plan_values import Launch, Plan
from cuflash._problem import Problem
from cuflash._views import OrderedEmpty, View, Views, contiguous_view, pair_view

# A thread takes several elements of large parameters.
MAX_SUM_BLOCKS = 1024


class OptionGradients:
    """The gradients of one kind of call that do not belong to q, k, v or slopes."""

    def __init__(
        self,
        device: Device,
        problem: Problem,
        arrays: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        self._device, self._problem = device, problem
        self._real = _dtypes.BY_NAME[problem.dtype].lse
        self._wants_bias, self._wants_sinks = "bias" in problem.wrt, "sinks" in problem.wrt
        # Place among the expression's arrays, and name.
        self._scores = [(n, x) for n, x in enumerate(problem.score_params) if x in problem.wrt]
        if self._wants_bias:
            bias = arrays["bias"]
            self._new_bias = OrderedEmpty(tuple(bias.shape), bias)
            self._bias_buffer = given.get("bias")
            self._bias_dtype = bias.dtype

    # ---- once per kind of call

    def bind(self, plan: Plan) -> dict[str, View]:
        """Where kernels write the bias's gradient: its own array, or one per share of its sums."""
        if not self._wants_bias:
            return {}
        (work,) = (x.pairs for x in plan.launches if x.spec.kernel == "backward_bias")
        assert work is not None
        self._work, shape = work, self._problem.bias or ()
        if self._work.splits > 1:
            view = contiguous_view(shape, copied=False)
        elif self._bias_buffer is not None:
            view = pair_view(self._bias_buffer, len(shape))
        else:
            view = self._new_bias.view
        missing = len(self._problem.batch) + 3 - len(shape)
        steps = (0 if n == 1 else step for n, step in zip(shape, view.strides, strict=True))
        return {"dbias": View((1,) * missing + shape, (0,) * missing + tuple(steps), False)}

    def fill(self, struct: np.ndarray, views: Views) -> None:
        """Write where the bias's gradient lies, and what it is summed over."""
        self._reduced = 0
        if not self._wants_bias:
            return
        problem, values, view = self._problem, struct["dbias_values"], views.views["dbias"]
        if view.copied:
            raise UnsupportedError(
                f"no kernel for the gradient of a bias with batch axes {problem.batch} that do not "
                f"merge to {_params.MAX_BATCH_AXES}.\n"
                "  Nearest supported: C-ordered arrays, or fewer batch axes."
            )
        views.fill(values["strides"], "dbias")
        steps = zip(values["strides"]["batch"], views.batch_extent, strict=True)
        reduced = sum(1 << n for n, (step, extent) in enumerate(steps) if step == 0 and extent > 1)
        whole = (problem.heads, problem.len_q, problem.len_k)
        flags = (_params.REDUCED_HEAD, _params.REDUCED_ROW, _params.REDUCED_KEY)
        for own, full, flag in zip(view.shape[-3:], whole, flags, strict=True):
            reduced |= flag if own == 1 and full > 1 else 0
        self._reduced = reduced
        values["split_stride"] = math.prod(problem.bias or ())
        if self._work.splits == 1 and self._bias_dtype != _dtypes.FLOAT32:
            struct["shape"]["flags"] |= _params.FLAG_DBIAS_ELEMENT

    def fill_launch(self, struct: np.ndarray, launch: Launch) -> None:
        """Write how a launch shares out its sums over pairs."""
        work, values = launch.pairs, struct["dbias_values"]
        if work is None:
            return
        is_bias = launch.spec.kernel == "backward_bias"
        # Blocks that sum for score parameters own heads and rows.
        values["reduced"] = self._reduced if is_bias else _params.REDUCED_KEY
        values["splits"] = work.splits
        values["tiles_q"], values["tiles_k"] = work.tiles_q, work.tiles_k

    # ---- per call

    def start(
        self, arrays: Mapping[str, Any], given: Mapping[str, Any], held: list[Any]
    ) -> tuple[list[int], dict[str, tuple[Any, Any]]]:
        """Allocate.

        Returns
        -------
        pointers
            Those that follow the options' in the params struct.
        pending
            (what kernels write, the array to return) by name, for `finish`.
        """
        device, problem = self._device, self._problem
        bias_at = sinks_at = 0
        pending = {}
        if self._wants_bias:
            result = self._bias_result(arrays, given)
            written = result
            if self._work.splits > 1:
                written = device.empty((self._work.splits, *result.shape), self._real)
            bias_at = device.pointer(written)
            pending["bias"] = written, result
        if self._wants_sinks:
            written = device.empty((math.prod(problem.batch), problem.heads), self._real)
            sinks_at = device.pointer(written)
            pending["sinks"] = written, device.empty((problem.heads,), arrays["sinks"].dtype)
        scores = [0] * _params.MAX_SCORE_ARRAYS
        for n, name in self._scores:
            array = arrays[name]
            written = device.empty((array.size, _params.SUM_WORDS[self._real.itemsize]), np.int64)
            written[...] = 0
            pending[name] = written, device.empty(array.shape, array.dtype)
            scores[n] = device.pointer(written) if array.size else 0
        held += pending.values()
        return [bias_at, sinks_at, *scores], pending

    def _bias_result(self, arrays: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        result = given.get("bias")
        return self._new_bias(self._device, arrays["bias"].dtype) if result is None else result

    def finish(self, pending: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
        """The gradients, once everything is queued: last sums in the type of the scores, rounded once."""
        results: dict[str, Any] = {}
        for name in ("bias", "sinks"):
            if name not in pending:
                continue
            written, result = pending[name]
            if written is not result:
                result[...] = written.sum(axis=0, dtype=self._real).astype(result.dtype)
            results[name] = result
        if self._scores:
            self._finish_scores(pending)
            results["score_params"] = {name: pending[name][1] for _, name in self._scores}
        return results

    def _finish_scores(self, pending: Mapping[str, tuple[Any, Any]]) -> None:
        """Exact sums become gradients, each rounded once."""
        device, struct = self._device, np.zeros((), _params.SCORE_SUMS)
        most = 0
        for n, name in self._scores:
            words, grad = pending[name]
            if grad.size == 0:
                continue
            struct["words"][n], struct["grads"][n] = device.pointer(words), device.pointer(grad)
            struct["elements"][n] = grad.size
            struct["element_grads"] |= int(grad.dtype != _dtypes.FLOAT32) << n
            most = max(most, grad.size)
        element = ELEMENTS[self._problem.dtype]
        kernel = device.load(_side_kernels.score_sums(device.arch, element))
        threads = _side_kernels.SUM_WARPS * 32
        blocks = min(-(-most // threads), MAX_SUM_BLOCKS)
        if blocks:
            kernel(blocks, threads, 0, struct.tobytes())

    def empty(self, arrays: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Gradients of a call without pairs: 0, but a sink's weight is 1 in every row."""
        results: dict[str, Any] = {}
        if self._wants_bias:
            results["bias"] = self._bias_result(arrays, given)
            results["bias"][...] = 0
        if self._wants_sinks:
            like = arrays["sinks"]
            results["sinks"] = self._device.empty(like.shape, like.dtype)
            results["sinks"][...] = 0
            dlse = arrays["dlse"]
            if dlse is not None and dlse.size:
                if self._problem.packed is not None:
                    inside = rows_of_sequences(self._device, self._problem, arrays)
                    dlse = self._device.xp.where(inside, dlse, 0)
                axes = tuple(a for a in range(dlse.ndim) if a != dlse.ndim - 2)
                total = dlse.sum(axis=axes)
                # A sink of -inf is none: its rows have lse = -inf, and weight 0.
                total = self._device.xp.where(like.astype(total.dtype) > -np.inf, total, 0)
                results["sinks"][...] = total.astype(like.dtype)
        if self._scores:
            grads = {
                n: self._device.empty(arrays[n].shape, arrays[n].dtype) for _, n in self._scores
            }
            for grad in grads.values():
                grad[...] = 0
            results["score_params"] = grads
        return results
