// scalar.cpp - directed rounding with the processor's own rounding mode. Compiled with -frounding-math.
#include "scalar.h"

#include <cfenv>
#include <cmath>

namespace emu {
namespace {
struct Mode {
    int old = std::fegetround();
    explicit Mode(Rounding r) {
        std::fesetround(r == RZ   ? FE_TOWARDZERO
                        : r == RM ? FE_DOWNWARD
                        : r == RP ? FE_UPWARD
                                  : FE_TONEAREST);
    }
    ~Mode() { std::fesetround(old); }
};
template <class T>
__attribute__((noinline)) T apply(char op, volatile T a, volatile T b, Rounding r) {
    Mode mode(r);
    volatile T x = op == '+' ? a + b : op == '-' ? a - b : op == '*' ? a * b : a / b;
    return x;
}
template <class To, class From> __attribute__((noinline)) To change(volatile From x, Rounding r) {
    Mode mode(r);
    volatile To y = (To)x;
    return y;
}
}  // namespace
float rounded(char op, float a, float b, Rounding r) { return apply<float>(op, a, b, r); }
double rounded(char op, double a, double b, Rounding r) { return apply<double>(op, a, b, r); }
float rounded_fma(float a, float b, float c, Rounding r) {
    Mode mode(r);
    volatile float x = a, y = std::fma((float)x, b, c);
    return y;
}
double rounded_fma(double a, double b, double c, Rounding r) {
    Mode mode(r);
    volatile double x = a, y = std::fma((double)x, b, c);
    return y;
}
float rounded_sqrt(float a, Rounding r) {
    Mode mode(r);
    volatile float x = a, y = std::sqrt((float)x);
    return y;
}
double rounded_sqrt(double a, Rounding r) {
    Mode mode(r);
    volatile double x = a, y = std::sqrt((double)x);
    return y;
}
float narrow(double x, Rounding r) { return change<float, double>(x, r); }
float integer_to_f32(s64 x, Rounding r) { return change<float, s64>(x, r); }
float integer_to_f32(u64 x, Rounding r) { return change<float, u64>(x, r); }
double integer_to_f64(s64 x, Rounding r) { return change<double, s64>(x, r); }
double integer_to_f64(u64 x, Rounding r) { return change<double, u64>(x, r); }
}  // namespace emu
