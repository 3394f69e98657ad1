// What sm_90a adds, one function per instruction: mbarriers, bulk copies by tensor map (TMA), register
// hand-over between warpgroups, named barriers, stmatrix. Products of warpgroups: ptx_sm90_wgmma.cuh.
//
// Shared memory has two kinds of users: ordinary instructions, and the asynchronous ones of this file
// and of wgmma. What ordinary stores wrote needs fence_proxy_async by the writers, and then a barrier,
// before the others may read it; what a copy wrote is visible to whoever waited on its mbarrier.
#pragma once

#include "ptx.cuh"

// ---- mbarrier: 8 bytes of shared memory that count arrivals and bytes ---------------------------
// Phases are numbered from 0. A phase ends when `arrivals` threads have arrived and every byte that was
// announced has come. wait(n & 1) returns when phase n is over; a fresh barrier counts as if phase -1
// just were, so that who waits for "empty" passes the first time with parity 1.

DEV void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By who initialised, before any copy can signal the barriers; then a block barrier for everybody else.
DEV void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Announces bytes of copies to come and arrives.
DEV void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
DEV void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Has the phase of this parity ended? May sleep a while before it says no.
DEV bool mbarrier_try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0u;
}
DEV void mbarrier_wait(u32 barrier, u32 parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// ---- the asynchronous proxy ---------------------------------------------------------------------

// Ordinary accesses of this thread to shared memory come before asynchronous ones that follow.
DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies by tensor map: one thread issues, coordinates are in elements, innermost first ------
// Elements outside the tensor read as zero, and count as bytes that came; stores leave them out.

// What a load leaves behind in the L2 cache: lines of Q are read once, those of K and V by everybody.
// (createpolicy makes these words from fractions; they are the ones for all of a copy.)
constexpr u64 L2_EVICT_FIRST = 0x12F0000000000000ull, L2_EVICT_LAST = 0x14F0000000000000ull;

DEV void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// clang-format off
DEV void tma_load_2d(u32 smem, const TensorMap* map, u32 barrier, u64 policy, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%4, %5}], [%2], %3;"
                 :: "r"(smem), "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y) : "memory");
}
DEV void tma_load_3d(u32 smem, const TensorMap* map, u32 barrier, u64 policy, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%4, %5, %6}], [%2], %3;"
                 :: "r"(smem), "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z) : "memory");
}
DEV void tma_load_4d(u32 smem, const TensorMap* map, u32 barrier, u64 policy, int x, int y, int z, int u) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;"
                 :: "r"(smem), "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z), "r"(u) : "memory");
}
DEV void tma_load_5d(u32 smem, const TensorMap* map, u32 barrier, u64 policy, int x, int y, int z, int u, int v) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;"
                 :: "r"(smem), "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v) : "memory");
}
DEV void tma_store_2d(const TensorMap* map, u32 smem, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(map), "r"(smem), "r"(x), "r"(y) : "memory");
}
DEV void tma_store_3d(const TensorMap* map, u32 smem, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
                 :: "l"(map), "r"(smem), "r"(x), "r"(y), "r"(z) : "memory");
}
DEV void tma_store_4d(const TensorMap* map, u32 smem, int x, int y, int z, int u) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 :: "l"(map), "r"(smem), "r"(x), "r"(y), "r"(z), "r"(u) : "memory");
}
DEV void tma_store_5d(const TensorMap* map, u32 smem, int x, int y, int z, int u, int v) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                 :: "l"(map), "r"(smem), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v) : "memory");
}
// clang-format on

// ---- plain bulk copies: contiguous, addresses and sizes are multiples of 16 ---------------------

DEV void bulk_load(u32 smem, const void* gmem, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(smem),
        "l"(global_address(gmem)), "r"(bytes), "r"(barrier)
        : "memory");
}
// gmem[i] += smem[i], each element atomic by itself.
DEV void bulk_reduce_add_f32(float* gmem, u32 smem, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                     global_address(gmem)),
                 "r"(smem), "r"(bytes)
                 : "memory");
}

// Stores and reductions of this thread are waited for in groups.
DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// At most PENDING newest groups are still to be read from shared memory, which may then be overwritten.
template <int PENDING> DEV void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// ... are still to be written.
template <int PENDING> DEV void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- warpgroups ---------------------------------------------------------------------------------

// Registers per thread from here on, by all warps of a warpgroup; a multiple of 8 from 24 to 256. The
// kernel must have launch bounds, or the compiler ignores it (C7508).
template <int REGISTERS> DEV void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> DEV void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Barriers 1 to 15 (0 is __syncthreads) of `threads` threads, whole warps, counting those that only
// arrive.
DEV void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEV void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Also: does `mine` hold for any of them?
DEV bool named_barrier_or(int barrier, int threads, bool mine) {
    u32 any;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, "
        "q; }"
        : "=r"(any)
        : "r"((u32)mine), "r"(barrier), "r"(threads)
        : "memory");
    return any != 0u;
}

// True in one lane of a whole warp.
DEV bool elect_one() {
    u32 elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
                 : "=r"(elected));
    return elected != 0u;
}

// ---- fragments to shared memory: the reverse of ldmatrix ----------------------------------------

DEV void stmatrix_x4(u32 smem, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
DEV void stmatrix_x4_trans(u32 smem, const u32 (&r)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
}
