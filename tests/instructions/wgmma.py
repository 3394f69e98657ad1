"""wgmma: N from 8 to 256, both sources of A, both major-nesses, every swizzle, every type; four k steps
each, so that stepping counts.

Operands are laid out by the slab rule of TMA: a slab is `span` bytes wide, its rows follow each
other, and the swizzle moves 16-byte chunks within a row. One k step is 32 bytes along k.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from . import fragments as fr
from .bulk import swizzled
from .form import Case, Form, blank, constraints, operands
from .mma import accumulate_tolerance, truncate_tf32

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
M, STEPS = 64, 4
SPAN_CODE = {0: 0, 128: 1, 64: 2, 32: 3}


@dataclass(frozen=True)
class Layout:
    """How a [mn, k] operand lies in shared memory, and the descriptor that says so."""

    span: int = 128
    mn_major: bool = False

    def place(self, x: np.ndarray) -> tuple[np.ndarray, int, int]:
        """(bytes, descriptor without address, step of the address per k step) of x[mn, k]."""
        image, leading, stride, step = (self._mn_slabs if self.mn_major else self._k_slabs)(x)
        descriptor = (leading >> 4) << 16 | (stride >> 4) << 32 | SPAN_CODE[self.span] << 62
        return image, descriptor, step

    def steps(self, x: np.ndarray) -> list[int]:
        """Byte offset of each k step from the operand's start."""
        mn, _ = x.shape
        if self.mn_major:
            return [k * (256 if not self.span else 16 * self.span) for k in range(STEPS)]
        if not self.span:
            return [k * 2 * mn * 16 for k in range(STEPS)]
        return [k * 32 // self.span * mn * self.span + k * 32 % self.span for k in range(STEPS)]

    def _k_slabs(self, x: np.ndarray) -> tuple[np.ndarray, int, int, int]:
        rows, chunks = x.shape[0], _chunks(x)  # [mn, k chunk, 16]
        if (
            not self.span
        ):  # core matrices of 8 rows x 16 bytes: rows follow each other, then the next chunk of k
            return chunks.swapaxes(0, 1).reshape(-1), rows * 16, 128, 0
        width = self.span // 16
        slabs = [
            swizzled(chunks[:, i : i + width].reshape(rows, -1), self.span)
            for i in range(0, chunks.shape[1], width)
        ]
        return np.concatenate([s.reshape(-1) for s in slabs]), 16, 8 * self.span, 0

    def _mn_slabs(self, x: np.ndarray) -> tuple[np.ndarray, int, int, int]:
        depth = x.shape[1]
        if not self.span:  # core matrices of 8 k x 16 bytes of mn: k groups follow each other, then the next 8 of mn
            chunks = _chunks(x.T)  # [k, mn chunk, 16]
            return chunks.swapaxes(0, 1).reshape(-1), 128, depth * 16, 0
        per_slab = self.span // x.itemsize
        padded = np.zeros((-(-x.shape[0] // per_slab) * per_slab, depth), x.dtype)
        padded[: x.shape[0]] = x
        slabs = [
            swizzled(_chunks(padded[i : i + per_slab].T).reshape(depth, -1), self.span)
            for i in range(0, len(padded), per_slab)
        ]
        return np.concatenate([s.reshape(-1) for s in slabs]), depth * self.span, 8 * self.span, 0


def _chunks(x: np.ndarray) -> np.ndarray:
    """[rows, columns] -> [rows, 16-byte chunk, 16] bytes."""
    flat = np.ascontiguousarray(x)
    return flat.view(np.uint8).reshape(len(flat), -1, 16)


@dataclass(frozen=True)
class Product:
    """One form: D[64, n] (+)= A B^T over four k steps."""

    name: str
    n: int
    kind: str = "f16"
    result: str = "f32"
    a: Layout | None = Layout()  # None: A in registers
    b: Layout = Layout()
    accumulate: bool = True
    sign_a: int = 1
    sign_b: int = 1
    exact: bool = True

    @property
    def dtype(self) -> np.dtype:
        return {"f16": F16, "bf16": BF16, "tf32": F32}[self.kind]

    @property
    def k(self) -> int:
        return 8 if self.kind == "tf32" else 16

    @property
    def d_registers(self) -> int:
        return self.n // 4 if self.result == "f16" else self.n // 2

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.integers(-2, 3, shape) if self.exact else rng.standard_normal(shape)
        return x.astype(self.dtype)

    def make(self, rng: np.random.Generator) -> Case:
        a, b = self.draw(rng, (M, STEPS * self.k)), self.draw(rng, (self.n, STEPS * self.k))
        d_type = F16 if self.result == "f16" else F32
        c = rng.integers(-8, 9, (M, self.n)).astype(d_type)
        read = truncate_tf32 if self.kind == "tf32" else (lambda x: x)
        a64, b64, c64 = (x.astype(np.float64) for x in (read(a), read(b), c))
        c64 = c64 if self.accumulate else np.zeros_like(c64)
        d = (self.sign_a * self.sign_b * (a64 @ b64.T) + c64).astype(d_type)
        rows, columns = fr.wgmma_d(self.n)
        held = c[rows, columns] if self.accumulate else np.full(rows.shape, np.nan, d_type)
        b_image, b_fields, _ = self.b.place(b)
        a_argument, a_fields, a_steps = self._a_arguments(a)
        tables = np.array([*a_steps, *self.b.steps(b)], np.uint32)
        fields = np.array([a_fields, b_fields], np.uint64)
        slack = None if self.exact else accumulate_tolerance(a64, b64.T, c64, d_type)[rows, columns]
        return Case(
            [
                a_argument,
                b_image,
                fields,
                tables,
                np.ascontiguousarray(held),
                blank(rows.shape, d_type),
            ],
            [d[rows, columns]],
            [slack],
        )

    def _a_arguments(self, a: np.ndarray) -> tuple[np.ndarray, int, list[int]]:
        if self.a is not None:
            image, fields, _ = self.a.place(a)
            return image, fields, self.a.steps(a)
        rows, columns = fr.wgmma_a_tf32() if self.kind == "tf32" else fr.wgmma_a_16bit()
        steps = [np.ascontiguousarray(a[rows, columns + s * self.k]) for s in range(STEPS)]
        return np.stack(steps), 0, [0] * STEPS

    def form(self) -> Form:
        regs = self.d_registers
        rng = np.random.default_rng(0)
        case = self.make(rng)
        a_bytes = case.arguments[0].nbytes if self.a is not None else 0
        b_at = -(-a_bytes // 1024) * 1024
        b_bytes = case.arguments[1].nbytes
        d_type, d_kind = ("u32", "r") if self.result == "f16" else ("float", "f")
        ptx = f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}.{self.result}.{self.kind}.{self.kind}"
        if self.a is None:
            a_text, a_in, used = operands("%{}", 4, regs), constraints("r", "x", 4), 4
            transposes = "" if self.kind == "tf32" else f", {int(self.b.mn_major)}"
            load_a = "u32 x[4]; for (int i = 0; i < 4; ++i) x[i] = ((const u32*)a)[(step * 128 + thread) * 4 + i];"
        else:
            a_text, a_in, used, load_a = (
                f"%{regs}",
                '"l"(da)',
                1,
                "u64 da = descriptor(smem, fields[0], steps[step]);",
            )
            transposes = (
                "" if self.kind == "tf32" else f", {int(self.a.mn_major)}, {int(self.b.mn_major)}"
            )
        text = (
            f"{{ .reg .pred p; setp.ne.u32 p, %{regs + used + 1}, 0; {ptx} {operands('%{}', regs)}, {a_text}, "
            f"%{regs + used}, p, {self.sign_a}, {self.sign_b}{transposes}; }}"
        )
        # Registers of A must live until the wait, so those steps are unrolled; the others share one
        # instruction.
        copy_a = f"for (u32 i = thread; i < {a_bytes} / 16; i += 128) ((uint4*)smem)[i] = ((const uint4*)a)[i];"
        body = f"""
    {copy_a if a_bytes else ""}
    for (u32 i = thread; i < {b_bytes} / 16; i += 128) ((uint4*)(smem + {b_at}))[i] = ((const uint4*)b)[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    {d_type} d[{regs}];
    for (int i = 0; i < {regs}; ++i) d[i] = c[thread * {regs} + i];
#pragma unroll {1 if self.a is not None else STEPS}
    for (u32 step = 0; step < {STEPS}; ++step) {{
        {load_a}
        const u64 db = descriptor(smem + {b_at}, fields[1], steps[{STEPS} + step]);
        const u32 accumulate = step > 0 || {int(self.accumulate)};
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        asm volatile("{text}"
            : {constraints("+" + d_kind, "d", regs)} : {a_in}, "l"(db), "r"(accumulate));
    }}
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < {regs}; ++i) out[thread * {regs} + i] = d[i];"""
        return Form(
            name=f"wgmma_{self.name}",
            group="sm_90a_wgmma",
            parameters="const u8* a, const u8* b, const u64* fields, const u32* steps, "
            f"const {d_type}* c, {d_type}* out",
            body=body,
            make=self.make,
            block=128,
            shared=b_at + b_bytes,
            functions=(DESCRIPTOR,),
        )


DESCRIPTOR = """
static __device__ __forceinline__ u64 descriptor(const void* start, u64 fields, u32 step) {
    return fields | (u64)(((shared_address(start) + step) & 0x3FFFF) >> 4);
}
"""
MN = Layout(mn_major=True)


def _products() -> list[Product]:
    out = [
        Product(f"ss_n{n}", n)
        for n in (8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 176, 192, 224, 256)
    ]
    for span in (0, 32, 64, 128):
        for a_mn in (False, True):
            for b_mn in (False, True):
                label = f"ss_{'mn' if a_mn else 'k'}_{'mn' if b_mn else 'k'}_span{span}"
                out.append(Product(label, 64, a=Layout(span, a_mn), b=Layout(span, b_mn)))
    out += [
        Product("ss_mn_n192", 192, b=MN),  # leading offset over three slabs
        Product("ss_mn_n96_span64", 96, b=Layout(64, True)),
        Product("ss_mn_n256_bf16", 256, "bf16", b=MN),
        *(Product(f"ss_n{n}_bf16", n, "bf16") for n in (32, 64, 80, 96, 112, 128, 160, 176, 192)),
        Product("ss_n64_zero", 64, accumulate=False),
        Product("ss_n64_negate_a", 64, sign_a=-1),
        Product("ss_n64_negate_b", 64, sign_b=-1),
        Product("ss_n64_f16", 64, result="f16"),
        Product("ss_n128_f16_zero", 128, result="f16", accumulate=False),
        Product("rs_n64_f16", 64, result="f16", a=None),
        *(Product(f"rs_n{n}", n, a=None) for n in (8, 64, 128, 256)),
        *(Product(f"rs_mn_n{n}", n, a=None, b=MN) for n in (64, 96, 128, 192, 256)),
        Product("rs_mn_n128_bf16", 128, "bf16", a=None, b=MN),
        Product("rs_n64_negate_a", 64, a=None, sign_a=-1, accumulate=False),
        Product("ss_n64_tf32", 64, "tf32"),
        Product("ss_n128_tf32_span32", 128, "tf32", a=Layout(32), b=Layout(32)),
        Product("rs_n64_tf32", 64, "tf32", a=None),
        Product("ss_n64_rounding", 64, exact=False),
        Product("ss_n64_bf16_rounding", 64, "bf16", exact=False),
        Product("ss_n64_tf32_rounding", 64, "tf32", exact=False),
    ]
    return out


FORMS = [p.form() for p in _products()]
