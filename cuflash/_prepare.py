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
from collections.abc import Callable, Sequence
from typing import Any

from cuflash import _arrays, _runs
from cuflash._arrangement import Arrangement
from cuflash._arrays import Meta
from cuflash._device import Device
from cuflash._errors import Seen
from cuflash._extras import NOTHING, Extra
from cuflash._problem import SCORE_PREFIX, Problem

# Array arguments, required ones first.
OPTION_ARRAYS = ("mask", "bias", "alibi_slopes", "sinks", "seed")
FORWARD_ARRAYS = ("q", "k", "v", *OPTION_ARRAYS, "out")
BACKWARD_ARRAYS = (
    *("dout", "q", "k", "v", "out", "lse", "dlse"),
    *OPTION_ARRAYS,
    *("dq", "dk", "dv", "dbias"),
)
_ENDS = ("cu_seqlens_q", "cu_seqlens_k")
_OUTPUTS = {"forward": ("out",), "backward": ("dq", "dk", "dv", "dbias")}
_OPTIONS = (
    *("causal", "window", "q_offset", "scale", "softcap"),
    *("layout", "dropout_p", "precision"),
)
FORWARD_OPTIONS = (*_OPTIONS, "return_lse")
BACKWARD_OPTIONS = (*_OPTIONS, "deterministic", "wrt")
_BOUNDS = ("max_seqlen_q", "max_seqlen_k")
# By direction; those of packed sequences have the cumulative lengths behind the others.
REQUIRED = {"forward": 3, "backward": 6, "varlen_forward": 3, "varlen_backward": 6}
ARRAYS: dict[str, tuple[str, ...]] = {
    "forward": FORWARD_ARRAYS,
    "backward": BACKWARD_ARRAYS,
    "varlen_forward": (*FORWARD_ARRAYS, *_ENDS),
    "varlen_backward": (*BACKWARD_ARRAYS, *_ENDS),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "forward": FORWARD_OPTIONS,
    "backward": BACKWARD_OPTIONS,
    "varlen_forward": (*_OPTIONS, *_BOUNDS, "return_lse"),
    "varlen_backward": (*_OPTIONS, *_BOUNDS, "deterministic", "wrt"),
}

# Prepared calls kept. One is a few kilobytes; a server that sees more lengths than this prepares
# again, 0.1 ms each.
CAPACITY = 1024


class Prepared:
    """A checked and planned call.

    Attributes
    ----------
    problem : Problem
    run : callable
        Takes the arrays in the order of ARRAYS, and the Extra.
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
        outputs = _OUTPUTS[problem.direction]
        self._outputs = [names.index(n) for n in outputs if metas[names.index(n)] is not None]

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
    direction: str,
    device: Device | None,
    arrays: Sequence[Any],
    values: Sequence[Any],
    extra: Extra = NOTHING,
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
        None if extra is NOTHING else extra.key,
    )


def prepared(
    direction: str, objects: Sequence[Any], values: Sequence[Any], extra: Extra = NOTHING
) -> tuple[Prepared, Sequence[Any]]:
    """The Prepared of a call, and its arrays adopted.

    Parameters
    ----------
    direction : {"forward", "backward"}
    objects : sequence
        Array arguments, in the order of ARRAYS.
    values : sequence
        Options, in the order of OPTIONS.
    extra : Extra
        Everything else; its score arrays are adopted behind the others.
    """
    names: Sequence[str] = ARRAYS[direction]
    if extra.score_mod is not None:
        names = (*names, *(SCORE_PREFIX + name for name in extra.score_arrays))
        objects = (*objects, *extra.score_arrays.values())
    arrays, device = _arrays.adopt(
        names,
        objects,
        REQUIRED[direction],
        lambda: dict(zip(OPTIONS[direction], values, strict=True)),
    )
    if type(values[1]) is list:  # window=[3, 0]: a key must be hashable
        values = (values[0], tuple(values[1]), *values[2:])
    key = key_of(direction, device, arrays, values, extra)
    try:
        call = _calls.get(key)
    except TypeError:  # an option such as a 0-d array: right or refused, but never warm
        key = call = None
    if values[1] is not None and type(values[1]) is not tuple:
        key = None  # an iterator: equal to itself, though not what it was
    if call is None:
        call = prepare(direction, device, names, arrays, values, extra)
        if key is not None:
            with _lock:
                while len(_calls) >= CAPACITY:
                    del _calls[next(iter(_calls))]
                _calls[key] = call
    shared = call.overlap(arrays)
    if shared is not None:
        name, other = (names[place] for place in shared)
        raise seen_of(direction, names, arrays, values, extra).error(
            ValueError, f"{name} shares memory with {other}.", f"pass another array, or no {name}=."
        )
    return call, arrays


def seen_of(
    direction: str,
    names: Sequence[str],
    arrays: Sequence[Any],
    values: Sequence[Any],
    extra: Extra,
) -> Seen:
    """The arguments, for messages."""
    options = dict(zip(OPTIONS[direction], values, strict=True))
    if options["precision"] is None:
        del options["precision"]
    return Seen(dict(zip(names, arrays, strict=True)), {**options, **extra.told})


def prepare(
    direction: str,
    device: Device | None,
    names: Sequence[str],
    arrays: Sequence[Any],
    values: Sequence[Any],
    extra: Extra,
) -> Prepared:
    """Check, plan and load; raises whatever is wrong with the call."""
    metas = [None if a is None else meta_of(a, device is not None) for a in arrays]
    problem = Problem.of(
        direction.removeprefix("varlen_"),
        {name: meta for name, meta in zip(names, metas, strict=True) if meta is not None},
        dict(zip(OPTIONS[direction], values, strict=True)),
        seen_of(direction, names, arrays, values, extra),
        extra=extra,
        on_device=device is not None,
    )
    if os.environ.get("CUFLASH_EXPLAIN", "0") != "0":
        from cuflash import _explain

        print(_explain.account(problem, device), file=sys.stderr)
    view = Arrangement(arrays[names.index("q")].ndim, values[_OPTIONS.index("layout")])
    run = _runs.run_of(device, problem, view, arrays, extra)
    return Prepared(direction, problem, run, metas)


def meta_of(array: Any, on_device: bool) -> Meta:
    """Metadata of an adopted array."""
    return Meta(*_arrays.signature(array, on_device))


def forget() -> None:
    """Drop every prepared call, and with it the devices and loaded kernels that only they keep."""
    with _lock:
        _calls.clear()
