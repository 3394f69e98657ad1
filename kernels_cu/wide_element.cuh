// Number formats of 32 and 64 bits: what element.cuh is for 16 bits.
//
// Operands of a 16x16 block of products. In tf32 and f64 products a lane holds k = lane % 4, + 4, ...,
// while a lane of an accumulator holds neighbouring columns, so that an accumulator is not the next
// product's A operand as it stands. But the order of k inside a product is free as long as both
// operands agree on it: slot n of lane t is whatever k the loads of wide_tile.cuh say, chosen so that
// accumulators go into the next product as they are (no shuffle, no trip through shared memory) and
// so that what lies side by side in shared memory is one wide load.
#pragma once

#include "element.cuh"

// x[r][n]: A: row lane/4 + 8 r; B: column lane/4 of n8 block r. n: the lane's k slots.
template <class Real> struct Slots {
    Real x[2][4];
    DEV_METHOD void set(int r, int n, Real to) { x[r][n] = to; }
};

namespace wide {

// d0 += a b[0] and d1 += a b[1] without matrix instructions: every lane fetches the slots of its rows
// and columns from the lanes that hold them and multiplies: one shuffle per multiplication in float. The loop is small on purpose; so is, there,
// STEPS_AT_ONCE: unrolled, the compiler would take minutes.
template <class Real>
DEV void multiply_add(Real (&d0)[4], Real (&d1)[4], const Slots<Real>& a, const Slots<Real>& b) {
    const int lane = threadIdx.x % 32, quad = lane & ~3, column = lane % 4 * 2;
#pragma unroll 1
    for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            Real rows[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                rows[half] = __shfl_sync(FULL_WARP, a.x[half][n], quad + t);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int from = (column + e) * 4 + t;
                const Real left = __shfl_sync(FULL_WARP, b.x[0][n], from);
                const Real right = __shfl_sync(FULL_WARP, b.x[1][n], from);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    d0[2 * half + e] = fma_of(rows[half], left, d0[2 * half + e]);
                    d1[2 * half + e] = fma_of(rows[half], right, d1[2 * half + e]);
                }
            }
        }
}

#if __CUDA_ARCH__ >= 800
// d += a b with operands rounded to tf32: two products of k 8.
DEV void mma_tf32(float (&d)[4], const u32 (&a)[2][4], const u32 (&b)[4]) {
#pragma unroll
    for (int n = 0; n < 4; n += 2)
        mma_m16n8k8_tf32(d, a[0][n], a[1][n], a[0][n + 1], a[1][n + 1], b[n], b[n + 1]);
}
#endif

// Traits that 32- and 64-bit formats share.
template <class T> struct Format {
    using Storage = T;
    using Real = T;
    static constexpr int STEPS_AT_ONCE = sizeof(T) == 8 && HAS_ASYNC_COPY ? 2 : 1;
    DEV T from_real(T x) { return x; }
    DEV T to_real(T x) { return x; }
};

struct Float : Format<float> {
    // The chunk without its infinities and NaNs: those elements become 0.
    DEV uint4 finite_chunk(uint4 x) {
        return make_uint4(finite(x.x), finite(x.y), finite(x.z), finite(x.w));
    }
    DEV bool is_finite_value(float x) { return (__float_as_uint(x) & EXPONENT) != EXPONENT; }

  private:
    static constexpr u32 EXPONENT = 0x7f800000;
    DEV u32 finite(u32 x) { return (x & EXPONENT) == EXPONENT ? 0u : x; }
};

}  // namespace wide

// float32 with the accuracy of float32 products.
struct f32 : wide::Float {
#if __CUDA_ARCH__ >= 800
    // x = high + low + what is below 2^-22 of x, both tf32: three products are as good as one of
    // float32 (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
    // surpassing the FP32 theoretical peak performance", IJHPCA 2022).
    struct Operand {
        u32 high[2][4], low[2][4];
        DEV_METHOD void set(int r, int n, float x) {
            high[r][n] = cvt_rna_tf32(x);
            low[r][n] = cvt_rna_tf32(x - __uint_as_float(high[r][n]));
        }
    };
    DEV void multiply(float (&d0)[4], float (&d1)[4], const Operand& a, const Operand& b) {
        multiply(d0, a, b.high[0], b.low[0]);
        multiply(d1, a, b.high[1], b.low[1]);
    }

  private:
    // Small terms first. The block's sum is formed apart and added by an ordinary addition: tensor
    // cores cut off what they add to an accumulator, always towards 0, which over thousands of keys
    // would be seen.
    DEV void multiply(float (&d)[4], const Operand& a, const u32 (&high)[4], const u32 (&low)[4]) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        wide::mma_tf32(sum, a.low, high);
        wide::mma_tf32(sum, a.high, low);
        wide::mma_tf32(sum, a.high, high);
#pragma unroll
        for (int e = 0; e < 4; ++e) d[e] += sum[e];
    }
#else
    using Operand = Slots<float>;
    DEV void multiply(float (&d0)[4], float (&d1)[4], const Operand& a, const Operand& b) {
        wide::multiply_add(d0, d1, a, b);
    }
#endif
};

#if __CUDA_ARCH__ >= 800
// float32 whose products read 10 bits of each factor. Not on Turing, which has no tf32.
struct f32tf32 : wide::Float {
    struct Operand {
        u32 x[2][4];
        DEV_METHOD void set(int r, int n, float to) { x[r][n] = cvt_rna_tf32(to); }
    };
    DEV void multiply(float (&d0)[4], float (&d1)[4], const Operand& a, const Operand& b) {
        wide::mma_tf32(d0, a.x, b.x[0]);
        wide::mma_tf32(d1, a.x, b.x[1]);
    }
};
#endif

struct f64 : wide::Format<double> {
    using Operand = Slots<double>;
    DEV void multiply(double (&d0)[4], double (&d1)[4], const Operand& a, const Operand& b) {
#if __CUDA_ARCH__ >= 800
        if constexpr (HAS_WIDE_MMA_F64) {
            mma_m16n8k16_f64(d0, a.x, b.x[0]);
            mma_m16n8k16_f64(d1, a.x, b.x[1]);
        } else {
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    mma_m8n8k4_f64(d0[2 * half], d0[2 * half + 1], a.x[half][n], b.x[0][n]);
                    mma_m8n8k4_f64(d1[2 * half], d1[2 * half + 1], a.x[half][n], b.x[1][n]);
                }
        }
#else
        wide::multiply_add(d0, d1, a, b);
#endif
    }
    DEV uint4 finite_chunk(uint4 x) {
        const bool low = finite(x.y), high = finite(x.w);
        return make_uint4(low ? x.x : 0u, low ? x.y : 0u, high ? x.z : 0u, high ? x.w : 0u);
    }
    DEV bool is_finite_value(double x) { return finite(__double2hiint(x)); }

  private:
    static constexpr u32 EXPONENT = 0x7ff00000;  // of the upper word
    DEV bool finite(u32 upper) { return (upper & EXPONENT) != EXPONENT; }
};
