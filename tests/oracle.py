"""What attention means, in float64 and without tiles: the yardstick that shares no code with the package.

`exact`, `forward`, `backward` are the definition, one (batch, head) at a time, whole rows, sums
over visible pairs only. `honest.py` has the second yardstick, what the obvious code in the inputs'
dtype makes of it, `rule_t.py` the rule that compares, and `oracle_varlen.py` both for packed
sequences.

Arrays are (*B, H, L, D); k and v may have batch axes of extent 1; their heads divide those of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.honest import distance, finite_part, low_precision, unbroadcast, visible
from tests.rule_t import FORWARD, GRADIENT, check, check_all, check_lse, eps, floor_of, score_step

__all__ = [
    "FORWARD",
    "GRADIENT",
    "Exact",
    "backward",
    "check",
    "check_all",
    "check_lse",
    "distance",
    "eps",
    "exact",
    "finite_part",
    "floor_of",
    "forward",
    "low_precision",
    "score_step",
    "unbroadcast",
    "visible",
]


def _product(weights: np.ndarray, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """`weights @ x` over seen pairs only: 0 * NaN of an unseen pair is not even formed."""
    if np.isfinite(x).all() and np.isfinite(weights).all():
        return weights @ x
    rows = [weights[i, seen[i]] @ x[seen[i]] for i in range(len(weights))]
    return np.array(rows).reshape(len(weights), x.shape[-1])


@dataclass
class _Terms:
    """What one (batch, head) adds to its scores, and what becomes of its weights.

    Parameters
    ----------
    seen
        bool (Lq, Lk).
    far
        ALiBi's distance, (Lq, Lk).
    kept
        Dropout's factor on each weight, 0 or 1/(1-p), (Lq, Lk).
    place
        (b, h, i, j) for the score expression.
    """

    scale: float
    softcap: float | None
    score_mod: Any
    place: tuple[Any, ...]
    bias: np.ndarray
    slope: float
    far: np.ndarray
    seen: np.ndarray
    sink: float
    kept: np.ndarray


class _Head:
    """One (batch, head): q (Lq, D), k (Lk, D), v (Lk, Dv) in float64."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, terms: _Terms) -> None:
        self.q, self.k, self.v, self.terms = q, k, v, terms
        seen = terms.seen
        scores = terms.scale * (q @ k.T)
        self.tanh = None if terms.softcap is None else np.tanh(scores / terms.softcap)
        if terms.softcap is not None:
            scores = terms.softcap * self.tanh
        self.bend, self.partials = None, []
        if terms.score_mod is not None:
            self.bend, self.partials = terms.score_mod.derivatives(scores, *terms.place)
            scores = terms.score_mod.value(scores, *terms.place)
        scores = scores + terms.bias
        if terms.slope:
            scores = scores - terms.slope * terms.far
        scores = np.where(seen, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True, initial=terms.sink)
        safe = np.where(top == -np.inf, 0, top)
        exps = np.where(seen, np.exp(scores - safe), 0)
        sink = np.exp(terms.sink - safe)
        total = exps.sum(axis=-1, keepdims=True) + sink
        self.weights = np.where(seen, exps / np.where(total == 0, 1, total), 0)
        self.sink_weight = (sink / np.where(total == 0, 1, total))[:, 0]
        self.lse = (np.log(total) + top)[:, 0]
        self.out = _product(self.weights * terms.kept, v, seen)

    def backward(self, dout: np.ndarray, dlse: np.ndarray) -> dict[str, Any]:
        """Gradients of q, k, v, the bias as if it were full, the slope, the sink, and the score's
        parameters (a list of places and their terms)."""
        seen, weights, terms = self.terms.seen, self.weights, self.terms
        dweights = (dout @ self.v.T) * terms.kept
        # An infinite bias of -inf has weight 0 for certain, whatever its key's value is.
        delta = np.where(seen, weights * dweights, 0).sum(axis=-1) - dlse
        dscores = np.where(seen, weights * (dweights - delta[:, None]), 0)
        result: dict[str, Any] = {
            "bias": dscores,
            "alibi_slopes": -np.where(seen, dscores * terms.far, 0).sum(),
            "sinks": -(self.sink_weight * delta).sum(),
            "score_params": [
                (name, at, np.where(seen, dscores * part, 0)) for name, at, part in self.partials
            ],
        }
        for factor in self._slopes():
            dscores = np.where(seen, dscores * factor, 0)
        return result | {
            "q": terms.scale * _product(dscores, self.k, seen),
            "k": terms.scale * _product(dscores.T, self.q, seen.T),
            "v": _product((weights * terms.kept).T, dout, seen.T),
        }

    def _slopes(self) -> list[np.ndarray]:
        """Derivatives of the final score in scale * q @ k.T, last step first."""
        slopes = [] if self.bend is None else [self.bend]
        return slopes if self.tanh is None else [*slopes, 1 - self.tanh**2]

    def gross(self, dout: np.ndarray, dlse: np.ndarray) -> dict[str, Any]:
        """`out` and gradients if no term cancelled another; NaN and inf count as 0."""
        weights, terms = finite_part(self.weights), self.terms
        q, k, v, dout, dlse = (abs(finite_part(x)) for x in (self.q, self.k, self.v, dout, dlse))
        dweights = (dout @ v.T) * terms.kept
        delta = (weights * dweights).sum(axis=-1) + dlse
        dscores = weights * (dweights + delta[:, None])
        result: dict[str, Any] = {
            "out": (weights * terms.kept) @ v,
            "v": (weights * terms.kept).T @ dout,
            "bias": dscores,
            "alibi_slopes": (dscores * terms.far).sum(),
            "sinks": (finite_part(self.sink_weight) * delta).sum(),
            "score_params": [
                (name, at, dscores * abs(finite_part(part))) for name, at, part in self.partials
            ],
        }
        for factor in self._slopes():
            dscores = dscores * abs(finite_part(factor))
        scale = abs(terms.scale)
        return result | {"q": scale * dscores @ k, "k": scale * dscores.T @ q}

    def inherited(self, dout: np.ndarray) -> dict[str, Any]:
        """What a relative error of at most 1 in every element of `out` changes in each gradient.

        Roundings of a row's elements are independent and uniform: their sum stays within four
        standard deviations, and within the sum of their sizes.
        """
        weights, terms = finite_part(self.weights), self.terms
        parts = finite_part(dout) * finite_part(self.out)
        spread = 4 / math.sqrt(3) * np.sqrt((parts**2).sum(axis=-1))
        delta = np.minimum(abs(parts).sum(axis=-1), spread)
        dscores = weights * delta[:, None]
        result: dict[str, Any] = {
            "bias": dscores,
            "sinks": (finite_part(self.sink_weight) * delta).sum(),
            "score_params": [
                (name, at, dscores * abs(finite_part(part))) for name, at, part in self.partials
            ],
        }
        for factor in self._slopes():
            dscores = dscores * abs(finite_part(factor))
        q, k = (abs(finite_part(x)) * abs(terms.scale) for x in (self.q, self.k))
        return result | {"q": dscores @ k, "k": dscores.T @ q}


