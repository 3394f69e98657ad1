// Gradients of the array parameters of a score expression, as exact sums: the walk of backward_pairs.cuh,
// every pair of which adds its share to the elements that the expression read for it.
//
// Grid, block and shared memory: see backward_pairs.cuh. Any of its axes may be summed over, in any
// number of splits: the sums do not depend on who adds what. Own axes of heads and rows keep decay[h] and
// row[i] in registers longest. Config: as for backward_bias, and WANTED: bit n: array n has a gradient.
// p.score_grads[n] holds zeros before the launch; backward_score_sums makes gradients of it.
#pragma once

#include "backward_pairs.cuh"
#include "score_mod.cuh"

namespace backward {

template <class C> struct ParameterGradients {
    using Real = typename C::Element::Real;
    static constexpr int N8 = C::BLOCK_K / 8;
    using Expression = decltype(C::Score::modifier);
    expression::ParameterSums<Expression, C::WANTED> sums;

    DEV_METHOD explicit ParameterGradients(const BackwardParams&) {}

    DEV_METHOD void add(const BackwardParams& p, const Work& work, int first_row, int first_key,
                        const Accumulator<1, N8, Real>& s, const Accumulator<1, N8, Real>& ds) {
        const typename C::Score score = make_score<C>(p, work, work.head);
        const int lane = fresh_thread_id() % 32, i_0 = first_row + lane / 4,
                  j_0 = first_key + lane % 4 * 2;
        // Row after row: what depends on the row alone changes once.
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e)
                    sums.add(score.modifier, p.score_grads,
                             score.shaped.scaled(s.x[0][n][e], Real(1)).log2, work.batch, work.head,
                             i_0 + 8 * half, j_0 + 8 * n + e % 2, ds.x[0][n][e]);
    }

    DEV_METHOD void finish(const BackwardParams& p, const Work&, const PairPlace&, u32) {
        sums.flush(p.score_grads);
    }
};

}  // namespace backward

template <class C> __device__ void backward_score(const BackwardParams& p) {
    extern __shared__ __align__(128) u8 shared_memory[];
    backward::PairBlock<C, backward::ParameterGradients<C>> block(p, shared_address(shared_memory));
    block.walk();
}
