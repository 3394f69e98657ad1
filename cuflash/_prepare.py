"""From the arguments of a call to something that can be run again: checks and planning happen once
per kind of call.

A training or serving loop makes the same call thousands of times with other arrays of the same
metadata. All checks and all planning depend on that metadata and the options only, so their result
is kept under a key made of both; a warm call adopts its arrays, makes the key, and runs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cuflash import _arrays, _cpu
from cuflash._arrays import Meta
from cuflash._device import Device
from cuflash._errors import Seen
from cuflash._options import Options
from cuflash._problem import GRADIENT_BUFFERS, Arrangement, Problem

# Array arguments, required ones first.
FORWARD_ARRAYS = ("q", "k", "v", "alibi_slopes", "out")
BACKWARD_ARRAYS = ("dout", "q", "k", "v", "out", "lse", "dlse", "alibi_slopes", "dq", "dk", "dv")
REQUIRED = {"forward": 3, "backward": 6}
OUTPUTS = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
_OPTIONS = ("causal", "window", "q_offset", "scale", "softcap", "layout")
FORWARD_OPTIONS = (*_OPTIONS, "return_lse")
BACKWARD_OPTIONS = (*_OPTIONS, "deterministic", "wrt")
ARRAYS = {"forward": FORWARD_ARRAYS, "backward": BACKWARD_ARRAYS}
OPTIONS = {"forward": FORWARD_OPTIONS, "backward": BACKWARD_OPTIONS}

# Prepared calls kept. One is a few kilobytes; a server that sees more lengths than this prepares
# again, 0.1 ms each.
CAPACITY = 1024


class CpuForward:
    """Attention of NumPy arrays on the CPU backend."""

    def __init__(self, problem: Problem, view: Arrangement) -> None:
        self.problem, self.view = problem, view

    def __call__(self, q: Any, k: Any, v: Any, slopes: Any, out: Any) -> tuple[Any, Any]:
        """(out, lse) in the caller's order."""
        view = self.view
        out, lse = _cpu.forward(
            view.standard(q),
            view.standard(k),
            view.standard(v),
            cpu_options(self.problem, slopes),
            out=view.standard(out),
        )
        return view.restore(out), view.restore_rows(lse)


class CpuBackward:
    """Gradients of NumPy arrays on the CPU backend."""

    def __init__(self, problem: Problem, view: Arrangement) -> None:
        self.problem, self.view = problem, view

    def __call__(self, *arrays: Any) -> dict[str, Any]:
        """Gradients by argument name, in the caller's order."""
        dout, q, k, v, out, lse, dlse, slopes, *buffers = arrays
        view, problem = self.view, self.problem
        grads = _cpu.backward(
            view.standard(dout),
            view.standard(q),
            view.standard(k),
            view.standard(v),
            view.standard(out),
            view.standard_rows(lse),
            cpu_options(problem, slopes),
            dlse=view.standard_rows(dlse),
            wrt=problem.wrt,
            grads_out=standard_buffers(view, buffers),
        )
        return restored(view, grads, slopes)


class DeviceForward:
    """Attention on a device: kernels are chosen, compiled and loaded here, launched by calls."""

    def __init__(
        self, device: Device, problem: Problem, view: Arrangement, arrays: Sequence[Any]
    ) -> None:
        from cuflash import _launch

        self.view = view
        q, k, v, slopes, out = arrays
        known = {"q": view.standard(q), "k": view.standard(k), "v": view.standard(v)}
        if slopes is not None:
            known["alibi_slopes"] = with_head_axis(slopes)
        self._run = _launch.PreparedForward(device, problem, known, view.standard(out))

    def __call__(self, q: Any, k: Any, v: Any, slopes: Any, out: Any) -> tuple[Any, Any]:
        """(out, lse) in the caller's order."""
        view = self.view
        if view.plain:
            return self._run(q, k, v, slopes, out)
        out, lse = self._run(
            view.standard(q),
            view.standard(k),
            view.standard(v),
            with_head_axis(slopes),
            view.standard(out),
        )
        return view.restore(out), view.restore_rows(lse)


