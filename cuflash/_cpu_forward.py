"""Attention forward on NumPy arrays: the online softmax of FlashAttention, one BLAS tile at a time.

Never more of the Lq x Lk scores than one tile exists. Row tiles are independent; each walks its
visible keys from left to right and keeps, per row, the running maximum m, the running sum l of
exp(s - m), and the unnormalised output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from ._cpu_masks import Cut
from ._cpu_scores import Place
from ._cpu_threads import run, threads_for
from ._cpu_tiles import Call, Scratch, for_blas, stack_rows, units, visible_matmul
from ._options import Options
from ._order import empty_like_order

# A row tile of a unit: its place, its rows q0:q1, and all of the unit's k and v.
_Rows: TypeAlias = tuple[tuple[slice, ...], int, int, np.ndarray, np.ndarray]


class OnlineSoftmax:
    """Running softmax-weighted mean of a stack of rows, over tiles of keys."""

    def __init__(self, total: np.ndarray, scratch: Scratch) -> None:
        """`total` (..., rows, Dv) is where the running output lives; its contents do not matter."""
        self.total = total
        self.scratch = scratch
        self.maximum: np.ndarray | None = None
        self.sum: np.ndarray | None = None

    def update(self, scores: np.ndarray, values: np.ndarray, cut: Cut | None) -> None:
        """Take in a tile: `scores` (..., rows, keys) is used up, `values` (..., keys, Dv)."""
        maximum = row_maximum(scores)
        if self.maximum is not None:
            np.maximum(maximum, self.maximum, out=maximum)
        # -inf - -inf is NaN: a row that has seen no key yet subtracts 0, and all its weights are
        # exp(-inf) = 0.
        shift = np.where(np.isneginf(maximum), 0, maximum)
        np.subtract(scores, shift, out=scores)
        weights = np.exp(scores, out=scores)
        # As a product with ones the row sums run at the speed of BLAS, four times that of `sum`.
        ones = np.ones((weights.shape[-1], 1), dtype=weights.dtype)
        if self.maximum is None or self.sum is None:
            self.sum = np.matmul(weights, ones)
            visible_matmul(weights, values, cut, out=self.total)
        else:
            rescale = np.exp(self.maximum - shift)
            self.sum *= rescale
            self.sum += np.matmul(weights, ones)
            self.total *= rescale
            part = self.scratch.take("part", self.total.shape)
            self.total += visible_matmul(weights, values, cut, out=part)
        self.maximum = maximum

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised output (in place of `total`) and lse (..., rows)."""
        assert self.maximum is not None and self.sum is not None
        self.total /= np.where(self.sum == 0, 1, self.sum)
        lse = np.log(self.sum) + self.maximum
        return self.total, lse[..., 0]


def row_maximum(scores: np.ndarray) -> np.ndarray:
    """Maximum over the last axis of a contiguous array, which stays as an axis of 1; NaN if there
    is one.

    NumPy vectorises `argmax` along rows better than `max`, which takes twice as long.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    index = flat.argmax(axis=-1)
    return flat[np.arange(len(flat)), index].reshape(*scores.shape[:-1], 1)


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
    call = Call.of(q, k, v, options)
    shape = call.shape
    if out is None:
        out = empty_like_order((*q.shape[:-1], shape.dim_v), q.dtype, q)
    lse = np.empty(q.shape[:-1], dtype=call.dtype)
    if lse.size == 0 or shape.len_k == 0:
        out[...] = 0
        lse[...] = -np.inf
        return out, lse
    rows_q, rows_out, rows_lse = (shape.group_rows(x) for x in (q, out, lse))
    all_k, all_v = shape.spread(k), shape.spread(v)
    places = list(units(shape.outer, call.tiling.heads))
    tiles = list(call.row_tiles())

    def items() -> Iterator[_Rows]:
        for place in places:
            # Once per unit, also when several threads share its rows.
            unit_k, unit_v = call.whole(all_k[place]), call.whole(all_v[place])
            for q0, q1 in tiles:
                yield place, q0, q1, unit_k, unit_v

    def worker(stopped: Callable[[], bool]) -> Callable[[_Rows], None]:
        own = call.own()

        def rows(item: _Rows) -> None:
            place, q0, q1, unit_k, unit_v = item
            result = _forward_rows(own, place, rows_q[place][..., q0:q1, :], unit_k, unit_v, q0)
            rows_out[place][..., q0:q1, :], rows_lse[place][..., q0:q1] = result

        return rows

    run(items(), worker, threads_for(len(places) * len(tiles), call.pairs()))
    return out, lse


def _forward_rows(
    call: Call,
    unit: tuple[slice, ...],
    q: np.ndarray,  # (*unit, G, rows, D)
    k: np.ndarray,  # (*unit, Lk, D)
    v: np.ndarray,  # (*unit, Lk, Dv)
    q0: int,
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """out (*unit, G, rows, Dv), in scratch memory, and lse (*unit, G, rows)."""
    *outer, rows, _ = q.shape
    stacked = stack_rows(q, call.dtype) * call.scale
    total = call.scratch.take("total", (*stacked.shape[:-1], v.shape[-1]))
    softmax = OnlineSoftmax(total, call.scratch)
    for k0, k1 in call.key_tiles(q0, q0 + rows):
        tile = call.scratch.take("scores", (*stacked.shape[:-1], k1 - k0))
        keys = for_blas(k[..., k0:k1, :], call.dtype)
        np.matmul(stacked, keys.swapaxes(-1, -2), out=tile)
        by_head = tile.reshape(*outer, rows, k1 - k0)
        for score in call.scores:
            score.apply(by_head, Place(unit, q0, q0 + rows, k0, k1))
        cut = call.mask.cut(q0, q0 + rows, k0, k1)
        if cut is not None:
            cut.fill(by_head, -np.inf)
        softmax.update(tile, for_blas(v[..., k0:k1, :], call.dtype), cut)
    if softmax.maximum is None:
        return 0.0, -np.inf
    out, lse = softmax.finish()
    return out.reshape(*outer, rows, v.shape[-1]), lse.reshape(*outer, rows)
