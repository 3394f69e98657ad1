// Products of a warpgroup: D (64 x N, float, in registers) += A (64 x 16) * B (16 x N), asynchronously.
//
//   wgmma_fence();                       accumulators and A registers were touched by ordinary code
//   wgmma_ss<f16, false, false>(d, a, b, accumulate); ...     any number; chained on one D in order
//   wgmma_commit();
//   wgmma_wait<N>();                     all but the N newest groups are done
//   wgmma_pin(d);                        what follows reads D after the wait, for the compiler, too
//
// Between commit and wait nobody may touch D, nor the registers of A. All four warps run the same.
//
// D of a warpgroup is, warp by warp, what mma.sync holds for 16 rows: an Accumulator<1, N / 8>, whose
// rows are 16 * (warp % 4) + lane / 4 (+ 8). Its columns 16 * s ..., rounded and packed, are the A
// registers of k step s: RoundedOperand<Element, 1, N / 8>.
#pragma once

#include "ptx_sm90.cuh"
#include "tile.cuh"

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEV void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// A wait says nothing about registers to the compiler: accesses to D stay on their side of this.
template <int N8> DEV void wgmma_pin(Accumulator<1, N8>& d) {
#pragma unroll
    for (int n = 0; n < N8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d.x[0][n][e])::"memory");
}
// What x and y (>= 0, or NaN) are made of is computed here, while products are under way. ptxas sees no reason
// to do arithmetic before a wait, and moves it behind; but not past a branch, which nobody takes.
DEV void finish_before_wait(float x, float y) {
    if (x < 0.f || y < 0.f) __nanosleep(1);
}

// ---- descriptors of operands in shared memory ---------------------------------------------------
// A tile is kept as slabs of 64 columns (rows of 128 bytes, 128-byte swizzle), one behind the other, each
// on a multiple of 1024 bytes: what one TMA box of 64 columns writes, and what SharedTile describes.
//   k-major    stored [m or n][k]: rows are rows (columns) of the product, a k step is 16 columns.
//              Q and K in Q K^T
//   mn-major   stored [k][m or n]: a k step is 16 rows. V in P V
constexpr int SLAB_COLUMNS = 64, SLAB_ROW_BYTES = 128;
constexpr u64 SWIZZLE_128 = 1ull << 62;

