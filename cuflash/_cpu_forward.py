"""Attention forward on NumPy arrays: the online softmax of FlashAttention, one BLAS tile at a time.

Never more of the Lq x Lk scores than one tile exists. Row tiles are independent; each walks its
visible keys from left to right and keeps, per row, the running maximum m, the running sum l of
exp(s - m), and the unnormalised output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ._cpu_place import Unit
from ._cpu_products import Scratch, for_blas, stack_rows
from ._cpu_rows import Dense, Rows
from ._cpu_softmax import OnlineSoftmax
from ._cpu_threads import run, threads_for
from ._cpu_tiles import Call, Extras, Shape, accumulator
from ._options import Options
from ._order import empty_like_order


@dataclass(frozen=True)
class Arrays:
    """A call and its arrays, whose outer axes are those of the call's shape."""

    call: Call
    q: Rows  # (*outer, G, Lq, D)
    k: Rows  # (*outer, Lk, D)
    v: Rows  # (*outer, Lk, Dv)
    out: Rows  # (*outer, G, Lq, Dv)
    lse: Rows  # (*outer, G, Lq, 1)


# A row tile of a unit: its rows q0:q1, and all of the unit's k and v.
_Item: TypeAlias = tuple[Arrays, Unit, int, int, np.ndarray, np.ndarray]


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    options: Options,
    *,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact attention and its log-sum-exp, in O(Lq + Lk) memory beside the results.

    Parameters
    ----------
    q, k, v
        (*B, H, Lq, D), (*B, Hkv, Lk, D), (*B, Hkv, Lk, Dv); any strides; batch axes of k, v equal
        q's or 1.
    options
        The resolved options.
    out
        Where to write; allocated in q's memory order when None.

    Returns
    -------
    out (*B, H, Lq, Dv) in q's dtype, lse (*B, H, Lq) float32 (float64 for float64).
    """
    shape, dtype = Shape.of(q, k, v), accumulator(q.dtype)
    call = Call.of(shape, Extras.of(options, shape.axes, dtype))
    if out is None:
        out = empty_like_order((*q.shape[:-1], shape.dim_v), q.dtype, q)
    lse = np.empty(q.shape[:-1], dtype=dtype)
    if lse.size:
        rows, spread = shape.group_rows, shape.spread
        views = rows(q), spread(k), spread(v), rows(out), rows(lse)[..., None]
        items = len(list(call.units())) * len(list(call.row_tiles()))
        attend([Arrays(call, *map(Dense, views))], dtype, items, call.pairs())
    elif out.size:
        out[...] = 0
    return out, lse


def attend(parts: Iterable[Arrays], dtype: np.dtype, items: int, pairs: int) -> None:
    """Fill `out` and `lse` of all parts.

    Parameters
    ----------
    parts
        Independent of each other.
    dtype
        The accumulator's.
    items, pairs
        About how many row tiles and how many pairs of query and key there are.
    """

    def tiles() -> Iterator[_Item]:
        for part in parts:
            call = part.call
            for unit in call.units():
                # Once per unit, also when several threads share its rows.
                k, v = (
                    call.whole(x.get(unit.place, 0, call.shape.len_k)) for x in (part.k, part.v)
                )
                for q0, q1 in call.row_tiles():
                    yield part, unit, q0, q1, k, v

    def worker(stopped: Callable[[], bool]) -> Callable[[_Item], None]:
        scratch = Scratch(dtype)

        def rows(item: _Item) -> None:
            part, unit, q0, q1, k, v = item
            q = part.q.get(unit.place, q0, q1)
            out, lse = _forward_rows(part.call, scratch, unit, q, k, v, q0)
            part.out.put(unit.place, q0, q1, out)
            part.lse.put(unit.place, q0, q1, lse)

        return rows

    run(tiles(), worker, threads_for(items, pairs))


def _forward_rows(
    call: Call,
    scratch: Scratch,
    unit: Unit,
    q: np.ndarray,  # (*unit, G, rows, D)
    k: np.ndarray,  # (*unit, Lk, D)
    v: np.ndarray,  # (*unit, Lk, Dv)
    q0: int,
) -> tuple[Any, Any]:
    """out (*unit, G, rows, Dv), in scratch memory, and lse (*unit, G, rows, 1), or numbers that
    hold for all rows."""
    *outer, rows, _ = q.shape
    sinks, dropout = call.extras.sinks, call.extras.dropout
    sink = None if sinks is None else sinks.of(unit, rows)
    stacked = stack_rows(q, call.dtype) * call.scale
    total = scratch.take("total", (*stacked.shape[:-1], v.shape[-1]))
    softmax = OnlineSoftmax(total, scratch)
    for place in call.tiles(unit, q0, q0 + rows):
        k0, k1 = place.k0, place.k1
        tile = scratch.take("scores", (*stacked.shape[:-1], k1 - k0))
        keys = for_blas(k[..., k0:k1, :], call.dtype)
        np.matmul(stacked, keys.swapaxes(-1, -2), out=tile)
        by_head = tile.reshape(*outer, rows, k1 - k0)
        for score in call.extras.scores:
            score.apply(by_head, place)
        cut = call.masks.cut(place)
        if cut is not None:
            cut.fill(by_head, -np.inf)
        dropped = None if dropout is None else dropout.tile(place)
        softmax.update(tile, for_blas(v[..., k0:k1, :], call.dtype), cut, dropped)
    if softmax.maximum is None:
        if sink is None:
            return 0.0, -np.inf
        return 0.0, np.broadcast_to(sink, (*stacked.shape[:-1], 1)).reshape(*outer, rows, 1)
    out, lse = softmax.finish(sink, 1.0 if dropout is None else dropout.factor)
    return out.reshape(*outer, rows, v.shape[-1]), lse.reshape(*outer, rows, 1)
