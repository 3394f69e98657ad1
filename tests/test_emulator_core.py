"""Scalar instructions of the emulator against NumPy, one instruction form per case, over random and awkward values.

Every case is one line of inline assembly in a kernel of its own; all kernels are one module, so the whole table is compiled once.
Results must agree bit for bit (any NaN equals any NaN), except where a tolerance is given: for `.approx` forms the
emulator is at least as accurate as the hardware, and the tolerance is the reference's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import Module, Nvrtc, Unsupported
from tests.emulator.translate import translate

BF16 = ml_dtypes.bfloat16
N = 512
# letter of an asm constraint and C type that carries a value of a NumPy type
CARRIERS = {
    "u2": ("h", "unsigned short"), "i2": ("h", "short"), "u4": ("r", "unsigned"), "i4": ("r", "int"),
    "u8": ("l", "unsigned long long"), "i8": ("l", "long long"), "f4": ("f", "float"), "f8": ("d", "double"),
    "f2": ("h", "unsigned short"), "b2": ("h", "unsigned short"),
}  # fmt: skip


def dtype(code: str) -> np.dtype:
    return np.dtype(BF16) if code == "b2" else np.dtype(code)


@dataclass(frozen=True)
class Case:
    """`text` is PTX with %0 for the result and %1... for the sources; `types` are NumPy codes, result first."""

    text: str
    types: str
    reference: Callable[..., np.ndarray]
    rtol: float = 0.0

    @property
    def codes(self) -> list[str]:
        return self.types.split()


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


def _shift_left(a, n):
    return np.where(n < 32, a << np.minimum(n, 31), 0).astype(np.uint32)


def _shift_right(a, n):
    return a >> np.minimum(n, 31).astype(a.dtype)


def _wide_high(a, b):
    return ((a.astype(object) * b.astype(object)) >> (8 * a.itemsize)).astype(a.dtype)


def _minmax(pick: Callable, nan: bool) -> Callable:
    def f(a, b):
        r = pick(a, b) if nan else {np.minimum: np.fmin, np.maximum: np.fmax}[pick](a, b)
        zero = (a == 0) & (b == 0)
        sign = (
            np.signbit(a) | np.signbit(b) if pick is np.minimum else np.signbit(a) & np.signbit(b)
        )
        return np.where(zero, np.where(sign, -0.0, 0.0), r).astype(a.dtype)

    return f


def _saturating(code: str, rounding: Callable) -> Callable:
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


def _bfe_u(a, pos, n):
    mask = (np.uint64(1) << np.minimum(n & 255, 32).astype(np.uint64)) - np.uint64(1)
    return np.where(
        (pos & 255) < 32,
        (a.astype(np.uint64) >> np.minimum(pos & 255, 63).astype(np.uint64)) & mask,
        0,
    ).astype("u4")


def _bfi(a, b, pos, n):
    pos, n = (pos & 255).astype(object), (n & 255).astype(object)
    out = []
    for x, y, p, k in zip(a.tolist(), b.tolist(), pos, n, strict=True):
        mask = ((1 << k) - 1) << p & 0xFFFFFFFF
        out.append((y & ~mask) | (x << p & mask))
    return np.array(out, np.uint32)


def _prmt(a, b, c):
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for k in range(4):
        s = c >> (4 * k) & 15
        byte = (pool >> (8 * (s & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        out |= np.where(s & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32) << np.uint32(
            8 * k
        )
    return out


def _funnel(a, b, n):
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    return (pair >> (n & 31).astype(np.uint64)).astype(np.uint32)


def _halves(x, t):
    return x.view("u2").reshape(-1, 2).view(t)


def _each_half(f: Callable, t) -> Callable:
    return lambda *v: np.ascontiguousarray(f(*(_halves(x, t) for x in v))).view("u4").reshape(-1)


def _pack(t) -> Callable:
    return lambda high, low: np.stack([low.astype(t), high.astype(t)], 1).view("u4").reshape(-1)


def _tf32(x, half):
    bits = x.view("u4")
    return (
        np.where(np.isfinite(x), (bits + np.uint32(half)) & np.uint32(0xFFFFE000), bits)
        .astype("u4")
        .view("f4")
    )


def _rounded_once(function: Callable, t: type, toward: str = "nearest") -> Callable:
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


def _half_fma(t: type) -> Callable:
    return _rounded_once(lambda a, b, c: a * b + c, t)


INTEGER = [
    Case("add.s32 %0, %1, %2;", "i4 i4 i4", np.add),
    Case("add.sat.s32 %0, %1, %2;", "i4 i4 i4", lambda a, b: np.clip(a.astype("i8") + b, -(2**31), 2**31 - 1).astype("i4")),
    Case("sub.u64 %0, %1, %2;", "u8 u8 u8", np.subtract),
    Case("sub.s16 %0, %1, %2;", "i2 i2 i2", np.subtract),
    Case("mul.lo.s32 %0, %1, %2;", "i4 i4 i4", np.multiply),
    Case("mul.lo.u16 %0, %1, %2;", "u2 u2 u2", np.multiply),
    Case("mul.hi.s32 %0, %1, %2;", "i4 i4 i4", _wide_high),
    Case("mul.hi.u32 %0, %1, %2;", "u4 u4 u4", _wide_high),
    Case("mul.hi.u64 %0, %1, %2;", "u8 u8 u8", _wide_high),
    Case("mul.hi.s64 %0, %1, %2;", "i8 i8 i8", _wide_high),
    Case("mul.wide.s32 %0, %1, %2;", "i8 i4 i4", lambda a, b: a.astype("i8") * b),
    Case("mul.wide.u16 %0, %1, %2;", "u4 u2 u2", lambda a, b: a.astype("u4") * b),
    Case("mul24.lo.s32 %0, %1, %2;", "i4 i4 i4", lambda a, b: ((a << 8 >> 8).astype("i8") * (b << 8 >> 8)).astype("i4")),
    Case("mad.lo.s32 %0, %1, %2, %3;", "i4 i4 i4 i4", lambda a, b, c: a * b + c),
    Case("mad.wide.u32 %0, %1, %2, %3;", "u8 u4 u4 u8", lambda a, b, c: a.astype("u8") * b + c),
    Case("mad.hi.s32 %0, %1, %2, %3;", "i4 i4 i4 i4", lambda a, b, c: _wide_high(a, b) + c),
    Case("{.reg .u32 l; add.cc.u32 l, %1, %2; addc.u32 %0, %3, %4;}", "u4 u4 u4 u4 u4",
         lambda a, b, c, d: ((a.astype("u8") + b >> np.uint64(32)) + c + d).astype("u4")),
    Case("{.reg .u32 l; sub.cc.u32 l, %1, %2; subc.u32 %0, %3, %4;}", "u4 u4 u4 u4 u4",
         lambda a, b, c, d: c - d - (a < b)),
    Case("div.s32 %0, %1, %2;", "i4 i4 i4", lambda a, b: np.where(b == 0, -1, np.trunc(a / np.where(b == 0, 1.0, b)).astype("i8")).astype("i4")),
    Case("rem.u32 %0, %1, %2;", "u4 u4 u4", lambda a, b: np.where(b == 0, a, a % np.where(b == 0, 1, b))),
    Case("min.s32 %0, %1, %2;", "i4 i4 i4", np.minimum),
    Case("max.u64 %0, %1, %2;", "u8 u8 u8", np.maximum),
    Case("abs.s32 %0, %1;", "i4 i4", np.abs),
    Case("neg.s64 %0, %1;", "i8 i8", np.negative),
    Case("sad.u32 %0, %1, %2, %3;", "u4 u4 u4 u4", lambda a, b, c: c + np.where(a > b, a - b, b - a)),
    Case("and.b32 %0, %1, %2;", "u4 u4 u4", np.bitwise_and),
    Case("xor.b64 %0, %1, %2;", "u8 u8 u8", np.bitwise_xor),
    Case("not.b16 %0, %1;", "u2 u2", np.invert),
    Case("cnot.b32 %0, %1;", "u4 u4", lambda a: (a == 0).astype("u4")),
    Case("lop3.b32 %0, %1, %2, %3, 0xe8;", "u4 u4 u4 u4", lambda a, b, c: a & b | a & c | b & c),
    Case("lop3.b32 %0, %1, %2, %3, 0x96;", "u4 u4 u4 u4", lambda a, b, c: a ^ b ^ c),
    Case("shl.b32 %0, %1, %2;", "u4 u4 u4", _shift_left),
    Case("shr.u32 %0, %1, %2;", "u4 u4 u4", lambda a, n: np.where(n < 32, _shift_right(a, n), 0).astype("u4")),
    Case("shr.s32 %0, %1, %2;", "i4 i4 u4", _shift_right),
    Case("shf.r.wrap.b32 %0, %1, %2, %3;", "u4 u4 u4 u4", _funnel),
    Case("shf.l.wrap.b32 %0, %1, %2, %3;", "u4 u4 u4 u4",
         lambda a, b, n: ((a.astype("u8") | b.astype("u8") << np.uint64(32)) << (n & 31).astype("u8") >> np.uint64(32)).astype("u4")),
    Case("shf.r.clamp.b32 %0, %1, %2, %3;", "u4 u4 u4 u4",
         lambda a, b, n: ((a.astype("u8") | b.astype("u8") << np.uint64(32)) >> np.minimum(n, 32).astype("u8")).astype("u4")),
    Case("bfe.u32 %0, %1, %2, %3;", "u4 u4 u4 u4", _bfe_u),
    Case("bfe.s32 %0, %1, 3, 7;", "i4 i4", lambda a: (a << 22) >> 25),
    Case("bfi.b32 %0, %1, %2, %3, %4;", "u4 u4 u4 u4 u4", _bfi),
    Case("prmt.b32 %0, %1, %2, %3;", "u4 u4 u4 u4", _prmt),
    Case("popc.b32 %0, %1;", "u4 u4", lambda a: np.array([int(x).bit_count() for x in a], "u4")),
    Case("popc.b64 %0, %1;", "u4 u8", lambda a: np.array([int(x).bit_count() for x in a], "u4")),
    Case("clz.b32 %0, %1;", "u4 u4", lambda a: np.array([32 - int(x).bit_length() for x in a], "u4")),
    Case("brev.b32 %0, %1;", "u4 u4", lambda a: np.array([int(f"{x:032b}"[::-1], 2) for x in a], "u4")),
    Case("bfind.u32 %0, %1;", "u4 u4", lambda a: np.array([(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a], "u4")),
    Case("bfind.s32 %0, %1;", "u4 i4",
         lambda a: np.array([(int(x if x >= 0 else ~x).bit_length() - 1) & 0xFFFFFFFF for x in a], "u4")),
    Case("bmsk.clamp.b32 %0, %1, %2;", "u4 u4 u4",
         lambda a, b: np.array([((1 << min(int(y), 32)) - 1 << int(x)) & 0xFFFFFFFF if x < 32 else 0 for x, y in zip(a, b, strict=True)], "u4")),
]  # fmt: skip

COMPARE = [
    Case(f"{{.reg .pred p; setp.{op}.{t} p, %1, %2; selp.u32 %0, 1, 0, p;}}", f"u4 {code} {code}",
         lambda a, b, f=f: f(a, b).astype("u4"))
    for t, code, ops in (
        ("s32", "i4", (("lt", np.less), ("ge", np.greater_equal), ("ne", np.not_equal))),
        ("u64", "u8", (("lo", np.less), ("hi", np.greater), ("ls", np.less_equal), ("hs", np.greater_equal))),
        ("f32", "f4", (
            ("lt", np.less), ("eq", np.equal), ("ne", lambda a, b: (a < b) | (a > b)), ("neu", np.not_equal),
            ("ltu", lambda a, b: ~(a >= b)), ("geu", lambda a, b: ~(a < b)), ("equ", lambda a, b: ~((a < b) | (a > b))),
            ("num", lambda a, b: (a == a) & (b == b)), ("nan", lambda a, b: (a != a) | (b != b)))),
        ("f64", "f8", (("gt", np.greater), ("leu", lambda a, b: ~(a > b)))),
        ("f16", "f2", (("le", np.less_equal), ("gtu", lambda a, b: ~(a <= b)))),
        ("bf16", "b2", (("lt", np.less),)),
    )
    for op, f in ops
] + [
    Case("{.reg .pred p, q, r; setp.gt.s32 p, %1, 0; setp.lt.and.f32 q|r, %2, %3, p; selp.u32 %0, 1, 0, q;"
         " @r add.u32 %0, %0, 2;}", "u4 i4 f4 f4",
         lambda s, a, b: ((a < b) & (s > 0)) * np.uint32(1) + (~(a < b) & (s > 0)) * np.uint32(2)),
    Case("{.reg .pred p, q; setp.gt.s32 p, %1, 0; setp.eq.xor.u32 q, %2, %3, !p; selp.u32 %0, 1, 0, q;}", "u4 i4 u4 u4",
         lambda s, a, b: ((a == b) ^ ~(s > 0)).astype("u4")),
    Case("{.reg .pred p, q; setp.gt.s32 p, %1, 0; setp.lt.or.s32 q, %2, %3, p; selp.f32 %0, 0f3F800000, 0fBF800000, q;}", "f4 i4 i4 i4",
         lambda s, a, b: np.where((a < b) | (s > 0), np.float32(1), np.float32(-1))),
    Case("set.gt.u32.f32 %0, %1, %2;", "u4 f4 f4", lambda a, b: np.where(a > b, 0xFFFFFFFF, 0).astype("u4")),
    Case("set.le.f32.s32 %0, %1, %2;", "f4 i4 i4", lambda a, b: (a <= b).astype("f4")),
    Case("slct.f32.s32 %0, %1, %2, %3;", "f4 f4 f4 i4", lambda a, b, c: np.where(c >= 0, a, b)),
    Case("slct.u32.f32 %0, %1, %2, %3;", "u4 u4 u4 f4", lambda a, b, c: np.where(c >= 0, a, b)),
    Case("testp.subnormal.f32 p, %1;", "u4 f4", lambda a: ((a != 0) & (np.abs(a) < np.finfo("f4").tiny)).astype("u4")),
    Case("testp.finite.f64 p, %1;", "u4 f8", lambda a: np.isfinite(a).astype("u4")),
]  # fmt: skip

FLOAT = [
    Case("add.f32 %0, %1, %2;", "f4 f4 f4", np.add),
    Case("sub.ftz.f32 %0, %1, %2;", "f4 f4 f4", lambda a, b: ftz(ftz(a) - ftz(b))),
    Case("mul.f64 %0, %1, %2;", "f8 f8 f8", np.multiply),
    Case("mul.sat.f32 %0, %1, %2;", "f4 f4 f4", lambda a, b: np.where(a * b == a * b, np.clip(a * b, 0, 1), 0).astype("f4") + np.float32(0)),
    Case("add.rz.f32 %0, %1, %2;", "f4 f4 f4", _rounded_once(lambda a, b: a + b, np.float32, "zero")),
    Case("mul.rm.f32 %0, %1, %2;", "f4 f4 f4", _rounded_once(lambda a, b: a * b, np.float32, "down")),
    Case("add.rp.f32 %0, %1, %2;", "f4 f4 f4", _rounded_once(lambda a, b: a + b, np.float32, "up")),
    Case("div.rn.f32 %0, %1, %2;", "f4 f4 f4", np.divide),
    Case("div.rn.f64 %0, %1, %2;", "f8 f8 f8", np.divide),
    Case("div.full.f32 %0, %1, %2;", "f4 f4 f4", np.divide),
    Case("neg.f32 %0, %1;", "f4 f4", np.negative),
    Case("abs.f64 %0, %1;", "f8 f8", np.abs),
    Case("copysign.f32 %0, %1, %2;", "f4 f4 f4", lambda a, b: np.copysign(b, a)),
    Case("min.f32 %0, %1, %2;", "f4 f4 f4", _minmax(np.minimum, False)),
    Case("max.f32 %0, %1, %2;", "f4 f4 f4", _minmax(np.maximum, False)),
    Case("max.NaN.f32 %0, %1, %2;", "f4 f4 f4", _minmax(np.maximum, True)),
    Case("min.NaN.f32 %0, %1, %2;", "f4 f4 f4", _minmax(np.minimum, True)),
    Case("max.f64 %0, %1, %2;", "f8 f8 f8", _minmax(np.maximum, False)),
    Case("sqrt.rn.f32 %0, %1;", "f4 f4", np.sqrt),
    Case("rcp.rn.f64 %0, %1;", "f8 f8", np.reciprocal),
    Case("rcp.approx.ftz.f32 %0, %1;", "f4 f4", lambda a: ftz(1 / ftz(a)), 2e-7),
    Case("rsqrt.approx.f32 %0, %1;", "f4 f4", lambda a: (1 / np.sqrt(a.astype("f8"))).astype("f4"), 3e-7),
    Case("ex2.approx.ftz.f32 %0, %1;", "f4 f4", lambda a: ftz(np.exp2(ftz(a).astype("f8")).astype("f4")), 3e-7),
    Case("lg2.approx.f32 %0, %1;", "f4 f4", lambda a: np.log2(a.astype("f8")).astype("f4"), 3e-7),
    Case("sin.approx.f32 %0, %1;", "f4 f4", lambda a: np.sin(a.astype("f8")).astype("f4"), 3e-7),
    Case("cos.approx.f32 %0, %1;", "f4 f4", lambda a: np.cos(a.astype("f8")).astype("f4"), 3e-7),
    Case("tanh.approx.f32 %0, %1;", "f4 f4", lambda a: np.tanh(a.astype("f8")).astype("f4"), 3e-7),
    Case("fma.rn.f64 %0, %1, %2, %3;", "f8 f8 f8 f8", _rounded_once(lambda a, b, c: a * b + c, np.float64)),
    Case("fma.rn.f32 %0, %1, %2, %3;", "f4 f4 f4 f4",
         _rounded_once(lambda a, b, c: a * b + c, np.float32)),
]  # fmt: skip

HALF = [
    case
    for t, code, np_type in (("f16", "f2", np.float16), ("bf16", "b2", BF16))
    for case in (
        Case(f"add.{t} %0, %1, %2;", f"{code} {code} {code}", lambda a, b, d=np_type: (a.astype("f8") + b.astype("f8")).astype(d)),
        Case(f"sub.{t} %0, %1, %2;", f"{code} {code} {code}", lambda a, b, d=np_type: (a.astype("f8") - b.astype("f8")).astype(d)),
        Case(f"mul.{t} %0, %1, %2;", f"{code} {code} {code}", lambda a, b, d=np_type: (a.astype("f8") * b.astype("f8")).astype(d)),
        Case(f"fma.rn.{t} %0, %1, %2, %3;", f"{code} {code} {code} {code}", _half_fma(np_type)),
        Case(f"neg.{t} %0, %1;", f"{code} {code}", np.negative),
        Case(f"abs.{t} %0, %1;", f"{code} {code}", np.abs),
        Case(f"min.{t} %0, %1, %2;", f"{code} {code} {code}",
             lambda a, b, d=np_type: _minmax(np.minimum, False)(a.astype("f4"), b.astype("f4")).astype(d)),
        Case(f"max.NaN.{t}x2 %0, %1, %2;", "u4 u4 u4",
             _each_half(lambda a, b, d=np_type: _minmax(np.maximum, True)(a.astype("f4"), b.astype("f4")).astype(d), np_type)),
        Case(f"fma.rn.{t}x2 %0, %1, %2, %3;", "u4 u4 u4 u4", _each_half(_half_fma(np_type), np_type)),
        Case(f"add.{t}x2 %0, %1, %2;", "u4 u4 u4",
             _each_half(lambda a, b, d=np_type: (a.astype("f8") + b.astype("f8")).astype(d), np_type)),
        Case(f"ex2.approx.{'ftz.' if t == 'bf16' else ''}{t} %0, %1;", f"{code} {code}", lambda a, d=np_type: np.exp2(a.astype("f8")).astype(d),
             1e-3 if t == "f16" else 8e-3),
    )
]  # fmt: skip

CONVERT = [
    *(
        Case(f"cvt.{name}.{to}.f32 %0, %1;", f"{code} f4", _saturating(code, rounding))
        for name, rounding in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil))
        for to, code in (("s32", "i4"), ("u32", "u4"), ("s64", "i8"))
    ),
    Case("cvt.rzi.u64.f64 %0, %1;", "u8 f8", _saturating("u8", np.trunc)),
    Case("cvt.rni.s32.f16 %0, %1;", "i4 f2", _saturating("i4", np.rint)),
    Case("cvt.rni.f32.f32 %0, %1;", "f4 f4", np.rint),
    Case("cvt.rmi.f32.f32 %0, %1;", "f4 f4", np.floor),
    Case("cvt.sat.f32.f32 %0, %1;", "f4 f4", lambda a: np.where(a == a, np.clip(a, 0, 1), 0).astype("f4") + np.float32(0)),
    Case("cvt.rn.f32.s32 %0, %1;", "f4 i4", lambda a: a.astype("f4")),
    Case("cvt.rn.f32.u64 %0, %1;", "f4 u8", lambda a: a.astype("f4")),
    Case("cvt.rz.f32.s32 %0, %1;", "f4 i4", _rounded_once(lambda a: a, np.float32, "zero")),
    Case("cvt.rn.f64.s64 %0, %1;", "f8 i8", lambda a: a.astype("f8")),
    Case("cvt.f64.f32 %0, %1;", "f8 f4", lambda a: a.astype("f8")),
    Case("cvt.rn.f32.f64 %0, %1;", "f4 f8", lambda a: a.astype("f4")),
    Case("cvt.rz.f32.f64 %0, %1;", "f4 f8", _rounded_once(lambda a: a, np.float32, "zero")),
    Case("cvt.s32.s8 %0, %1;", "i4 i4", lambda a: a.astype("i1").astype("i4")),
    Case("cvt.u32.u16 %0, %1;", "u4 u2", lambda a: a.astype("u4")),
    Case("cvt.s64.s32 %0, %1;", "i8 i4", lambda a: a.astype("i8")),
    Case("cvt.u16.u32 %0, %1;", "u2 u4", lambda a: a.astype("u2")),
    Case("cvt.sat.s8.s32 %0, %1;", "i4 i4", lambda a: np.clip(a, -128, 127)),
    Case("cvt.sat.u32.s64 %0, %1;", "u4 i8", lambda a: np.clip(a, 0, 2**32 - 1).astype("u4")),
    Case("cvt.rn.f16.f32 %0, %1;", "f2 f4", lambda a: a.astype("f2")),
    Case("cvt.rz.f16.f32 %0, %1;", "f2 f4",
         lambda a: np.where((np.abs(a.astype("f2").astype("f4")) > np.abs(a)) & np.isfinite(a), np.nextafter(a.astype("f2"), np.float16(0)), a.astype("f2"))),
    Case("cvt.rn.f16.f64 %0, %1;", "f2 f8", lambda a: a.astype("f2")),
    Case("cvt.f32.f16 %0, %1;", "f4 f2", lambda a: a.astype("f4")),
    Case("cvt.rn.bf16.f32 %0, %1;", "b2 f4", lambda a: a.astype(BF16)),
    Case("cvt.rz.bf16.f32 %0, %1;", "b2 f4", lambda a: np.where(a == a, a.view("u4") >> 16, 0x7FFF).astype("u2").view(BF16)),
    Case("cvt.rn.relu.bf16.f32 %0, %1;", "b2 f4", lambda a: np.where(a < 0, np.float32(0), a + np.float32(0)).astype(BF16)),
    Case("cvt.f32.bf16 %0, %1;", "f4 b2", lambda a: a.astype("f4")),
    Case("cvt.rn.f16.s32 %0, %1;", "f2 i4", lambda a: a.astype("f8").astype("f2")),
    Case("cvt.rn.f16x2.f32 %0, %1, %2;", "u4 f4 f4", _pack(np.float16)),
    Case("cvt.rn.bf16x2.f32 %0, %1, %2;", "u4 f4 f4", _pack(BF16)),
    Case("cvt.rna.tf32.f32 %0, %1;", "f4 f4", lambda a: _tf32(a, 0x1000)),
    Case("cvt.rn.tf32.f32 %0, %1;", "f4 f4", lambda a: np.where(
        np.isfinite(a), (a.view("u4") + np.uint32(0xFFF) + (a.view("u4") >> 13 & 1)) & np.uint32(0xFFFFE000), a.view("u4")).astype("u4").view("f4")),
    Case("mov.b64 %0, {%1, %2};", "u8 u4 u4", lambda a, b: a.astype("u8") | b.astype("u8") << np.uint64(32)),
    Case("{.reg .b32 lo, hi; mov.b64 {lo, hi}, %1; mov.b32 %0, hi;}", "u4 u8", lambda a: (a >> np.uint64(32)).astype("u4")),
    Case("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 %0, {hi, lo};}", "u4 u4", lambda a: a >> 16 | a << 16),
]  # fmt: skip

CASES = INTEGER + COMPARE + FLOAT + HALF + CONVERT


def kernel_source(index: int, case: Case) -> str:
    result, *sources = case.codes
    letter, c_result = CARRIERS[result]
    text = case.text
    if text.startswith("testp"):
        text = f"{{.reg .pred p; {text} selp.u32 %0, 1, 0, p;}}"
    parameters = "".join(f", const {CARRIERS[c][1]}* s{k}" for k, c in enumerate(sources))
    inputs = ", ".join(f'"{CARRIERS[c][0]}"(s{k}[i])' for k, c in enumerate(sources))
    # the conversion to and from "h" operands is a move of bits, which the compiler inserts
    return (
        f'extern "C" __global__ void case_{index}({c_result}* out{parameters}) {{\n'
        f"  int i = blockIdx.x * 64 + threadIdx.x;\n  {c_result} r;\n"
        f'  asm volatile("{text}" : "={letter}"(r) : {inputs});\n  out[i] = r;\n}}\n'
    )


@cache
def module() -> Module:
    return Module(
        Nvrtc().ptx("".join(kernel_source(i, c) for i, c in enumerate(CASES)), "compute_90")
    )


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"{c.text}[{c.types}]".replace(" ", "_") for c in CASES]
)
def test_instruction(index: int) -> None:
    case = CASES[index]
    rng = np.random.default_rng(index)
    result, *codes = case.codes
    sources = [awkward(c, rng) for c in codes]
    if (
        case.text.startswith(("sh", "bf")) and "bfind" not in case.text
    ):  # shift amounts: mostly sensible ones
        k = len(sources) - (2 if case.text.startswith(("bfe.u", "bfi")) else 1)
        for j in range(max(k, 1), len(sources)):
            sources[j] = np.where(rng.random(N) < 0.9, rng.integers(0, 40, N), sources[j]).astype(
                sources[j].dtype
            )
    out = np.zeros(N, dtype(result))
    module().launch(f"case_{index}", N // 64, 64, 0, [out, *sources])
    with np.errstate(all="ignore"):
        expected = np.asarray(case.reference(*sources)).astype(out.dtype)
    if out.dtype.kind in "fV" or out.dtype == BF16:
        compare_floats(out, expected, sources, case.rtol)
    elif "x2" in case.text and result == "u4":
        t = BF16 if "bf16x2" in case.text else np.float16
        compare_floats(_halves(out, t), _halves(expected, t), sources, case.rtol)
    else:
        wrong = np.flatnonzero(out != expected)
        assert not wrong.size, [(s[wrong[0]] for s in sources), out[wrong[0]], expected[wrong[0]]]


def compare_floats(
    out: np.ndarray, expected: np.ndarray, sources: list[np.ndarray], rtol: float
) -> None:
    both_nan = (out != out) & (expected != expected)
    if rtol:
        close = np.isclose(out.astype("f8"), expected.astype("f8"), rtol=rtol, atol=1e-37)
    else:
        unsigned = f"u{out.dtype.itemsize}"
        close = out.view(unsigned) == expected.view(unsigned)
    wrong = np.argwhere(~(close | both_nan))
    assert not wrong.size, (
        [s[wrong[0][0]] for s in sources],
        out[tuple(wrong[0])],
        expected[tuple(wrong[0])],
    )


# ------------------------------------------------------------------------------------------------------ what plain CUDA C emits
PLAIN = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __noinline__ int collatz(int n) { int k = 0; while (n != 1) { n = n & 1 ? 3 * n + 1 : n / 2; ++k; } return k; }
__constant__ int table[4] = {10, 20, 30, 40};
__device__ int total = 5;
extern "C" __global__ void calls(int* out) { out[threadIdx.x] = collatz(threadIdx.x + 1) + table[threadIdx.x & 3]; }
extern "C" __global__ void switches(int* out, int k) {
  int r;
  switch (threadIdx.x + k) {
    case 0: r = 5; break; case 1: r = out[9]; break; case 2: r = 77; break; case 3: r = out[8] * 3; break;
    case 4: r = 1 + out[7]; break; case 5: r = -1; break; case 6: r = out[6] / 3; break; default: r = 1000;
  }
  out[threadIdx.x] = r;
}
extern "C" __global__ void locals(int* out, int shift) {
  int a[16];
  for (int i = 0; i < 16; ++i) a[i] = i * i;
  for (int i = 0; i < 16; ++i) a[(i * 5 + shift) & 15] += a[i];
  out[threadIdx.x] = a[(threadIdx.x + shift) & 15];
}
extern "C" __global__ void atomics(u32* u, float* f, u64* w, int* s) {
  int i = threadIdx.x;
  atomicAdd(u, i); atomicMax(u + 1, i * 7 % 32); atomicXor(u + 2, 1u << i); atomicInc(u + 3, 9); atomicCAS(u + 4, 0, i + 1);
  atomicAdd(f, 0.5f); atomicAdd(w, 1ull << 33); atomicMin(s, -i); atomicExch(u + 5, 3); atomicSub(u + 6, 2); atomicAdd(&total, 1);
  __syncthreads();
  if (i == 0) u[7] = total;
}
extern "C" __global__ void warps(int* out) {
  int i = threadIdx.x, lane = i & 31;
  out[i] = __shfl_up_sync(~0u, i, 3) + 1000 * __shfl_down_sync(~0u, i, 5, 16);
  out[64 + i] = __shfl_sync(~0u, i, 7, 8) + 1000 * __shfl_xor_sync(~0u, i, 9);
  out[128 + i] = __ballot_sync(~0u, lane % 3 == 0) ^ (__any_sync(~0u, lane == 40) ? 1 : 0) ^ (__all_sync(~0u, lane < 32) ? 2 : 0);
  out[192 + i] = __match_any_sync(~0u, lane % 5);
  out[256 + i] = __reduce_add_sync(~0u, i) + __reduce_max_sync(~0u, i) * 10000;
  if (lane < 8) out[320 + i] = __shfl_xor_sync(0xff, i, 2);
  out[384 + i] = __syncthreads_count(i & 1) + 100 * __syncthreads_or(i == 63) + 1000 * __syncthreads_and(i < 63);
}
extern "C" __global__ void bytes(const signed char* a, short* b, unsigned char* c) {
  int i = threadIdx.x; b[i] = a[i] * 3; c[i] = (unsigned char)(a[i] >> 1);
}
extern "C" __global__ void wide(const float4* a, double2* b) { float4 v = a[threadIdx.x]; b[threadIdx.x] = make_double2(v.x + v.y, v.z * v.w); }
extern "C" __global__ void static_and_dynamic(int* out) {
  __shared__ int s[40]; extern __shared__ int d[];
  s[threadIdx.x] = threadIdx.x; d[threadIdx.x] = 100 + threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[31 - threadIdx.x] + d[31 - threadIdx.x];
}
extern "C" __global__ void block_ids(int* out) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * 12 + thread] = block * 1000 + thread;
}
extern "C" __global__ void matrix_moves(u32* out) {
  u32 v = threadIdx.x, r; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v | v << 16)); out[threadIdx.x] = r;
}
extern "C" __global__ void asserts(int n) { if (n > 3) asm volatile("trap;"); }
"""


