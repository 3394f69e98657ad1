"""Attention backward on NumPy arrays: weights recomputed tile by tile from the saved log-sum-exp.

    P = exp(s - lse)     dP = dO V^T * Z     delta = rowsum(dO * O) - dlse
    dS = P (dP - delta)
    dV = (P Z)^T dO      dQ = scale dS K     dK = scale dS^T Q

Z is 1, and with dropout 0 or 1 / (1 - p). A pair that the mask hides has P = dS = 0, set and not
multiplied: NaN in hidden places must reach nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ._cpu_bits import overwrite
from ._cpu_masks import Cut
from ._cpu_place import Place, Unit
from ._cpu_products import Scratch, for_blas, stack_rows, visible_matmul
from ._cpu_rows import Dense, Rows
from ._cpu_sums import KeySum, Turns
from ._cpu_threads import run, threads_for
from ._cpu_tiles import Call, Extras, Shape, accumulator
from ._options import Options
from ._order import empty_like_order


@dataclass(frozen=True)
class Arrays:
    """A call and its arrays, whose outer axes are those of the call's shape; a gradient that nobody
    asked for is None."""

    call: Call
    q: Rows  # (*outer, G, Lq, D)
    k: Rows  # (*outer, Lk, D)
    v: Rows  # (*outer, Lk, Dv)
    dout: Rows  # (*outer, G, Lq, Dv)
    out: Rows  # (*outer, G, Lq, Dv)
    lse: Rows  # (*outer, G, Lq, 1)
    dlse: Rows | None  # (*outer, G, Lq, 1)
    dq: Rows | None  # (*outer, G, Lq, D), written once per row tile
    dk: KeySum | None
    dv: KeySum | None


@dataclass
class _Operands:
    """One unit's operands and sums."""

    call: Call
    scratch: Scratch
    arrays: Arrays
    unit: Unit
    k: np.ndarray  # (*unit, Lk, D)
    v: np.ndarray  # (*unit, Lk, Dv)
    dk: np.ndarray | None  # (*unit, Lk, D), a sum in the accumulator's dtype
    dv: np.ndarray | None  # (*unit, Lk, Dv), the same
    parts: list[Any]  # of the options' gradients

    @classmethod
    def of(cls, arrays: Arrays, unit: Unit, scratch: Scratch) -> _Operands:
        call, place = arrays.call, unit.place
        k, v = (call.whole(x.get(place, 0, call.shape.len_k)) for x in (arrays.k, arrays.v))
        dk, dv = (None if x is None else x.begin(place) for x in (arrays.dk, arrays.dv))
        return cls(call, scratch, arrays, unit, k, v, dk, dv, call.extras.begin(unit))

    def end(self) -> None:
        """Add the sums to the gradients; units take turns."""
        for total, part in ((self.arrays.dk, self.dk), (self.arrays.dv, self.dv)):
            if total is not None and part is not None:
                total.end(self.unit.place, part)
        self.call.extras.end(self.unit, self.parts)