DEV u64 descriptor_field(u32 bytes) { return (bytes & 0x3ffff) >> 4; }
// 8 rows of 128 bytes lie side by side in memory: the stride field. The leading field is not used.
DEV u64 k_major_descriptor(u32 smem) {
    return descriptor_field(smem) | 1ull << 16 | descriptor_field(1024) << 32 | SWIZZLE_128;
}
// The leading field leads to the next 64 columns.
DEV u64 mn_major_descriptor(u32 smem, u32 slab_bytes) {
    return descriptor_field(smem) | descriptor_field(slab_bytes) << 16 |
           descriptor_field(1024) << 32 | SWIZZLE_128;
}
// Bytes from an operand's first k step to its k step `step`. Inside a slab's row the hardware applies the
// swizzle to the sum, so that plain addition is right.
template <int SLAB_BYTES> DEV u32 k_major_step(int step) {
    return step / 4 * SLAB_BYTES + step % 4 * 32;
}
DEV u32 mn_major_step(int step) { return step * 16 * SLAB_ROW_BYTES; }
DEV u64 moved_descriptor(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// ---- the instruction, for each N ----------------------------------------------------------------
// The text of an instruction names its operands by number: first the N / 2 registers of D, then the rest.

template <class Element, int N> struct Wgmma;

#define D_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define D_32 D_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D_48 D_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define D_64 D_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define D_80 D_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define D_96 D_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define D_112 D_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define D_128 D_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define D_144 D_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define D_160 D_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define D_176 D_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define D_192 D_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define D_208 D_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define D_224 D_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define D_240 D_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define D_256 D_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define OUT_8(n)                                                                   \
    "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), \
        "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define OUT_16 OUT_8(0)
#define OUT_32 OUT_16, OUT_8(2)
#define OUT_48 OUT_32, OUT_8(4)
#define OUT_64 OUT_48, OUT_8(6)
#define OUT_80 OUT_64, OUT_8(8)
#define OUT_96 OUT_80, OUT_8(10)
#define OUT_112 OUT_96, OUT_8(12)
#define OUT_128 OUT_112, OUT_8(14)
#define OUT_144 OUT_128, OUT_8(16)
#define OUT_160 OUT_144, OUT_8(18)
#define OUT_176 OUT_160, OUT_8(20)
#define OUT_192 OUT_176, OUT_8(22)
#define OUT_208 OUT_192, OUT_8(24)
#define OUT_224 OUT_208, OUT_8(26)
#define OUT_240 OUT_224, OUT_8(28)
#define OUT_256 OUT_240, OUT_8(30)

// i0 ... i6: the numbers that follow those of D.
#define WGMMA_OF(ELEMENT, N, OPCODE, i0, i1, i2, i3, i4, i5, i6)                                 \
    template <> struct Wgmma<ELEMENT, N> {                                                       \
        template <bool A_MN_MAJOR, bool B_MN_MAJOR>                                              \
        DEV void ss(float (&d)[N / 8][4], u64 a, u64 b, int accumulate) {                        \
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %" #i2 ", 0; " OPCODE " {" D_##N        \
                         "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 "; }"                 \
                         : OUT_##N                                                               \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN_MAJOR), "n"(B_MN_MAJOR));   \
        }                                                                                        \
        template <bool B_MN_MAJOR>                                                               \
        DEV void rs(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, int accumulate) {            \
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %" #i5 ", 0; " OPCODE " {" D_##N        \
                         "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 \
                         "; }"                                                                   \
                         : OUT_##N                                                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),  \
                           "n"(B_MN_MAJOR));                                                     \
        }                                                                                        \
    };

// clang-format off
WGMMA_OF(f16, 32, "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16", 16, 17, 18, 19, 20, 21, 22)
WGMMA_OF(bf16, 32, "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16", 16, 17, 18, 19, 20, 21, 22)
WGMMA_OF(f16, 64, "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", 32, 33, 34, 35, 36, 37, 38)
WGMMA_OF(bf16, 64, "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", 32, 33, 34, 35, 36, 37, 38)
WGMMA_OF(f16, 80, "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16", 40, 41, 42, 43, 44, 45, 46)
WGMMA_OF(bf16, 80, "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16", 40, 41, 42, 43, 44, 45, 46)
WGMMA_OF(f16, 96, "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16", 48, 49, 50, 51, 52, 53, 54)
WGMMA_OF(bf16, 96, "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16", 48, 49, 50, 51, 52, 53, 54)
WGMMA_OF(f16, 112, "wgmma.mma_async.sync.aligned.m64n112k16.f32.f16.f16", 56, 57, 58, 59, 60, 61, 62)
WGMMA_OF(bf16, 112, "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16", 56, 57, 58, 59, 60, 61, 62)
WGMMA_OF(f16, 128, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", 64, 65, 66, 67, 68, 69, 70)
WGMMA_OF(bf16, 128, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", 64, 65, 66, 67, 68, 69, 70)
WGMMA_OF(f16, 160, "wgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16", 80, 81, 82, 83, 84, 85, 86)
WGMMA_OF(bf16, 160, "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16", 80, 81, 82, 83, 84, 85, 86)
WGMMA_OF(f16, 176, "wgmma.mma_async.sync.aligned.m64n176k16.f32.f16.f16", 88, 89, 90, 91, 92, 93, 94)
WGMMA_OF(bf16, 176, "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16", 88, 89, 90, 91, 92, 93, 94)
WGMMA_OF(f16, 192, "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16", 96, 97, 98, 99, 100, 101, 102)
WGMMA_OF(bf16, 192, "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16", 96, 97, 98, 99, 100, 101, 102)
WGMMA_OF(f16, 256, "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16", 128, 129, 130, 131, 132, 133, 134)
WGMMA_OF(bf16, 256, "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", 128, 129, 130, 131, 132, 133, 134)
// clang-format on

// A and B in shared memory, by descriptors. accumulate = 0: D = A B.
template <class Element, bool A_MN_MAJOR, bool B_MN_MAJOR, int N8>
DEV void wgmma_ss(Accumulator<1, N8>& d, u64 a, u64 b, int accumulate) {
    Wgmma<Element, N8 * 8>::template ss<A_MN_MAJOR, B_MN_MAJOR>(d.x[0], a, b, accumulate);
}
// A in registers, which must stay as they are until the wait.
template <class Element, bool B_MN_MAJOR, int N8>
DEV void wgmma_rs(Accumulator<1, N8>& d, const u32 (&a)[4], u64 b, int accumulate) {
    Wgmma<Element, N8 * 8>::template rs<B_MN_MAJOR>(d.x[0], a, b, accumulate);
}
