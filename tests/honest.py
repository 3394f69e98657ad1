"""The plain formula as a user would write it in the dtype of the inputs: what "no worse than the obvious code" means.

Matrix products and softmax are computed in float32 and rounded to that dtype; `rule_t.py` allows a
small multiple of the error that this makes. Nothing here shares code with the package.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def visible(
    len_q: int,
    len_k: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
) -> np.ndarray:
    """bool (len_q, len_k): may row i see key j?"""
    offset = len_k - len_q if q_offset is None else q_offset
    left, right = window or (None, None)
    # Python ints in object arrays: this stays right for any offset and window.
    i = np.arange(len_q).astype(object)[:, None] + offset
    j = np.arange(len_k).astype(object)[None, :]
    seen = np.ones((len_q, len_k), dtype=bool)
    if causal:
        seen &= (j <= i).astype(bool)
    if left is not None:
        seen &= (j >= i - left).astype(bool)
    if right is not None:
        seen &= (j <= i + right).astype(bool)
    return seen


def distance(len_q: int, len_k: int, q_offset: int | None) -> np.ndarray:
    """abs(d - j) of ALiBi, (len_q, len_k)."""
    offset = len_k - len_q if q_offset is None else q_offset
    return abs(np.arange(len_q)[:, None] + float(offset) - np.arange(len_k)[None, :])


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum `grad` over the axes that were broadcast from `shape`."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)


def finite_part(x: Any) -> np.ndarray:
    """`x` with NaN and inf replaced by 0."""
    return np.where(np.isfinite(x), x, np.zeros_like(x))


class _Plain:
    """The steps of one call on whole arrays, each result rounded to the dtype of q."""

    def __init__(self, q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
        self.dtype = q.dtype
        self.wide = np.dtype(np.float64 if q.dtype == np.float64 else np.float32).type
        options = dict(options)
        names = ("scale", "softcap", "alibi_slopes", "score_mod", "bias", "sinks", "mask", "keep")
        self.given = {name: options.pop(name, None) for name in names}
        self.p, self.first_batch = options.pop("dropout_p", 0.0), options.pop("first_batch", 0)
        self.scale = self.given["scale"]
        if self.scale is None:
            self.scale = 1 / math.sqrt(q.shape[-1])
        self.seen = visible(q.shape[-2], k.shape[-2], **options)
        if self.given["mask"] is not None:
            self.seen = self.seen & self.given["mask"]
        self.far = distance(q.shape[-2], k.shape[-2], options.get("q_offset"))
        self.group = max(1, q.shape[-3] // max(1, k.shape[-3]))
        self.q, self.k, self.v = (finite_part(x).astype(self.wide) for x in (q, k, v))
        self.kk, self.vv = (
            np.broadcast_to(np.repeat(x, self.group, axis=-3), (*q.shape[:-2], *x.shape[-2:]))
            for x in (self.k, self.v)
        )
        self.turn = (*range(q.ndim - 2), q.ndim - 1, q.ndim - 2)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """As an array of the inputs' dtype would hold it."""
        return np.asarray(x).astype(self.dtype).astype(self.wide)

    def given_wide(self, name: str) -> np.ndarray:
        """An option as an array of float32 (float64); NaN and +inf count as 0."""
        x = np.asarray(self.given[name]).astype(self.wide)
        return np.where(np.isneginf(x), x, finite_part(x))

    def place(self) -> tuple[Any, ...]:
        """(b, h, i, j) of every score."""
        *batch, heads, len_q, _ = self.q.shape
        b = np.arange(math.prod(batch)).reshape(*batch, 1, 1, 1) + self.first_batch
        h, i = np.arange(heads)[:, None, None], np.arange(len_q)[:, None]
        return b, h, i, np.arange(self.k.shape[-2])

    def forward(self) -> np.ndarray:
        """out, and what backward needs."""
        rounded, wide = self.rounded, self.wide
        scores = rounded(rounded(self.q @ self.kk.transpose(self.turn)) * wide(self.scale))
        self.slopes: list[np.ndarray] = []
        softcap, score_mod = self.given["softcap"], self.given["score_mod"]
        if softcap is not None:
            tanh = rounded(np.tanh(scores / wide(softcap)))
            scores = rounded(tanh * wide(softcap))
            self.slopes.insert(0, 1 - tanh**2)
        self.partials = []
        if score_mod is not None:
            score_mod, place = score_mod.in_dtype(wide), self.place()
            slope, self.partials = score_mod.derivatives(scores, *place)
            scores = rounded(score_mod.value(scores, *place))
            self.slopes.insert(0, slope)
        if self.given["bias"] is not None:
            scores = rounded(scores + self.given_wide("bias"))
        if self.given["alibi_slopes"] is not None:
            slopes = np.broadcast_to(self.given_wide("alibi_slopes"), self.q.shape[:-2])
            scores = rounded(scores - rounded(slopes[..., None, None] * self.far.astype(wide)))
        scores = np.where(self.seen, scores, -np.inf).astype(wide)
        sinks = wide(-np.inf) if self.given["sinks"] is None else self.given_wide("sinks")
        sinks = np.broadcast_to(sinks, self.q.shape[:-2])[..., None, None]
        top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sinks)
        safe = np.where(top == -np.inf, wide(0), top)
        exps, sink = np.exp(scores - safe), np.exp(sinks - safe)
        total = exps.sum(axis=-1, keepdims=True) + sink
        total = np.where(total == 0, wide(1), total)
        self.weights, self.sink_weights = rounded(exps / total), rounded(sink / total)
        self.kept = wide(1)
        if self.given["keep"] is not None:
            self.kept = np.where(self.given["keep"], wide(1 / (1 - self.p)), wide(0))
        self.dropped = rounded(self.weights * self.kept)
        return rounded(self.dropped @ self.vv)

    def backward(self, dout: Any, dlse: Any) -> dict[str, np.ndarray]:
        """Gradients of everything that was given, after `forward`."""
        rounded, wide = self.rounded, self.wide
        dout = finite_part(dout).astype(wide)
        dweights = rounded(rounded(dout @ self.vv.transpose(self.turn)) * self.kept)
        delta = rounded((dweights * self.weights).sum(axis=-1, keepdims=True))
        if dlse is not None:
            delta = delta - np.asarray(dlse)[..., None].astype(wide)
        dscores = rounded(self.weights * (dweights - delta))
        result = self._option_gradients(dscores, delta)
        for slope in self.slopes:
            dscores = rounded(dscores * slope)
        dscores = rounded(dscores * wide(self.scale))
        result["q"] = rounded(dscores @ self.kk)
        for name, of, grad in (
            ("k", self.k, dscores.transpose(self.turn) @ self.q),
            ("v", self.v, self.dropped.transpose(self.turn) @ dout),
        ):
            heads = (*grad.shape[:-3], of.shape[-3], self.group, *grad.shape[-2:])
            folded = rounded(grad).reshape(heads).sum(axis=-3)
            result[name] = rounded(unbroadcast(folded, of.shape))
        return result

    def _option_gradients(self, dscores: np.ndarray, delta: np.ndarray) -> dict[str, np.ndarray]:
        """Of bias, slopes, sinks and score parameters: sums in float32, rounded once at the end."""
        terms = {
            "bias": dscores,
            "alibi_slopes": -(dscores * self.far.astype(self.wide)).sum(axis=(-2, -1)),
            "sinks": -self.rounded(self.sink_weights * delta).sum(axis=(-2, -1)),
        }
        result = {}
        for name, full in terms.items():
            of = self.given[name]
            if of is None:
                continue
            # ALiBi's slopes are few and float32 more often than not: they are not rounded.
            grad = unbroadcast(full, np.shape(of))
            grad = grad if name == "alibi_slopes" else grad.astype(of.dtype)
            result[name] = grad.astype(np.float64)
        if self.given["score_mod"] is None:
            return result
        arrays = self.given["score_mod"].arrays()
        sums = {name: np.zeros(x.shape, self.wide) for name, x in arrays.items()}
        for name, where, part in self.partials:
            term = self.rounded(dscores * part)
            where = tuple(np.broadcast_to(x, term.shape) for x in where)
            np.add.at(sums[name], where, np.where(self.seen, term, 0))
        for name, total in sums.items():
            result[f"score_{name}"] = total.astype(arrays[name].dtype).astype(np.float64)
        return result


def low_precision(
    q: Any, k: Any, v: Any, dout: Any = None, *, dlse: Any = None, **options: Any
) -> dict[str, np.ndarray]:
    """The plain formula in the dtype of q: "out", and with `dout` also the gradients.

    Every product and every softmax is computed in float32 (float64 for float64) and rounded to the
    dtype, as a line of code per step on arrays of that dtype does. NaN and inf count as 0: they
    would spread to every row here, and this is about the size of honest rounding errors only.
    Options and names of gradients as in `oracle.exact`.
    """
    with np.errstate(all="ignore"):
        plain = _Plain(q, k, v, options)
        result = {"out": plain.forward()}
        return result if dout is None else result | plain.backward(dout, dlse)
