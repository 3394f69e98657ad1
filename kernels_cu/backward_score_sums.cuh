// Gradients of the parameters of a score expression from their exact sums (exact_sum.cuh), rounded once to
// the type of the parameter.
//
// Grid: any number of blocks of WARPS * 32 threads; one thread per element at a time.
#pragma once

#include "exact_sum.cuh"
#include "wide_element.cuh"

template <class C> __device__ void backward_score_sums(const ScoreSumsParams& p) {
    using Element = typename C::Element;
    using Real = typename Element::Real;
    using Storage = typename Element::Storage;
    const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x,
              step = (i64)gridDim.x * blockDim.x;
#pragma unroll 1
    for (int n = 0; n < MAX_SCORE_ARRAYS; ++n) {
        if (p.words[n] == nullptr) continue;
#pragma unroll 1
        for (i64 at = first; at < p.elements[n]; at += step) {
            const ExactSum<Real> sum(p.words[n] + at * SUM_WORDS<Real>);
            if (p.element_grads >> n & 1)
                ((Storage*)p.grads[n])[at] = Element::from_real(
                    sizeof(Storage) < sizeof(Real) ? sum.to_odd() : sum.nearest());
            else
                ((float*)p.grads[n])[at] =
                    sizeof(Real) == 8 ? (float)sum.to_odd() : (float)sum.nearest();
        }
    }
}
