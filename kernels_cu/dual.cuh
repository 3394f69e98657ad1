// Dual numbers: a value and its derivatives in N variables, carried through every operation (Griewank &
// Walther, "Evaluating Derivatives", 2nd edition, 2008, chapter 3). And the functions that score
// expressions may call, for reals, ints and duals alike. `Real` is float, or double for elements of 64 bits.
//
// A tangent of 0 stays 0 whatever it is multiplied by: sqrt(x) at 0 of an x that does not depend on a
// variable has derivative 0 in it, not 0 * inf. The compiler then also drops all work on tangents that
// are known to be 0.
#pragma once

#include "real.cuh"

template <class Real> DEV Real times(Real factor, Real tangent) {
    return tangent == 0 ? Real(0) : factor * tangent;
}

template <int N, class Real = float> struct Dual {
    Real value;
    Real tangent[N > 0 ? N : 1];

    // From any number (double literals too): a constant.
    DEV_METHOD Dual(Real x = 0) : value(x) {
#pragma unroll
        for (int n = 0; n < N; ++n) tangent[n] = 0;
    }
    // Variable number `n`; none if n < 0.
    DEV_METHOD static Dual variable(Real x, int n) {
        Dual y(x);
        if constexpr (N > 0)
            if (n >= 0) y.tangent[n] = Real(1);
        return y;
    }
    // f(x), where f has slope `slope` at x.
    DEV_METHOD Dual through(Real f, Real slope) const {
        Dual y(f);
#pragma unroll
        for (int n = 0; n < N; ++n) y.tangent[n] = times(slope, tangent[n]);
        return y;
    }
    // f(x, y) with slopes in both.
    DEV_METHOD static Dual of_both(Real f, Real slope_x, const Dual& x, Real slope_y,
                                   const Dual& y) {
        Dual z(f);
#pragma unroll
        for (int n = 0; n < N; ++n)
            z.tangent[n] = times(slope_x, x.tangent[n]) + times(slope_y, y.tangent[n]);
        return z;
    }

    DEV_METHOD explicit operator bool() const { return value != 0; }
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
    friend DEV_METHOD Dual operator+(const Dual& x, Real y) { return x.moved(x.value + y); }
    friend DEV_METHOD Dual operator+(Real x, const Dual& y) { return y.moved(x + y.value); }
    friend DEV_METHOD Dual operator+(const Dual& x, const Dual& y) {
        Dual z(x.value + y.value);
#pragma unroll
        for (int n = 0; n < N; ++n) z.tangent[n] = x.tangent[n] + y.tangent[n];
        return z;
    }
    friend DEV_METHOD Dual operator-(const Dual& x, Real y) { return x.moved(x.value - y); }
    friend DEV_METHOD Dual operator-(Real x, const Dual& y) { return (-y).moved(x - y.value); }
    friend DEV_METHOD Dual operator-(const Dual& x, const Dual& y) {
        Dual z(x.value - y.value);
#pragma unroll
        for (int n = 0; n < N; ++n) z.tangent[n] = x.tangent[n] - y.tangent[n];
        return z;
    }
    friend DEV_METHOD Dual operator*(const Dual& x, Real y) { return x.through(x.value * y, y); }
    friend DEV_METHOD Dual operator*(Real x, const Dual& y) { return y.through(x * y.value, x); }
    friend DEV_METHOD Dual operator*(const Dual& x, const Dual& y) {
        return of_both(x.value * y.value, y.value, x, x.value, y);
    }
    friend DEV_METHOD Dual operator/(const Dual& x, Real y) {
        return x.through(x.value / y, N > 0 ? 1 / y : 0);
    }
    friend DEV_METHOD Dual operator/(Real x, const Dual& y) { return Dual(x) / y; }
    friend DEV_METHOD Dual operator/(const Dual& x, const Dual& y) {
        const Real z = x.value / y.value, inverse = N > 0 ? 1 / y.value : 0;
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
    DEV_METHOD Dual moved(Real x) const {
        Dual y = *this;
        y.value = x;
        return y;
    }
};

// What score expressions see. Names in Functions hide CUDA's own, whose overloads for ints compute in
// double.
namespace expression {

// ---- functions of one real: value, and slope from the argument x and the value y

struct Exp {
    template <class Real> DEV Real value(Real x) { return ::exp(x); }
    template <class Real> DEV Real slope(Real, Real y) { return y; }
};
struct Exp2 {
    template <class Real> DEV Real value(Real x) { return ::exp2(x); }
    template <class Real> DEV Real slope(Real, Real y) { return y * LN_2_OF<Real>; }
};
struct Expm1 {
    template <class Real> DEV Real value(Real x) { return ::expm1(x); }
    template <class Real> DEV Real slope(Real x, Real) { return ::exp(x); }
};
struct Log {
    template <class Real> DEV Real value(Real x) { return ::log(x); }
    template <class Real> DEV Real slope(Real x, Real) { return 1 / x; }
};
struct Log2 {
    template <class Real> DEV Real value(Real x) { return ::log2(x); }
    template <class Real> DEV Real slope(Real x, Real) { return LOG2_E_OF<Real> / x; }
};
struct Log10 {
    template <class Real> DEV Real value(Real x) { return ::log10(x); }
    template <class Real> DEV Real slope(Real x, Real) { return Real(0.43429448190325182765) / x; }
};
struct Log1p {
    template <class Real> DEV Real value(Real x) { return ::log1p(x); }
    template <class Real> DEV Real slope(Real x, Real) { return 1 / (1 + x); }
};
struct Sqrt {
    template <class Real> DEV Real value(Real x) { return ::sqrt(x); }
    template <class Real> DEV Real slope(Real, Real y) { return Real(0.5) / y; }
};
struct Rsqrt {
    template <class Real> DEV Real value(Real x) { return ::rsqrt(x); }
    template <class Real> DEV Real slope(Real x, Real y) { return Real(-0.5) * y / x; }
};
struct Tanh {
    template <class Real> DEV Real value(Real x) { return ::tanh(x); }
    template <class Real> DEV Real slope(Real, Real y) { return 1 - y * y; }
};
struct Sin {
    template <class Real> DEV Real value(Real x) { return ::sin(x); }
    template <class Real> DEV Real slope(Real x, Real) { return ::cos(x); }
};
struct Cos {
    template <class Real> DEV Real value(Real x) { return ::cos(x); }
    template <class Real> DEV Real slope(Real x, Real) { return -::sin(x); }
};
struct Sigmoid {
    template <class Real> DEV Real value(Real x) { return 1 / (1 + ::exp(-x)); }
    template <class Real> DEV Real slope(Real, Real y) { return y * (1 - y); }
};
struct Fabs {
    template <class Real> DEV Real value(Real x) { return ::fabs(x); }
    // 0 at 0, NaN at NaN.
    template <class Real> DEV Real slope(Real x, Real) {
        return x > 0 ? Real(1) : x < 0 ? Real(-1) : x;
    }
};

// Of ints, Reals and duals; what they return is made of Reals.
template <class Real> struct Functions {
    template <int N> using Number = Dual<N, Real>;

    template <class F> DEV Real call(Real x) { return F::value(x); }
    template <class F, int N> DEV Number<N> call(const Number<N>& x) {
        const Real y = F::value(x.value);
        return x.through(y, N > 0 ? F::slope(x.value, y) : 0);
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

    DEV Real value_of(Real x) { return x; }
    template <int N> DEV Real value_of(const Number<N>& x) { return x.value; }

    template <class A> DEV Real floor(A x) { return ::floor(value_of(x)); }
    template <class A> DEV Real ceil(A x) { return ::ceil(value_of(x)); }
    template <class A> DEV Real round(A x) { return ::round(value_of(x)); }
    template <class A> DEV Real trunc(A x) { return ::trunc(value_of(x)); }
    template <class A> DEV Real rint(A x) { return ::rint(value_of(x)); }

    // ---- functions of the common type of their arguments

    DEV Real real(Real x) { return x; }
    template <int N> DEV Number<N> real(const Number<N>& x) { return x; }

    DEV int abs(int x) { return x < 0 ? -x : x; }
    DEV unsigned abs(unsigned x) { return x; }
    DEV Real abs(Real x) { return ::fabs(x); }
    template <int N> DEV Number<N> abs(const Number<N>& x) { return fabs(x); }

    DEV int smaller(int x, int y) { return x < y ? x : y; }
    DEV unsigned smaller(unsigned x, unsigned y) { return x < y ? x : y; }
    DEV Real smaller(Real x, Real y) { return ::fmin(x, y); }
    DEV int larger(int x, int y) { return x > y ? x : y; }
    DEV unsigned larger(unsigned x, unsigned y) { return x > y ? x : y; }
    DEV Real larger(Real x, Real y) { return ::fmax(x, y); }
    // NaN gives way to the other argument, as in CUDA's fmin and fmax.
    template <int N> DEV Number<N> smaller(const Number<N>& x, const Number<N>& y) {
        return x.value <= y.value || y.value != y.value ? x : y;
    }
    template <int N> DEV Number<N> larger(const Number<N>& x, const Number<N>& y) {
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
    template <class A, class B> DEV auto fmin(A x, B y) { return min(real(x), real(y)); }
    template <class A, class B> DEV auto fmax(A x, B y) { return max(real(x), real(y)); }

    DEV Real power(Real x, Real y) { return ::pow(x, y); }
    template <int N> DEV Number<N> power(const Number<N>& x, const Number<N>& y) {
        const Real z = ::pow(x.value, y.value);
        if constexpr (N == 0) return Number<N>(z);
        const Real slope_x = y.value == 0 ? Real(0) : y.value * ::pow(x.value, y.value - 1);
        return Number<N>::of_both(z, slope_x, x, x.value == 0 ? Real(0) : z * ::log(x.value), y);
    }
    template <class A, class B> DEV auto pow(A x, B y) {
        using Common = decltype(true ? real(x) : real(y));
        return power(Common(real(x)), Common(real(y)));
    }
};

}  // namespace expression
