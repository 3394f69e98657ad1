"""Ordinary loads and stores written out in the kernels' assembly: widths, vectors, and the
non-coherent path."""

from __future__ import annotations

import numpy as np

from .form import Case, Form, blank, operands

LANES = 32


def _round_trip(kind: str, width: int, load: str = "") -> Form:
    """Global to registers, to shared memory and back the same way, each lane its own place."""
    c_type, constraint, bits = {
        "u16": ("u16", "h", np.uint16),
        "u32": ("u32", "r", np.uint32),
        "f32": ("float", "f", np.uint32),
        "u64": ("u64", "l", np.uint64),
        "f64": ("double", "d", np.uint64),
    }[kind]
    vector = f".v{width}" if width > 1 else ""
    suffix = f"{vector}.{kind}"
    size = np.dtype(bits).itemsize * width

    def registers(start: int) -> str:
        return operands("%{}", width, start) if width > 1 else f"%{start}"

    values = ", ".join(f'"{constraint}"(x[{i}])' for i in range(width))
    results = ", ".join(f'"={constraint}"(x[{i}])' for i in range(width))

    def make(rng: np.random.Generator) -> Case:
        data = rng.integers(0, np.iinfo(bits).max, (LANES, width), bits, endpoint=True)
        return Case([data, blank((LANES, width), bits)], [data])

    return Form(
        name=f"ld_st{load}{suffix}".replace(".", "_"),
        group="sm_75",
        parameters="const u8* in, u8* out",
        shared=LANES * size,
        body=f"""
    {c_type} x[{width}];
    const u32 own = shared_address(smem) + lane * {size};
    asm volatile("ld.global{load}{suffix} {registers(0)}, [%{width}];"
        : {results} : "l"(__cvta_generic_to_global(in + lane * {size})) : "memory");
    asm volatile("st.shared{suffix} [%0], {registers(1)};" :: "r"(own), {values} : "memory");
    for (int i = 0; i < {width}; ++i) x[i] = 0;
    asm volatile("ld.shared{suffix} {registers(0)}, [%{width}];" : {results} : "r"(own) : "memory");
    asm volatile("st.global{suffix} [%0], {registers(1)};"
        :: "l"(__cvta_generic_to_global(out + lane * {size})), {values} : "memory");""",
        make=make,
    )


FORMS = [
    *(_round_trip("u16", n) for n in (1, 2, 4)),
    *(_round_trip("u32", n) for n in (1, 2, 4)),
    *(_round_trip("f32", n) for n in (1, 2, 4)),
    *(_round_trip("u64", n) for n in (1, 2)),
    *(_round_trip("f64", n) for n in (1, 2)),
    _round_trip("u32", 4, ".nc"),
    _round_trip("u16", 1, ".nc"),
]