def _full(x: Any, otherwise: float, shape: tuple[int, ...]) -> np.ndarray:
    """`x` in float64, or a constant, as a view of this shape."""
    return np.broadcast_to(otherwise if x is None else np.asarray(x).astype(np.float64), shape)


def _heads(q: Any, k: Any, v: Any, options: dict[str, Any], visit: Callable[..., None]) -> None:
    """Call `visit(index, {"k": its index, "v": its index}, head)` for every (batch, query head)."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    options = dict(options)
    names = ("scale", "softcap", "alibi_slopes", "score_mod", "bias", "sinks", "mask", "keep")
    scale, softcap, slopes, score_mod, bias, sinks, mask, keep = (
        options.pop(name, None) for name in names
    )
    p, first_batch = options.pop("dropout_p", 0.0), options.pop("first_batch", 0)
    rows, (len_q, len_k) = q.shape[:-2], (q.shape[-2], k.shape[-2])
    seen = visible(len_q, len_k, **options)
    far = distance(len_q, len_k, options.get("q_offset"))
    full = (*rows, len_q, len_k)
    mask = np.broadcast_to(True if mask is None else mask, full)
    keep = np.broadcast_to(True if keep is None else keep, full)
    bias = _full(bias, 0.0, full)
    slopes, sinks = _full(slopes, 0.0, rows), _full(sinks, -np.inf, rows)
    score_mod = None if score_mod is None else score_mod.in_dtype(np.float64)
    i, j = np.arange(len_q)[:, None], np.arange(len_k)
    with np.errstate(all="ignore"):
        for flat, index in enumerate(np.ndindex(rows)):
            group = q.shape[-3] // k.shape[-3]
            at = {
                name: (
                    *(min(b, n - 1) for b, n in zip(index[:-1], x.shape, strict=False)),
                    index[-1] // group,
                )
                for name, x in (("k", k), ("v", v))
            }
            terms = _Terms(
                scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
                softcap=softcap,
                score_mod=score_mod,
                place=(first_batch + flat // rows[-1], index[-1], i, j),
                bias=bias[index],
                slope=float(slopes[index]),
                far=far,
                seen=seen & mask[index],
                sink=float(sinks[index]),
                kept=keep[index] / (1.0 - p),
            )
            visit(index, at, _Head(q[index], k[at["k"]], v[at["v"]], terms))


@dataclass
class Exact:
    """The float64 results of one call.

    `gross` holds, for "out" and every gradient, the sum of its terms without their signs: the
    yardstick of how much of a float32 rounding error a result can inherit although little of the
    terms is left after they cancel. `inherited` holds how much of a relative rounding error of `out`
    a gradient inherits at most. `pairs` is the number of scores, hidden ones included; `dropped`
    tells whether there was dropout.
    """

    out: np.ndarray
    lse: np.ndarray
    grads: dict[str, np.ndarray]
    gross: dict[str, np.ndarray]
    inherited: dict[str, np.ndarray]
    pairs: int
    dropped: bool = False


def exact(q: Any, k: Any, v: Any, dout: Any = None, *, dlse: Any = None, **options: Any) -> Exact:
    """Results in float64, gradients in their arguments' shapes (without `dout` only "gross" of
    "out").

    Options as in the public API: causal, window, q_offset, scale, softcap, alibi_slopes, bias,
    sinks, dropout_p. `mask` and `keep` (the weights that dropout keeps) are bool arrays that
    broadcast to (*B, H, Lq, Lk), `score_mod` a `scores.Twin`; `first_batch` is the batch number
    that the twin sees for the first entry. Gradients of score parameters are named "score_" +
    name.
    """
    heads, full = q.shape[:-2], (*q.shape[:-1], k.shape[-2])
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape}
    by_head = {"alibi_slopes": heads, "sinks": heads, "bias": full}
    given = {name: shape for name, shape in by_head.items() if options.get(name) is not None}
    if options.get("score_mod") is not None:
        shapes |= {f"score_{n}": x.shape for n, x in options["score_mod"].arrays().items()}
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full(q.shape[:-1], -np.inf)
    grads, gross, inherited = (
        {name: np.zeros(shape) for name, shape in {**shapes, **given, "out": out.shape}.items()}
        for _ in range(3)
    )
    del grads["out"]
    dout64 = np.zeros(out.shape) if dout is None else np.asarray(dout).astype(np.float64)
    dlse64 = np.zeros(lse.shape) if dlse is None else np.asarray(dlse).astype(np.float64)

    def visit(index: tuple[int, ...], at: dict[str, Any], head: _Head) -> None:
        out[index], lse[index] = head.out, head.lse
        tables = [(gross, head.gross(dout64[index], dlse64[index]))]
        if dout is not None:
            tables.append((grads, head.backward(dout64[index], dlse64[index])))
            tables.append((inherited, head.inherited(dout64[index])))
        for table, values in tables:
            for name, where, value in values.pop("score_params"):
                where = tuple(np.broadcast_to(x, value.shape) for x in where)
                np.add.at(table[f"score_{name}"], where, value)
            for name, value in values.items():
                if name in table:
                    table[name][at.get(name, index)] += value

    _heads(q, k, v, options, visit)
    for table in (grads, gross, inherited):
        for name in given:
            table[name] = unbroadcast(table[name], np.shape(options[name]))
    pairs, dropped = lse.size * k.shape[-2], options.get("keep") is not None
    return Exact(out, lse, grads, gross, inherited, pairs, dropped)


def forward(q: Any, k: Any, v: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """out, lse in float64."""
    result = exact(q, k, v, **options)
    return result.out, result.lse


def backward(dout: Any, q: Any, k: Any, v: Any, **options: Any) -> dict[str, np.ndarray]:
    """Gradients in float64 of everything that was given; options and `dlse` as in `exact`."""
    return exact(q, k, v, dout, **options).grads