class DeviceBackward:
    """Gradients on a device."""

    def __init__(
        self, device: Device, problem: Problem, view: Arrangement, arrays: Sequence[Any]
    ) -> None:
        from cuflash import _launch_backward

        self.view = view
        known, given = self._standard(arrays)
        self._run = _launch_backward.PreparedBackward(device, problem, known, given)

    def __call__(self, *arrays: Any) -> dict[str, Any]:
        """Gradients by argument name, in the caller's order."""
        return restored(self.view, self._run(*self._standard(arrays)), arrays[7])

    def _standard(self, arrays: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and gradient buffers by name, in the order (*B, H, L, D)."""
        dout, q, k, v, out, lse, dlse, slopes, *buffers = arrays
        view = self.view
        known = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
        known = {name: view.standard(array) for name, array in known.items()}
        known["lse"] = view.standard_rows(lse)
        known["dlse"] = view.standard_rows(dlse)
        known["alibi_slopes"] = with_head_axis(slopes)
        return known, standard_buffers(view, buffers)


def with_head_axis(slopes: Any) -> Any:
    """Slopes of a call without heads may have no axis; below, they always have one."""
    return slopes.reshape(1) if slopes is not None and slopes.ndim == 0 else slopes


def cpu_options(problem: Problem, slopes: Any) -> Options:
    """What the CPU backend reads of a Problem."""
    return Options(
        scale=problem.scale,
        q_offset=problem.q_offset,
        left=problem.left,
        right=problem.right,
        softcap=problem.softcap,
        alibi_slopes=with_head_axis(slopes),
        deterministic=problem.deterministic,
    )


def standard_buffers(view: Arrangement, buffers: Sequence[Any]) -> dict[str, Any]:
    """The gradient arrays to write to, by argument name."""
    names = GRADIENT_BUFFERS.values()
    return {n: view.standard(b) for n, b in zip(names, buffers, strict=True) if b is not None}


def restored(view: Arrangement, grads: Mapping[str, Any], slopes: Any) -> dict[str, Any]:
    """Gradients in the caller's order and shapes."""
    result = {n: view.restore(grads[n]) for n in GRADIENT_BUFFERS.values() if n in grads}
    if "alibi_slopes" in grads:
        result["alibi_slopes"] = grads["alibi_slopes"].reshape(slopes.shape)
    return result


class Prepared:
    """A checked and planned call.

    Attributes
    ----------
    problem : Problem
    run : callable
        Takes the arrays in the order of ARRAYS.
    """

    __slots__ = ("_outputs", "_spans", "problem", "run")

    def __init__(
        self,
        direction: str,
        problem: Problem,
        run: Callable[..., Any],
        metas: Sequence[Meta | None],
    ) -> None:
        self.problem, self.run = problem, run
        self._spans = {place: meta.span() for place, meta in enumerate(metas) if meta is not None}
        names = ARRAYS[direction]
        self._outputs = [
            names.index(n) for n in OUTPUTS[direction] if metas[names.index(n)] is not None
        ]

    def overlap(self, arrays: Sequence[Any]) -> tuple[int, int] | None:
        """Places of an output and another array that share memory; nothing is read."""
        if not self._outputs:
            return None
        ranges = {}
        for place, (low, high) in self._spans.items():
            at = _arrays.address_of(arrays[place])
            ranges[place] = at + low, at + high
        for place in self._outputs:
            low, high = ranges[place]
            for other, (start, stop) in ranges.items():
                if other == place or start >= high or stop <= low:
                    continue
                if _arrays.share_memory(arrays[place], arrays[other]):
                    return place, other
        return None


_calls: dict[Any, Prepared] = {}
_lock = threading.Lock()


def key_of(
    direction: str, device: Device | None, arrays: Sequence[Any], values: Sequence[Any]
) -> Any:
    """Everything a Prepared depends on, hashable if the option values are.

    The types of the values are part of it: True equals 1, but only one of them is a bool.
    """
    on_device = device is not None
    window = values[1]
    return (
        direction,
        device.key if device is not None else None,
        *[None if a is None else _arrays.signature(a, on_device) for a in arrays],
        *values,
        *map(type, values),
        tuple(map(type, window)) if type(window) is tuple else None,
    )


def prepared(
    direction: str, objects: Sequence[Any], values: Sequence[Any]
) -> tuple[Prepared, Sequence[Any]]:
    """The Prepared of a call, and its arrays adopted.

    Parameters
    ----------
    direction : {"forward", "backward"}
    objects : sequence
        Array arguments, in the order of ARRAYS.
    values : sequence
        Options, in the order of OPTIONS.
    """
    arrays, device = _arrays.adopt(
        ARRAYS[direction],
        objects,
        REQUIRED[direction],
        lambda: dict(zip(OPTIONS[direction], values, strict=True)),
    )
    if type(values[1]) is list:  # window=[3, 0]: a key must be hashable
        values = (values[0], tuple(values[1]), *values[2:])
    key = key_of(direction, device, arrays, values)
    try:
        call = _calls.get(key)
    except TypeError:  # an option such as a 0-d array: right or refused, but never warm
        key = call = None
    if call is None:
        call = prepare(direction, device, arrays, values)
        if key is not None:
            with _lock:
                while len(_calls) >= CAPACITY:
                    del _calls[next(iter(_calls))]
                _calls[key] = call
    shared = call.overlap(arrays)
    if shared is not None:
        names = ARRAYS[direction]
        name, other = (names[place] for place in shared)
        raise seen_of(direction, arrays, values).error(
            ValueError, f"{name} shares memory with {other}.", f"pass another array, or no {name}=."
        )
    return call, arrays


def seen_of(direction: str, arrays: Sequence[Any], values: Sequence[Any]) -> Seen:
    """The arguments, for messages."""
    return Seen(
        dict(zip(ARRAYS[direction], arrays, strict=True)),
        dict(zip(OPTIONS[direction], values, strict=True)),
    )


def prepare(
    direction: str, device: Device | None, arrays: Sequence[Any], values: Sequence[Any]
) -> Prepared:
    """Check, plan and load; raises whatever is wrong with the call."""
    names = ARRAYS[direction]
    metas = [None if a is None else meta_of(a, device is not None) for a in arrays]
    problem = Problem.of(
        direction,
        {name: meta for name, meta in zip(names, metas, strict=True) if meta is not None},
        dict(zip(OPTIONS[direction], values, strict=True)),
        seen_of(direction, arrays, values),
        on_device=device is not None,
    )
    if os.environ.get("CUFLASH_EXPLAIN", "0") != "0":
        from cuflash import _explain

        print(_explain.account(problem, device), file=sys.stderr)
    view = Arrangement(arrays[names.index("q")].ndim, values[_OPTIONS.index("layout")])
    run: Callable[..., Any]
    if device is None:
        run = (CpuForward if direction == "forward" else CpuBackward)(problem, view)
    else:
        on_device = DeviceForward if direction == "forward" else DeviceBackward
        run = on_device(device, problem, view, arrays)
    return Prepared(direction, problem, run, metas)


def meta_of(array: Any, on_device: bool) -> Meta:
    """Metadata of an adopted array."""
    return Meta(*_arrays.signature(array, on_device))


def forget() -> None:
    """Drop every prepared call, and with it the devices and loaded kernels that only they keep."""
    with _lock:
        _calls.clear()
