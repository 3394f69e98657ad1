// Sums of floats or doubles that do not depend on the order of their terms, hence equal bits in every run:
// a long fixed-point accumulator (Kulisch, "Computer Arithmetic and Validity", 2nd edition, 2013, chapter
// 8) whose digits are added to by integer reductions in global memory.
//
// One sum is SUM_WORDS words. Word n < SUM_DIGITS counts units of 2^(DIGIT_BITS n - LOWEST_BIT);
// 2^-LOWEST_BIT is the last bit of the smallest number. The highest bit of a float is at 2^127, in the
// digit (149 + 127) / 29 = 9, that of a double at 2^1023, in the digit (1074 + 1023) / 29 = 72. The last
// word gathers what no digit can hold: which infinities and NaNs came.
//
// Overflow: a number's bits are split where digits end, and each part is less than 2^29. A signed word
// takes 2^63 / 2^29 = 2^34 of those (17e9 calls of exact_add per sum) before it can overflow, even if all
// have one sign.
#pragma once

#include "element.cuh"

constexpr int DIGIT_BITS = 29;
constexpr u64 DIGIT_MASK = (1ull << DIGIT_BITS) - 1;
constexpr u64 SEEN_INFINITY = 1, SEEN_NEGATIVE_INFINITY = 2, SEEN_NAN = 4;

template <class Real> constexpr int LOWEST_BIT = sizeof(Real) == 8 ? 1074 : 149;
template <class Real> constexpr int SUM_DIGITS = sizeof(Real) == 8 ? 73 : 10;
template <class Real> constexpr int SUM_WORDS = SUM_DIGITS<Real> + 1;

// |x| = mantissa * 2^(place - LOWEST_BIT). Subnormals have the exponent of the smallest normal.
struct FloatParts {
    u64 mantissa;
    u32 place;
    bool finite;

    DEV_METHOD explicit FloatParts(float x) { split<23, 0xff>(__float_as_uint(x)); }
    DEV_METHOD explicit FloatParts(double x) { split<52, 0x7ff>((u64)__double_as_longlong(x)); }

  private:
    template <int FRACTION, u32 LARGEST, class Bits> DEV_METHOD void split(Bits bits) {
        const u32 exponent = (u32)(bits >> FRACTION) & LARGEST;
        const Bits one = (Bits)1 << FRACTION, fraction = bits & (one - 1);
        finite = exponent != LARGEST;
        mantissa = exponent == 0 ? fraction : fraction | one;
        place = exponent == 0 ? 0 : exponent - 1;
    }
};

// sum += x. `words` starts as zeros.
template <class Real> DEV void exact_add(i64* words, Real x) {
    if (x == 0) return;
    const FloatParts parts(x);
    if (!parts.finite) {
        const u64 what = x != x ? SEEN_NAN : x > 0 ? SEEN_INFINITY : SEEN_NEGATIVE_INFINITY;
        red_global_or_u64((u64*)words + SUM_DIGITS<Real>, what);
        return;
    }
    const u32 shift = parts.place % DIGIT_BITS;
    u64* at = (u64*)words + parts.place / DIGIT_BITS;
    const auto add = [&](int digit, u64 share) {
        if (share != 0) red_global_add_u64(at + digit, x < 0 ? 0 - share : share);
    };
    add(0, parts.mantissa << shift & DIGIT_MASK);
    const u64 rest = parts.mantissa >> (DIGIT_BITS - shift);
    add(1, rest & DIGIT_MASK);
    if (sizeof(Real) == 8) add(2, rest >> DIGIT_BITS);
}

// A sum on its way to a floating-point number.
template <class Real> struct ExactSum {
    static constexpr int DIGITS = SUM_DIGITS<Real>;
    u64 leading;   // the highest bits of |sum|: all of them, or 64
    bool inexact;  // bits were left out below
    bool negative;
    int place;  // |sum| = leading * 2^(place - LOWEST_BIT), and what was left out
    u64 seen;

    DEV_METHOD explicit ExactSum(const i64* words)
        : leading(0), inexact(false), place(DIGITS * DIGIT_BITS), seen((u64)words[DIGITS]) {
        i64 digits[DIGITS];
#pragma unroll(UNROLL)
        for (int n = 0; n < DIGITS; ++n) digits[n] = words[n];
        carry(digits);
        negative = digits[DIGITS - 1] < 0;  // all others are in [0, 2^29) now
        if (negative) {
#pragma unroll(UNROLL)
            for (int n = 0; n < DIGITS; ++n) digits[n] = -digits[n];
            carry(digits);
        }
#pragma unroll(UNROLL)
        for (int n = DIGITS - 1; n >= 0; --n) {
            const u64 digit = (u64)digits[n];
            const int taken =
                min(DIGIT_BITS, __clzll((i64)leading));  // bits that there is room for
            leading = leading << taken | digit >> (DIGIT_BITS - taken);
            inexact |= (digit & DIGIT_MASK >> taken) != 0;
            place -= taken;
        }
    }

    // Rounded once, to nearest even.
    DEV_METHOD Real nearest() const {
        // 64 bits are there when something was left out: it only breaks ties.
        return finished(rounded(leading | (inexact ? 1 : 0)));
    }
    // Rounded to odd: a conversion to a narrower format then rounds as if from the exact sum (Boldo &
    // Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    // odd", IEEE Trans. Computers 57, 2008).
    DEV_METHOD Real to_odd() const { return finished(odd()); }

  private:
    // Seventy digits unrolled would be a long program for a rare use.
    static constexpr int UNROLL = DIGITS > 16 ? 1 : DIGITS;

    DEV void carry(i64 (&digits)[DIGITS]) {
#pragma unroll(UNROLL)
        for (int n = 0; n + 1 < DIGITS; ++n) {
            digits[n + 1] += digits[n] >> DIGIT_BITS;
            digits[n] &= (i64)DIGIT_MASK;
        }
    }
    DEV Real rounded(u64 x) {
        if constexpr (sizeof(Real) == 8)
            return __ull2double_rn(x);
        else
            return __ull2float_rn(x);
    }
    DEV_METHOD Real odd() const {
        if constexpr (sizeof(Real) == 8) {
            const double x = __ull2double_rz(leading);
            const bool cut = inexact || (u64)x != leading;
            return cut ? __longlong_as_double(__double_as_longlong(x) | 1) : x;
        } else {
            const float x = __ull2float_rz(leading);
            const bool cut = inexact || (u64)x != leading;
            return cut ? __uint_as_float(__float_as_uint(x) | 1) : x;
        }
    }
    DEV Real power_of_two(int exponent) {
        if constexpr (sizeof(Real) == 8)
            return __longlong_as_double((i64)(exponent + 1023) << 52);
        else
            return __uint_as_float((u32)(exponent + 127) << 23);
    }
    DEV_METHOD Real finished(Real x) const {
        if (seen == SEEN_INFINITY) return positive_infinity();
        if (seen == SEEN_NEGATIVE_INFINITY) return neg_infinity();
        if (seen != 0) return __uint_as_float(0x7fffffff);
        // Powers of two: exact, or overflow. The smallest one is subnormal, so it is made of two.
        constexpr int HALF = LOWEST_BIT<Real> / 2;
        const Real y = x * power_of_two(place / 2 - HALF) *
                       power_of_two(place - place / 2 - (LOWEST_BIT<Real> - HALF));
        return negative ? -y : y;
    }
};
