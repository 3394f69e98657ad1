// What generated score expressions are made of (cuflash/_scoremod_source.py): their parameters, and
// gradients of those.
//
// Parameter arrays are C-contiguous, [extents[0]][extents[1]]..., of elements or floats. An index
// outside reads nothing: the element is NaN, and has no gradient.
#pragma once

#include "dual.cuh"
#include "exact_sum.cuh"

namespace expression {

// ---- parameters

DEV int int_scalar(const OptionPointers& options, int n) { return (int)options.score_scalars[n]; }
// Its bits are those of a Real.
template <class Real> DEV Real real_scalar(const OptionPointers& options, int n) {
    if constexpr (sizeof(Real) == 8)
        return __longlong_as_double((i64)options.score_scalars[n]);
    else
        return __uint_as_float((u32)options.score_scalars[n]);
}

// Reads elements of one array; -1 is outside.
template <class Element> struct Reader {
    using Real = typename Element::Real;
    const void* array;
    bool of_elements;

    DEV_METHOD Reader(const OptionPointers& options, const ScoreModParams& values, int n)
        : array(options.score_arrays[n]), of_elements(values.element_arrays >> n & 1) {}

    DEV_METHOD Real operator()(i64 at) const {
        if (at < 0) return __uint_as_float(0x7fffffff);
        return of_elements ? Element::to_real(__ldg((const typename Element::Storage*)array + at))
                           : __ldg((const float*)array + at);
    }
};

// An array of which some axes are indexed: a[i] of a[i][j] is an Axes<..., 1>.
template <class Read, int LEFT> struct Axes {
    Read read;
    const int* extents;  // of the axes left
    i64 first;           // element at 0, 0, ... of the axes left, in units of what they span
    bool inside;

    DEV_METHOD auto operator[](int index) const {
        const i64 at = first * *extents + index;
        const bool here = inside && (unsigned)index < (unsigned)*extents;
        if constexpr (LEFT == 1)
            return read(here ? at : -1);
        else
            return Axes<Read, LEFT - 1>{read, extents + 1, at, here};
    }
};

template <int RANK, class Read>
DEV auto indexed(const Read& read, const ScoreModParams& values, int n) {
    if constexpr (RANK == 0)
        return read(0);
    else
        return Axes<Read, RANK>{read, values.extents[n], 0, true};
}

// Array `n`, to be indexed RANK times.
template <class Element, int RANK>
DEV auto array(const OptionPointers& options, const ScoreModParams& values, int n) {
    return indexed<RANK>(Reader<Element>(options, values, n), values, n);
}

// ---- gradients: a site is a place in the text where an array stands

// Number of wanted sites before `site`: the number of its tangent.
template <class Expression, u32 WANTED> __device__ constexpr int sites_before(int site) {
    int count = 0;
    for (int n = 0; n < site; ++n) count += WANTED >> Expression::array_of(n) & 1;
    return count;
}

// Which elements the sites of wanted arrays read; -1: none.
template <class Expression_, u32 WANTED_> struct Sites {
    using Expression = Expression_;
    static constexpr u32 WANTED = WANTED_;
    static constexpr int COUNT = sites_before<Expression, WANTED>(Expression::SITES);
    i64 element[COUNT > 0 ? COUNT : 1];

    DEV_METHOD Sites() {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) element[n] = -1;
    }
};

// Reads an element as a variable, and remembers which one it was.
template <class Number, class Element> struct SiteReader {
    Reader<Element> read;
    i64* element;
    int tangent;

    DEV_METHOD Number operator()(i64 at) const {
        *element = at;
        return Number::variable(read(at), tangent);
    }
};

// Array `n` where it stands at site SITE.
template <class Number, class Element, int RANK, int SITE, class Places>
DEV auto site(const OptionPointers& options, const ScoreModParams& values, int n, Places& places) {
    using Expression = typename Places::Expression;
    const Reader<Element> read(options, values, n);
    if constexpr ((Places::WANTED >> Expression::array_of(SITE) & 1) == 0) {
        return indexed<RANK>(read, values, n);
    } else {
        constexpr int tangent = sites_before<Expression, Places::WANTED>(SITE);
        const SiteReader<Number, Element> reader = {read, places.element + tangent, tangent};
        return indexed<RANK>(reader, values, n);
    }
}

// One thread's share of the gradients of the arrays whose bits are set in WANTED. Consecutive pairs that
// read the same element are summed in a register, in the thread's own fixed order; sums go to the exact
// accumulators (exact_sum.cuh) when the element changes, in any order. decay[h] so costs one exact_add
// per thread and head; table[h][i - j] costs one per pair.
//
// Usage: add for every pair, in an order that depends on nothing but the problem; flush at the end.
template <class Expression, u32 WANTED> struct ParameterSums {
    using Real = typename Expression::Real;
    using Places = Sites<Expression, WANTED>;
    static constexpr int COUNT = Places::COUNT;
    Places places;
    Real sum[COUNT > 0 ? COUNT : 1];

    DEV_METHOD ParameterSums() {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) sum[n] = 0;
    }

    // `s`: scaled, soft-capped score. `weight`: gradient of the logit; 0 (of a hidden pair, too) adds
    // nothing, whatever s is.
    DEV_METHOD void add(const Expression& expression, i64* const (&grads)[MAX_SCORE_ARRAYS], Real s,
                        int b, int h, int i, int j, Real weight) {
        if (weight == 0) return;
        Places read;
        const Dual<COUNT, Real> x = expression.at_sites(Dual<COUNT, Real>(s), b, h, i, j, read);
        each_site([&](int n, int array) {
            if (read.element[n] < 0) return;
            if (read.element[n] != places.element[n]) {
                flush_site(n, grads[array]);
                places.element[n] = read.element[n];
            }
            sum[n] += times(weight, x.tangent[n]);
        });
    }

    DEV_METHOD void flush(i64* const (&grads)[MAX_SCORE_ARRAYS]) {
        each_site([&](int n, int array) { flush_site(n, grads[array]); });
    }

  private:
    // visit(number of the tangent, array) for every wanted site.
    template <class Visit> DEV_METHOD static void each_site(Visit visit) {
        int n = 0;
#pragma unroll
        for (int site = 0; site < Expression::SITES; ++site)
            if (WANTED >> Expression::array_of(site) & 1) visit(n++, Expression::array_of(site));
    }
    DEV_METHOD void flush_site(int n, i64* words) {
        if (places.element[n] >= 0) exact_add(words + places.element[n] * SUM_WORDS<Real>, sum[n]);
        sum[n] = 0;
    }
};

}  // namespace expression
