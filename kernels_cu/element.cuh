// Number formats: one struct of traits per 16-bit format. A kernel is generic over
// `Config::Element`; data move as u16 and u32 (two elements, the lower index in the lower half),
// and only these structs know what the bits mean.
#pragma once

#include "ptx.cuh"

// Element concept:
//   EXPONENT        u16 mask of the exponent; all ones there means infinity or NaN
//   ONE             the bits of 1
//   pack(lo, hi)    two floats -> u32, rounded to nearest even
//   from_float(x)   one float -> its bits, the same rounding
//   to_float(bits)  exact
//   mma(d, a, b0, b1)   d (16x8, float) += a (16x16) * b (16x8)
struct f16 {
    static constexpr u16 EXPONENT = 0x7c00, ONE = 0x3c00;
    DEV u32 pack(float low, float high) { return cvt_rn_f16x2_f32(low, high); }
    DEV u16 from_float(float x) { return (u16)pack(x, 0.f); }
    DEV float to_float(u16 bits) { return cvt_f32_f16(bits); }
    DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_m16n8k16_f16(d, a, b0, b1);
    }
};

#if __CUDA_ARCH__ >= 800
struct bf16 {
    static constexpr u16 EXPONENT = 0x7f80, ONE = 0x3f80;
    DEV u32 pack(float low, float high) { return cvt_rn_bf16x2_f32(low, high); }
    DEV u16 from_float(float x) { return (u16)pack(x, 0.f); }
    DEV float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
    DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_m16n8k16_bf16(d, a, b0, b1);
    }
};
#endif

template <class Element> DEV bool is_finite(u16 bits) {
    return (bits & Element::EXPONENT) != Element::EXPONENT;
}

// The pair without its infinities and NaNs: those halves become 0.
template <class Element> DEV u32 finite_or_zero(u32 pair) {
    const u32 low = is_finite<Element>((u16)pair) ? pair & 0xffffu : 0u;
    const u32 high = is_finite<Element>((u16)(pair >> 16)) ? pair & 0xffff0000u : 0u;
    return low | high;
}

// Two elements of one register as floats.
template <class Element> DEV float2 unpack(u32 pair) {
    return make_float2(Element::to_float((u16)pair), Element::to_float((u16)(pair >> 16)));
}