@dataclass
class _Rows:
    """A row tile's operands, the group's heads stacked, in the accumulator's dtype."""

    q: np.ndarray  # (*unit, G * rows, D), scaled
    dout: np.ndarray  # (*unit, G * rows, Dv), times dropout's factor
    delta: np.ndarray  # (*unit, G * rows, 1)
    lse: np.ndarray  # (*unit, G * rows, 1)
    dq: np.ndarray | None  # (*unit, G * rows, D), sum of dS K without the scale

    @classmethod
    def of(cls, own: _Operands, q0: int, q1: int) -> _Rows:
        arrays, call, scratch, place = own.arrays, own.call, own.scratch, own.unit.place
        q = stack_rows(arrays.q.get(place, q0, q1), call.dtype) * call.scale
        dout = stack_rows(arrays.dout.get(place, q0, q1), call.dtype)
        product = scratch.take("part", dout.shape)
        out = stack_rows(arrays.out.get(place, q0, q1), call.dtype)
        np.multiply(dout, out, out=product)
        delta = product.sum(axis=-1, keepdims=True)
        if not np.isfinite(delta).all():
            # A row without keys has out = 0; NaN in its dout is nobody's, a sink's neither.
            product[out == 0] = 0
            delta = product.sum(axis=-1, keepdims=True)
        if arrays.dlse is not None:
            delta -= arrays.dlse.get(place, q0, q1).reshape(delta.shape)
        lse = arrays.lse.get(place, q0, q1).reshape(delta.shape)
        # A row without weights: exp(s - 0) is 0 for its scores of -inf, where s - lse would be -inf
        # + inf.
        lse = np.where(np.isneginf(lse), 0, lse)
        dropout = call.extras.dropout
        if dropout is not None:
            dout = dout * dropout.factor
        dq = None if arrays.dq is None else scratch.take("dq", q.shape)
        return cls(q, dout, delta, lse, dq)


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
        Any of "q", "k", "v", "bias", "alibi_slopes", "sinks", and names of arrays that `score_mod`
        has as parameters.
    grads_out
        Arrays to write "q", "k", "v" to; missing or None ones are allocated in the memory order of
        their argument.

    Returns
    -------
    name -> gradient, for the names in `wrt`; each has the shape and dtype of its argument. Those of
    score parameters are a dict of their own, "score_params".
    """
    shape, dtype = Shape.of(q, k, v), accumulator(q.dtype)
    extras = Extras.of(options, shape.axes, dtype, wrt)
    call = Call.of(shape, extras)
    grads = buffers_of({"q": q, "k": k, "v": v}, wrt, grads_out)
    if lse.size:
        rows, spread = shape.group_rows, shape.spread
        sums = {n: KeySum(Dense(grads[n]), shape.outer, dtype) for n in ("k", "v") if n in grads}
        arrays = Arrays(
            call,
            q=Dense(rows(q)),
            k=Dense(spread(k)),
            v=Dense(spread(v)),
            dout=Dense(rows(dout)),
            out=Dense(rows(out)),
            lse=Dense(rows(lse)[..., None]),
            dlse=None if dlse is None else Dense(rows(dlse)[..., None]),
            dq=Dense(rows(grads["q"])) if "q" in grads else None,
            dk=sums.get("k"),
            dv=sums.get("v"),
        )
        differentiate([arrays], dtype, len(list(call.units())), call.pairs())
        for total in sums.values():
            total.finish()
    return grads | extras.gradients()


def buffers_of(
    arguments: Mapping[str, np.ndarray],
    wrt: Collection[str],
    grads_out: Mapping[str, np.ndarray | None] | None,
) -> dict[str, np.ndarray]:
    """Zeros for the gradients of q, k, v that are wanted, in the caller's arrays if given."""
    grads: dict[str, np.ndarray] = {}
    for name, argument in arguments.items():
        if name in wrt:
            buffer = (grads_out or {}).get(name)
            if buffer is None:
                buffer = empty_like_order(argument.shape, argument.dtype, argument)
            buffer[...] = 0
            grads[name] = buffer
    return grads


# Units that one thread does, one after the other, each with its number.
_Item: TypeAlias = list[tuple[int, Arrays, Unit]]


def differentiate(
    parts: Iterable[Arrays], dtype: np.dtype, units: int, pairs: int, *, packed: bool = False
) -> None:
    """Add up the gradients of all parts.

    Each unit is one thread's: the sums over its rows have one order, however many there are.

    Parameters
    ----------
    parts
        With the same Extras, whose sums they share.
    dtype
        The accumulator's.
    units, pairs
        About how many units and how many pairs of query and key there are.
    packed
        The parts hold packed sequences.
    """
    turns = Turns()
    items, most = _owned(parts, packed)

    def worker(stopped: Callable[[], bool]) -> Callable[[_Item], None]:
        scratch = Scratch(dtype)

        def whole(item: _Item) -> None:
            for index, arrays, unit in item:
                own = _Operands.of(arrays, unit, scratch)
                for q0, q1 in arrays.call.row_tiles():
                    if stopped():
                        return
                    _backward_rows(own, q0, q1)
                turns.take(index, own.end)

        return whole

    run(items, worker, threads_for(units if most is None else most, pairs))


def _owned(parts: Iterable[Arrays], packed: bool) -> tuple[Iterator[_Item], int | None]:
    """All units, those of one owner together; and the number of owners, None if there are none.

    Numbers follow the order in which units are handed out: then no sum waits long for its turn.
    """
    every = ((arrays, unit) for arrays in parts for unit in arrays.call.units())
    first = next(every, None)
    if first is None:
        return iter(()), None
    units = itertools.chain((first,), every)

    def owner(arrays: Arrays, unit: Unit) -> tuple[int, ...] | None:
        return arrays.call.extras.owner(unit, packed)

    if owner(*first) is None:
        return ([(index, *unit)] for index, unit in enumerate(units)), None
    owned: dict[Any, list[tuple[Arrays, Unit]]] = {}
    for arrays, unit in units:
        owned.setdefault(owner(arrays, unit), []).append((arrays, unit))
    numbers = itertools.count()
    return ([(next(numbers), *unit) for unit in group] for group in owned.values()), len(owned)


