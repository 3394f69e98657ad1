"""Bounds of the lengths of packed sequences: what the caller says, or what the cumulative lengths hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import _arrays, _checks, _packed_checks
from cuflash._errors import Seen

# Of an array of packed rows, by layout.
_ROWS_AXIS = {"HLD": 1, "LHD": 0}


def _stated(
    arrays: tuple[Any, Any, Any, Any], given: tuple[Any, Any], layout: Any
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The bounds given and the packed lengths of a call whose lengths nobody reads: nearly every one on
    a GPU. None where something is missing or must be looked at.
    """
    q, k = arrays[:2]
    kinds, types = {type(array) for array in arrays}, {type(bound) for bound in given}
    if len(kinds) > 1 or types != {int} or not _arrays.is_cupy(type(q)):
        return None
    if type(layout) is not str or layout not in _ROWS_AXIS or min(given) < 0:
        return None
    if q.ndim != 3 or k.ndim != 3:
        return None
    axis = _ROWS_AXIS[layout]
    return given, (q.shape[axis], k.shape[axis])


def bounds_of(
    arrays: tuple[Any, Any, Any, Any],
    given: tuple[int | None, int | None],
    layout: Any,
    needs_longest: bool,
) -> tuple[int, int]:
    """Bounds of the lengths: those given, else what the contents say.

    Lengths in the host's memory are always checked; those of a GPU are read, which synchronises, only
    when a bound is missing. Without mask and bias any bound will do, and the packed length is one that
    does not make every batch another kind of call.
    """
    stated = _stated(arrays, given, layout)
    if stated is not None:
        (most_q, most_k), (total_q, total_k) = stated
        # No sequence is longer than the arrays; only masks and biases are of the bound's size.
        return (most_q, most_k) if needs_longest else (min(most_q, total_q), min(most_k, total_k))
    names = ("q", "k", "cu_seqlens_q", "cu_seqlens_k")
    told = {"max_seqlen_q": given[0], "max_seqlen_k": given[1], "layout": layout}
    adopted, _ = _arrays.adopt(names, arrays, 4, lambda: told)
    seen = Seen(dict(zip(names, adopted, strict=True)), told)
    layout = _checks.layout(layout, seen)
    wanted = [
        None if value is None else _packed_checks.longest(name, value, seen)
        for name, value in list(told.items())[:2]
    ]
    rows_axis = _ROWS_AXIS[layout]
    bounds = []
    for rows, cu, bound, name in zip(adopted[:2], adopted[2:], wanted, names[2:], strict=True):
        total = rows.shape[rows_axis] if rows.ndim == 3 else 0
        longest = bound
        on_host = isinstance(cu, np.ndarray)
        if on_host or None in wanted:
            readable = cu.ndim == 1 and cu.size > 0 and cu.dtype.kind == "i" and rows.ndim == 3
            if readable:
                contents = cu if on_host else cu.get()
                most = _packed_checks.contents(name, contents, total, bound, seen)
                if longest is None:
                    longest = most if needs_longest else total
        if longest is None or not needs_longest:
            longest = total if longest is None else min(longest, total)
        bounds.append(longest)
    return bounds[0], bounds[1]
