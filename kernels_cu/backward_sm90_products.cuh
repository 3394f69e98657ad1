// The products of one tile of Hopper's backward, and what happens to scores between them; warpgroups own 64 keys,
// which lie along the rows of their accumulators, and queries along the columns.
#pragma once

#include "backward_sm90_layout.cuh"

namespace backward::sm90 {

// P^T or dS^T of 8 Q8 queries, rounded: the A operands of 16 queries each.
template <class Element, int Q8> struct Rounded {
    u32 a[Q8 / 2][4];

    // The part-th tile of as many queries as `scores` has.
    template <int N8> DEV_METHOD void put(int part, const Accumulator<1, N8>& scores) {
#pragma unroll
        for (int k = 0; k < N8 / 2; ++k)
            accumulator_to_a<Element>(a[part * (N8 / 2) + k], scores, 0, k);
    }
    DEV_METHOD void hide(int n, int e) {
        a[n / 2][n % 2 * 2 + e / 2] &= e % 2 ? 0x0000ffffu : 0xffff0000u;
    }
    // To the tile [keys][queries] where the products of dQ find it; the warp's keys begin at `key`.
    template <class Tile> DEV_METHOD void store(u32 smem, int key) const {
        const u32 lane = lane_major<Tile>(smem + key * Tile::ROW_BYTES);
#pragma unroll
        for (int k = 0; k < Q8 / 2; ++k) stmatrix_x4(Tile::moved(lane, 0, 16 * k), a[k]);
        fence_proxy_async();
    }
};

// scores = A B^T over DIM columns; 64 rows of A from a_smem on, 8 N8 of B.
template <class Element, class TileA, class TileB, int DIM, int N8>
DEV void multiply_scores(Accumulator<1, N8>& scores, u32 a_smem, u32 b_smem) {
    const KMajor a(a_smem), b(b_smem);
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k)
        wgmma_ss<Element, false, false>(scores, a.at(k_major_step<TileA::SLAB_BYTES>(k)),
                                        b.at(k_major_step<TileB::SLAB_BYTES>(k)), k > 0);
}
// gradient += scores B.
template <class TileB, class Element, int N8, int Q8>
DEV void multiply_gradient(Accumulator<1, N8>& gradient, const Rounded<Element, Q8>& scores,
                           u32 b_smem) {
    const MnMajor<TileB::SLAB_BYTES> b(b_smem);
#pragma unroll
    for (int k = 0; k < Q8 / 2; ++k)
        wgmma_rs<Element, true>(gradient, scores.a[k], b.at(mn_major_step(k)), 1);
}
// 64 queries and 64 (or all) columns of dS K: a slab of dS^T and a slab of K.
template <class Element, class TileDs, class TileK, int N8>
DEV void multiply_dq(Accumulator<1, N8>& dq, u32 ds_smem, u32 k_smem) {
    const MnMajor<TileDs::SLAB_BYTES> a(ds_smem);
    const MnMajor<TileK::SLAB_BYTES> b(k_smem);
#pragma unroll
    for (int k = 0; k < TileK::ROWS / 16; ++k)
        wgmma_ss<Element, true, true>(dq, a.at(mn_major_step(k)), b.at(mn_major_step(k)), k > 0);
}

// act(n, e, statistic of the element's query); `statistics`: of this lane's first query.
template <int N8, class Act> DEV void each_pair(u32 statistics, Act act) {
#pragma unroll
    for (int n = 0; n < N8; ++n) {
        const float2 pair = ld_shared_f32x2(statistics + 32 * n);
#pragma unroll
        for (int e = 0; e < 4; ++e) act(n, e, e % 2 ? pair.y : pair.x);
    }
}
// s: in raw products under way, out P of a score that is a factor. BEHIND: something else is under way behind
// them, and everything is done before the wait for that.
template <bool BEHIND, class Score, int N8>
DEV void make_weights(const Score& score, Accumulator<1, N8>& s, u32 lse_log2_smem) {
    wgmma_wait<BEHIND ? 1 : 0>();
    wgmma_pin(s);
    u32 bits = 0;
    each_pair<N8>(lse_log2_smem, [&](int n, int e, float lse_log2) {
        s.x[0][n][e] = probability(score.at(s.x[0][n][e], 0, 0).log2, lse_log2);
        bits |= __float_as_uint(s.x[0][n][e]);
    });
    // One instruction per two weights, and none of them has a sign.
    finish_before_wait(__uint_as_float(bits), 0.f);
}
// ds: in dP, out dS.
template <int N8>
DEV void make_gradients(const Accumulator<1, N8>& weights, Accumulator<1, N8>& ds, u32 delta_smem) {
    each_pair<N8>(delta_smem, [&](int n, int e, float delta) {
        ds.x[0][n][e] = weights.x[0][n][e] * (ds.x[0][n][e] - delta);
    });
}

}  // namespace backward::sm90
