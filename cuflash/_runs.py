"""What a prepared call does with its arrays: the CPU backend, or kernels on a device.

Each class is made once per kind of call and then called with the arrays in the order of
`_prepare.ARRAYS`, parameters of a score expression last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cuflash import _cpu
from cuflash._arrangement import Arrangement
from cuflash._device import Device
from cuflash._extras import Extra
from cuflash._options import Options
from cuflash._problem import GRADIENT_BUFFERS, Problem

# Places of the option arrays in the tuple of a call's arrays.
_FORWARD = slice(3, 8)
_BACKWARD = slice(7, 12)


def run_of(
    device: Device | None,
    problem: Problem,
    view: Arrangement,
    arrays: Sequence[Any],
    extra: Extra,
) -> Callable[[Sequence[Any], Extra], Any]:
    """What runs a call of this kind."""
    forward = problem.direction == "forward"
    if device is None:
        return (CpuForward if forward else CpuBackward)(problem, view)
    return (DeviceForward if forward else DeviceBackward)(device, problem, view, arrays, extra)


class CpuForward:
    """Attention of NumPy arrays on the CPU backend."""

    def __init__(self, problem: Problem, view: Arrangement) -> None:
        self.problem, self.view = problem, view

    def __call__(self, arrays: Sequence[Any], extra: Extra) -> tuple[Any, Any]:
        """(out, lse) in the caller's order."""
        view = self.view
        q, k, v = map(view.standard, arrays[:3])
        options = cpu_options(self.problem, arrays[_FORWARD], extra)
        out = view.standard(arrays[8])
        if self.problem.packed is not None:
            cu_q, cu_k = arrays[9:11]
            out, lse = _cpu.varlen_forward(q, k, v, cu_q, cu_k, options, out=out)
        else:
            out, lse = _cpu.forward(q, k, v, options, out=out)
        return view.restore(out), view.restore_rows(lse)


class CpuBackward:
    """Gradients of NumPy arrays on the CPU backend."""

    def __init__(self, problem: Problem, view: Arrangement) -> None:
        self.problem, self.view = problem, view

    def __call__(self, arrays: Sequence[Any], extra: Extra) -> dict[str, Any]:
        """Gradients by argument name, in the caller's order."""
        view, problem = self.view, self.problem
        dout, q, k, v, out = map(view.standard, arrays[:5])
        lse, dlse = map(view.standard_rows, arrays[5:7])
        buffers = standard_buffers(view, arrays[12:16])
        options = cpu_options(problem, arrays[_BACKWARD], extra)
        given = (dout, q, k, v, out, lse)
        wanted: dict[str, Any] = {"dlse": dlse, "wrt": problem.wrt, "grads_out": buffers}
        if problem.packed is not None:
            cu_q, cu_k = arrays[16:18]
            grads = _cpu.varlen_backward(*given, cu_q, cu_k, options, **wanted)
        else:
            grads = _cpu.backward(*given, options, **wanted)
        if "bias" in buffers:
            buffers["bias"][...] = grads["bias"]
        return restored(view, grads, arrays)


class DeviceForward:
    """Attention on a device: kernels are chosen, compiled and loaded here, launched by calls."""

    def __init__(
        self,
        device: Device,
        problem: Problem,
        view: Arrangement,
        arrays: Sequence[Any],
        extra: Extra,
    ) -> None:
        from cuflash import _launch

        self.view = view
        known = dict(zip("qkv", map(view.standard, arrays[:3]), strict=True))
        known |= option_arrays(arrays[_FORWARD], arrays[9:], extra)
        self._has_options = problem.has_options
        self._run = _launch.PreparedForward(device, problem, known, view.standard(arrays[8]), extra)

    def __call__(self, arrays: Sequence[Any], extra: Extra) -> tuple[Any, Any]:
        """(out, lse) in the caller's order."""
        view = self.view
        q, k, v, _, _, slopes, _, _, out = arrays[:9]
        options = None
        if self._has_options:
            options = option_arrays(arrays[_FORWARD], arrays[9:], extra)
        if view.plain:
            return self._run(q, k, v, slopes, out, options, extra)
        if self._run.is_simple:  # an array in standard order would begin where this one does
            result, lse = self._run(q, k, v, slopes, out, None, extra)
            return (view.restore(result) if out is None else out), view.restore_rows(lse)
        result, lse = self._run(
            view.standard(q),
            view.standard(k),
            view.standard(v),
            with_head_axis(slopes),
            view.standard(out),
            options,
            extra,
        )
        return view.restore(result), view.restore_rows(lse)


