"""NumPy references for scalar PTX instructions, and the awkward values they are compared on."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
N = 512


def dtype(code: str) -> np.dtype:
    return np.dtype(BF16) if code == "b2" else np.dtype(code)


def awkward(code: str, rng: np.random.Generator) -> np.ndarray:
    """Random values of every magnitude, and the ones that break things."""
    t = dtype(code)
    if t.kind in "iu":
        size = 8 * t.itemsize
        bits = rng.integers(0, 1 << 63, N, dtype=np.uint64) * 2 + rng.integers(
            0, 2, N, dtype=np.uint64
        )
        bits >>= rng.integers(0, size, N, dtype=np.uint64) + np.uint64(64 - size)
        bits[rng.random(N) < 0.3] ^= np.uint64(2**64 - 1)
        values = bits.astype(f"u{t.itemsize}").view(t)
        values[:6] = [0, 1, np.iinfo(t).max, np.iinfo(t).min, np.iinfo(t).max - 1, 31]
        return rng.permutation(values)
    values = (rng.standard_normal(N) * np.exp2(rng.uniform(-12, 12, N))).astype(t)
    bits = rng.integers(0, 1 << 8 * t.itemsize, N // 4, dtype=np.uint64).astype(f"u{t.itemsize}")
    values[: N // 4] = bits.view(t)
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.nan,
        0.5,
        1.5,
        2.5,
        -0.5,
        -2.5,
        1e-40,
        -1e-45,
        65504,
        65520,
        3e38,
    ]
    with np.errstate(all="ignore"):
        values[N // 4 : N // 4 + len(special)] = np.array(special).astype(t)
    return rng.permutation(values)


def ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x).astype(
        np.float32
    )


def shift_left(a, n):
    return np.where(n < 32, a << np.minimum(n, 31), 0).astype(np.uint32)


def shift_right(a, n):
    return a >> np.minimum(n, 31).astype(a.dtype)


def wide_high(a, b):
    return ((a.astype(object) * b.astype(object)) >> (8 * a.itemsize)).astype(a.dtype)


def minmax(pick: Callable, nan: bool) -> Callable:
    def f(a, b):
        r = pick(a, b) if nan else {np.minimum: np.fmin, np.maximum: np.fmax}[pick](a, b)
        zero = (a == 0) & (b == 0)
        sign = (
            np.signbit(a) | np.signbit(b) if pick is np.minimum else np.signbit(a) & np.signbit(b)
        )
        return np.where(zero, np.where(sign, -0.0, 0.0), r).astype(a.dtype)

    return f


def saturating(code: str, rounding: Callable) -> Callable:
    def f(x):
        x = rounding(x.astype(np.float64))
        limits = np.iinfo(code)
        out = np.zeros(x.shape, code)
        fine = (x >= limits.min) & (x < float(limits.max) + 1)
        out[fine] = x[fine].astype(code)
        out[x >= float(limits.max) + 1] = limits.max
        out[x < limits.min] = limits.min
        return out

    return f


def bfe_u(a, pos, n):
    mask = (np.uint64(1) << np.minimum(n & 255, 32).astype(np.uint64)) - np.uint64(1)
    return np.where(
        (pos & 255) < 32,
        (a.astype(np.uint64) >> np.minimum(pos & 255, 63).astype(np.uint64)) & mask,
        0,
    ).astype("u4")


def bfi(a, b, pos, n):
    pos, n = (pos & 255).astype(object), (n & 255).astype(object)
    out = []
    for x, y, p, k in zip(a.tolist(), b.tolist(), pos, n, strict=True):
        mask = ((1 << k) - 1) << p & 0xFFFFFFFF
        out.append((y & ~mask) | (x << p & mask))
    return np.array(out, np.uint32)


def prmt(a, b, c):
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for k in range(4):
        s = c >> (4 * k) & 15
        byte = (pool >> (8 * (s & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        out |= np.where(s & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32) << np.uint32(
            8 * k
        )
    return out


def funnel(a, b, n):
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    return (pair >> (n & 31).astype(np.uint64)).astype(np.uint32)


def halves(x, t):
    return x.view("u2").reshape(-1, 2).view(t)


def each_half(f: Callable, t) -> Callable:
    return lambda *v: np.ascontiguousarray(f(*(halves(x, t) for x in v))).view("u4").reshape(-1)


def pack(t) -> Callable:
    return lambda high, low: np.stack([low.astype(t), high.astype(t)], 1).view("u4").reshape(-1)


def tf32(x, half):
    bits = x.view("u4")
    return (
        np.where(np.isfinite(x), (bits + np.uint32(half)) & np.uint32(0xFFFFE000), bits)
        .astype("u4")
        .view("f4")
    )


def rounded_once(function: Callable, t: type, toward: str = "nearest") -> Callable:
    """Element by element in exact fractions, rounded once to type `t`: nearest (even), "zero", "down" or "up"."""

    def one(values: tuple) -> np.generic:
        native = t(
            function(*(float(x) for x in values))
        )  # right for NaN, infinities and the sign of zero
        if not all(np.isfinite(values)):
            return native
        exact = function(*(Fraction(float(x)) for x in values))
        if exact == 0:
            return native
        if abs(exact) >= Fraction(2) ** 1024:  # rounds to infinity; float() would raise
            return native
        near = t(float(exact))
        choices = sorted(
            {
                float(np.nextafter(near, t(-np.inf))),
                float(near),
                float(np.nextafter(near, t(np.inf))),
            }
        )
        if toward != "nearest":
            down = toward == "down" or (toward == "zero" and exact > 0)
            return t(
                max(c for c in choices if c <= exact)
                if down
                else min(c for c in choices if c >= exact)
            )
        if not np.isfinite(near):
            return near

        def distance(c: float) -> tuple[Fraction, int]:
            even = int(t(c).view(f"u{np.dtype(t).itemsize}")) & 1
            return (abs(Fraction(c) - exact) if np.isfinite(c) else Fraction(10) ** 99, even)

        return t(min(choices, key=distance))

    def all_of(*v: np.ndarray) -> np.ndarray:
        return np.array([one(x) for x in zip(*(a.ravel() for a in v), strict=True)], t).reshape(
            v[0].shape
        )

    return all_of


def half_fma(t: type) -> Callable:
    return rounded_once(lambda a, b, c: a * b + c, t)
