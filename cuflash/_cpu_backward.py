"""Attention backward on NumPy arrays: weights recomputed tile by tile from the saved log-sum-exp.

    P = exp(s - lse)      dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      dQ = scale dS K      dK = scale dS^T Q
    delta = rowsum(dO * O) - dlse

A pair that the mask hides has P = dS = 0, set and not multiplied: NaN in a hidden place must reach nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

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


@dataclass
class _Unit:
    """One unit's operands and float32 (float64) sums; a sum that nobody asked for is None."""

    q: np.ndarray  # (*unit, G, Lq, D)
    k: np.ndarray  # (*unit, Lk, D), ready for BLAS
    v: np.ndarray  # (*unit, Lk, Dv), ready for BLAS
    dout: np.ndarray  # (*unit, G, Lq, Dv)
    out: np.ndarray  # (*unit, G, Lq, Dv)
    lse: np.ndarray  # (*unit, G, Lq)
    dlse: np.ndarray | None  # (*unit, G, Lq)
    dq: np.ndarray | None  # (*unit, G, Lq, D), the caller's: written once per row tile
    dk: np.ndarray | None  # (*unit, Lk, D)
    dv: np.ndarray | None  # (*unit, Lk, Dv)
    place: tuple[slice, ...]


def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    options: Options,
    *,
    dlse: np.ndarray | None = None,
    wrt: Collection[str] = ("q", "k", "v"),
    grads_out: Mapping[str, np.ndarray | None] | None = None,
) -> dict[str, np.ndarray]:
    """Gradients of `sum(out * dout) + sum(lse * dlse)`, in O(Lq + Lk) memory beside the results.

    Parameters
    ----------
    dout, q, k, v, out, lse
        As given to and returned by `forward`; any strides.
    options
        The same as in `forward`.
    dlse
        (*B, H, Lq), or None for 0.
    wrt
        Any of "q", "k", "v", "alibi_slopes".
    grads_out
        Arrays to write "q", "k", "v" to; missing or None ones are allocated in the memory order of their argument.

    Returns
    -------
    name -> gradient, for the names in `wrt`; each has the shape and dtype of its argument.
    """
    shape = Shape.of(q, k, v)
    dtype = accumulator(q.dtype)
    given = grads_out or {}
    grads: dict[str, np.ndarray] = {}
    for name, argument in (("q", q), ("k", k), ("v", v)):
        if name in wrt:
            buffer = given.get(name)
            grads[name] = (
                empty_like_order(argument.shape, argument.dtype, argument)
                if buffer is None
                else buffer
            )
    scores = scores_of(options, (*shape.outer, shape.group), dtype)
    # Sums that several units share, or whose dtype is too narrow to add in, live in an accumulator of their own.
    sums = {name: np.zeros(grads[name].shape, dtype=dtype) for name in ("k", "v") if name in grads}
    if lse.size == 0 or shape.len_k == 0:
        for grad in grads.values():
            grad[...] = 0
    else:
        with np.errstate(all="ignore"):
            _backward_units(
                dout, q, k, v, out, lse, options, dlse, grads.get("q"), sums, scores, shape, dtype
            )
            for name, total in sums.items():
                grads[name][...] = total
    if "alibi_slopes" in wrt:
        grads["alibi_slopes"] = next(s for s in scores if isinstance(s, Alibi)).gradient()
    return grads


def _backward_units(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    options: Options,
    dlse: np.ndarray | None,
    dq: np.ndarray | None,
    sums: dict[str, np.ndarray],
    scores: list[Softcap | Alibi],
    shape: Shape,
    dtype: np.dtype,
) -> None:
    """All units; those that share keys (k or v broadcast over a batch axis) add to the same sums, in order."""
    tiling = Tiling.of(shape)
    mask = Band(shape.len_k, options.q_offset, options.left, options.right)
    scratch = Scratch(dtype)
    rows = {
        name: None if x is None else shape.group_rows(x)
        for name, x in (
            ("q", q),
            ("dout", dout),
            ("out", out),
            ("lse", lse),
            ("dlse", dlse),
            ("dq", dq),
        )
    }
    all_k, all_v = shape.spread(k), shape.spread(v)
    for place in units(shape.outer, tiling.heads):
        own = {
            name: np.zeros((*all_k[place].shape[:-1], total.shape[-1]), dtype=dtype)
            for name, total in sums.items()
        }
        unit = _Unit(
            **{name: None if x is None else x[place] for name, x in rows.items()},
            k=for_blas(all_k[place], dtype),
            v=for_blas(all_v[place], dtype),
            dk=own.get("k"),
            dv=own.get("v"),
            place=place,
        )
        _backward_unit(unit, options.scale, mask, scores, tiling, scratch)
        for name, part in own.items():
            total = sums[name]
            shared = tuple(a for a, n in enumerate(total.shape[:-2]) if n == 1)
            where = tuple(slice(0, 1) if a in shared else cut for a, cut in enumerate(place))
            total[where] += part.sum(axis=shared, keepdims=True) if shared else part


