"""What attention means, in float64 and without tiles, and what the obvious code makes of it.

Two independent yardsticks, neither of which shares code with the package:

* `exact`, `forward`, `backward`: the definition, one (batch, head) at a time, whole rows, sums over
  visible pairs only.
* `low_precision`: the same formula as a user would write it in the dtype of the inputs (matrix
  products and softmax are computed in float32 and rounded to that dtype). Its error is what "no
  worse than the obvious code" means; `rule_t.py` allows a small multiple of it.

Arrays are (*B, H, L, D); k and v may have batch axes of extent 1; their heads divide those of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def _product(weights: np.ndarray, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """`weights @ x` over seen pairs only: 0 * NaN of an unseen pair is not even formed."""
    if np.isfinite(x).all() and np.isfinite(weights).all():
        return weights @ x
    rows = [weights[i, seen[i]] @ x[seen[i]] for i in range(len(weights))]
    return np.array(rows).reshape(len(weights), x.shape[-1])


class _Head:
    """One (batch, head): q (Lq, D), k (Lk, D), v (Lk, Dv) in float64."""

    def __init__(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        seen: np.ndarray,
        far: np.ndarray,
        scale: float,
        softcap: float | None,
        slope: float,
    ) -> None:
        self.q, self.k, self.v, self.seen, self.far, self.scale = q, k, v, seen, far, scale
        scores = scale * (q @ k.T)
        self.tanh = None if softcap is None else np.tanh(scores / softcap)
        if softcap is not None:
            scores = softcap * self.tanh
        if slope:
            scores = scores - slope * far
        scores = np.where(seen, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        exps = np.where(seen, np.exp(scores - np.where(top == -np.inf, 0, top)), 0)
        total = exps.sum(axis=-1, keepdims=True)
        self.weights = np.where(seen, exps / np.where(total == 0, 1, total), 0)
        self.lse = (np.log(total) + top)[:, 0]
        self.out = _product(self.weights, v, seen)

    def backward(self, dout: np.ndarray, dlse: np.ndarray) -> dict[str, Any]:
        """Gradients of q, k, v and the slope."""
        seen, weights = self.seen, self.weights
        dweights = dout @ self.v.T
        delta = np.where(seen, weights * dweights, 0).sum(axis=-1, keepdims=True)
        dscores = np.where(seen, weights * (dweights - delta + dlse[:, None]), 0)
        dslope = -np.where(seen, dscores * self.far, 0).sum()
        if self.tanh is not None:
            dscores = np.where(seen, dscores * (1 - self.tanh**2), 0)
        return {
            "q": self.scale * _product(dscores, self.k, seen),
            "k": self.scale * _product(dscores.T, self.q, seen.T),
            "v": _product(weights.T, dout, seen.T),
            "alibi_slopes": dslope,
        }

    def gross(self, dout: np.ndarray, dlse: np.ndarray) -> dict[str, Any]:
        """`out` and gradients if no term cancelled another; NaN and inf count as 0."""
        weights = finite_part(self.weights)
        q, k, v, dout, dlse = (abs(finite_part(x)) for x in (self.q, self.k, self.v, dout, dlse))
        dweights = dout @ v.T
        delta = (weights * dweights).sum(axis=-1, keepdims=True) + dlse[:, None]
        dscores = weights * (dweights + delta)
        result = {
            "out": weights @ v,
            "v": weights.T @ dout,
            "alibi_slopes": (dscores * self.far).sum(),
        }
        if self.tanh is not None:
            dscores = dscores * finite_part(1 - self.tanh**2)
        return result | {"q": abs(self.scale) * dscores @ k, "k": abs(self.scale) * dscores.T @ q}


def _heads(q: Any, k: Any, v: Any, options: dict[str, Any], visit: Callable[..., None]) -> None:
    """Call `visit(index, {"k": its index, "v": its index}, head)` for every (batch, query head)."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    options = dict(options)
    scale, softcap, slopes = (
        options.pop(name, None) for name in ("scale", "softcap", "alibi_slopes")
    )
    len_q, len_k = q.shape[-2], k.shape[-2]
    seen = visible(len_q, len_k, **options)
    far = distance(len_q, len_k, options.get("q_offset"))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    slopes = np.broadcast_to(
        0.0 if slopes is None else np.asarray(slopes).astype(np.float64), q.shape[:-2]
    )
    with np.errstate(all="ignore"):
        for index in np.ndindex(q.shape[:-2]):
            group = q.shape[-3] // k.shape[-3]
            at_k = (
                *(min(b, n - 1) for b, n in zip(index[:-1], k.shape, strict=False)),
                index[-1] // group,
            )
            at_v = (
                *(min(b, n - 1) for b, n in zip(index[:-1], v.shape, strict=False)),
                index[-1] // group,
            )
            head = _Head(
                q[index], k[at_k], v[at_v], seen, far, scale, softcap, float(slopes[index])
            )
            visit(index, {"k": at_k, "v": at_v}, head)


@dataclass
class Exact:
    """The float64 results of one call.

    `gross` holds, for "out" and every gradient, the sum of its terms without their signs: the
    yardstick of how much of a float32 rounding error a result can inherit although little of the
    terms is left after they cancel.
    """

    out: np.ndarray
    lse: np.ndarray
    grads: dict[str, np.ndarray]
    gross: dict[str, np.ndarray]


