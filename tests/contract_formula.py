"""The contract once more, written from its sentences alone: all pairs at once, any precision.

`tests/oracle.py` is the first such formula; this one shares no line with it or with the package, so
that a misreading would have to happen twice. Batch axes are one, layout is HLD.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def philox(counter: list[Any], key: list[int]) -> list[Any]:
    """Philox-4x32-10 of arrays of counters (Salmon et al., SC 2011)."""
    low = np.uint64(2**32 - 1)
    for _ in range(10):
        first, second = (
            np.uint64(m) * c for m, c in ((0xD2511F53, counter[0]), (0xCD9E8D57, counter[2]))
        )
        shift = np.uint64(32)
        counter = [
            (second >> shift) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            (first >> shift) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def kept(seed: int, p: float, shape: tuple[int, int, int, int]) -> Any:
    """Which weights dropout keeps: word j % 4 of the counter (j // 4, i, h, b) is at least p * 2**32."""
    b, h, i, j = np.indices(shape).astype(np.uint64)
    words = philox([j // np.uint64(4), i, h, b], [seed % 2**32, seed >> 32])
    return np.choose((j % np.uint64(4)).astype(int), words) >= round(p * 2**32)


def visible(queries: int, keys: int, options: dict[str, Any]) -> Any:
    """What causal, window and q_offset leave of (queries, keys)."""
    offset = options.get("q_offset")
    d = np.arange(queries)[:, None] + (keys - queries if offset is None else offset)
    j = np.arange(keys)[None, :]
    left, right = options.get("window") or (None, None)
    sees = np.ones((queries, keys), bool)
    sees &= (j <= d) | (not options.get("causal", False))
    sees &= True if left is None else d - left <= j
    sees &= True if right is None else j <= d + right
    return sees


def folded(gradient: Any, shape: tuple[int, ...]) -> Any:
    """Summed over the axes along which an argument of `shape` was broadcast."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and gradient.shape[a] != 1)
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


class Arithmetic:
    """Numbers of a working precision; with `low`, each step is rounded to that dtype."""

    def __init__(self, low: Any = None) -> None:
        wide = low is None or np.dtype(low) == np.float64
        self.low, self.dtype = low, np.dtype(np.float64 if wide else np.float32)

    def take(self, x: Any) -> Any:
        """An argument in the working precision."""
        return np.asarray(x).astype(self.dtype)

    def rounded(self, x: Any) -> Any:
        """The result of a step."""
        return x if self.low is None else self.take(np.asarray(x).astype(self.low))


class Weights(NamedTuple):
    """Softmax of all pairs, and what its derivative needs."""

    p: Any  # (B, H, Lq, Lk)
    sink: Any  # the share of the sink, (B, H, Lq, 1)
    lse: Any  # (B, H, Lq)
    slope: Any  # derivative of the logits in the scaled scores
    far: Any  # abs(d - j), (Lq, Lk)


def weights(q: Any, k: Any, scale: float, number: Arithmetic, options: dict[str, Any]) -> Weights:
    """Logits in the order of the contract, and their softmax over keys and sink."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    softcap, sinks = options.get("softcap"), options.get("sinks")
    s = number.rounded(scale * number.rounded(q @ k.swapaxes(-1, -2)))
    slope = np.ones_like(s)
    if softcap is not None:
        slope = 1 - np.tanh(s / softcap) ** 2
        s = number.rounded(softcap * np.tanh(s / softcap))
    if "bias" in options:
        s = s + number.take(options["bias"])
    d = np.arange(queries)[:, None] + options.get("q_offset", keys - queries)
    far = np.abs(d - np.arange(keys))
    if "alibi_slopes" in options:
        s = s - number.take(options["alibi_slopes"])[..., None, None] * far
    sees = visible(queries, keys, options) & options.get("mask", True)
    s = number.take(np.where(np.broadcast_to(sees, s.shape), s, -np.inf))
    sink = np.full(heads, -np.inf) if sinks is None else sinks
    sink = number.take(sink)[:, None, None]
    top = np.maximum(s.max(-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(np.isneginf(top), number.dtype.type(0), top)  # -inf - -inf is NaN
    e, e_sink = np.exp(s - top), np.exp(sink - top)
    total = e.sum(-1, keepdims=True) + e_sink
    whole = np.where(total == 0, number.dtype.type(1), total)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return Weights(number.rounded(e / whole), e_sink / whole, lse, slope, far)


def reference(
    q: Any, k: Any, v: Any, dout: Any, dlse: Any, low: Any = None, **options: Any
) -> dict[str, Any]:
    """out, lse and every gradient by name; in float64, or with each step rounded to `low`.

    Softmax keeps the sums of its rows, as the plain formula does: nothing passes through lse.
    """
    number = Arithmetic(low)
    rounded = number.rounded
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    pairs = (batch, heads, queries, k.shape[2])
    q, dout = number.take(q), number.take(dout)
    k, v = (np.repeat(number.take(x), group, axis=1) for x in (k, v))
    scale = number.dtype.type(options.get("scale", dim**-0.5))
    w = weights(q, k, scale, number, options)
    chance = options.get("dropout_p", 0.0)
    keep = kept(options["seed"], chance, pairs) / (1 - chance) if chance else np.ones(pairs)
    dropped = rounded(w.p * number.take(keep))
    out = rounded(dropped @ v)
    # Backward: the derivative of each line above, the last first.
    dp = rounded(dout @ v.swapaxes(-1, -2)) * number.take(keep)
    inner = (dout * out).sum(-1, keepdims=True) - dlse[..., None]
    ds = rounded(w.p * (dp - inner))
    dx = rounded(ds * w.slope)

    def by_group(x: Any) -> Any:
        return rounded(x.reshape(batch, -1, group, *x.shape[2:]).sum(2))

    found = {
        "out": out,
        "lse": w.lse,
        "q": rounded(scale * (dx @ k)),
        "k": by_group(scale * (dx.swapaxes(-1, -2) @ q)),
        "v": by_group(dropped.swapaxes(-1, -2) @ dout),
    }
    return found | summed(ds, inner, w, options)


def summed(ds: Any, inner: Any, w: Weights, options: dict[str, Any]) -> dict[str, Any]:
    """Gradients that are sums of score gradients over many pairs: of bias, slopes and sinks.

    Of a pair's score gradient p * (dp - inner), and of a row's share of its sink.
    """
    found = {}
    if "bias" in options:
        found["bias"] = folded(ds, options["bias"].shape)
    if "alibi_slopes" in options:
        slopes = options["alibi_slopes"]
        found["alibi_slopes"] = folded(-(ds * w.far).sum((-1, -2)), slopes.shape)
    if "sinks" in options:
        found["sinks"] = -(w.sink * inner).sum((0, 2, 3))
    return found


def slack(
    q: Any, k: Any, v: Any, dout: Any, dlse: Any, eps: float, **options: Any
) -> dict[str, Any]:
    """By how much the gradients of `summed` may be off although every step was right.

    `inner` is sum(dout * out) of the row, from an `out` that was rounded to q's dtype: half a step
    of `eps` in each element, the same for all pairs of the row, so that it adds up where score
    gradients themselves cancel. `eps` of the sums is counted against the terms, not their sum.
    """
    number = Arithmetic()
    group = q.shape[1] // k.shape[1]
    k, v, dout = np.repeat(number.take(k), group, 1), np.repeat(number.take(v), group, 1), dout
    w = weights(number.take(q), k, options.get("scale", q.shape[-1] ** -0.5), number, options)
    chance = options.get("dropout_p", 0.0)
    keep = kept(options["seed"], chance, w.p.shape) / (1 - chance) if chance else 1.0
    dout = np.abs(number.take(dout))
    out = np.abs((w.p * keep) @ v)
    rounding = (dout * out).sum(-1, keepdims=True) * eps / 2
    terms = (dout @ np.abs(v).swapaxes(-1, -2)).max(-1, keepdims=True) + np.abs(dlse)[..., None]
    step = rounding + terms * min(eps, 2.0**-23)
    return {name: np.abs(x) for name, x in summed(-w.p * step, step, w, options).items()}
