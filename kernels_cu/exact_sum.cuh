// Sums of floats that do not depend on the order of their terms, hence equal bits in every run: a long
// fixed-point accumulator (Kulisch, "Computer Arithmetic and Validity", 2nd edition, 2013, chapter 8)
// whose digits are added to by integer reductions in global memory.
//
// One sum is SUM_WORDS words. Word n < SUM_DIGITS counts units of 2^(DIGIT_BITS n - 149); 2^-149 is the
// last bit of the smallest float. The highest float bit is at 2^127, in the digit (149 + 127) / 29 = 9.
// The last word gathers what no digit can hold: which infinities and NaNs came.
//
// Overflow: a float is 24 bits, shifted by at most 28, split where the digit ends; it adds less than
// 2^29 to a digit. A signed word takes 2^63 / 2^29 = 2^34 of those (17e9 calls of exact_add per sum)
// before it can overflow, even if all have one sign.
#pragma once

#include "element.cuh"

constexpr int DIGIT_BITS = 29, SUM_DIGITS = 10, SUM_WORDS = SUM_DIGITS + 1;
constexpr u64 DIGIT_MASK = (1ull << DIGIT_BITS) - 1;
constexpr u64 SEEN_INFINITY = 1, SEEN_NEGATIVE_INFINITY = 2, SEEN_NAN = 4;

// sum += x. `words` starts as zeros.
DEV void exact_add(i64* words, float x) {
    const u32 bits = __float_as_uint(x), exponent = bits >> 23 & 0xff;
    if (x == 0.f) return;
    if (exponent == 0xff) {
        const u64 what = x != x ? SEEN_NAN : x > 0.f ? SEEN_INFINITY : SEEN_NEGATIVE_INFINITY;
        red_global_or_u64((u64*)words + SUM_DIGITS, what);
        return;
    }
    // x = +-mantissa * 2^(place - 149); subnormals have the exponent of the smallest normal.
    const u64 mantissa = exponent == 0 ? bits & 0x7fffff : (bits & 0x7fffff) | 0x800000;
    const u32 place = exponent == 0 ? 0 : exponent - 1;
    const u32 digit = place / DIGIT_BITS;
    const u64 shifted = mantissa << place % DIGIT_BITS;
    const u64 low = shifted & DIGIT_MASK, high = shifted >> DIGIT_BITS;
    u64* at = (u64*)words + digit;
    if (low != 0) red_global_add_u64(at, x < 0.f ? 0 - low : low);
    if (high != 0) red_global_add_u64(at + 1, x < 0.f ? 0 - high : high);
}

// A sum on its way to a floating-point number.
struct ExactSum {
    u64 leading;   // the highest bits of |sum|: all of them, or at least 34
    bool inexact;  // bits were left out below
    bool negative;
    int place;  // |sum| = leading * 2^(place - 149), and what was left out
    u64 seen;

    DEV_METHOD explicit ExactSum(const i64* words)
        : leading(0), inexact(false), place(0), seen((u64)words[SUM_DIGITS]) {
        i64 digits[SUM_DIGITS];
#pragma unroll
        for (int n = 0; n < SUM_DIGITS; ++n) digits[n] = words[n];
        carry(digits);
        negative = digits[SUM_DIGITS - 1] < 0;  // all others are in [0, 2^29) now
        if (negative) {
#pragma unroll
            for (int n = 0; n < SUM_DIGITS; ++n) digits[n] = -digits[n];
            carry(digits);
        }
#pragma unroll
        for (int n = SUM_DIGITS - 1; n >= 0; --n) {
            if (leading >> (63 - DIGIT_BITS)) {
                inexact |= digits[n] != 0;
            } else {
                leading = leading << DIGIT_BITS | (u64)digits[n];
                place = n * DIGIT_BITS;
            }
        }
    }

    // Rounded once, to nearest even.
    DEV_METHOD float nearest() const {
        // More than 24 + 2 bits are there when something was left out: it only breaks ties.
        return finished(__ull2float_rn(leading | (inexact ? 1 : 0)));
    }
    // Rounded to odd: a conversion to a narrower format then rounds as if from the exact sum (Boldo &
    // Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    // odd", IEEE Trans. Computers 57, 2008).
    DEV_METHOD float to_odd() const {
        const float x = __ull2float_rz(leading);
        const bool cut = inexact || (u64)x != leading;
        return finished(cut ? __uint_as_float(__float_as_uint(x) | 1) : x);
    }

  private:
    DEV void carry(i64 (&digits)[SUM_DIGITS]) {
#pragma unroll
        for (int n = 0; n + 1 < SUM_DIGITS; ++n) {
            digits[n + 1] += digits[n] >> DIGIT_BITS;
            digits[n] &= (i64)DIGIT_MASK;
        }
    }
    DEV_METHOD float finished(float x) const {
        if (seen == SEEN_INFINITY) return positive_infinity();
        if (seen == SEEN_NEGATIVE_INFINITY) return neg_infinity();
        if (seen != 0) return __uint_as_float(0x7fffffff);
        // Powers of two: exact, or overflow. 2^-149 is subnormal, so it is made in two factors.
        const float scale = __uint_as_float((u32)(place / 2 + 127 - 74) << 23);
        const float rest = __uint_as_float((u32)(place - place / 2 + 127 - 75) << 23);
        const float y = x * scale * rest;
        return negative ? -y : y;
    }
};
