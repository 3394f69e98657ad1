// Arithmetic of scores and sums in the type they are kept in: float for 16-bit and 32-bit elements,
// double for 64-bit ones. Code that serves both says `Real` and calls these.
#pragma once

#include "ptx.cuh"

// ---- float: the hardware's approximations, relative error about 2^-22 ---------------------------

DEV float exp2_of(float x) { return ex2_approx(x); }
DEV float log2_of(float x) { return lg2_approx(x); }
DEV float max_of(float a, float b) { return fmaxf(a, b); }
DEV float abs_of(float x) { return fabsf(x); }
DEV float fma_of(float a, float b, float c) { return fmaf(a, b, c); }

// Relative error below 4e-7 everywhere: tanh.approx (5e-4) would be visible in the output.
DEV float tanh_of(float x) {
    const float a = fabsf(x), x2 = x * x;
    // Near 0 the exponential form cancels; odd polynomial, minimax on [0, 0.55].
    const float p =
        fmaf(x2, fmaf(x2, fmaf(x2, 0.0163248945f, -0.0526107661f), 0.133198217f), -0.333329231f);
    const float small = fmaf(x * x2, p, x);
    const float large = 1.f - 2.f * rcp_approx(ex2_approx(a * (2.f * LOG2_E)) + 1.f);
    return a < 0.55f ? small : copysignf(large, x);
}

// ---- double: a unit in the last place -----------------------------------------------------------

// 2^x = 2^n (1 + f r), n the nearest integer and |f| <= 1/2, for x in [-1021, 1023].
struct Exp2Parts {
    double f_r;  // 2^f - 1
    int n;

    DEV_METHOD explicit Exp2Parts(double x) {
        constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: its last bit has the value 1
        const double shifted = x + ROUND;
        const double f = x - (shifted - ROUND);
        n = __double2loint(shifted);
        // (2^f - 1) / f, minimax on [-1/2, 1/2], relative error 5e-17.
        double r = 4.4549605981865186e-10;
        r = fma(r, f, 7.072585949269223e-09);
        r = fma(r, f, 1.0178062445845774e-07);
        r = fma(r, f, 1.321544258792169e-06);
        r = fma(r, f, 1.525273382983612e-05);
        r = fma(r, f, 0.0001540353044173605);
        r = fma(r, f, 0.0013333558146416936);
        r = fma(r, f, 0.009618129107606888);
        r = fma(r, f, 0.0555041086648216);
        r = fma(r, f, 0.24022650695910097);
        r = fma(r, f, 0.6931471805599453);
        f_r = r * f;
    }
    // 2^n
    DEV_METHOD double power() const { return __hiloint2double((1023 + n) << 20, 0); }
};

// 0 below the normal numbers; NaN stays NaN. x <= 1023.
DEV double exp2_of(double x) {
    const Exp2Parts parts(x);
    const double power = parts.power();
    return x < -1021.0 ? 0.0 : fma(parts.f_r, power, power);
}
DEV double log2_of(double x) { return log2(x); }
// NaN only when both are, as fmaxf.
DEV double max_of(double a, double b) { return fmax(a, b); }
DEV double abs_of(double x) { return fabs(x); }
DEV double fma_of(double a, double b, double c) { return fma(a, b, c); }

// t / (2 - t) with t = 1 - exp(-2 |x|), which does not cancel near 0.
DEV double tanh_of(double x) {
    const double size = fmin(fabs(x), 20.0);  // beyond it, 1
    const Exp2Parts parts(size * -2.8853900817779268);
    const double power = parts.power();
    const double t = (1.0 - power) - power * parts.f_r;
    return x != x ? x : copysign(t / (2.0 - t), x);
}

// ---- the same by type ---------------------------------------------------------------------------

template <class Real> constexpr Real LOG2_E_OF = (Real)1.4426950408889634074;
template <class Real> constexpr Real LN_2_OF = (Real)0.69314718055994530942;

// The smaller one; NaN when either is NaN.
DEV double min_or_nan(double a, double b) { return a > b ? b : a; }  // b is never NaN in our calls

DEV double shfl_xor(double x, int mask) { return __shfl_xor_sync(FULL_WARP, x, mask); }
DEV float shfl_xor(float x, int mask) { return __shfl_xor_sync(FULL_WARP, x, mask); }
