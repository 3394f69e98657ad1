// Gradient of the sinks: dsinks_partial[b, h] = sum over rows of -exp(sink - lse) * delta, the sink being
// one more key of every row with a value of zeros. lse has the sink in it already, so that no other
// kernel of backward knows of it.
//
// Grid: batch * heads blocks (packed: sequences * heads), one per sum, so that its order is fixed.
// Needs WARPS and PACKED of Config, no dynamic shared memory.
#pragma once

#include "backward_tile.cuh"

template <class C> __device__ void backward_sinks(const BackwardParams& p) {
    using Element = typename C::Element;
    using Real = typename Element::Real;
    constexpr int THREADS = C::WARPS * 32;
    __shared__ Real scratch[C::WARPS];
    const int h = blockIdx.x % p.shape.heads, b = blockIdx.x / p.shape.heads;
    const Real sink = LOG2_E_OF<Real> *
                      side_value<Element>(p.options.sinks, h, p.shape.flags & FLAG_SINKS_ELEMENT);
    const Real* lse_log2 = (const Real*)p.lse_log2;
    const Real* delta = (const Real*)p.delta;
    i64 first = ((i64)b * p.shape.heads + h) * p.shape.len_q;
    int rows = p.shape.len_q;
    if constexpr (C::PACKED) {
        const Sequence here = packed::sequence(p.options, b);
        first = h * p.values.packed.total_q + here.q_start;
        rows = here.q_len;
    }

    Real sum = 0;
#pragma unroll 1
    for (int row = threadIdx.x; row < rows; row += THREADS)
        // lse_log2 of a row without keys is +inf only if the sink is -inf: its weight is 0.
        sum -= backward::probability(sink, lse_log2[first + row]) * delta[first + row];
    sum = backward::block_sum<C::WARPS>(sum, shared_address(scratch));
    if (threadIdx.x == 0) ((Real*)p.dsinks_partial)[blockIdx.x] = sum;
}
