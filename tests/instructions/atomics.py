"""Atomic adds on global memory, scalar and vector; sums are exact, so their order does not
matter."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .form import Case, Form, Output, blank

CELLS = 16


def _float_case(width: int, dtype: np.dtype, rng: np.random.Generator) -> Case:
    """Every lane adds `width` small integers to the group of cells it drew."""
    cells = rng.integers(-8, 9, (CELLS, width)).astype(dtype)
    where = rng.integers(0, CELLS, 32).astype(np.uint32)
    value = rng.integers(-3, 4, (32, width)).astype(dtype)
    total = cells.astype(np.float64)
    np.add.at(total, where, value.astype(np.float64))
    return Case([where, value, Output(cells)], [total.astype(dtype)])


def _red_f32(width: int) -> Form:
    vector = f".v{width}" if width > 1 else ""
    values = "{" + ", ".join(f"%{i + 1}" for i in range(width)) + "}" if width > 1 else "%1"
    operands = ", ".join(f'"f"(value[lane * {width} + {i}])' for i in range(width))
    return Form(
        name=f"red_global_add{vector.replace('.', '_')}_f32",
        group="sm_90a" if width > 1 else "sm_75",
        parameters="const u32* where, const float* value, float* cells",
        body=f"""
    asm volatile("red.global.add{vector}.f32 [%0], {values};"
        :: "l"(__cvta_generic_to_global(cells + where[lane] * {width})), {operands} : "memory");""",
        make=lambda rng: _float_case(width, np.dtype(np.float32), rng),
    )


def _red_pair(kind: str, dtype: np.dtype, group: str) -> Form:
    return Form(
        name=f"red_global_add_noftz_{kind}",
        group=group,
        parameters="const u32* where, const u32* value, u32* cells",
        body=f"""
    asm volatile("red.global.add.noftz.{kind} [%0], %1;"
        :: "l"(__cvta_generic_to_global(cells + where[lane])), "r"(value[lane]) : "memory");""",
        make=lambda rng: _float_case(2, dtype, rng),
    )


def _red_64(name: str, op: str, combine: np.ufunc) -> Form:
    """Every lane changes the cell it drew; numbers as large as they get, so that sums wrap around."""

    def make(rng: np.random.Generator) -> Case:
        cells, value = (rng.integers(0, 2**64, n, np.uint64) for n in (CELLS, 32))
        where = rng.integers(0, CELLS, 32).astype(np.uint32)
        changed = cells.copy()
        combine.at(changed, where, value)
        return Case([where, value, Output(cells)], [changed])

    return Form(
        name=f"red_global_{name}",
        group="sm_75",
        parameters="const u32* where, const u64* value, u64* cells",
        body=f"""
    asm volatile("red.global.{op} [%0], %1;"
        :: "l"(__cvta_generic_to_global(cells + where[lane])), "l"(value[lane]) : "memory");""",
        make=make,
    )


def _tickets(rng: np.random.Generator) -> Case:
    """atom returns the old value: 32 lanes adding 1 draw the tickets start .. start + 31, each
    once."""
    start = rng.integers(0, 2**31, 1, np.uint32)
    drawn = np.ones(32, np.uint32)
    return Case(
        [start.copy(), Output(start), Output(np.zeros(32, np.uint32))],
        [start + np.uint32(32), drawn],
    )


def _cas(rng: np.random.Generator) -> Case:
    """Each lane swaps its own cell, if the cell holds the value the lane compares with."""
    cells = rng.integers(0, 3, 32).astype(np.uint32)
    compare = rng.integers(0, 3, 32).astype(np.uint32)
    swap = rng.integers(10, 99, 32).astype(np.uint32)
    return Case(
        [compare, swap, Output(cells), blank(32, np.uint32)],
        [np.where(cells == compare, swap, cells), cells],
    )


FORMS = [
    *(_red_f32(width) for width in (1, 2, 4)),
    _red_pair("f16x2", np.dtype(np.float16), "sm_75"),
    _red_pair("bf16x2", np.dtype(ml_dtypes.bfloat16), "sm_90a"),
    _red_64("add_u64", "add.u64", np.add),
    _red_64("or_b64", "or.b64", np.bitwise_or),
    Form(
        name="atom_global_add_u32",
        group="sm_75",
        parameters="const u32* start, u32* cell, u32* drawn",
        body="""
    u32 old;
    asm volatile("atom.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(__cvta_generic_to_global(cell)) : "memory");
    if (old - start[0] < 32) atomicAdd(drawn + (old - start[0]), 1u);""",
        make=_tickets,
    ),
    Form(
        name="atom_global_cas_b32",
        group="sm_75",
        parameters="const u32* compare, const u32* swap, u32* cells, u32* out",
        body="""
    u32 old;
    asm volatile("atom.global.cas.b32 %0, [%1], %2, %3;"
        : "=r"(old) : "l"(__cvta_generic_to_global(cells + lane)), "r"(compare[lane]), "r"(swap[lane]) : "memory");
    out[lane] = old;""",
        make=_cas,
    ),
]
