"""Attention backward on NumPy arrays: weights recomputed tile by tile from the saved log-sum-exp.

    P = exp(s - lse)     dP = dO V^T      delta = rowsum(dO * O) - dlse
    dS = P (dP - delta)
    dV = P^T dO          dQ = scale dS K      dK = scale dS^T Q

A pair that the mask hides has P = dS = 0, set and not multiplied: NaN in hidden places must reach
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ._cpu_scores import Alibi, Place
from ._cpu_threads import run, threads_for
from ._cpu_tiles import Call, for_blas, stack_rows, units, visible_matmul
from ._options import Options
from ._order import empty_like_order


@dataclass
class _Unit:
    """One unit's operands and sums; a gradient that nobody asked for is None."""

    index: int
    place: tuple[slice, ...]
    q: np.ndarray  # (*unit, G, Lq, D)
    k: np.ndarray  # (*unit, Lk, D)
    v: np.ndarray  # (*unit, Lk, Dv)
    dout: np.ndarray  # (*unit, G, Lq, Dv)
    out: np.ndarray  # (*unit, G, Lq, Dv)
    lse: np.ndarray  # (*unit, G, Lq)
    dlse: np.ndarray | None  # (*unit, G, Lq)
    dq: np.ndarray | None  # (*unit, G, Lq, D), the caller's: written once per row tile
    dk: np.ndarray | None  # (*unit, Lk, D), a sum in the accumulator's dtype
    dv: np.ndarray | None  # (*unit, Lk, Dv), the same


