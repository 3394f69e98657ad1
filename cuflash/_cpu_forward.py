"""Attention forward on NumPy arrays: the online softmax of FlashAttention, one BLAS tile at a time.

Never more of the Lq x Lk scores than one tile exists. Row tiles are independent; each walks its visible keys from
left to right and keeps, per row, the running maximum m, the running sum l of exp(s - m), and the unnormalised output.
"""

from __future__ import annotations

import numpy as np

from ._cpu_masks import Band
from ._cpu_scores import Alibi, Place, Softcap, scores_of
from ._cpu_tiles import (
    Scratch,
    Shape,
    Tiling,
    accumulator,
    for_blas,
    stack_rows,
    units,
    visible_matmul,
)
from ._options import Options
from ._order import empty_like_order


class OnlineSoftmax:
    """Running softmax-weighted mean of a stack of rows, over tiles of keys."""

    def __init__(self, total: np.ndarray, scratch: Scratch) -> None:
        """`total` (..., rows, Dv) is overwritten by the running output."""
        self.total = total
        self.scratch = scratch
        self.maximum: np.ndarray | None = None
        self.sum: np.ndarray | None = None

    def update(self, scores: np.ndarray, values: np.ndarray, keep: np.ndarray | None) -> None:
        """Take in a tile: `scores` (..., rows, keys) is used up, `values` (..., keys, Dv), `keep` (rows, keys)."""
        maximum = scores.max(axis=-1, keepdims=True)
        if self.maximum is not None:
            np.maximum(maximum, self.maximum, out=maximum)
        # -inf - -inf is NaN: a row that has seen no key yet subtracts 0, and all its weights are exp(-inf) = 0.
        shift = np.where(np.isneginf(maximum), 0, maximum)
        np.subtract(scores, shift, out=scores)
        weights = np.exp(scores, out=scores)
        total = weights.sum(axis=-1, keepdims=True)
        if self.maximum is None or self.sum is None:
            visible_matmul(weights, values, keep, out=self.total)
            self.sum = total
        else:
            rescale = np.exp(self.maximum - shift)
            part = self.scratch.take("part", self.total.shape)
            visible_matmul(weights, values, keep, out=part)
            self.total *= rescale
            self.total += part
            self.sum *= rescale
            self.sum += total
        self.maximum = maximum

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised output (in place of `total`) and lse (..., rows)."""
        assert self.maximum is not None and self.sum is not None
        empty = self.sum == 0
        self.total /= np.where(empty, 1, self.sum)
        lse = np.log(self.sum) + self.maximum
        return self.total, lse[..., 0]


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
        (*B, H, Lq, D), (*B, Hkv, Lk, D), (*B, Hkv, Lk, Dv); any strides; batch axes of k, v equal q's or 1.
    options
        The resolved options.
    out
        Where to write; allocated in q's memory order when None.

    Returns
    -------
    out (*B, H, Lq, Dv) in q's dtype, lse (*B, H, Lq) float32 (float64 for float64).
    """
    shape = Shape.of(q, k, v)
    dtype = accumulator(q.dtype)
    if out is None:
        out = empty_like_order((*q.shape[:-1], shape.dim_v), q.dtype, q)
    lse = np.empty(q.shape[:-1], dtype=dtype)
    if lse.size == 0 or shape.len_k == 0:
        out[...] = 0
        lse[...] = -np.inf
        return out, lse
    tiling = Tiling.of(shape)
    mask = Band(shape.len_k, options.q_offset, options.left, options.right)
    scores = scores_of(options, (*shape.outer, shape.group), dtype)
    scratch = Scratch(dtype)
    rows_q, rows_out, rows_lse = shape.group_rows(q), shape.group_rows(out), shape.group_rows(lse)
    all_k, all_v = shape.spread(k), shape.spread(v)
    # NaN, inf and overflow of the user's numbers are results here, not accidents worth a warning.
    with np.errstate(all="ignore"):
        for unit in units(shape.outer, tiling.heads):
            _forward_unit(
                rows_q[unit],
                for_blas(all_k[unit], dtype),
                for_blas(all_v[unit], dtype),
                rows_out[unit],
                rows_lse[unit],
                options.scale,
                mask,
                scores,
                tiling,
                scratch,
                unit,
            )
    return out, lse


def _forward_unit(
    q: np.ndarray,  # (*unit, G, Lq, D)
    k: np.ndarray,  # (*unit, Lk, D)
    v: np.ndarray,  # (*unit, Lk, Dv)
    out: np.ndarray,  # (*unit, G, Lq, Dv)
    lse: np.ndarray,  # (*unit, G, Lq)
    scale: float,
    mask: Band,
    scores: list[Softcap | Alibi],
    tiling: Tiling,
    scratch: Scratch,
    unit: tuple[slice, ...],
) -> None:
    """All rows of a unit."""
    len_q = q.shape[-2]
    for q0 in range(0, len_q, tiling.rows):
        q1 = min(q0 + tiling.rows, len_q)
        low, high = mask.keys(q0, q1)
        if low >= high:
            out[..., q0:q1, :] = 0
            lse[..., q0:q1] = -np.inf
            continue
        rows = stack_rows(q[..., q0:q1, :], k.dtype) * k.dtype.type(scale)
        softmax = OnlineSoftmax(scratch.take("total", (*rows.shape[:-1], v.shape[-1])), scratch)
        for k0 in range(low, high, tiling.keys):
            k1 = min(k0 + tiling.keys, high)
            tile = scratch.take("scores", (*rows.shape[:-1], k1 - k0))
            np.matmul(rows, k[..., k0:k1, :].swapaxes(-1, -2), out=tile)
            split = tile.reshape(*q.shape[:-2], q1 - q0, k1 - k0)
            place = Place(unit, q0, q1, k0, k1)
            for score in scores:
                score.apply(split, place)
            keep = mask.keep(q0, q1, k0, k1)
            if keep is not None:
                np.copyto(split, -np.inf, where=~keep)
                keep = np.tile(keep, (q.shape[-3], 1))
            softmax.update(tile, v[..., k0:k1, :], keep)
        total, total_lse = softmax.finish()
        out[..., q0:q1, :] = total.reshape(*q.shape[:-2], q1 - q0, v.shape[-1])
        lse[..., q0:q1] = total_lse.reshape(*q.shape[:-2], q1 - q0)