@cache
def plain(arch: str) -> Module:
    return Module(Nvrtc().ptx(PLAIN, arch))


@pytest.mark.parametrize("arch", ["compute_80", "compute_90", "compute_120"])
def test_plain_cuda(arch: str) -> None:
    m = plain(arch)
    out = np.zeros(32, np.int32)
    m.launch("calls", 1, 32, 0, [out])
    steps = {1: 0}
    expected = []
    for n in range(1, 33):
        k, x = 0, n
        while x != 1:
            x, k = (3 * x + 1 if x & 1 else x // 2), k + 1
        steps[n] = k
        expected.append(k + [10, 20, 30, 40][(n - 1) & 3])
    np.testing.assert_array_equal(out, expected)
    out = np.arange(10, dtype=np.int32)
    m.launch("switches", 1, 1, 0, [out, np.int32(3)])
    assert out[0] == 24
    out = np.zeros(16, np.int32)
    m.launch("locals", 1, 16, 0, [out, np.int32(3)])
    a = [i * i for i in range(16)]
    for i in range(16):
        a[(i * 5 + 3) & 15] += a[i]
    np.testing.assert_array_equal(out, [a[(i + 3) & 15] for i in range(16)])
    x, y = np.arange(-20, 12, dtype=np.int8), np.zeros(32, np.int16)
    z = np.zeros(32, np.uint8)
    m.launch("bytes", 1, 32, 0, [x, y, z])
    np.testing.assert_array_equal(y, x.astype(np.int16) * 3)
    np.testing.assert_array_equal(z, (x >> 1).view(np.uint8))
    f, d = (
        m.memory.copy(np.arange(16, dtype=np.float32).reshape(4, 4)),
        m.memory.empty((4, 2), np.float64),
    )
    m.launch("wide", 1, 4, 0, [f, d])
    np.testing.assert_array_equal(d, np.stack([f[:, 0] + f[:, 1], f[:, 2] * f[:, 3]], 1))
    out = np.zeros(32, np.int32)
    m.launch("static_and_dynamic", 1, 32, 128, [out], seed=1)
    np.testing.assert_array_equal(out, 100 + 2 * (31 - np.arange(32)))
    out = np.zeros(24 * 12, np.int32)
    m.launch("block_ids", (2, 3, 4), (3, 2, 2), 0, [out])
    np.testing.assert_array_equal(
        out.reshape(24, 12), 1000 * np.arange(24)[:, None] + np.arange(12)
    )


def test_atomics() -> None:
    u, f, w, s = (
        np.zeros(8, np.uint32),
        np.zeros(1, np.float32),
        np.zeros(1, np.uint64),
        np.zeros(1, np.int32),
    )
    plain("compute_80").launch("atomics", 1, 32, 0, [u, f, w, s], seed=3)
    assert u[:4].tolist() == [496, 31, 0xFFFFFFFF, 32 % 10] and u[4] in range(1, 33)
    assert (u[5], u[6], f[0], w[0], s[0]) == (3, 2**32 - 64, 16, 32 << 33, -31)
    assert u[7] % 32 == 5


def test_warp_collectives() -> None:
    out = np.zeros(448, np.int32)
    plain("compute_80").launch("warps", 1, 64, 0, [out], seed=2)
    i, lane = np.arange(64), np.arange(64) % 32
    np.testing.assert_array_equal(
        out[:64], np.where(lane < 3, i, i - 3) + 1000 * np.where(lane % 16 + 5 < 16, i + 5, i)
    )
    np.testing.assert_array_equal(out[64:128], (i & ~7) + 7 + 1000 * (i ^ 9))
    ballot = sum(1 << k for k in range(0, 32, 3)) ^ 2
    np.testing.assert_array_equal(out[128:192].view(np.uint32), ballot)
    np.testing.assert_array_equal(
        out[192:256].view(np.uint32),
        [sum(1 << k for k in range(32) if k % 5 == x % 5) for x in lane],
    )
    sums = np.where(i < 32, 496, 496 + 1024) + np.where(i < 32, 31, 63) * 10000
    np.testing.assert_array_equal(out[256:320], sums)
    np.testing.assert_array_equal(out[320:384], np.where(lane < 8, i ^ 2, 0))
    np.testing.assert_array_equal(out[384:448], 32 + 100)


def test_movmatrix_transposes() -> None:
    out = np.zeros(32, np.uint32)
    plain("compute_80").launch("matrix_moves", 1, 32, 0, [out])
    matrix = np.repeat(np.arange(32, dtype=np.uint16), 2).reshape(8, 8)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)


def test_unknown_instructions_and_modifiers_are_named() -> None:
    text = Nvrtc().ptx(PLAIN, "compute_80")
    with pytest.raises(Unsupported, match="wmma.load"):
        translate(text.replace("bar.sync", "wmma.load.bar", 1))
    with pytest.raises(Unsupported, match=r"modifier \.sideways"):
        translate(text.replace("add.s32", "add.sideways.s32", 1))
