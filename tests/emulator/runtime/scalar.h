// scalar.h - the value rules of PTX arithmetic that C does not have, as inline functions of plain values.
#pragma once
#include "emu.h"

namespace emu {
// The C library without <cmath>.
inline float math_sqrt(float x) { return __builtin_sqrtf(x); }
inline double math_sqrt(double x) { return __builtin_sqrt(x); }
inline float math_abs(float x) { return __builtin_fabsf(x); }
inline double math_abs(double x) { return __builtin_fabs(x); }
inline float math_copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline double math_copysign(double x, double y) { return __builtin_copysign(x, y); }
inline bool is_nan(double x) { return x != x; }
inline bool is_inf(double x) { return __builtin_fabs(x) == __builtin_inf(); }
inline bool is_negative(float x) { return __builtin_bit_cast(u32, x) >> 31; }
inline bool is_negative(double x) { return __builtin_bit_cast(u64, x) >> 63; }

enum Rounding { RN, RZ, RM, RP, RNI, RZI, RMI, RPI, RNA };
enum HalfKind { F16, BF16 };

// ---- bits -----------------------------------------------------------------------------------------------------------
inline u32 bits(float x) { return __builtin_bit_cast(u32, x); }
inline float as_float(u32 x) { return __builtin_bit_cast(float, x); }
inline float ftz(float x) { return (bits(x) & 0x7f800000u) ? x : as_float(bits(x) & 0x80000000u); }
inline u16 ftz_f16(u16 x) { return (x & 0x7c00) ? x : (u16)(x & 0x8000); }
inline float saturate(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // NaN -> 0
inline double saturate(double x) { return x > 0. ? (x < 1. ? x : 1.) : 0.; }
inline s32 clamp_s32(s64 x) {
    return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (s32)x;
}
template <class T> inline T positive(T x) { return x < 0 ? 0 : x; }
inline u32 low24(u32 x) { return x & 0xffffffu; }
inline s32 low24(s32 x) { return (s32)((u32)x << 8) >> 8; }
inline u32 at_most_32(u32 n) { return n < 32 ? n : 32; }

template <class T> inline T shift_left(T x, u32 n) { return n >= 8 * sizeof(T) ? 0 : (T)(x << n); }
template <class T> inline T shift_right(T x, u32 n) {
    if (n >= 8 * sizeof(T)) return x < 0 ? (T)-1 : (T)0;
    return (T)(x >> n);
}
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    if (table & 1) r |= ~a & ~b & ~c;
    if (table & 2) r |= ~a & ~b & c;
    if (table & 4) r |= ~a & b & ~c;
    if (table & 8) r |= ~a & b & c;
    if (table & 16) r |= a & ~b & ~c;
    if (table & 32) r |= a & ~b & c;
    if (table & 64) r |= a & b & ~c;
    if (table & 128) r |= a & b & c;
    return r;
}
template <class T> inline T bit_field_extract(T x, u32 pos, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    constexpr bool is_signed = (T)-1 < (T)0;
    pos &= 0xff, length &= 0xff;
    if (length == 0) return 0;
    u32 sign_at = pos + length - 1 < width ? pos + length - 1 : width - 1;
    bool sign = is_signed && (x >> sign_at & 1);
    T out = 0;
    for (u32 i = 0; i < width; ++i) {
        bool bit = i < length && pos + i < width ? (bool)(x >> (pos + i) & 1) : sign;
        if (bit) out |= (T)((T)1 << i);
    }
    return out;
}
template <class T> inline T bit_field_insert(T a, T b, u32 pos, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    pos &= 0xff, length &= 0xff;
    for (u32 i = 0; i < length && pos + i < width; ++i) {
        T one = (T)1 << (pos + i);
        b = (a >> i & 1) ? (b | one) : (b & ~one);
    }
    return b;
}
inline u32 permute_byte(u64 pool, u32 select) {
    u32 byte = (u32)(pool >> (8 * (select & 7))) & 0xff;
    return select & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
}
inline u32 permute_index(u32 a, u32 b, u32 c) {
    u64 pool = (u64)b << 32 | a;
    return permute_byte(pool, c) | permute_byte(pool, c >> 4) << 8 |
           permute_byte(pool, c >> 8) << 16 | permute_byte(pool, c >> 12) << 24;
}
inline u32 permute_f4e(u32 a, u32 b, u32 c) { return (u32)(((u64)b << 32 | a) >> (8 * (c & 3))); }
inline u32 permute_b4e(u32 a, u32 b, u32 c) {
    u32 n = c & 3;
    return permute_index(a, b, n | ((n - 1) & 7) << 4 | ((n - 2) & 7) << 8 | ((n - 3) & 7) << 12);
}
inline u32 permute_rc8(u32 a, u32, u32 c) { return (a >> (8 * (c & 3)) & 0xff) * 0x01010101u; }
inline u32 permute_ecl(u32 a, u32 b, u32 c) {
    u32 n = c & 3, s = 0;
    for (u32 k = 0; k < 4; ++k) s |= (k < n ? n : k) << (4 * k);
    return permute_index(a, b, s);
}
inline u32 permute_ecr(u32 a, u32 b, u32 c) {
    u32 n = c & 3, s = 0;
    for (u32 k = 0; k < 4; ++k) s |= (k > n ? n : k) << (4 * k);
    return permute_index(a, b, s);
}
inline u32 permute_rc16(u32 a, u32, u32 c) { return (a >> (16 * (c & 1)) & 0xffff) * 0x00010001u; }
inline u32 popc32(u32 x) { return __builtin_popcount(x); }
inline u32 popc64(u64 x) { return __builtin_popcountll(x); }
inline u32 clz32(u32 x) { return x ? __builtin_clz(x) : 32; }
inline u32 clz64(u64 x) { return x ? __builtin_clzll(x) : 64; }
inline u64 brev64(u64 x) {
    u64 r = 0;
    for (int i = 0; i < 64; ++i) r |= (x >> i & 1) << (63 - i);
    return r;
}
inline u32 brev32(u32 x) { return (u32)(brev64(x) >> 32); }
template <class T> inline u32 find_leading(T x, bool as_shift) {
    u64 v = x < 0 ? (u64)(T)~x : (u64)x;
    if (!v) return 0xffffffffu;
    u32 msb = 63 - __builtin_clzll(v);
    return as_shift ? 8 * sizeof(T) - 1 - msb : msb;
}
inline u32 bit_mask_clamp(u32 a, u32 b) {
    if (a >= 32 || b == 0) return 0;
    u32 ones = b >= 32 ? ~0u : (1u << b) - 1;
    return ones << a;
}
inline u32 bit_mask_wrap(u32 a, u32 b) { return bit_mask_clamp(a & 31, b & 31); }
// Division by zero gives all ones and a remainder of the dividend, as the hardware's code sequences do; it never traps.
template <class T> inline T divide(T a, T b) {
    if (b == 0) return (T)-1;
    if ((T)-1 < 0 && b == (T)-1) return (T)(0 - (u64)a);
    return a / b;
}
template <class T> inline T remainder(T a, T b) {
    if (b == 0) return a;
    if ((T)-1 < 0 && b == (T)-1) return 0;
    return a % b;
}

// ---- half precision ---------------------------------------------------------------------------------------------------
inline float from_f16(u16 h) { return (float)__builtin_bit_cast(_Float16, h); }
inline float from_bf16(u16 h) { return as_float((u32)h << 16); }
inline u16 to_f16(float x) { return x == x ? __builtin_bit_cast(u16, (_Float16)x) : (u16)0x7fff; }
inline u16 to_f16(double x) { return x == x ? __builtin_bit_cast(u16, (_Float16)x) : (u16)0x7fff; }
inline u16 to_f16_rz(float x) {
    if (x != x) return 0x7fff;
    u16 h = to_f16(x);
    if (is_inf(from_f16(h)) && !is_inf(x)) return (u16)(h - 1);
    return math_abs(from_f16(h)) > math_abs(x) ? (u16)(h - 1) : h;
}
inline u16 to_bf16(float x) {
    u32 b = bits(x);
    return x == x ? (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16) : (u16)0x7fff;
}
inline u16 to_bf16_rz(float x) { return x == x ? (u16)(bits(x) >> 16) : (u16)0x7fff; }
// double -> float with the last bit forced odd when inexact: rounding that once more to a narrower type is then exact
inline float narrow_odd(double x) {
    float f = (float)x;
    if (x != x || (double)f == x || is_inf(f)) return f;
    u32 b = bits(f);
    if (math_abs((double)f) > math_abs(x)) b -= 1;
    return as_float(b | 1);
}
inline u16 to_bf16(double x) { return to_bf16(narrow_odd(x)); }
inline u16 to_f16_rz(double x) { return to_f16_rz(narrow_odd(x)); }
inline u16 to_bf16_rz(double x) { return to_bf16_rz(narrow_odd(x)); }
inline u16 relu_f16(u16 h) { return (h & 0x7fff) > 0x7c00 ? 0x7fff : (h & 0x8000 ? 0 : h); }
inline u16 relu_bf16(u16 h) { return (h & 0x7fff) > 0x7f80 ? 0x7fff : (h & 0x8000 ? 0 : h); }
inline u32 relu_f32_bits(u32 x) {
    return (x & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : (x >> 31 ? 0 : x);
}
inline u16 saturate_f16(u16 h) { return to_f16(saturate(from_f16(h))); }
inline u16 saturate_bf16(u16 h) { return to_bf16(saturate(from_bf16(h))); }

// a * b + c, rounded to odd in double: the product of two halves is exact there, so one more rounding is correct.
inline double fma_odd(float a, float b, float c) {
    double p = (double)a * b, s = p + c;
    if (!(math_abs(s) < __builtin_inf())) return s;
    double v = s - p, error = (p - (s - v)) + (c - v);
    if (error != 0) {
        u64 u = __builtin_bit_cast(u64, s);
        if (!(u & 1)) u += ((error > 0) == (s > 0)) ? 1 : -1;
        s = __builtin_bit_cast(double, u);
    }
    return s;
}
// Sums and products of two halves are exact (or exact enough) in float: 24 >= 2 * 11 + 2 bits.
inline u16 add_f16(u16 a, u16 b) { return to_f16(from_f16(a) + from_f16(b)); }
inline u16 sub_f16(u16 a, u16 b) { return to_f16(from_f16(a) - from_f16(b)); }
inline u16 mul_f16(u16 a, u16 b) { return to_f16(from_f16(a) * from_f16(b)); }
inline u16 fma_f16(u16 a, u16 b, u16 c) {
    return to_f16(fma_odd(from_f16(a), from_f16(b), from_f16(c)));
}
inline u32 pair_add_f16(u32 a, u32 b) {
    return add_f16((u16)a, (u16)b) | (u32)add_f16((u16)(a >> 16), (u16)(b >> 16)) << 16;
}
// bf16 has float's range, where float sums of distant exponents could round twice: go through double.
inline u16 add_bf16(u16 a, u16 b) { return to_bf16((double)from_bf16(a) + from_bf16(b)); }
inline u16 sub_bf16(u16 a, u16 b) { return to_bf16((double)from_bf16(a) - from_bf16(b)); }
inline u16 mul_bf16(u16 a, u16 b) { return to_bf16((double)from_bf16(a) * from_bf16(b)); }
inline u16 fma_bf16(u16 a, u16 b, u16 c) {
    return to_bf16(fma_odd(from_bf16(a), from_bf16(b), from_bf16(c)));
}
inline u32 pair_add_bf16(u32 a, u32 b) {
    return add_bf16((u16)a, (u16)b) | (u32)add_bf16((u16)(a >> 16), (u16)(b >> 16)) << 16;
}

// ---- minimum and maximum: a NaN loses against a number (or wins, with .NaN); -0 is less than +0 ---------------------------
template <class T> inline T quiet_nan();
template <> inline float quiet_nan<float>() { return as_float(0x7fffffffu); }
template <> inline double quiet_nan<double>() {
    return __builtin_bit_cast(double, (u64)0x7fffffffffffffffull);
}
template <class T, bool NAN_WINS, bool XORSIGN> inline T pick(T a, T b, bool smaller) {
    if (XORSIGN) {
        T sign = (is_negative(a) != is_negative(b)) ? (T)-1 : (T)1;
        return math_copysign(pick<T, NAN_WINS, false>(math_abs(a), math_abs(b), smaller), sign);
    }
    if (a != a || b != b) {
        if (NAN_WINS || (a != a && b != b)) return quiet_nan<T>();
        return a != a ? b : a;
    }
    if (a == b) return is_negative(a) == smaller ? a : b;
    return (a < b) == smaller ? a : b;
}
template <class T, bool N, bool X> inline T min_float(T a, T b) {
    return pick<T, N, X>(a, b, true);
}
template <class T, bool N, bool X> inline T max_float(T a, T b) {
    return pick<T, N, X>(a, b, false);
}
template <HalfKind K> inline float from_half(u16 h) {
    return K == F16 ? from_f16(h) : from_bf16(h);
}
template <HalfKind K> inline u16 to_half(float x) { return K == F16 ? to_f16(x) : to_bf16(x); }
template <HalfKind K, bool N, bool X> inline u16 min_half(u16 a, u16 b) {
    return to_half<K>(pick<float, N, X>(from_half<K>(a), from_half<K>(b), true));
}
template <HalfKind K, bool N, bool X> inline u16 max_half(u16 a, u16 b) {
    return to_half<K>(pick<float, N, X>(from_half<K>(a), from_half<K>(b), false));
}

// ---- conversions --------------------------------------------------------------------------------------------------------
inline double integral(double x, Rounding r) {
    return r == RZI   ? __builtin_trunc(x)
           : r == RMI ? __builtin_floor(x)
           : r == RPI ? __builtin_ceil(x)
                      : __builtin_nearbyint(x);
}
inline float integral(float x, Rounding r) { return (float)integral((double)x, r); }
// Float to integer saturates, and NaN becomes zero.
template <class T> inline T to_integer(double x, Rounding r) {
    constexpr bool is_signed = (T)-1 < (T)0;
    constexpr u32 width = 8 * sizeof(T);
    constexpr T high = is_signed ? (T)(((u64)1 << (width - 1)) - 1) : (T)-1;
    constexpr T low = is_signed ? (T)((T)-1 - high) : (T)0;
    if (x != x) return 0;
    x = integral(x, r);
    double limit = (is_signed ? 0.5 : 1.) * 2. * (double)((u64)1 << (width - 1));
    if (x >= limit) return high;
    if (x < (is_signed ? -limit : 0.)) return low;
    return (T)x;
}
template <class T, class S> inline T clamp_integer(S x) {
    constexpr bool is_signed = (T)-1 < (T)0;
    constexpr u32 width = 8 * sizeof(T);
    constexpr T high = is_signed ? (T)(((u64)1 << (width - 1)) - 1) : (T)-1;
    constexpr T low = is_signed ? (T)((T)-1 - high) : (T)0;
    __int128 v = x;
    return v > (__int128)high ? high : v < (__int128)low ? low : (T)x;
}
inline u32 to_tf32_rz(float x) { return x == x ? bits(x) & 0xffffe000u : 0x7fffffffu; }
inline u32 to_tf32_rna(float x) {  // nearest, ties away from zero
    if (x != x) return 0x7fffffffu;
    return is_inf(x) ? bits(x) : (bits(x) + 0x1000u) & 0xffffe000u;
}
inline u32 to_tf32_rn(float x) {
    if (x != x) return 0x7fffffffu;
    return is_inf(x) ? bits(x) : (bits(x) + 0xfffu + (bits(x) >> 13 & 1)) & 0xffffe000u;
}
template <class T> inline bool testp_finite(T x) { return x == x && !is_inf(x); }
template <class T> inline bool testp_infinite(T x) { return is_inf(x); }
template <class T> inline bool testp_number(T x) { return x == x; }
template <class T> inline bool testp_notanumber(T x) { return x != x; }
template <class T> inline bool testp_normal(T x) { return __builtin_isnormal(x); }
template <class T> inline bool testp_subnormal(T x) {
    return x == x && !is_inf(x) && x != 0 && !__builtin_isnormal(x);
}

// ---- directed rounding (scalar.cpp; rare) -------------------------------------------------------------------------------
float rounded(char op, float a, float b, Rounding r);
double rounded(char op, double a, double b, Rounding r);
float rounded_fma(float a, float b, float c, Rounding r);
double rounded_fma(double a, double b, double c, Rounding r);
float rounded_sqrt(float a, Rounding r);
double rounded_sqrt(double a, Rounding r);
inline float rounded_rcp(float a, Rounding r) { return rounded('/', 1.f, a, r); }
inline double rounded_rcp(double a, Rounding r) { return rounded('/', 1., a, r); }
float narrow(double x, Rounding r);
float integer_to_f32(s64 x, Rounding r);
float integer_to_f32(u64 x, Rounding r);
double integer_to_f64(s64 x, Rounding r);
double integer_to_f64(u64 x, Rounding r);
inline float integer_to_f32(s32 x, Rounding r) { return integer_to_f32((s64)x, r); }
inline float integer_to_f32(u32 x, Rounding r) { return integer_to_f32((u64)x, r); }
inline double integer_to_f64(s32 x, Rounding) { return x; }
inline double integer_to_f64(u32 x, Rounding) { return x; }
}  // namespace emu