def exact(q: Any, k: Any, v: Any, dout: Any = None, *, dlse: Any = None, **options: Any) -> Exact:
    """Results in float64, gradients in their arguments' shapes (without `dout` only "gross" of
    "out").

    Options as in the public API: causal, window, q_offset, scale, softcap, alibi_slopes.
    """
    slopes = options.get("alibi_slopes")
    heads = q.shape[:-2]
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "alibi_slopes": heads}
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full(q.shape[:-1], -np.inf)
    grads = {name: np.zeros(shape) for name, shape in shapes.items()}
    gross = {name: np.zeros(shape) for name, shape in {**shapes, "out": out.shape}.items()}
    dout64 = np.zeros(out.shape) if dout is None else np.asarray(dout).astype(np.float64)
    dlse64 = np.zeros(lse.shape) if dlse is None else np.asarray(dlse).astype(np.float64)

    def visit(index: tuple[int, ...], at: dict[str, Any], head: _Head) -> None:
        out[index], lse[index] = head.out, head.lse
        for name, value in head.gross(dout64[index], dlse64[index]).items():
            gross[name][at.get(name, index)] += value
        if dout is not None:
            for name, value in head.backward(dout64[index], dlse64[index]).items():
                grads[name][at.get(name, index)] += value

    _heads(q, k, v, options, visit)
    for table in (grads, gross):
        by_head = table.pop("alibi_slopes")
        if slopes is not None:
            table["alibi_slopes"] = unbroadcast(by_head, np.shape(slopes))
    return Exact(out, lse, grads, gross)


def forward(q: Any, k: Any, v: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """out, lse in float64."""
    result = exact(q, k, v, **options)
    return result.out, result.lse


def backward(dout: Any, q: Any, k: Any, v: Any, **options: Any) -> dict[str, np.ndarray]:
    """Gradients "q", "k", "v" and, with slopes, "alibi_slopes", in float64; options and `dlse` as
    in `exact`."""
    return exact(q, k, v, dout, **options).grads


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum `grad` over the axes that were broadcast from `shape`."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)


# ---- the honest same-precision computation


def finite_part(x: Any) -> np.ndarray:
    """`x` with NaN and inf replaced by 0."""
    return np.where(np.isfinite(x), x, np.zeros_like(x))


def low_precision(
    q: Any, k: Any, v: Any, dout: Any = None, *, dlse: Any = None, **options: Any
) -> dict[str, np.ndarray]:
    """The plain formula in the dtype of q: "out", and with `dout` also "q", "k", "v" (and
    "alibi_slopes").

    Every product and every softmax is computed in float32 (float64 for float64) and rounded to the
    dtype, as a line of code per step on arrays of that dtype does. NaN and inf count as 0: they
    would spread to every row here, and this is about the size of honest rounding errors only.
    """
    dtype = q.dtype
    wide = np.float64 if dtype == np.float64 else np.float32

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(wide)

    options = dict(options)
    scale, softcap, slopes = (
        options.pop(name, None) for name in ("scale", "softcap", "alibi_slopes")
    )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    seen = visible(q.shape[-2], k.shape[-2], **options)
    far = distance(q.shape[-2], k.shape[-2], options.get("q_offset"))
    group = max(1, q.shape[-3] // max(1, k.shape[-3]))
    q, k, v = (finite_part(x).astype(wide) for x in (q, k, v))
    kk, vv = (
        np.broadcast_to(np.repeat(x, group, axis=-3), (*q.shape[:-2], *x.shape[-2:]))
        for x in (k, v)
    )
    turn = (*range(q.ndim - 2), q.ndim - 1, q.ndim - 2)
    with np.errstate(all="ignore"):
        scores = rounded(rounded(q @ kk.transpose(turn)) * wide(scale))
        tanh = None
        if softcap is not None:
            tanh = rounded(np.tanh(scores / wide(softcap)))
            scores = rounded(tanh * wide(softcap))
        if slopes is not None:
            spread = np.broadcast_to(np.asarray(slopes).astype(wide), q.shape[:-2])[..., None, None]
            scores = rounded(scores - rounded(spread * far.astype(wide)))
        scores = np.where(seen, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        exps = np.exp(scores - np.where(top == -np.inf, 0, top))
        total = exps.sum(axis=-1, keepdims=True)
        weights = rounded(exps / np.where(total == 0, 1, total))
        out = rounded(weights @ vv)
        result = {"out": out}
        if dout is None:
            return result
        dout = finite_part(dout).astype(wide)
        dweights = rounded(dout @ vv.transpose(turn))
        delta = rounded((dweights * weights).sum(axis=-1, keepdims=True))
        inner = (
            dweights - delta
            if dlse is None
            else dweights - delta + np.asarray(dlse)[..., None].astype(wide)
        )
        dscores = rounded(weights * inner)
        if slopes is not None:
            dslopes = -(dscores * far.astype(wide)).sum(axis=(-2, -1))
            result["alibi_slopes"] = unbroadcast(dslopes, np.shape(slopes)).astype(np.float64)
        if tanh is not None:
            dscores = rounded(dscores * (1 - tanh**2))
        dscores = rounded(dscores * wide(scale))
        result["q"] = rounded(dscores @ kk)
        for name, of, grad in (
            ("k", k, dscores.transpose(turn) @ q),
            ("v", v, weights.transpose(turn) @ dout),
        ):
            folded = (
                rounded(grad)
                .reshape(*grad.shape[:-3], of.shape[-3], group, *grad.shape[-2:])
                .sum(axis=-3)
            )
            result[name] = rounded(unbroadcast(folded, of.shape))
    return result
