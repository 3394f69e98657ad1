// Dual numbers: a value and its derivatives in N variables, carried through every operation (Griewank &
// Walther, "Evaluating Derivatives", 2nd edition, 2008, chapter 3). And the functions that score
// expressions may call, for floats, ints and duals alike.
//
// A tangent of 0 stays 0 whatever it is multiplied by: sqrt(x) at 0 of an x that does not depend on a
// variable has derivative 0 in it, not 0 * inf. The compiler then also drops all work on tangents that
// are known to be 0.
#pragma once

#include "ptx.cuh"

DEV float times(float factor, float tangent) { return tangent == 0.f ? 0.f : factor * tangent; }

template <int N> struct Dual {
    float value;
    float tangent[N > 0 ? N : 1];

    // From any number (double literals too): a constant.
    DEV_METHOD Dual(float x = 0.f) : value(x) {
#pragma unroll
        for (int n = 0; n < N; ++n) tangent[n] = 0.f;
    }
    // Variable number `n`; none if n < 0.
    DEV_METHOD static Dual variable(float x, int n) {
        Dual y(x);
        if constexpr (N > 0)
            if (n >= 0) y.tangent[n] = 1.f;
        return y;
    }
    // f(x), where f has slope `slope` at x.
    DEV_METHOD Dual through(float f, float slope) const {
        Dual y(f);
#pragma unroll
        for (int n = 0; n < N; ++n) y.tangent[n] = times(slope, tangent[n]);
        return y;
    }
    // f(x, y) with slopes in both.
    DEV_METHOD static Dual of_both(float f, float slope_x, const Dual& x, float slope_y,
                                   const Dual& y) {
        Dual z(f);
#pragma unroll
        for (int n = 0; n < N; ++n)
            z.tangent[n] = times(slope_x, x.tangent[n]) + times(slope_y, y.tangent[n]);
        return z;
    }

    DEV_METHOD explicit operator bool() const { return value != 0.f; }
    DEV_METHOD explicit operator int() const { return (int)value; }
    DEV_METHOD explicit operator unsigned() const { return (unsigned)value; }

    DEV_METHOD Dual operator+() const { return *this; }
    DEV_METHOD Dual operator-() const {
        Dual y(-value);
#pragma unroll
        for (int n = 0; n < N; ++n) y.tangent[n] = -tangent[n];
        return y;
    }

    // Constants have operators of their own: x + 0 is an instruction.
    friend DEV_METHOD Dual operator+(const Dual& x, float y) { return x.moved(x.value + y); }
    friend DEV_METHOD Dual operator+(float x, const Dual& y) { return y.moved(x + y.value); }
    friend DEV_METHOD Dual operator+(const Dual& x, const Dual& y) {
        Dual z(x.value + y.value);
#pragma unroll
        for (int n = 0; n < N; ++n) z.tangent[n] = x.tangent[n] + y.tangent[n];
        return z;
    }
    friend DEV_METHOD Dual operator-(const Dual& x, float y) { return x.moved(x.value - y); }
    friend DEV_METHOD Dual operator-(float x, const Dual& y) { return (-y).moved(x - y.value); }
    friend DEV_METHOD Dual operator-(const Dual& x, const Dual& y) {
        Dual z(x.value - y.value);
#pragma unroll
        for (int n = 0; n < N; ++n) z.tangent[n] = x.tangent[n] - y.tangent[n];
        return z;
    }
    friend DEV_METHOD Dual operator*(const Dual& x, float y) { return x.through(x.value * y, y); }
    friend DEV_METHOD Dual operator*(float x, const Dual& y) { return y.through(x * y.value, x); }
    friend DEV_METHOD Dual operator*(const Dual& x, const Dual& y) {
        return of_both(x.value * y.value, y.value, x, x.value, y);
    }
    friend DEV_METHOD Dual operator/(const Dual& x, float y) {
        return x.through(x.value / y, N > 0 ? 1.f / y : 0.f);
    }
    friend DEV_METHOD Dual operator/(float x, const Dual& y) { return Dual(x) / y; }
    friend DEV_METHOD Dual operator/(const Dual& x, const Dual& y) {
        const float z = x.value / y.value, inverse = N > 0 ? 1.f / y.value : 0.f;
        return of_both(z, inverse, x, -z * inverse, y);
    }

    friend DEV_METHOD bool operator<(const Dual& x, const Dual& y) { return x.value < y.value; }
    friend DEV_METHOD bool operator<=(const Dual& x, const Dual& y) { return x.value <= y.value; }
    friend DEV_METHOD bool operator>(const Dual& x, const Dual& y) { return x.value > y.value; }
    friend DEV_METHOD bool operator>=(const Dual& x, const Dual& y) { return x.value >= y.value; }
    friend DEV_METHOD bool operator==(const Dual& x, const Dual& y) { return x.value == y.value; }
    friend DEV_METHOD bool operator!=(const Dual& x, const Dual& y) { return x.value != y.value; }

  private:
    // The same tangents at another value.
    DEV_METHOD Dual moved(float x) const {
        Dual y = *this;
        y.value = x;
        return y;
    }
};

