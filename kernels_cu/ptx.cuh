// One function per PTX instruction: asm text lives here and nowhere else. Instructions of sm_75 to
// sm_90 that the mma.sync family needs; what an architecture lacks is replaced here, so callers
// never ask which one they run on. Those of matrices: ptx_matrix.cuh.
#pragma once

#include "params.cuh"

#define DEV static __device__ __forceinline__  // free functions and static members
#define DEV_METHOD __device__ __forceinline__  // members of a struct

#if __CUDA_ARCH__ >= 800
constexpr bool HAS_ASYNC_COPY = true;
#else
constexpr bool HAS_ASYNC_COPY =
    false;  // Turing: tiles travel through registers, no bf16, mma has k8
#endif

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

DEV int lane_id() { return threadIdx.x % 32; }
DEV int warp_id() { return threadIdx.x / 32; }
// Read anew at every call, so that what is computed from them is not kept in registers across a
// main loop.
DEV unsigned fresh_block_id() {
    unsigned x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}
DEV unsigned fresh_thread_id() {
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}
// x, as a value of unknown origin: addresses made from it are computed where they are used, not
// kept in registers across a loop.
DEV u32 opaque(u32 x) {
    asm volatile("mov.u32 %0, %0;" : "+r"(x));
    return x;
}
DEV int opaque(int x) { return (int)opaque((u32)x); }
DEV float opaque(float x) { return __uint_as_float(opaque(__float_as_uint(x))); }
DEV double opaque(double x) {
    asm volatile("mov.f64 %0, %0;" : "+d"(x));
    return x;
}
DEV float neg_infinity() { return __int_as_float(0xff800000); }
DEV float positive_infinity() { return __int_as_float(0x7f800000); }

// ---- addresses ----------------------------------------------------------------------------------

DEV u32 shared_address(const void* smem) { return (u32)__cvta_generic_to_shared(smem); }
DEV u64 global_address(const void* gmem) { return (u64)__cvta_generic_to_global(gmem); }

// ---- loads and stores ---------------------------------------------------------------------------

DEV u16 ld_global_u16(const u16* gmem) {
    u16 x;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(global_address(gmem)) : "memory");
    return x;
}
DEV float ld_global_f32(const float* gmem) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(global_address(gmem)) : "memory");
    return x;
}
DEV uint4 ld_global_v4(const void* gmem) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(global_address(gmem))
                 : "memory");
    return x;
}
// 4, 8 or 16 bytes, aligned to their number.
DEV void ld_global_words(u32 (&x)[1], const void* gmem) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x[0]) : "l"(global_address(gmem)) : "memory");
}
DEV void ld_global_words(u32 (&x)[2], const void* gmem) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "l"(global_address(gmem))
                 : "memory");
}
DEV void ld_global_words(u32 (&x)[4], const void* gmem) {
    const uint4 found = ld_global_v4(gmem);
    x[0] = found.x, x[1] = found.y, x[2] = found.z, x[3] = found.w;
}
DEV void st_global_u16(u16* gmem, u16 x) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(global_address(gmem)), "h"(x) : "memory");
}
DEV void st_global_v4(void* gmem, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(gmem)), "r"(x.x),
                 "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
DEV u16 ld_shared_u16(u32 smem) {
    u16 x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(smem) : "memory");
    return x;
}
DEV u32 ld_shared_u32(u32 smem) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(smem) : "memory");
    return x;
}
DEV float ld_shared_f32(u32 smem) { return __uint_as_float(ld_shared_u32(smem)); }
DEV float2 ld_shared_f32x2(u32 smem) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(smem) : "memory");
    return x;
}
DEV uint4 ld_shared_v4(u32 smem) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(smem)
                 : "memory");
    return x;
}
DEV float4 ld_shared_f32x4(u32 smem) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(smem)
                 : "memory");
    return x;
}
DEV double ld_shared_f64(u32 smem) {
    double x;
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(smem) : "memory");
    return x;
}
DEV double2 ld_shared_f64x2(u32 smem) {
    double2 x;
    asm volatile("ld.shared.v2.f64 {%0, %1}, [%2];" : "=d"(x.x), "=d"(x.y) : "r"(smem) : "memory");
    return x;
}
DEV void st_shared_u16(u32 smem, u16 x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(smem), "h"(x) : "memory");
}
DEV void st_shared_u32(u32 smem, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(x) : "memory");
}
DEV void st_shared_f32(u32 smem, float x) { st_shared_u32(smem, __float_as_uint(x)); }
DEV void st_shared_f32x4(u32 smem, float4 x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w)
                 : "memory");
}
DEV void st_shared_f64(u32 smem, double x) {
    asm volatile("st.shared.f64 [%0], %1;" ::"r"(smem), "d"(x) : "memory");
}
DEV void st_shared_f64x2(u32 smem, double2 x) {
    asm volatile("st.shared.v2.f64 [%0], {%1, %2};" ::"r"(smem), "d"(x.x), "d"(x.y) : "memory");
}
DEV void st_shared_v4(u32 smem, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}