@dataclass
class _Rows:
    """A row tile's operands, the group's heads stacked, in the accumulator's dtype."""

    q0: int
    q1: int
    q: np.ndarray  # (*unit, G * rows, D), scaled
    dout: np.ndarray  # (*unit, G * rows, Dv)
    delta: np.ndarray  # (*unit, G * rows, 1)
    lse: np.ndarray  # (*unit, G * rows, 1)
    dq: np.ndarray | None  # (*unit, G * rows, D), sum of dS K without the scale

    @classmethod
    def of(cls, call: Call, unit: _Unit, q0: int, q1: int) -> _Rows:
        cut = np.s_[..., q0:q1, :]
        q = stack_rows(unit.q[cut], call.dtype) * call.scale
        dout = stack_rows(unit.dout[cut], call.dtype)
        product = call.scratch.take("part", dout.shape)
        np.multiply(dout, stack_rows(unit.out[cut], call.dtype), out=product)
        delta = product.sum(axis=-1, keepdims=True)
        if unit.dlse is not None:
            delta -= unit.dlse[..., q0:q1].reshape(delta.shape)
        lse = unit.lse[..., q0:q1].reshape(delta.shape)
        # A row without weights: exp(s - 0) is 0 for its scores of -inf, where s - lse would be -inf
        # + inf.
        lse = np.where(np.isneginf(lse), 0, lse)
        dq = None if unit.dq is None else call.scratch.take("dq", q.shape)
        return cls(q0, q1, q, dout, delta, lse, dq)


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
        Arrays to write "q", "k", "v" to; missing or None ones are allocated in the memory order of
        their argument.

    Returns
    -------
    name -> gradient, for the names in `wrt`; each has the shape and dtype of its argument.
    """
    call = Call.of(q, k, v, options)
    grads: dict[str, np.ndarray] = {}
    for name, argument in (("q", q), ("k", k), ("v", v)):
        if name in wrt:
            buffer = (grads_out or {}).get(name)
            if buffer is None:
                buffer = empty_like_order(argument.shape, argument.dtype, argument)
            grads[name] = buffer
    for grad in grads.values():
        grad[...] = 0
    if lse.size and call.shape.len_k:
        _backward_units(call, dout, q, k, v, out, lse, dlse, grads)
    if "alibi_slopes" in wrt:
        with np.errstate(all="ignore"):
            grads["alibi_slopes"] = next(s for s in call.scores if isinstance(s, Alibi)).gradient()
    return grads


def _backward_units(
    call: Call,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dlse: np.ndarray | None,
    grads: dict[str, np.ndarray],
) -> None:
    """All units, each by one thread: the sums over its rows have one order, however many there are.

    A call of one unit leaves its products to the threads of BLAS.
    """
    shape, rows = call.shape, call.shape.group_rows
    sums: dict[str, _KeySum] = {
        n: _KeySum(grads[n], shape.outer, call.dtype) for n in ("k", "v") if n in grads
    }
    all_k, all_v = shape.spread(k), shape.spread(v)
    places = list(units(shape.outer, call.tiling.heads))

    def items() -> Iterator[_Unit]:
        for index, place in enumerate(places):
            own = {name: total.begin(place) for name, total in sums.items()}
            yield _Unit(
                index,
                place,
                q=rows(q)[place],
                k=call.whole(all_k[place]),
                v=call.whole(all_v[place]),
                dout=rows(dout)[place],
                out=rows(out)[place],
                lse=rows(lse)[place],
                dlse=None if dlse is None else rows(dlse)[place],
                dq=rows(grads["q"])[place] if "q" in grads else None,
                dk=own.get("k"),
                dv=own.get("v"),
            )

    def worker(stopped: Callable[[], bool]) -> Callable[[_Unit], None]:
        own = call.own()

        def whole(unit: _Unit) -> None:
            for q0, q1 in own.row_tiles():
                if stopped():
                    return
                _backward_rows(own, unit, q0, q1)
            for name, part in (("k", unit.dk), ("v", unit.dv)):
                if part is not None:
                    sums[name].end(unit.index, unit.place, part)

        return whole

    run(items(), worker, threads_for(len(places), call.pairs()))
    for total in sums.values():
        total.finish()


class _KeySum:
    """Where the parts of dk or dv are added up.

    In the gradient itself when its dtype is wide enough and every unit has keys of its own. A
    narrow gradient gets one wide sum per unit; keys that several units share (k or v broadcast over
    a batch axis) one for all of them, to which the units' parts are added in the units' order,
    whichever thread is done first.
    """

    def __init__(self, grad: np.ndarray, outer: tuple[int, ...], dtype: np.dtype) -> None:
        """`grad` holds zeros."""
        self.grad, self.outer, self.dtype = grad, outer, dtype
        self.in_place = grad.dtype == dtype and grad.shape[:-2] == outer
        self.shared = None if grad.shape[:-2] == outer else np.zeros(grad.shape, dtype=dtype)
        self.lock = threading.Lock()
        self.waiting: dict[int, tuple[tuple[slice, ...], np.ndarray]] = {}
        self.added = 0

    def begin(self, place: tuple[slice, ...]) -> np.ndarray:
        """The array that a unit adds its tiles to."""
        if self.in_place:
            return self.grad[place]
        extents = (len(range(*cut.indices(n))) for cut, n in zip(place, self.outer, strict=True))
        return np.zeros((*extents, *self.grad.shape[-2:]), dtype=self.dtype)

    def end(self, index: int, place: tuple[slice, ...], part: np.ndarray) -> None:
        """Take the finished sum of the unit of this index."""
        if self.shared is not None:
            with self.lock:
                self.waiting[index] = place, part
                while self.added in self.waiting:
                    self._add(self.shared, *self.waiting.pop(self.added))
                    self.added += 1
        elif not self.in_place:
            self.grad[place] = part

    @staticmethod
    def _add(shared: np.ndarray, place: tuple[slice, ...], part: np.ndarray) -> None:
        axes = tuple(a for a, n in enumerate(shared.shape[:-2]) if n == 1)
        where = tuple(slice(0, 1) if a in axes else cut for a, cut in enumerate(place))
        shared[where] += part.sum(axis=axes, keepdims=True)

    def finish(self) -> None:
        """Round the shared sum, once."""
        if self.shared is not None:
            with np.errstate(all="ignore"):
                self.grad[...] = self.shared


def _backward_rows(call: Call, unit: _Unit, q0: int, q1: int) -> None:
    """One tile of rows against all keys that it sees."""
    tiles = list(call.key_tiles(q0, q1))
    if not tiles:
        return
    rows = _Rows.of(call, unit, q0, q1)
    for k0, k1 in tiles:
        _backward_tile(call, unit, rows, Place(unit.place, q0, q1, k0, k1), k0 == tiles[0][0])
    if rows.dq is not None and unit.dq is not None:
        rows.dq *= call.scale
        unit.dq[..., q0:q1, :] = rows.dq.reshape(*unit.q.shape[:-2], q1 - q0, unit.q.shape[-1])


def _backward_tile(call: Call, unit: _Unit, rows: _Rows, place: Place, first: bool) -> None:
    """Add one tile's part to dq, dk, dv and the scores' own gradients."""
    k0, k1 = place.k0, place.k1
    keys = for_blas(unit.k[..., k0:k1, :], call.dtype)
    values = for_blas(unit.v[..., k0:k1, :], call.dtype)
    by_head = (*unit.q.shape[:-2], place.q1 - place.q0, k1 - k0)
    cut = call.mask.cut(place.q0, place.q1, k0, k1)

    weights = call.scratch.take("scores", (*rows.q.shape[:-1], k1 - k0))
    np.matmul(rows.q, keys.swapaxes(-1, -2), out=weights)
    saved = [score.apply(weights.reshape(by_head), place) for score in call.scores]
    weights -= rows.lse
    # s <= lse but for rounding; at logits of 1e11 that is thousands, whose exp would overflow.
    if not weights.max() <= 1e-3:
        np.minimum(weights, 0, out=weights)
    np.exp(weights, out=weights)
    if cut is not None:
        cut.fill(weights.reshape(by_head), 0)
    if unit.dv is not None:
        part = call.scratch.take("part", values.shape)
        unit.dv[..., k0:k1, :] += visible_matmul(
            weights.swapaxes(-1, -2), rows.dout, cut, out=part, transposed=True
        )

    grads = call.scratch.take("grads", weights.shape)
    np.matmul(rows.dout, values.swapaxes(-1, -2), out=grads)
    grads -= rows.delta
    grads *= weights
    if cut is not None:
        cut.fill(grads.reshape(by_head), 0)
    for score, kept in zip(reversed(call.scores), reversed(saved), strict=True):
        score.backward(grads.reshape(by_head), kept, place)
    if rows.dq is not None:
        if first:
            visible_matmul(grads, keys, cut, out=rows.dq)
        else:
            part = call.scratch.take("part", rows.dq.shape)
            rows.dq += visible_matmul(grads, keys, cut, out=part)
    if unit.dk is not None:
        part = call.scratch.take("part", keys.shape)
        unit.dk[..., k0:k1, :] += visible_matmul(
            grads.swapaxes(-1, -2), rows.q, cut, out=part, transposed=True
        )