def _backward_rows(own: _Operands, q0: int, q1: int) -> None:
    """One tile of rows against all keys that it sees."""
    unit, sinks = own.unit, own.call.extras.sinks
    tiles = list(own.call.tiles(unit, q0, q1))
    if not tiles and sinks is None:
        return
    rows = _Rows.of(own, q0, q1)
    if sinks is not None:
        sinks.backward(rows.lse, rows.delta, Place(unit, q0, q1, 0, 0), own.parts[-1])
    for place in tiles:
        _backward_tile(own, rows, place, place is tiles[0])
    if tiles and rows.dq is not None and own.arrays.dq is not None:
        rows.dq *= own.call.scale
        *outer, dim = rows.dq.shape
        by_head = rows.dq.reshape(*outer[:-1], -1, q1 - q0, dim)
        own.arrays.dq.put(unit.place, q0, q1, by_head)


def _backward_tile(own: _Operands, rows: _Rows, place: Place, first: bool) -> None:
    """Add one tile's part to dq (set there by the first tile), dk, dv and the options' gradients."""
    call, scratch = own.call, own.scratch
    here = np.s_[..., place.k0 : place.k1, :]
    keys, values = for_blas(own.k[here], call.dtype), for_blas(own.v[here], call.dtype)
    cut = call.masks.cut(place)
    weights, saved = _weights(own, rows, place, keys, cut)
    by_head = (*rows.q.shape[:-2], -1, place.q1 - place.q0, place.k1 - place.k0)

    dropout = call.extras.dropout
    kept, dropped = weights, None
    if dropout is not None:
        dropped = dropout.tile(place).reshape(weights.shape)
        kept = scratch.take("kept", weights.shape)
        np.copyto(kept, weights)
        overwrite(kept, 0, dropped)
    if own.dv is not None:
        part = scratch.take("part", values.shape)
        own.dv[here] += visible_matmul(
            kept.swapaxes(-1, -2), rows.dout, cut, out=part, transposed=True
        )

    grads = scratch.take("grads", weights.shape)
    np.matmul(rows.dout, values.swapaxes(-1, -2), out=grads)
    if dropped is not None:
        overwrite(grads, 0, dropped)
    grads -= rows.delta
    grads *= weights
    if cut is not None:
        cut.fill(grads.reshape(by_head), 0)
    scores = zip(call.extras.scores, saved, own.parts, strict=False)
    for score, memory, sums in reversed(list(scores)):
        score.backward(grads.reshape(by_head), memory, place, sums)
    if rows.dq is not None:
        if first:
            visible_matmul(grads, keys, cut, out=rows.dq)
        else:
            part = scratch.take("part", rows.dq.shape)
            rows.dq += visible_matmul(grads, keys, cut, out=part)
    if own.dk is not None:
        part = scratch.take("part", keys.shape)
        own.dk[here] += visible_matmul(
            grads.swapaxes(-1, -2), rows.q, cut, out=part, transposed=True
        )


def _weights(
    own: _Operands, rows: _Rows, place: Place, keys: np.ndarray, cut: Cut | None
) -> tuple[np.ndarray, list[Any]]:
    """A tile of the softmax's weights P (*unit, G * rows, keys), and what the scores recorded."""
    weights = own.scratch.take("scores", (*rows.q.shape[:-1], keys.shape[-2]))
    by_head = weights.reshape(*rows.q.shape[:-2], -1, place.q1 - place.q0, keys.shape[-2])
    np.matmul(rows.q, keys.swapaxes(-1, -2), out=weights)
    saved = [score.record(by_head, place) for score in own.call.extras.scores]
    weights -= rows.lse
    # s <= lse but for rounding; at logits of 1e11 that is thousands, whose exp would overflow.
    if not weights.max() <= 1e-3:
        np.minimum(weights, 0, out=weights)
    np.exp(weights, out=weights)
    if cut is not None:
        cut.fill(by_head, 0)
    return weights, saved
