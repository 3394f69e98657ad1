"""Blocks of one cluster: their barrier, each other's memory and mbarriers, copies that all receive."""

from __future__ import annotations

import numpy as np

from .bulk import Box
from .form import Case, Form, blank
from .handshakes import BASIC, TRY

BLOCKS = 2
CLUSTER = """
static __device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
static __device__ __forceinline__ u32 in_block(u32 address, u32 rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
static __device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
"""


def _exchange_case(rng: np.random.Generator) -> Case:
    """Every block doubles what the other one put into its own shared memory."""
    values = rng.integers(0, 2**31, (BLOCKS, 32)).astype(np.uint32)
    return Case([values, blank((BLOCKS, 32), np.uint32)], [values[::-1] * np.uint32(2)])


EXCHANGE = Form(
    name="cluster_shared_exchange",
    group="sm_90a",
    parameters="const u32* in, u32* out",
    cluster=BLOCKS,
    shared=256,
    functions=(CLUSTER,),
    body="""
    const u32 rank = cluster_rank(), own = shared_address(smem) + lane * 4;
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(own), "r"(in[rank * 32 + lane]) : "memory");
    cluster_barrier();
    u32 theirs;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(theirs) : "r"(in_block(own, rank ^ 1)) : "memory");
    asm volatile("st.shared::cluster.u32 [%0], %1;"
        :: "r"(in_block(own + 128, rank)), "r"(2 * theirs) : "memory");
    out[rank * 32 + lane] = ((const volatile u32*)smem)[32 + lane];
    cluster_barrier();""",
    make=_exchange_case,
)


def _arrive_case(rng: np.random.Generator) -> Case:
    values = rng.integers(0, 2**31, 32).astype(np.uint32)
    return Case([values, blank(32, np.uint32)], [values])


# Block 1 writes into the shared memory of block 0 and arrives at its mbarrier; block 0 waits and reads.
REMOTE_ARRIVE = Form(
    name="cluster_remote_arrive",
    group="sm_90a",
    parameters="const u32* in, u32* out",
    cluster=BLOCKS,
    shared=256,
    functions=(BASIC, TRY, CLUSTER),
    body="""
    const u32 rank = cluster_rank(), own = shared_address(smem) + lane * 4, barrier = shared_address(smem) + 128;
    if (rank == 0 && lane == 0) {
        init_barrier(barrier, 32);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_barrier();
    if (rank == 1) {
        asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(in_block(own, 0)), "r"(in[lane]) : "memory");
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
            :: "r"(in_block(barrier, 0)) : "memory");
    } else {
        u32 done = 0;
        while (!done)
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;"
                "selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier) : "memory");
        out[lane] = ((const volatile u32*)smem)[lane];
    }
    cluster_barrier();""",
    make=_arrive_case,
)

BOX = Box((64, 16), (64, 8), (0, 8), swizzle=128)


def _multicast_case(rng: np.random.Generator) -> Case:
    tensor = BOX.tensor(rng)
    (rows, columns), _ = BOX.index()
    box = BOX.row_bytes(tensor[rows, columns]).reshape(-1)
    return Case(
        [BOX.argument(tensor, tensor), tensor, blank((BLOCKS, BOX.bytes), np.uint8)],
        [np.stack([box] * BLOCKS)],
    )


# Each block loads half of the box for both; every barrier sees all bytes.
MULTICAST = Form(
    name="tma_multicast",
    group="sm_90a",
    parameters="const __grid_constant__ TensorMap map, const void* tensor, u8* out",
    cluster=BLOCKS,
    shared=2 * BOX.bytes + 16,
    functions=(BASIC, TRY, CLUSTER),
    body=f"""
    const u32 rank = cluster_rank(), barrier = shared_address(smem) + {2 * BOX.bytes};
    if (lane == 0) {{
        init_barrier(barrier, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
            :: "r"(barrier), "r"({2 * BOX.bytes}) : "memory");
    }}
    cluster_barrier();
    if (lane == 0)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".multicast::cluster [%0], [%1, {{%2, %3}}], [%4], %5;"
            :: "r"(shared_address(smem) + rank * {BOX.bytes}), "l"(&map), "r"(0), "r"(8 - 8 * (int)rank),
               "r"(barrier), "h"((u16)3) : "memory");
    while (!try_parity(barrier, 0)) {{}}
    for (u32 i = lane; i < {BOX.bytes} / 16; i += 32)
        ((uint4*)(out + rank * {BOX.bytes}))[i] = ((const uint4*)smem)[i];
    cluster_barrier();""",
    make=_multicast_case,
)

FORMS = [EXCHANGE, REMOTE_ARRIVE, MULTICAST]
