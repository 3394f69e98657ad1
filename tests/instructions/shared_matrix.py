"""ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements between shared memory and
fragments."""

from __future__ import annotations

import numpy as np

from .form import Case, Form, blank, constraints, operands
from .fragments import matrix_8x8

ROWS = 64  # 16-byte rows in shared memory, more than any form reads, so that wrong addresses read wrong data


def _spread(matrices: np.ndarray, transposed: bool) -> np.ndarray:
    """[count, 8, 8] -> [lanes, count, 2]: what each lane's registers hold."""
    rows, columns = matrix_8x8()
    m = matrices.swapaxes(1, 2) if transposed else matrices
    return m[:, rows, columns].swapaxes(0, 1)


def _load_case(count: int, transposed: bool, rng: np.random.Generator) -> Case:
    memory = rng.integers(0, 2**16, (ROWS, 8), np.uint16)
    rows = rng.permutation(ROWS)[:32].astype(
        np.uint32
    )  # every lane of x1 and x2 holds a valid address, as sm_75 demands
    matrices = memory[rows[: 8 * count]].reshape(count, 8, 8)
    return Case(
        arguments=[memory, rows, blank((32, count, 2), np.uint16)],
        expected=[_spread(matrices, transposed)],
    )


def _store_case(count: int, transposed: bool, rng: np.random.Generator) -> Case:
    matrices = rng.integers(0, 2**16, (count, 8, 8), np.uint16)
    rows = rng.permutation(ROWS)[:32].astype(np.uint32)
    memory = np.full((ROWS, 8), 0xABCD, np.uint16)
    memory[rows[: 8 * count]] = matrices.reshape(-1, 8)
    fragments = np.ascontiguousarray(_spread(matrices, transposed))
    return Case(
        arguments=[fragments, rows, blank((ROWS, 8), np.uint16)],
        expected=[memory],
    )


def _load(count: int, transposed: bool) -> Form:
    suffix = ".trans" if transposed else ""
    return Form(
        name=f"ldmatrix_x{count}{suffix.replace('.', '_')}",
        group="sm_75",
        parameters="const uint4* memory, const u32* rows, u32* out",
        shared=ROWS * 16,
        body=f"""
    for (u32 i = lane; i < {ROWS}; i += 32) ((uint4*)smem)[i] = memory[i];
    __syncthreads();
    u32 x[{count}];
    asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {operands("%{}", count)}, [%{count}];"
        : {constraints("=r", "x", count)} : "r"(shared_address(smem) + rows[lane] * 16) : "memory");
    for (int i = 0; i < {count}; ++i) out[lane * {count} + i] = x[i];""",
        make=lambda rng: _load_case(count, transposed, rng),
    )


def _store(count: int, transposed: bool) -> Form:
    suffix = ".trans" if transposed else ""
    return Form(
        name=f"stmatrix_x{count}{suffix.replace('.', '_')}",
        group="sm_90a",
        parameters="const u32* fragments, const u32* rows, uint4* memory",
        shared=ROWS * 16,
        body=f"""
    const u32 word = 0xABCDABCDu;
    for (u32 i = lane; i < {ROWS}; i += 32) ((uint4*)smem)[i] = make_uint4(word, word, word, word);
    __syncthreads();
    u32 x[{count}];
    for (int i = 0; i < {count}; ++i) x[i] = fragments[lane * {count} + i];
    asm volatile("stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%0], {operands("%{}", count, 1)};"
        :: "r"(shared_address(smem) + rows[lane] * 16), {constraints("r", "x", count)} : "memory");
    __syncthreads();
    for (u32 i = lane; i < {ROWS}; i += 32) memory[i] = ((uint4*)smem)[i];""",
        make=lambda rng: _store_case(count, transposed, rng),
    )


def _transpose_case(rng: np.random.Generator) -> Case:
    matrix = rng.integers(0, 2**16, (1, 8, 8), np.uint16)
    return Case(
        arguments=[np.ascontiguousarray(_spread(matrix, False)), blank((32, 1, 2), np.uint16)],
        expected=[_spread(matrix, True)],
    )


FORMS = [
    *(_load(count, transposed) for count in (1, 2, 4) for transposed in (False, True)),
    *(_store(count, transposed) for count in (1, 2, 4) for transposed in (False, True)),
    Form(
        name="movmatrix_trans",
        group="sm_75",
        parameters="const u32* in, u32* out",
        body="""
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(in[lane]));
    out[lane] = y;""",
        make=_transpose_case,
    ),
]
