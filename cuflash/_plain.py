"""Attention written out with whole matrices: what `python -m cuflash` and the benchmarks compare
with.

`forward` and `backward` are the three lines everybody writes, in the dtype of the inputs; `exact`
is the same formula in float64, a block of rows at a time so that its memory stays modest. None
shares code with the backends. Arrays are NumPy or CuPy, (*B, H, L, D), as many heads in k and v as
in q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = 512  # of one block of the exact reference: 16 MB of scores for 4096 keys


def forward(xp: Any, q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any, Any]:
    """out, lse and the matrix of weights, all rows at once.

    Scores and softmax are float32 (float64 for float64), products are in the dtype of the inputs.
    """
    kind, scale = precision(q)
    s = (q @ k.swapaxes(-1, -2)).astype(kind, copy=False)
    s *= scale
    if causal:
        s += xp.where(hidden(xp, q.shape[-2], k.shape[-2]), kind.type(-np.inf), kind.type(0))
    top = s.max(axis=-1, keepdims=True)
    s -= top
    xp.exp(s, out=s)
    total = s.sum(axis=-1, keepdims=True)
    s /= total
    weights = s.astype(q.dtype, copy=False)
    return weights @ v, (xp.log(total) + top)[..., 0], weights


def backward(
    xp: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, weights: Any
) -> tuple[Any, Any, Any]:
    """dq, dk, dv from the saved matrix of weights."""
    kind, scale = precision(q)
    dv = weights.swapaxes(-1, -2) @ dout
    ds = (dout @ v.swapaxes(-1, -2)).astype(kind, copy=False)
    ds -= (dout.astype(kind) * out.astype(kind)).sum(axis=-1, keepdims=True)
    ds *= weights
    ds *= scale
    ds = ds.astype(q.dtype, copy=False)
    return ds @ k, ds.swapaxes(-1, -2) @ q, dv


def exact(
    xp: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    causal: bool,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """float64 out, lse, dq, dk, dv of one (*B, H) batch of heads; calls `progress` per head."""
    len_q, len_k = q.shape[-2], k.shape[-2]
    scale = 1 / math.sqrt(q.shape[-1])
    results = {
        "out": xp.empty((*q.shape[:-1], v.shape[-1])),
        "lse": xp.empty(q.shape[:-1]),
        "q": xp.empty(q.shape),
        "k": xp.zeros(k.shape),
        "v": xp.zeros(v.shape),
    }
    for head in np.ndindex(q.shape[:-2]):
        keys, values = k[head].astype(np.float64), v[head].astype(np.float64)
        for start in range(0, len_q, ROWS):
            rows = slice(start, min(start + ROWS, len_q))
            x, dy = q[head][rows].astype(np.float64), dout[head][rows].astype(np.float64)
            p = scale * (x @ keys.T)
            if causal:
                p[hidden(xp, len_q, len_k)[rows]] = -xp.inf
            top = p.max(axis=-1, keepdims=True)
            p = xp.exp(p - top)
            total = p.sum(axis=-1, keepdims=True)
            p /= total
            y = p @ values
            ds = scale * p * (dy @ values.T - (dy * y).sum(axis=-1, keepdims=True))
            results["out"][head][rows] = y
            results["lse"][head][rows] = (top + xp.log(total))[:, 0]
            results["q"][head][rows] = ds @ keys
            results["k"][head] += ds.T @ x
            results["v"][head] += p.T @ dy
        progress()
    return results


def hidden(xp: Any, len_q: int, len_k: int) -> Any:
    """bool (len_q, len_k): True where a causal row does not see the key (bottom-right aligned)."""
    return xp.arange(len_k) > xp.arange(len_q)[:, None] + (len_k - len_q)


def precision(q: Any) -> tuple[np.dtype, Any]:
    """The dtype of scores for inputs like `q`, and 1/sqrt(D) in it, so that it widens nothing."""
    kind = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    return kind, kind.type(1 / math.sqrt(q.shape[-1]))
