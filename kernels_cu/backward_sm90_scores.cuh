// The walk over tiles of queries, and what happens to their scores.
#pragma once

#include "backward_sm90_products.cuh"
#include "backward_sm90_results.cuh"

namespace backward::sm90 {

template <class C> struct Scorer : Results<C> {
    using Base = Results<C>;
    using Base::Base;
    using Base::first_key, Base::key_work;
    using Base::p, Base::layout, Base::head_mask, Base::repair_k;
    using Base::sequence, Base::warp_key;
    using typename Base::Element;
    using typename Base::L;
    using typename Base::Mask;
    using Score = typename C::Score;
    static constexpr int Q8 = C::BLOCK_Q / 8;
    // Scores that take registers of their own to work out come a part of a tile at a time where a whole one does
    // not fit beside them.
    static constexpr int PARTS = C::BLOCK_Q / QUERIES_AT_ONCE<C>;
    static constexpr int PART_Q = C::BLOCK_Q / PARTS, PART_Q8 = PART_Q / 8;
    using Scores = Accumulator<1, PART_Q8>;
    using Operand = Rounded<Element, Q8>;

    // step(score, head, tile, visit) for every tile of queries.
    template <class Step> DEV_METHOD void walk(Step step) {
        const Range tiles = key_work().tiles;
        Visit<C::STAGES> visit;
#pragma unroll 1
        for (int head = 0; head < p.shape.group; ++head) {
            if constexpr (!Mask::CONTIGUOUS) head_mask = key_work().mask(p, head);
            const Work work = key_work().work;
            Score score = make_score<C>(p, work, work.head * p.shape.group + head);
            if constexpr (C::PACKED) set_offset(score, layout.q_offset(p));
#pragma unroll 1
            for (int tile = head_mask.next_tile(tiles.begin, tiles.end); tile < tiles.end;
                 tile = head_mask.next_tile(tile + 1, tiles.end)) {
                if (visit.number == 0) {
                    mbarrier_wait(layout.keys_full(), 0);
                    if constexpr (C::ACCUMULATE_DQ)
                        repair_k =
                            named_barrier_or(CONSUMER_BARRIER, CONSUMERS, this->finds_bad_keys());
                }
                step(score, head, tile, visit);
                visit.advance();
            }
        }
    }

    // s: in raw products, out P (where dropout keeps it). ds: in dP, out dS. Keys along the accumulator's
    // rows, queries along its columns. The products are under way; the weights of a linear score are
    // made while that of dP is.
    template <bool WANT_DS> DEV_METHOD void score_gradients(const Score& score, Scores& s,
                                                            Scores& ds, int head, int first_row,
                                                            u32 statistics) {
        if constexpr (Score::FOLDED && !C::DROPOUT) {
            make_weights<WANT_DS>(score, s, statistics);
            if constexpr (WANT_DS) {
                wgmma_wait<0>();
                wgmma_pin(ds);
                make_gradients(s, ds, statistics + L::DELTA);
            }
        } else {
            wgmma_wait<0>();
            wgmma_pin(s);
            if constexpr (WANT_DS) wgmma_pin(ds);
            const int lane = fresh_thread_id() % 32;
            const int i_0 = first_row + lane % 4 * 2, j_0 = first_key() + warp_key() + lane / 4;
            const Work work = key_work().work;
            const dropout::KeepBits<C::DROPOUT, 1, PART_Q8, true> keep(
                p, work, work.head * p.shape.group + head, first_row, first_key() + warp_key());
#pragma unroll
            for (int n = 0; n < PART_Q8; ++n) {
                const float2 lse_log2 = ld_shared_f32x2(statistics + 32 * n);
                const float2 delta = ld_shared_f32x2(statistics + 32 * n + L::DELTA);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const Logit<float> logit =
                        score.at(s.x[0][n][e], i_0 + 8 * n + e % 2, j_0 + e / 2 * 8);
                    const float weight =
                        backward::probability(logit.log2, e % 2 ? lse_log2.y : lse_log2.x);
                    s.x[0][n][e] = keep.kept(0, n, e) ? weight : 0.f;
                    if constexpr (WANT_DS)
                        ds.x[0][n][e] =
                            weight *
                            (keep.weighted(ds.x[0][n][e], 0, n, e) - (e % 2 ? delta.y : delta.x)) *
                            logit.derivative;
                }
            }
        }
    }
    // Sets P or dS of pairs that do not exist to 0. Nothing is multiplied: they may be NaN. Rounded, they take
    // half of the registers.
    template <class... Operands> DEV_METHOD void hide(int tile, Operands&... operands) const {
        each_hidden<1, Q8, true>(this->mask(), sequence().q_len, tile * C::BLOCK_Q,
                                 first_key() + warp_key(),
                                 [&](int, int n, int e) { (operands.hide(n, e), ...); });
    }
};

}  // namespace backward::sm90
