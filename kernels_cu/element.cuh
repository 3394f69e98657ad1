// Number formats: one struct of traits per format, those of 16 bits here and the wider ones in
// wide_element.cuh. A kernel is generic over `Config::Element`; only these structs know what bits
// mean. 16-bit data move as u16 and u32 (two elements, the lower index in the lower half).
#pragma once

#include "ptx_matrix.cuh"
#include "real.cuh"

// Element concept:
//   Storage             what an array holds
//   Real                scores, statistics and sums
//   from_real(x)        Real -> Storage, rounded to nearest even
//   to_real(x)          exact
//   Operand             a lane's share of A (16x16) or B (16x16, two n8 blocks) of a product
//   STEPS_AT_ONCE       steps of 16 columns that the product over the head dim unrolls
//   multiply(d0, d1, a, b)   d0 and d1 (16x8 accumulators) += a (16x16) * b (16x16)
//   finite_chunk(x)     16 bytes without infinities and NaNs, which become 0
//   is_finite_value(x)  of Storage
// Only of 16 bits:
//   EXPONENT            u16 mask of the exponent; all ones there means infinity or NaN
//   ONE                 the bits of 1
//   pack(lo, hi)        two floats -> u32, rounded to nearest even
//   mma(d, a, b0, b1)   d (16x8, float) += a (16x16) * b (16x8)

template <class Element> DEV u32 finite_or_zero(u32 pair);

// What the 16-bit formats share.
template <class Element> struct Half {
    using Storage = u16;
    using Real = float;
    using Operand = u32[4];
    static constexpr int STEPS_AT_ONCE = 16;
    DEV u16 from_real(float x) { return (u16)Element::pack(x, 0.f); }
    DEV void multiply(float (&d0)[4], float (&d1)[4], const u32 (&a)[4], const u32 (&b)[4]) {
        Element::mma(d0, a, b[0], b[1]);
        Element::mma(d1, a, b[2], b[3]);
    }
    DEV uint4 finite_chunk(uint4 x) {
        return make_uint4(finite_or_zero<Element>(x.x), finite_or_zero<Element>(x.y),
                          finite_or_zero<Element>(x.z), finite_or_zero<Element>(x.w));
    }
    DEV bool is_finite_value(u16 bits) { return (bits & Element::EXPONENT) != Element::EXPONENT; }
};

struct f16 : Half<f16> {
    static constexpr u16 EXPONENT = 0x7c00, ONE = 0x3c00;
    DEV u32 pack(float low, float high) { return cvt_rn_f16x2_f32(low, high); }
    DEV float to_real(u16 bits) { return cvt_f32_f16(bits); }
    DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_m16n8k16_f16(d, a, b0, b1);
    }
};

#if __CUDA_ARCH__ >= 800
struct bf16 : Half<bf16> {
    static constexpr u16 EXPONENT = 0x7f80, ONE = 0x3f80;
    DEV u32 pack(float low, float high) { return cvt_rn_bf16x2_f32(low, high); }
    DEV float to_real(u16 bits) { return __uint_as_float((u32)bits << 16); }
    DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_m16n8k16_bf16(d, a, b0, b1);
    }
};
#endif

// The pair without its infinities and NaNs: those halves become 0.
template <class Element> DEV u32 finite_or_zero(u32 pair) {
    const u32 low = Element::is_finite_value((u16)pair) ? pair & 0xffffu : 0u;
    const u32 high = Element::is_finite_value((u16)(pair >> 16)) ? pair & 0xffff0000u : 0u;
    return low | high;
}

// Two elements of one register as floats.
template <class Element> DEV float2 unpack(u32 pair) {
    return make_float2(Element::to_real((u16)pair), Element::to_real((u16)(pair >> 16)));
}
