"""cp.async: 4-, 8- and 16-byte copies, zero fill, groups and their mbarrier completion."""

from __future__ import annotations

import numpy as np

from .form import Case, Form, blank

THREADS = 32


def _case(size: int, kept: np.ndarray | None, rng: np.random.Generator) -> Case:
    """Thread i copies chunk order[i] to place i; `kept` bytes of each chunk survive, the rest is
    zero."""
    source = rng.integers(0, 256, (THREADS, size), np.uint8)
    order = rng.permutation(THREADS).astype(np.uint32)
    keep = np.full(THREADS, size) if kept is None else kept[rng.integers(0, len(kept), THREADS)]
    moved = np.where(np.arange(size) < keep[:, None], source[order], 0).astype(np.uint8)
    return Case(
        arguments=[source, order, keep.astype(np.uint32), blank((THREADS, size), np.uint8)],
        expected=[moved],
    )


def _copy(name: str, instruction: str, size: int, operand: str, kept: np.ndarray | None) -> Form:
    wait = 'asm volatile("cp.async.wait_all;" ::: "memory");'
    return Form(
        name=name,
        group="sm_80",
        parameters="const u8* source, const u32* order, const u32* keep, u8* out",
        shared=THREADS * 16,
        body=f"""
    const u32 bytes = keep[lane]; (void)bytes;
    asm volatile("{instruction} [%0], [%1], {size}{operand};"
        :: "r"(shared_address(smem) + lane * {size}), "l"(__cvta_generic_to_global(source + order[lane] * {size})),
           "r"(bytes) : "memory");
    {wait}
    __syncthreads();
    for (u32 i = lane; i < {size} * {THREADS}; i += 32) out[i] = smem[i];""",
        make=lambda rng: _case(size, kept, rng),
    )


def _groups_case(rng: np.random.Generator) -> Case:
    source = rng.integers(0, 2**32, (4, THREADS, 4), np.uint32)
    return Case(
        arguments=[source, blank((4, THREADS, 4), np.uint32)],
        expected=[source],
    )


# Each stage is read by its own thread right after the wait that covers it; the middle commit closes
# an empty group.
GROUPS = Form(
    name="cp_async_groups",
    group="sm_80",
    parameters="const uint4* source, uint4* out",
    shared=4 * THREADS * 16,
    body="""
    for (int stage = 0; stage < 4; ++stage) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
            :: "r"(shared_address(smem) + (stage * 32 + lane) * 16),
               "l"(__cvta_generic_to_global(source + stage * 32 + lane)) : "memory");
        if (stage == 1) asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    const uint4* mine = (const uint4*)smem + lane;
    asm volatile("cp.async.wait_group 4;" ::: "memory");
    out[lane] = mine[0];
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    out[32 + lane] = mine[32];
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    out[64 + lane] = mine[64];
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    out[96 + lane] = mine[96];""",
    make=_groups_case,
)

_PREDICATED = Form(
    name="cp_async_cg_16_ignore_src",
    group="sm_80",
    parameters="const u8* source, const u32* order, const u32* keep, u8* out",
    shared=THREADS * 16,
    body=f"""
    asm volatile("{{ .reg .pred ignore; setp.eq.u32 ignore, %2, 0;"
        "cp.async.cg.shared.global [%0], [%1], 16, ignore; }}"
        :: "r"(shared_address(smem) + lane * 16), "l"(__cvta_generic_to_global(source + order[lane] * 16)),
           "r"(keep[lane]) : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    for (u32 i = lane; i < 16 * {THREADS}; i += 32) out[i] = smem[i];""",
    make=lambda rng: _case(16, np.array([0, 16]), rng),
)

FORMS = [
    *(_copy(f"cp_async_ca_{n}", "cp.async.ca.shared.global", n, "", None) for n in (4, 8, 16)),
    *(
        _copy(
            f"cp_async_ca_{n}_zero_fill", "cp.async.ca.shared.global", n, ", %2", np.arange(n + 1)
        )
        for n in (4, 8, 16)
    ),
    _copy("cp_async_cg_16", "cp.async.cg.shared.global", 16, "", None),
    _copy("cp_async_cg_16_zero_fill", "cp.async.cg.shared.global", 16, ", %2", np.arange(17)),
    _copy(
        "cp_async_cg_16_l2_128b_zero_fill",
        "cp.async.cg.shared.global.L2::128B",
        16,
        ", %2",
        np.array([0, 16]),
    ),
    _PREDICATED,
    GROUPS,
]
