"""Scalar PTX instruction forms, one line of inline assembly each, with what they must compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.scalar_reference import (
    BF16,
    bfe_u,
    bfi,
    each_half,
    ftz,
    funnel,
    half_fma,
    minmax,
    pack,
    prmt,
    rounded_once,
    saturating,
    shift_left,
    shift_right,
    tf32,
    wide_high,
)


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


INTEGER = [
    Case("add.s32 %0, %1, %2;", "i4 i4 i4", np.add),
    Case(
        "add.sat.s32 %0, %1, %2;",
        "i4 i4 i4",
        lambda a, b: np.clip(a.astype("i8") + b, -(2**31), 2**31 - 1).astype("i4"),
    ),
    Case("sub.u64 %0, %1, %2;", "u8 u8 u8", np.subtract),
    Case("sub.s16 %0, %1, %2;", "i2 i2 i2", np.subtract),
    Case("mul.lo.s32 %0, %1, %2;", "i4 i4 i4", np.multiply),
    Case("mul.lo.u16 %0, %1, %2;", "u2 u2 u2", np.multiply),
    Case("mul.hi.s32 %0, %1, %2;", "i4 i4 i4", wide_high),
    Case("mul.hi.u32 %0, %1, %2;", "u4 u4 u4", wide_high),
    Case("mul.hi.u64 %0, %1, %2;", "u8 u8 u8", wide_high),
    Case("mul.hi.s64 %0, %1, %2;", "i8 i8 i8", wide_high),
    Case("mul.wide.s32 %0, %1, %2;", "i8 i4 i4", lambda a, b: a.astype("i8") * b),
    Case("mul.wide.u16 %0, %1, %2;", "u4 u2 u2", lambda a, b: a.astype("u4") * b),
    Case(
        "mul24.lo.s32 %0, %1, %2;",
        "i4 i4 i4",
        lambda a, b: ((a << 8 >> 8).astype("i8") * (b << 8 >> 8)).astype("i4"),
    ),
    Case("mad.lo.s32 %0, %1, %2, %3;", "i4 i4 i4 i4", lambda a, b, c: a * b + c),
    Case("mad.wide.u32 %0, %1, %2, %3;", "u8 u4 u4 u8", lambda a, b, c: a.astype("u8") * b + c),
    Case("mad.hi.s32 %0, %1, %2, %3;", "i4 i4 i4 i4", lambda a, b, c: wide_high(a, b) + c),
    Case(
        "{.reg .u32 l; add.cc.u32 l, %1, %2; addc.u32 %0, %3, %4;}",
        "u4 u4 u4 u4 u4",
        lambda a, b, c, d: ((a.astype("u8") + b >> np.uint64(32)) + c + d).astype("u4"),
    ),
    Case(
        "{.reg .u32 l; sub.cc.u32 l, %1, %2; subc.u32 %0, %3, %4;}",
        "u4 u4 u4 u4 u4",
        lambda a, b, c, d: c - d - (a < b),
    ),
    Case(
        "div.s32 %0, %1, %2;",
        "i4 i4 i4",
        lambda a, b: np.where(
            b == 0, -1, np.trunc(a / np.where(b == 0, 1.0, b)).astype("i8")
        ).astype("i4"),
    ),
    Case(
        "rem.u32 %0, %1, %2;",
        "u4 u4 u4",
        lambda a, b: np.where(b == 0, a, a % np.where(b == 0, 1, b)),
    ),
    Case("min.s32 %0, %1, %2;", "i4 i4 i4", np.minimum),
    Case("max.u64 %0, %1, %2;", "u8 u8 u8", np.maximum),
    Case("abs.s32 %0, %1;", "i4 i4", np.abs),
    Case("neg.s64 %0, %1;", "i8 i8", np.negative),
    Case(
        "sad.u32 %0, %1, %2, %3;", "u4 u4 u4 u4", lambda a, b, c: c + np.where(a > b, a - b, b - a)
    ),
    Case("and.b32 %0, %1, %2;", "u4 u4 u4", np.bitwise_and),
    Case("xor.b64 %0, %1, %2;", "u8 u8 u8", np.bitwise_xor),
    Case("not.b16 %0, %1;", "u2 u2", np.invert),
    Case("cnot.b32 %0, %1;", "u4 u4", lambda a: (a == 0).astype("u4")),
    Case("lop3.b32 %0, %1, %2, %3, 0xe8;", "u4 u4 u4 u4", lambda a, b, c: a & b | a & c | b & c),
    Case("lop3.b32 %0, %1, %2, %3, 0x96;", "u4 u4 u4 u4", lambda a, b, c: a ^ b ^ c),
    Case("shl.b32 %0, %1, %2;", "u4 u4 u4", shift_left),
    Case(
        "shr.u32 %0, %1, %2;",
        "u4 u4 u4",
        lambda a, n: np.where(n < 32, shift_right(a, n), 0).astype("u4"),
    ),
    Case("shr.s32 %0, %1, %2;", "i4 i4 u4", shift_right),
    Case("shf.r.wrap.b32 %0, %1, %2, %3;", "u4 u4 u4 u4", funnel),
    Case(
        "shf.l.wrap.b32 %0, %1, %2, %3;",
        "u4 u4 u4 u4",
        lambda a, b, n: (
            (a.astype("u8") | b.astype("u8") << np.uint64(32))
            << (n & 31).astype("u8")
            >> np.uint64(32)
        ).astype("u4"),
    ),
    Case(
        "shf.r.clamp.b32 %0, %1, %2, %3;",
        "u4 u4 u4 u4",
        lambda a, b, n: (
            (a.astype("u8") | b.astype("u8") << np.uint64(32)) >> np.minimum(n, 32).astype("u8")
        ).astype("u4"),
    ),
    Case("bfe.u32 %0, %1, %2, %3;", "u4 u4 u4 u4", bfe_u),
    Case("bfe.s32 %0, %1, 3, 7;", "i4 i4", lambda a: (a << 22) >> 25),
    Case("bfi.b32 %0, %1, %2, %3, %4;", "u4 u4 u4 u4 u4", bfi),
    Case("prmt.b32 %0, %1, %2, %3;", "u4 u4 u4 u4", prmt),
    Case("popc.b32 %0, %1;", "u4 u4", lambda a: np.array([int(x).bit_count() for x in a], "u4")),
    Case("popc.b64 %0, %1;", "u4 u8", lambda a: np.array([int(x).bit_count() for x in a], "u4")),
    Case(
        "clz.b32 %0, %1;", "u4 u4", lambda a: np.array([32 - int(x).bit_length() for x in a], "u4")
    ),
    Case(
        "brev.b32 %0, %1;",
        "u4 u4",
        lambda a: np.array([int(f"{x:032b}"[::-1], 2) for x in a], "u4"),
    ),
    Case(
        "bfind.u32 %0, %1;",
        "u4 u4",
        lambda a: np.array([(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a], "u4"),
    ),
    Case(
        "bfind.s32 %0, %1;",
        "u4 i4",
        lambda a: np.array(
            [(int(x if x >= 0 else ~x).bit_length() - 1) & 0xFFFFFFFF for x in a], "u4"
        ),
    ),
    Case(
        "bmsk.clamp.b32 %0, %1, %2;",
        "u4 u4 u4",
        lambda a, b: np.array(
            [
                ((1 << min(int(y), 32)) - 1 << int(x)) & 0xFFFFFFFF if x < 32 else 0
                for x, y in zip(a, b, strict=True)
            ],
            "u4",
        ),
    ),
]

COMPARE = [
    Case(
        f"{{.reg .pred p; setp.{op}.{t} p, %1, %2; selp.u32 %0, 1, 0, p;}}",
        f"u4 {code} {code}",
        lambda a, b, f=f: f(a, b).astype("u4"),
    )
    for t, code, ops in (
        ("s32", "i4", (("lt", np.less), ("ge", np.greater_equal), ("ne", np.not_equal))),
        (
            "u64",
            "u8",
            (("lo", np.less), ("hi", np.greater), ("ls", np.less_equal), ("hs", np.greater_equal)),
        ),
        (
            "f32",
            "f4",
            (
                ("lt", np.less),
                ("eq", np.equal),
                ("ne", lambda a, b: (a < b) | (a > b)),
                ("neu", np.not_equal),
                ("ltu", lambda a, b: ~(a >= b)),
                ("geu", lambda a, b: ~(a < b)),
                ("equ", lambda a, b: ~((a < b) | (a > b))),
                ("num", lambda a, b: (a == a) & (b == b)),
                ("nan", lambda a, b: (a != a) | (b != b)),
            ),
        ),
        ("f64", "f8", (("gt", np.greater), ("leu", lambda a, b: ~(a > b)))),
        ("f16", "f2", (("le", np.less_equal), ("gtu", lambda a, b: ~(a <= b)))),
        ("bf16", "b2", (("lt", np.less),)),
    )
    for op, f in ops
] + [
    Case(
        "{.reg .pred p, q, r; setp.gt.s32 p, %1, 0; setp.lt.and.f32 q|r, %2, %3, p; selp.u32 %0, 1, 0, q;"
        " @r add.u32 %0, %0, 2;}",
        "u4 i4 f4 f4",
        lambda s, a, b: ((a < b) & (s > 0)) * np.uint32(1) + (~(a < b) & (s > 0)) * np.uint32(2),
    ),
    Case(
        "{.reg .pred p, q; setp.gt.s32 p, %1, 0; setp.eq.xor.u32 q, %2, %3, !p; selp.u32 %0, 1, 0, q;}",
        "u4 i4 u4 u4",
        lambda s, a, b: ((a == b) ^ ~(s > 0)).astype("u4"),
    ),
    Case(
        "{.reg .pred p, q; setp.gt.s32 p, %1, 0; setp.lt.or.s32 q, %2, %3, p; selp.f32 %0, 0f3F800000, 0fBF800000, q;}",
        "f4 i4 i4 i4",
        lambda s, a, b: np.where((a < b) | (s > 0), np.float32(1), np.float32(-1)),
    ),
    Case(
        "set.gt.u32.f32 %0, %1, %2;",
        "u4 f4 f4",
        lambda a, b: np.where(a > b, 0xFFFFFFFF, 0).astype("u4"),
    ),
    Case("set.le.f32.s32 %0, %1, %2;", "f4 i4 i4", lambda a, b: (a <= b).astype("f4")),
    Case("slct.f32.s32 %0, %1, %2, %3;", "f4 f4 f4 i4", lambda a, b, c: np.where(c >= 0, a, b)),
    Case("slct.u32.f32 %0, %1, %2, %3;", "u4 u4 u4 f4", lambda a, b, c: np.where(c >= 0, a, b)),
    Case(
        "testp.subnormal.f32 p, %1;",
        "u4 f4",
        lambda a: ((a != 0) & (np.abs(a) < np.finfo("f4").tiny)).astype("u4"),
    ),
    Case("testp.finite.f64 p, %1;", "u4 f8", lambda a: np.isfinite(a).astype("u4")),
]

FLOAT = [
    Case("add.f32 %0, %1, %2;", "f4 f4 f4", np.add),
    Case("sub.ftz.f32 %0, %1, %2;", "f4 f4 f4", lambda a, b: ftz(ftz(a) - ftz(b))),
    Case("mul.f64 %0, %1, %2;", "f8 f8 f8", np.multiply),
    Case(
        "mul.sat.f32 %0, %1, %2;",
        "f4 f4 f4",
        lambda a, b: np.where(a * b == a * b, np.clip(a * b, 0, 1), 0).astype("f4") + np.float32(0),
    ),
    Case(
        "add.rz.f32 %0, %1, %2;", "f4 f4 f4", rounded_once(lambda a, b: a + b, np.float32, "zero")
    ),
    Case(
        "mul.rm.f32 %0, %1, %2;", "f4 f4 f4", rounded_once(lambda a, b: a * b, np.float32, "down")
    ),
    Case("add.rp.f32 %0, %1, %2;", "f4 f4 f4", rounded_once(lambda a, b: a + b, np.float32, "up")),
    Case("div.rn.f32 %0, %1, %2;", "f4 f4 f4", np.divide),
    Case("div.rn.f64 %0, %1, %2;", "f8 f8 f8", np.divide),
    Case("div.full.f32 %0, %1, %2;", "f4 f4 f4", np.divide),
    Case("neg.f32 %0, %1;", "f4 f4", np.negative),
    Case("abs.f64 %0, %1;", "f8 f8", np.abs),
    Case("copysign.f32 %0, %1, %2;", "f4 f4 f4", lambda a, b: np.copysign(b, a)),
    Case("min.f32 %0, %1, %2;", "f4 f4 f4", minmax(np.minimum, False)),
    Case("max.f32 %0, %1, %2;", "f4 f4 f4", minmax(np.maximum, False)),
    Case("max.NaN.f32 %0, %1, %2;", "f4 f4 f4", minmax(np.maximum, True)),
    Case("min.NaN.f32 %0, %1, %2;", "f4 f4 f4", minmax(np.minimum, True)),
    Case("max.f64 %0, %1, %2;", "f8 f8 f8", minmax(np.maximum, False)),
    Case("sqrt.rn.f32 %0, %1;", "f4 f4", np.sqrt),
    Case("rcp.rn.f64 %0, %1;", "f8 f8", np.reciprocal),
    Case("rcp.approx.ftz.f32 %0, %1;", "f4 f4", lambda a: ftz(1 / ftz(a)), 2e-7),
    Case(
        "rsqrt.approx.f32 %0, %1;",
        "f4 f4",
        lambda a: (1 / np.sqrt(a.astype("f8"))).astype("f4"),
        3e-7,
    ),
    Case(
        "ex2.approx.ftz.f32 %0, %1;",
        "f4 f4",
        lambda a: ftz(np.exp2(ftz(a).astype("f8")).astype("f4")),
        3e-7,
    ),
    Case("lg2.approx.f32 %0, %1;", "f4 f4", lambda a: np.log2(a.astype("f8")).astype("f4"), 3e-7),
    Case("sin.approx.f32 %0, %1;", "f4 f4", lambda a: np.sin(a.astype("f8")).astype("f4"), 3e-7),
    Case("cos.approx.f32 %0, %1;", "f4 f4", lambda a: np.cos(a.astype("f8")).astype("f4"), 3e-7),
    Case("tanh.approx.f32 %0, %1;", "f4 f4", lambda a: np.tanh(a.astype("f8")).astype("f4"), 3e-7),
    Case(
        "fma.rn.f64 %0, %1, %2, %3;",
        "f8 f8 f8 f8",
        rounded_once(lambda a, b, c: a * b + c, np.float64),
    ),
    Case(
        "fma.rn.f32 %0, %1, %2, %3;",
        "f4 f4 f4 f4",
        rounded_once(lambda a, b, c: a * b + c, np.float32),
    ),
]

HALF = [
    case
    for t, code, np_type in (("f16", "f2", np.float16), ("bf16", "b2", BF16))
    for case in (
        Case(
            f"add.{t} %0, %1, %2;",
            f"{code} {code} {code}",
            lambda a, b, d=np_type: (a.astype("f8") + b.astype("f8")).astype(d),
        ),
        Case(
            f"sub.{t} %0, %1, %2;",
            f"{code} {code} {code}",
            lambda a, b, d=np_type: (a.astype("f8") - b.astype("f8")).astype(d),
        ),
        Case(
            f"mul.{t} %0, %1, %2;",
            f"{code} {code} {code}",
            lambda a, b, d=np_type: (a.astype("f8") * b.astype("f8")).astype(d),
        ),
        Case(f"fma.rn.{t} %0, %1, %2, %3;", f"{code} {code} {code} {code}", half_fma(np_type)),
        Case(f"neg.{t} %0, %1;", f"{code} {code}", np.negative),
        Case(f"abs.{t} %0, %1;", f"{code} {code}", np.abs),
        Case(
            f"min.{t} %0, %1, %2;",
            f"{code} {code} {code}",
            lambda a, b, d=np_type: minmax(np.minimum, False)(
                a.astype("f4"), b.astype("f4")
            ).astype(d),
        ),
        Case(
            f"max.NaN.{t}x2 %0, %1, %2;",
            "u4 u4 u4",
            each_half(
                lambda a, b, d=np_type: minmax(np.maximum, True)(
                    a.astype("f4"), b.astype("f4")
                ).astype(d),
                np_type,
            ),
        ),
        Case(f"fma.rn.{t}x2 %0, %1, %2, %3;", "u4 u4 u4 u4", each_half(half_fma(np_type), np_type)),
        Case(
            f"add.{t}x2 %0, %1, %2;",
            "u4 u4 u4",
            each_half(lambda a, b, d=np_type: (a.astype("f8") + b.astype("f8")).astype(d), np_type),
        ),
        Case(
            f"ex2.approx.{'ftz.' if t == 'bf16' else ''}{t} %0, %1;",
            f"{code} {code}",
            lambda a, d=np_type: np.exp2(a.astype("f8")).astype(d),
            1e-3 if t == "f16" else 8e-3,
        ),
    )
]

CONVERT = [
    *(
        Case(f"cvt.{name}.{to}.f32 %0, %1;", f"{code} f4", saturating(code, rounding))
        for name, rounding in (
            ("rni", np.rint),
            ("rzi", np.trunc),
            ("rmi", np.floor),
            ("rpi", np.ceil),
        )
        for to, code in (("s32", "i4"), ("u32", "u4"), ("s64", "i8"))
    ),
    Case("cvt.rzi.u64.f64 %0, %1;", "u8 f8", saturating("u8", np.trunc)),
    Case("cvt.rni.s32.f16 %0, %1;", "i4 f2", saturating("i4", np.rint)),
    Case("cvt.rni.f32.f32 %0, %1;", "f4 f4", np.rint),
    Case("cvt.rmi.f32.f32 %0, %1;", "f4 f4", np.floor),
    Case(
        "cvt.sat.f32.f32 %0, %1;",
        "f4 f4",
        lambda a: np.where(a == a, np.clip(a, 0, 1), 0).astype("f4") + np.float32(0),
    ),
    Case("cvt.rn.f32.s32 %0, %1;", "f4 i4", lambda a: a.astype("f4")),
    Case("cvt.rn.f32.u64 %0, %1;", "f4 u8", lambda a: a.astype("f4")),
    Case("cvt.rz.f32.s32 %0, %1;", "f4 i4", rounded_once(lambda a: a, np.float32, "zero")),
    Case("cvt.rn.f64.s64 %0, %1;", "f8 i8", lambda a: a.astype("f8")),
    Case("cvt.f64.f32 %0, %1;", "f8 f4", lambda a: a.astype("f8")),
    Case("cvt.rn.f32.f64 %0, %1;", "f4 f8", lambda a: a.astype("f4")),
    Case("cvt.rz.f32.f64 %0, %1;", "f4 f8", rounded_once(lambda a: a, np.float32, "zero")),
    Case("cvt.s32.s8 %0, %1;", "i4 i4", lambda a: a.astype("i1").astype("i4")),
    Case("cvt.u32.u16 %0, %1;", "u4 u2", lambda a: a.astype("u4")),
    Case("cvt.s64.s32 %0, %1;", "i8 i4", lambda a: a.astype("i8")),
    Case("cvt.u16.u32 %0, %1;", "u2 u4", lambda a: a.astype("u2")),
    Case("cvt.sat.s8.s32 %0, %1;", "i4 i4", lambda a: np.clip(a, -128, 127)),
    Case("cvt.sat.u32.s64 %0, %1;", "u4 i8", lambda a: np.clip(a, 0, 2**32 - 1).astype("u4")),
    Case("cvt.rn.f16.f32 %0, %1;", "f2 f4", lambda a: a.astype("f2")),
    Case(
        "cvt.rz.f16.f32 %0, %1;",
        "f2 f4",
        lambda a: np.where(
            (np.abs(a.astype("f2").astype("f4")) > np.abs(a)) & np.isfinite(a),
            np.nextafter(a.astype("f2"), np.float16(0)),
            a.astype("f2"),
        ),
    ),
    Case("cvt.rn.f16.f64 %0, %1;", "f2 f8", lambda a: a.astype("f2")),
    Case("cvt.f32.f16 %0, %1;", "f4 f2", lambda a: a.astype("f4")),
    Case("cvt.rn.bf16.f32 %0, %1;", "b2 f4", lambda a: a.astype(BF16)),
    Case(
        "cvt.rz.bf16.f32 %0, %1;",
        "b2 f4",
        lambda a: np.where(a == a, a.view("u4") >> 16, 0x7FFF).astype("u2").view(BF16),
    ),
    Case(
        "cvt.rn.relu.bf16.f32 %0, %1;",
        "b2 f4",
        lambda a: np.where(a < 0, np.float32(0), a + np.float32(0)).astype(BF16),
    ),
    Case("cvt.f32.bf16 %0, %1;", "f4 b2", lambda a: a.astype("f4")),
    Case("cvt.rn.f16.s32 %0, %1;", "f2 i4", lambda a: a.astype("f8").astype("f2")),
    Case("cvt.rn.f16x2.f32 %0, %1, %2;", "u4 f4 f4", pack(np.float16)),
    Case("cvt.rn.bf16x2.f32 %0, %1, %2;", "u4 f4 f4", pack(BF16)),
    Case("cvt.rna.tf32.f32 %0, %1;", "f4 f4", lambda a: tf32(a, 0x1000)),
    Case(
        "cvt.rn.tf32.f32 %0, %1;",
        "f4 f4",
        lambda a: (
            np.where(
                np.isfinite(a),
                (a.view("u4") + np.uint32(0xFFF) + (a.view("u4") >> 13 & 1))
                & np.uint32(0xFFFFE000),
                a.view("u4"),
            )
            .astype("u4")
            .view("f4")
        ),
    ),
    Case(
        "mov.b64 %0, {%1, %2};",
        "u8 u4 u4",
        lambda a, b: a.astype("u8") | b.astype("u8") << np.uint64(32),
    ),
    Case(
        "{.reg .b32 lo, hi; mov.b64 {lo, hi}, %1; mov.b32 %0, hi;}",
        "u4 u8",
        lambda a: (a >> np.uint64(32)).astype("u4"),
    ),
    Case(
        "{.reg .b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 %0, {hi, lo};}",
        "u4 u4",
        lambda a: a >> 16 | a << 16,
    ),
]

CASES = INTEGER + COMPARE + FLOAT + HALF + CONVERT