// What score expressions see. Names here hide CUDA's own, whose overloads for ints compute in double.
namespace expression {

// ---- functions of one float: value, and slope from the argument x and the value y

struct Exp {
    DEV float value(float x) { return expf(x); }
    DEV float slope(float, float y) { return y; }
};
struct Exp2 {
    DEV float value(float x) { return exp2f(x); }
    DEV float slope(float, float y) { return y * LN_2; }
};
struct Expm1 {
    DEV float value(float x) { return expm1f(x); }
    DEV float slope(float x, float) { return expf(x); }
};
struct Log {
    DEV float value(float x) { return logf(x); }
    DEV float slope(float x, float) { return 1.f / x; }
};
struct Log2 {
    DEV float value(float x) { return log2f(x); }
    DEV float slope(float x, float) { return LOG2_E / x; }
};
struct Log10 {
    DEV float value(float x) { return log10f(x); }
    DEV float slope(float x, float) { return 0.4342944819f / x; }
};
struct Log1p {
    DEV float value(float x) { return log1pf(x); }
    DEV float slope(float x, float) { return 1.f / (1.f + x); }
};
struct Sqrt {
    DEV float value(float x) { return sqrtf(x); }
    DEV float slope(float, float y) { return 0.5f / y; }
};
struct Rsqrt {
    DEV float value(float x) { return rsqrtf(x); }
    DEV float slope(float x, float y) { return -0.5f * y / x; }
};
struct Tanh {
    DEV float value(float x) { return tanhf(x); }
    DEV float slope(float, float y) { return 1.f - y * y; }
};
struct Sin {
    DEV float value(float x) { return sinf(x); }
    DEV float slope(float x, float) { return cosf(x); }
};
struct Cos {
    DEV float value(float x) { return cosf(x); }
    DEV float slope(float x, float) { return -sinf(x); }
};
struct Sigmoid {
    DEV float value(float x) { return 1.f / (1.f + expf(-x)); }
    DEV float slope(float, float y) { return y * (1.f - y); }
};
struct Fabs {
    DEV float value(float x) { return fabsf(x); }
    // 0 at 0, NaN at NaN.
    DEV float slope(float x, float) { return x > 0.f ? 1.f : x < 0.f ? -1.f : x; }
};

template <class F> DEV float call(float x) { return F::value(x); }
template <class F, int N> DEV Dual<N> call(const Dual<N>& x) {
    const float y = F::value(x.value);
    return x.through(y, N > 0 ? F::slope(x.value, y) : 0.f);
}

template <class A> DEV auto exp(A x) { return call<Exp>(x); }
template <class A> DEV auto exp2(A x) { return call<Exp2>(x); }
template <class A> DEV auto expm1(A x) { return call<Expm1>(x); }
template <class A> DEV auto log(A x) { return call<Log>(x); }
template <class A> DEV auto log2(A x) { return call<Log2>(x); }
template <class A> DEV auto log10(A x) { return call<Log10>(x); }
template <class A> DEV auto log1p(A x) { return call<Log1p>(x); }
template <class A> DEV auto sqrt(A x) { return call<Sqrt>(x); }
template <class A> DEV auto rsqrt(A x) { return call<Rsqrt>(x); }
template <class A> DEV auto tanh(A x) { return call<Tanh>(x); }
template <class A> DEV auto sin(A x) { return call<Sin>(x); }
template <class A> DEV auto cos(A x) { return call<Cos>(x); }
template <class A> DEV auto sigmoid(A x) { return call<Sigmoid>(x); }
template <class A> DEV auto fabs(A x) { return call<Fabs>(x); }

// ---- functions that are constant wherever they have a derivative

DEV float value_of(float x) { return x; }
template <int N> DEV float value_of(const Dual<N>& x) { return x.value; }

template <class A> DEV float floor(A x) { return floorf(value_of(x)); }
template <class A> DEV float ceil(A x) { return ceilf(value_of(x)); }
template <class A> DEV float round(A x) { return roundf(value_of(x)); }
template <class A> DEV float trunc(A x) { return truncf(value_of(x)); }
template <class A> DEV float rint(A x) { return rintf(value_of(x)); }

// ---- functions of the common type of their arguments

DEV float real(float x) { return x; }
template <int N> DEV Dual<N> real(const Dual<N>& x) { return x; }

DEV int abs(int x) { return x < 0 ? -x : x; }
DEV unsigned abs(unsigned x) { return x; }
DEV float abs(float x) { return fabsf(x); }
template <int N> DEV Dual<N> abs(const Dual<N>& x) { return fabs(x); }

DEV int smaller(int x, int y) { return x < y ? x : y; }
DEV unsigned smaller(unsigned x, unsigned y) { return x < y ? x : y; }
DEV float smaller(float x, float y) { return fminf(x, y); }
DEV int larger(int x, int y) { return x > y ? x : y; }
DEV unsigned larger(unsigned x, unsigned y) { return x > y ? x : y; }
DEV float larger(float x, float y) { return fmaxf(x, y); }
// NaN gives way to the other argument, as in fminf and fmaxf.
template <int N> DEV Dual<N> smaller(const Dual<N>& x, const Dual<N>& y) {
    return x.value <= y.value || y.value != y.value ? x : y;
}
template <int N> DEV Dual<N> larger(const Dual<N>& x, const Dual<N>& y) {
    return x.value >= y.value || y.value != y.value ? x : y;
}

template <class A, class B> DEV auto min(A x, B y) {
    using Common = decltype(true ? A() : B());
    return smaller(Common(x), Common(y));
}
template <class A, class B> DEV auto max(A x, B y) {
    using Common = decltype(true ? A() : B());
    return larger(Common(x), Common(y));
}
template <class A, class B> DEV auto fmin(A x, B y) { return expression::min(real(x), real(y)); }
template <class A, class B> DEV auto fmax(A x, B y) { return expression::max(real(x), real(y)); }

DEV float power(float x, float y) { return powf(x, y); }
template <int N> DEV Dual<N> power(const Dual<N>& x, const Dual<N>& y) {
    const float z = powf(x.value, y.value);
    if constexpr (N == 0) return Dual<N>(z);
    const float slope_x = y.value == 0.f ? 0.f : y.value * powf(x.value, y.value - 1.f);
    return Dual<N>::of_both(z, slope_x, x, x.value == 0.f ? 0.f : z * logf(x.value), y);
}
template <class A, class B> DEV auto pow(A x, B y) {
    using Common = decltype(true ? real(x) : real(y));
    return power(Common(real(x)), Common(real(y)));
}

}  // namespace expression