class DeviceBackward:
    """Gradients on a device."""

    def __init__(
        self,
        device: Device,
        problem: Problem,
        view: Arrangement,
        arrays: Sequence[Any],
        extra: Extra,
    ) -> None:
        from cuflash import _launch_backward

        self.view = view
        known, given = self._standard(arrays, extra)
        self._run = _launch_backward.PreparedBackward(device, problem, known, given, extra)
        # Addresses are those of arrays in standard order; results are brought into the caller's.
        self._is_simple = self._run.is_simple and (view.plain or not given)

    def __call__(self, arrays: Sequence[Any], extra: Extra) -> dict[str, Any]:
        """Gradients by argument name, in the caller's order."""
        if self._is_simple:
            grads = self._run.simple(arrays)
            return grads if self.view.plain else restored(self.view, grads, arrays)
        return restored(self.view, self._run(*self._standard(arrays, extra), extra), arrays)

    def _standard(
        self, arrays: Sequence[Any], extra: Extra
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and gradient buffers by name, in the order (*B, H, L, D)."""
        view = self.view
        names = ("dout", "q", "k", "v", "out")
        known = {n: view.standard(a) for n, a in zip(names, arrays[:5], strict=True)}
        known["lse"], known["dlse"] = map(view.standard_rows, arrays[5:7])
        known |= option_arrays(arrays[_BACKWARD], arrays[16:], extra)
        return known, standard_buffers(view, arrays[12:16])


def option_arrays(options: Sequence[Any], others: Sequence[Any], extra: Extra) -> dict[str, Any]:
    """The option arrays of a call by name, as kernels know them.

    `others`: cumulative lengths if sequences are packed, then parameters of the score expression.
    """
    mask, bias, slopes, sinks, seed = options
    found = {
        "mask": mask,
        "bias": bias,
        "alibi_slopes": with_head_axis(slopes),
        "sinks": with_head_axis(sinks),
        "seed": seed,
    }
    if others:
        names = tuple(extra.score_arrays)
        if len(others) > len(names):
            names = ("cu_seqlens_q", "cu_seqlens_k", *names)
        found |= dict(zip(names, others, strict=True))
    return found


def with_head_axis(x: Any) -> Any:
    """Slopes or sinks of a call without heads may have no axis; below, they always have one."""
    return x.reshape(1) if x is not None and x.ndim == 0 else x


def cpu_options(problem: Problem, options: Sequence[Any], extra: Extra) -> Options:
    """What the CPU backend reads of a call."""
    mask, bias, slopes, sinks, seed = options
    dropout = None
    if problem.dropout_p > 0:
        number = extra.seed if seed is None else int(seed.reshape(-1)[0])
        assert number is not None, "checked with dropout_p"
        from cuflash._dropout import Dropout

        dropout = Dropout.of(problem.dropout_p, number)
    return Options(
        scale=problem.scale,
        q_offset=None if problem.packed and problem.packed.aligned_at_end else problem.q_offset,
        left=problem.left,
        right=problem.right,
        softcap=problem.softcap,
        alibi_slopes=with_head_axis(slopes),
        mask=mask,
        blocks=extra.blocks,
        bias=bias,
        sinks=with_head_axis(sinks),
        score_mod=extra.score_mod,
        dropout=dropout,
        deterministic=problem.deterministic,
    )


def standard_buffers(view: Arrangement, buffers: Sequence[Any]) -> dict[str, Any]:
    """The gradient arrays to write to, by argument name."""
    names = GRADIENT_BUFFERS.values()
    return {
        n: b if n == "bias" else view.standard(b)
        for n, b in zip(names, buffers, strict=True)
        if b is not None
    }


def restored(view: Arrangement, grads: Mapping[str, Any], arrays: Sequence[Any]) -> dict[str, Any]:
    """Gradients in the caller's order and shapes."""
    result = {n: view.restore(grads[n]) for n in ("q", "k", "v") if n in grads}
    for name, place in (("alibi_slopes", 9), ("sinks", 10)):
        if name in grads:
            result[name] = grads[name].reshape(arrays[place].shape)
    for name in ("bias", "score_params"):
        if name in grads:
            result[name] = grads[name]
    return result
