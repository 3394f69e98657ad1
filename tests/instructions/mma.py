"""mma.sync forms: every shape and type the kernels multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from . import fragments as fr
from .form import Case, Form, blank, constraints, operands

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)


@dataclass(frozen=True)
class Shape:
    """One mma instruction: its PTX name, extents, element types and fragment layouts."""

    ptx: str
    m: int
    n: int
    k: int
    ab: np.dtype
    cd: np.dtype
    group: str

    @property
    def tf32(self) -> bool:
        return "tf32" in self.ptx

    def layouts(self) -> tuple[fr.Index, fr.Index, fr.Index]:
        if self.m == 8:
            rows, columns = fr.a_m8k4()
            return (rows, columns), (columns, rows), fr.c_m8n8()
        if self.ab.itemsize == 2:
            return fr.a_16bit(self.k), fr.b_16bit(self.k), fr.c_m16n8()
        return fr.a_wide(self.k), fr.b_wide(self.k), fr.c_m16n8()


def truncate_tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of an fp32 register in a tf32 instruction: the low 13 bits are
    ignored."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def accumulate_tolerance(a: np.ndarray, b: np.ndarray, c: np.ndarray, cd: np.dtype) -> np.ndarray:
    """Bound on |computed - exact| for one instruction.

    Tensor cores align the K products and C to a common exponent and drop bits below it: each addend
    loses less than one unit in the last place of the largest partial sum (2^-23 of the sum of
    magnitudes), and storing the result loses one unit of the output type. fp64 instructions round
    every addition to nearest (2^-53).
    """
    magnitude = np.abs(a) @ np.abs(b) + np.abs(c)
    unit = 2.0**-53 if cd == F64 else 2.0**-23
    last = {F64: 2.0**-53, F32: 2.0**-23, F16: 2.0**-10}[cd]
    return magnitude * ((a.shape[-1] + 2) * unit + last)


def _grid(rng: np.random.Generator, shape: tuple[int, ...], step: float, top: int) -> np.ndarray:
    """Random multiples of `step` in [-top, top] * step: small enough that every sum below is
    exact."""
    return rng.integers(-top, top + 1, shape) * step


def _case(s: Shape, rng: np.random.Generator) -> Case:
    """Problem 0 has only exact sums (bitwise equality, any order); problem 1 rounds."""
    # fp16 accumulators hold 11 bits: integers up to 2 keep |sum| <= 16 * 4 + 8, exact.
    a = np.stack([_grid(rng, (s.m, s.k), 1.0, 2), rng.standard_normal((s.m, s.k))])
    b = np.stack([_grid(rng, (s.k, s.n), 1.0, 2), rng.standard_normal((s.k, s.n))])
    c = np.stack([_grid(rng, (s.m, s.n), 1.0, 8), rng.standard_normal((s.m, s.n))])
    a, b, c = a.astype(s.ab), b.astype(s.ab), c.astype(s.cd)
    read = truncate_tf32 if s.tf32 else (lambda x: x)
    a64, b64, c64 = (x.astype(np.float64) for x in (read(a), read(b), c))
    (ar, ac), (br, bc), (cr, cc) = s.layouts()
    slack = accumulate_tolerance(a64, b64, c64, s.cd)
    slack[0] = 0.0
    return Case(
        arguments=[
            np.ascontiguousarray(a[:, ar, ac]),
            np.ascontiguousarray(b[:, br, bc]),
            np.ascontiguousarray(c[:, cr, cc]),
            blank((2, *cr.shape), s.cd),
        ],
        expected=[(a64 @ b64 + c64).astype(s.cd)[:, cr, cc]],
        tolerance=[slack[:, cr, cc]],
    )


def _form(s: Shape) -> Form:
    (ar, _), (br, _), (cr, _) = s.layouts()

    def registers(elements: int, dtype: np.dtype) -> int:
        return max(1, elements * dtype.itemsize // 4) if dtype.itemsize < 8 else elements

    na, nb, nc = (
        registers(ar.shape[1], s.ab),
        registers(br.shape[1], s.ab),
        registers(cr.shape[1], s.cd),
    )
    in_type, in_kind = ("double", "d") if s.ab == F64 else ("u32", "r")
    acc_type, acc_kind = {F64: ("double", "d"), F32: ("float", "f"), F16: ("u32", "r")}[s.cd]
    d_text, a_text = operands("%{}", nc), operands("%{}", na, nc)
    text = f"{s.ptx} {d_text}, {a_text}, {operands('%{}', nb, nc + na)}, {d_text};"
    body = f"""
    for (int problem = 0; problem < 2; ++problem) {{
        {in_type} x[{na}], y[{nb}]; {acc_type} z[{nc}];
        const int at = problem * 32 + lane;
        for (int i = 0; i < {na}; ++i) x[i] = a[at * {na} + i];
        for (int i = 0; i < {nb}; ++i) y[i] = b[at * {nb} + i];
        for (int i = 0; i < {nc}; ++i) z[i] = c[at * {nc} + i];
        asm volatile("{text}"
            : {constraints("+" + acc_kind, "z", nc)}
            : {constraints(in_kind, "x", na)}, {constraints(in_kind, "y", nb)});
        for (int i = 0; i < {nc}; ++i) d[at * {nc} + i] = z[i];
    }}"""
    return Form(
        name=s.ptx.replace(".sync.aligned", "").replace(".row.col", "").replace(".", "_"),
        group=s.group,
        parameters=f"const {in_type}* a, const {in_type}* b, const {acc_type}* c, {acc_type}* d",
        body=body,
        make=lambda rng: _case(s, rng),
    )


def _shape(dims: str, types: str, ab: np.dtype, cd: np.dtype, group: str) -> Shape:
    m, n, k = (int(x) for x in dims[1:].replace("n", " ").replace("k", " ").split())
    return Shape(f"mma.sync.aligned.{dims}.row.col.{types}", m, n, k, ab, cd, group)


SHAPES = [
    _shape("m16n8k8", "f32.f16.f16.f32", F16, F32, "sm_75"),
    _shape("m16n8k8", "f16.f16.f16.f16", F16, F16, "sm_75"),
    _shape("m16n8k16", "f32.f16.f16.f32", F16, F32, "sm_80"),
    _shape("m16n8k16", "f16.f16.f16.f16", F16, F16, "sm_80"),
    _shape("m16n8k8", "f32.bf16.bf16.f32", BF16, F32, "sm_80"),
    _shape("m16n8k16", "f32.bf16.bf16.f32", BF16, F32, "sm_80"),
    _shape("m16n8k4", "f32.tf32.tf32.f32", F32, F32, "sm_80"),
    _shape("m16n8k8", "f32.tf32.tf32.f32", F32, F32, "sm_80"),
    _shape("m8n8k4", "f64.f64.f64.f64", F64, F64, "sm_80"),
    _shape("m16n8k4", "f64.f64.f64.f64", F64, F64, "sm_90a"),
    _shape("m16n8k8", "f64.f64.f64.f64", F64, F64, "sm_90a"),
    _shape("m16n8k16", "f64.f64.f64.f64", F64, F64, "sm_90a"),
]
FORMS = [_form(s) for s in SHAPES]