def _backward_unit(
    unit: _Unit,
    scale: float,
    mask: Band,
    scores: list[Softcap | Alibi],
    tiling: Tiling,
    scratch: Scratch,
) -> None:
    """All rows of a unit."""
    dtype = unit.k.dtype
    len_q = unit.q.shape[-2]
    for q0 in range(0, len_q, tiling.rows):
        q1 = min(q0 + tiling.rows, len_q)
        low, high = mask.keys(q0, q1)
        if low >= high:
            if unit.dq is not None:
                unit.dq[..., q0:q1, :] = 0
            continue
        cut = np.s_[..., q0:q1, :]
        rows = stack_rows(unit.q[cut], dtype) * dtype.type(scale)
        dout = stack_rows(unit.dout[cut], dtype)
        delta = np.sum(dout * stack_rows(unit.out[cut], dtype), axis=-1, keepdims=True)
        lse = unit.lse[..., q0:q1].reshape(*delta.shape)
        if unit.dlse is not None:
            delta -= unit.dlse[..., q0:q1].reshape(*delta.shape)
        # A row without weights: exp(s - 0) is 0 for its scores of -inf, where s - lse would be -inf + inf.
        lse = np.where(np.isneginf(lse), 0, lse)
        dq = scratch.take("dq", rows.shape) if unit.dq is not None else None
        for k0 in range(low, high, tiling.keys):
            k1 = min(k0 + tiling.keys, high)
            place = Place(unit.place, q0, q1, k0, k1)
            _backward_tile(
                unit, rows, dout, delta, lse, dq, k0 == low, mask, scores, place, scratch
            )
        if dq is not None and unit.dq is not None:
            dq *= dtype.type(scale)
            unit.dq[cut] = dq.reshape(*unit.q.shape[:-2], q1 - q0, -1)


def _backward_tile(
    unit: _Unit,
    rows: np.ndarray,  # (*unit, G * rows, D), scaled
    dout: np.ndarray,  # (*unit, G * rows, Dv)
    delta: np.ndarray,  # (*unit, G * rows, 1)
    lse: np.ndarray,  # (*unit, G * rows, 1)
    dq: np.ndarray | None,  # (*unit, G * rows, D), unscaled sum
    first: bool,
    mask: Band,
    scores: list[Softcap | Alibi],
    place: Place,
    scratch: Scratch,
) -> None:
    """Add one tile's part to dq, dk, dv and the scores' own gradients."""
    q0, q1, k0, k1 = place.q0, place.q1, place.k0, place.k1
    keys, values = unit.k[..., k0:k1, :], unit.v[..., k0:k1, :]
    group = unit.q.shape[-3]
    split_shape = (*unit.q.shape[:-2], q1 - q0, k1 - k0)
    weights = scratch.take("scores", (*rows.shape[:-1], k1 - k0))
    np.matmul(rows, keys.swapaxes(-1, -2), out=weights)
    saved = [score.apply(weights.reshape(split_shape), place) for score in scores]
    weights -= lse
    # s <= lse but for rounding, which at logits of 1e11 is thousands: exp of that would overflow.
    np.minimum(weights, 0, out=weights)
    np.exp(weights, out=weights)
    keep = mask.keep(q0, q1, k0, k1)
    hidden = keep_t = None
    if keep is not None:
        keep = np.tile(keep, (group, 1))
        hidden, keep_t = ~keep, keep.T
        np.copyto(weights, 0, where=hidden)
    if unit.dv is not None:
        unit.dv[..., k0:k1, :] += visible_matmul(weights.swapaxes(-1, -2), dout, keep_t)
    grads = scratch.take("grads", weights.shape)
    np.matmul(dout, values.swapaxes(-1, -2), out=grads)
    grads -= delta
    grads *= weights
    if hidden is not None:
        np.copyto(grads, 0, where=hidden)
    for score, kept in zip(reversed(scores), reversed(saved), strict=True):
        score.backward(grads.reshape(split_shape), kept, place)
    if dq is not None:
        if first:
            visible_matmul(grads, keys, keep, out=dq)
        else:
            dq += visible_matmul(grads, keys, keep)
    if unit.dk is not None:
        unit.dk[..., k0:k1, :] += visible_matmul(grads.swapaxes(-1, -2), rows, keep_t)