// The same by the type of the element.
DEV u16 ld_global(const u16* gmem) { return ld_global_u16(gmem); }
DEV float ld_global(const float* gmem) { return *gmem; }
DEV double ld_global(const double* gmem) { return *gmem; }
DEV void st_global(u16* gmem, u16 x) { st_global_u16(gmem, x); }
DEV void st_global(float* gmem, float x) { *gmem = x; }
DEV void st_global(double* gmem, double x) { *gmem = x; }
DEV void ld_shared(u16& x, u32 smem) { x = ld_shared_u16(smem); }
DEV void ld_shared(float& x, u32 smem) { x = ld_shared_f32(smem); }
DEV void ld_shared(double& x, u32 smem) { x = ld_shared_f64(smem); }
DEV void ld_shared(float2& x, u32 smem) { x = ld_shared_f32x2(smem); }
DEV void ld_shared(double2& x, u32 smem) { x = ld_shared_f64x2(smem); }
DEV void st_shared(u32 smem, u16 x) { st_shared_u16(smem, x); }
DEV void st_shared(u32 smem, float x) { st_shared_f32(smem, x); }
DEV void st_shared(u32 smem, double x) { st_shared_f64(smem, x); }

// Two neighbours.
template <class Real> struct PairOf;
template <> struct PairOf<float> {
    using Type = float2;
};
template <> struct PairOf<double> {
    using Type = double2;
};

// ---- asynchronous copies (sm_80+; callers test HAS_ASYNC_COPY where a substitute is needed) -----

// 16 bytes global -> shared past L1; only the first `bytes` (0 or 16) are read, the rest of the
// destination becomes zero.
DEV void cp_async_16(u32 smem, const void* gmem, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem),
                 "l"(global_address(gmem)), "r"(bytes)
                 : "memory");
#endif
}
// 4 bytes, likewise.
DEV void cp_async_4(u32 smem, const void* gmem, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem),
                 "l"(global_address(gmem)), "r"(bytes)
                 : "memory");
#endif
}
// 8 bytes, likewise.
DEV void cp_async_8(u32 smem, const void* gmem, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem),
                 "l"(global_address(gmem)), "r"(bytes)
                 : "memory");
#endif
}
DEV void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Returns when at most PENDING of this thread's newest groups are still on their way. Other threads
// need a barrier too.
template <int PENDING> DEV void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- reductions in global memory: *gmem += x, in whatever order threads arrive ---------------------------------------

#if __CUDA_ARCH__ >= 900
constexpr bool HAS_VECTOR_REDUCTION = true;
#else
constexpr bool HAS_VECTOR_REDUCTION = false;
#endif

DEV void red_global_add_f32(float* gmem, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(global_address(gmem)), "f"(x) : "memory");
}
DEV void red_global_add_u64(u64* gmem, u64 x) {
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(global_address(gmem)), "l"(x) : "memory");
}
DEV void red_global_or_u64(u64* gmem, u64 x) {
    asm volatile("red.global.or.b64 [%0], %1;" ::"l"(global_address(gmem)), "l"(x) : "memory");
}
// Four neighbours at once, each atomic by itself; 16-byte aligned. Callers test HAS_VECTOR_REDUCTION.
DEV void red_global_add_v4(float* gmem, float4 x) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(gmem)),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
#endif
}

// ---- conversions: `low` goes to the lower 16 bits; round to nearest even, subnormals kept -------

DEV u16 cvt_rn_f16_f32(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEV float cvt_f32_f16(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#if __CUDA_ARCH__ >= 800
DEV u32 cvt_rn_f16x2_f32(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEV u32 cvt_rn_bf16x2_f32(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
#else
DEV u32 cvt_rn_f16x2_f32(float low, float high) {
    return (u32)cvt_rn_f16_f32(low) | (u32)cvt_rn_f16_f32(high) << 16;
}
#endif

#if __CUDA_ARCH__ >= 800
// The nearest number of 10 mantissa bits (ties away from 0): what a tf32 product reads of a float.
DEV u32 cvt_rna_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
#endif

// ---- selection ----------------------------------------------------------------------------------

// The smaller one; NaN when either is NaN (min.f32 and fminf would return the other).
DEV float min_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a > b ? b : a;  // b is never NaN in our calls
#endif
}

// ---- approximate functions: relative error about 2^-22 ------------------------------------------
// .ftz only flushes arguments and results below 2^-126.

DEV float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEV float lg2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEV float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
