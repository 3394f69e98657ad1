"""Conversions, packed arithmetic and approximate functions: one value in, one value out, awkward
values included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from .form import Case, Form, blank
from .rounding import flush, fma32, narrow, truncate

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
COUNT = 512
AWKWARD = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 65504.0, 65519.99, 65520.0, 7e4, -7e4]
    + [2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 2.0**-14 - 2.0**-25, 3.4e38, -3.4e38]
    + [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-12, 1 + 2.0**-24]
    + [2.0**-126, 2.0**-149, 1e-40, -1e-40, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e9, -3e9, 5e9],
    np.float64,
)
Reference = Callable[..., Any]


def _values(rng: np.random.Generator, dtype: np.dtype, low: float, high: float) -> np.ndarray:
    """Random values of wide magnitude range plus the awkward ones that lie in [low, high]."""
    magnitude = np.exp2(rng.uniform(-20, 20, COUNT))
    x = np.where(rng.integers(0, 2, COUNT), magnitude, -magnitude)
    plain = rng.normal(0, 2, COUNT)
    x[: COUNT // 2] = plain[: COUNT // 2]
    with np.errstate(over="ignore", invalid="ignore"):
        awkward = AWKWARD[~((low > AWKWARD) | (high < AWKWARD))]
        x = np.clip(x, low, high)
        x[COUNT - len(awkward) :] = awkward
        return x.astype(dtype)


class Op:
    """A unary, binary or ternary instruction applied to COUNT elements, `width` of them per
    register."""

    KINDS: ClassVar = {
        F16: ("u16", "h"),
        BF16: ("u16", "h"),
        F32: ("float", "f"),
        F64: ("double", "d"),
    }
    KINDS |= {np.dtype(np.int32): ("i32", "r"), np.dtype(np.uint32): ("u32", "r")}

    def __init__(
        self,
        ptx: str,
        group: str,
        ins: list[np.dtype],
        out: Any,
        reference: Reference,
        *,
        tolerance: Reference | None = None,
        span: tuple[float, float] = (-np.inf, np.inf),
        width: int = 1,
        raw: bool = False,
    ) -> None:
        self.ptx, self.group, self.ins, self.out = ptx, group, ins, np.dtype(out)
        self.reference, self.tolerance, self.span, self.width = reference, tolerance, span, width
        self.raw = raw  # the result register is .b32 whatever it means

    def make(self, rng: np.random.Generator) -> Case:
        values = [_values(rng, dtype, *self.span) for dtype in self.ins]
        for v in values[1:]:
            rng.shuffle(v)
        with np.errstate(all="ignore"):
            expected = narrow(np.asarray(self.reference(*values)), self.out)
            tolerance = (
                None
                if self.tolerance is None
                else self.tolerance(expected.astype(np.float64), *values)
            )
        return Case([*values, blank(COUNT, self.out)], [expected], [tolerance])

    def form(self) -> Form:
        packed = self.width == 2
        kinds = [("u32", "r") if packed else self.KINDS[d] for d in [*self.ins, self.out]]
        out_type, out_kind = ("u32", "r") if self.raw else kinds[-1]
        names = ["a", "b", "c"][: len(self.ins)]
        parameters = [f"const {t}* {n}" for (t, _), n in zip(kinds[:-1], names, strict=True)]
        inputs = ", ".join(f'"{k}"({n}[i])' for (_, k), n in zip(kinds[:-1], names, strict=True))
        places = ", ".join(f"%{i}" for i in range(len(names) + 1))
        return Form(
            name=self.ptx.replace(".", "_"),
            group=self.group,
            parameters=", ".join([*parameters, f"{out_type}* out"]),
            body=f"""
    for (u32 i = thread; i < {COUNT // self.width}; i += 32) {{
        {out_type} y;
        asm volatile("{self.ptx} {places};" : "={out_kind}"(y) : {inputs});
        out[i] = y;
    }}""",
            make=self.make,
        )


def _pack_form(ptx: str, group: str, dtype: np.dtype) -> Form:
    """cvt.rn.<16-bit>x2.f32 d, a, b: a goes to the upper half, b to the lower."""

    def make(rng: np.random.Generator) -> Case:
        upper, lower = (_values(rng, F32, -np.inf, np.inf) for _ in "ab")
        rng.shuffle(lower)
        with np.errstate(all="ignore"):
            pairs = np.stack([lower, upper], 1).astype(dtype)
        return Case([upper, lower, blank((COUNT, 2), dtype)], [pairs])

    return Form(
        name=ptx.replace(".", "_"),
        group=group,
        parameters="const float* upper, const float* lower, u32* out",
        body=f"""
    for (u32 i = thread; i < {COUNT}; i += 32) {{
        u32 y;
        asm volatile("{ptx} %0, %1, %2;" : "=r"(y) : "f"(upper[i]), "f"(lower[i]));
        out[i] = y;
    }}""",
        make=make,
    )


def _to_int(low: int, high: int, rounding: Reference) -> Reference:
    """Saturating conversion; NaN becomes 0."""

    def convert(x: np.ndarray) -> np.ndarray:
        y = np.where(np.isnan(x), 0.0, rounding(x.astype(np.float64)))
        return np.clip(y, low, high).astype(np.int64)

    return convert


def relative(bound: float) -> Reference:
    """Tolerance of a stated maximum relative error."""
    return lambda expected, *_: np.where(np.isfinite(expected), np.abs(expected) * bound, 0.0)


def _d(function: Reference) -> Reference:
    """Evaluate in float64, so that the reference itself is correctly rounded to well below the
    tolerance."""
    return lambda *x: function(*(v.astype(np.float64) for v in x))


I32, U32 = np.dtype(np.int32), np.dtype(np.uint32)
_int32 = np.iinfo(np.int32)

CONVERSIONS = [
    Op("cvt.rn.f16.f32", "sm_75", [F32], F16, lambda x: x.astype(F16)),
    Op("cvt.f32.f16", "sm_75", [F16], F32, lambda x: x),
    Op("cvt.rn.bf16.f32", "sm_80", [F32], BF16, lambda x: x.astype(BF16)),
    Op("cvt.f32.bf16", "sm_90a", [BF16], F32, lambda x: x),
    Op("cvt.rna.tf32.f32", "sm_80", [F32], F32, lambda x: truncate(x, 13, "rna"), raw=True),
    Op("cvt.rn.tf32.f32", "sm_90a", [F32], F32, lambda x: truncate(x, 13, "rn"), raw=True),
    Op("cvt.f64.f32", "sm_75", [F32], F64, lambda x: x),
    Op("cvt.rn.f32.f64", "sm_75", [F64], F32, lambda x: x),
    Op("cvt.rni.s32.f32", "sm_75", [F32], I32, _to_int(_int32.min, _int32.max, np.rint)),
    Op("cvt.rzi.s32.f32", "sm_75", [F32], I32, _to_int(_int32.min, _int32.max, np.trunc)),
    Op("cvt.rmi.s32.f32", "sm_75", [F32], I32, _to_int(_int32.min, _int32.max, np.floor)),
    Op("cvt.rzi.u32.f32", "sm_75", [F32], U32, _to_int(0, 2**32 - 1, np.trunc)),
    Op("cvt.rn.f32.s32", "sm_75", [I32], F32, lambda x: x, span=(_int32.min, _int32.max - 1)),
    Op("cvt.rn.f32.u32", "sm_75", [U32], F32, lambda x: x, span=(0, 2**32 - 2)),
    Op("cvt.rmi.f32.f32", "sm_75", [F32], F32, np.floor),
]
PACKED = [
    _pack_form("cvt.rn.f16x2.f32", "sm_80", F16),
    _pack_form("cvt.rn.bf16x2.f32", "sm_80", BF16),
]


def _fma(dtype: np.dtype) -> Reference:
    """float64 holds the product of two 11-bit significands exactly; the sum is rounded once more
    below 2^-52."""
    return lambda a, b, c: narrow(_d(lambda x, y, z: x * y + z)(a, b, c), dtype)


# Double rounding (to float64 first) can differ from the true fma by one unit only when the sum lies
# within 2^-52 of a tie.
ARITHMETIC = [
    Op("add.rn.f16x2", "sm_75", [F16, F16], F16, lambda a, b: _d(np.add)(a, b), width=2),
    Op("mul.rn.f16x2", "sm_75", [F16, F16], F16, lambda a, b: _d(np.multiply)(a, b), width=2),
    Op("fma.rn.f16x2", "sm_75", [F16, F16, F16], F16, _fma(F16), width=2),
    Op("fma.rn.bf16x2", "sm_80", [BF16, BF16, BF16], BF16, _fma(BF16), width=2),
    Op("max.f16x2", "sm_80", [F16, F16], F16, np.fmax, width=2),
    Op("min.NaN.f32", "sm_80", [F32, F32], F32, np.minimum),
    Op("max.NaN.f32", "sm_80", [F32, F32], F32, np.maximum),
    Op("min.f32", "sm_75", [F32, F32], F32, np.fmin),
    Op("max.f32", "sm_75", [F32, F32], F32, np.fmax),
    Op("fma.rn.f32", "sm_75", [F32, F32, F32], F32, fma32),
    Op("add.rn.f32", "sm_75", [F32, F32], F32, np.add),
    Op("mul.rn.f32", "sm_75", [F32, F32], F32, np.multiply),
    Op("div.rn.f32", "sm_75", [F32, F32], F32, np.divide),
    Op("sqrt.rn.f32", "sm_75", [F32], F32, np.sqrt),
    Op("rcp.rn.f32", "sm_75", [F32], F32, lambda x: np.float32(1) / x),
]
# Stated bounds: PTX ISA, the precision tables of each instruction. .ftz forms are given inputs and
# results that are normal numbers or zero, except where flushing itself is the point.
APPROXIMATE = [
    Op(
        "ex2.approx.ftz.f32",
        "sm_75",
        [F32],
        F32,
        _d(np.exp2),
        tolerance=relative(2.0**-22.5),
        span=(-125, 127),
    ),
    Op(
        "ex2.approx.f32",
        "sm_75",
        [F32],
        F32,
        _d(np.exp2),
        # a subnormal result is an integer multiple of 2^-149
        tolerance=lambda e, *_: np.where(np.isfinite(e), np.abs(e) * 2.0**-22.5 + 2.0**-149, 0.0),
    ),
    Op(
        "lg2.approx.ftz.f32",
        "sm_75",
        [F32],
        F32,
        lambda x: _d(np.log2)(flush(x)),
        tolerance=lambda e, *_: np.where(
            np.isfinite(e), np.maximum(np.abs(e) * 2.0**-22, 2.0**-22.6), 0.0
        ),
        span=(0, np.inf),
    ),
    Op(
        "lg2.approx.f32",
        "sm_75",
        [F32],
        F32,
        _d(np.log2),
        tolerance=lambda e, *_: np.where(
            np.isfinite(e), np.maximum(np.abs(e) * 2.0**-22, 2.0**-22.6), 0.0
        ),
        span=(0, np.inf),
    ),
    Op(
        "rcp.approx.ftz.f32",
        "sm_75",
        [F32],
        F32,
        _d(lambda x: 1 / flush(x)),
        tolerance=relative(2.0**-23),
        span=(-(2.0**100), 2.0**100),
    ),
    Op(
        "rsqrt.approx.ftz.f32",
        "sm_75",
        [F32],
        F32,
        _d(lambda x: 1 / np.sqrt(flush(x))),
        tolerance=relative(2.0**-22.4),
        span=(0, np.inf),
    ),
    Op(
        "sqrt.approx.ftz.f32",
        "sm_75",
        [F32],
        F32,
        _d(lambda x: np.sqrt(flush(x))),
        tolerance=relative(2.0**-22),
        span=(0, np.inf),
    ),
    Op("tanh.approx.f32", "sm_75", [F32], F32, _d(np.tanh), tolerance=relative(2.0**-10.987)),
    Op(
        "div.full.f32",
        "sm_75",
        [F32, F32],
        F32,
        _d(np.divide),
        tolerance=relative(2.0**-22),
        span=(2.0**-60, 2.0**60),
    ),
    Op(
        "div.approx.ftz.f32",
        "sm_75",
        [F32, F32],
        F32,
        _d(np.divide),
        tolerance=relative(2.0**-22),
        span=(2.0**-60, 2.0**60),
    ),
    Op(
        "ex2.approx.f16x2",
        "sm_75",
        [F16],
        F16,
        _d(np.exp2),
        # 2^-9.9 of the value; subnormal results are multiples of 2^-24
        tolerance=lambda e, *_: np.where(np.isfinite(e), np.abs(e) * 2.0**-9.9 + 2.0**-24, 0.0),
        span=(-np.inf, 15),
        width=2,
    ),
    Op(
        "ex2.approx.ftz.bf16x2",
        "sm_90a",
        [BF16],
        BF16,
        _d(np.exp2),
        tolerance=relative(2.0**-7),
        width=2,
        span=(-120, 120),
    ),
    Op(
        "tanh.approx.f16x2",
        "sm_75",
        [F16],
        F16,
        _d(np.tanh),
        width=2,
        tolerance=lambda e, *_: np.where(np.isnan(e), 0.0, 2.0**-10.987),
    ),
    Op(
        "tanh.approx.bf16x2",
        "sm_90a",
        [BF16],
        BF16,
        _d(np.tanh),
        width=2,
        tolerance=lambda e, *_: np.where(np.isnan(e), 0.0, 2.0**-8),
    ),
]
FORMS = [op.form() for op in [*CONVERSIONS, *ARITHMETIC, *APPROXIMATE]] + PACKED
