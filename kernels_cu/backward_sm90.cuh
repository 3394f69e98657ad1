// dK, dV and, in the same walk, dQ on Hopper: one block per key tile and key head visits the tiles of queries that
// see it, for every query head of the group. A tile of queries takes five products of warpgroups:
//
//   S^T = K Q^T, dP^T = V dO^T    64 keys x queries; P^T and dS^T stay in registers, where they are A
//   dV += P^T dO, dK += dS^T Q    64 keys x head dim, accumulated over the walk
//   dQ = dS K                     dS^T of both warpgroups through shared memory; added to dq_accum
//
// Grid: batch * heads_kv * schedule.tiles blocks, schedule.tiles = ceil(len_k / BLOCK_K). p.dk or
// p.dv may be null. C::TURNS: blocks add to a tile of dQ in the order of their numbers, so that its
// bits are the same in every run.
#pragma once

#include "backward_sm90_feed.cuh"
#include "backward_sm90_products.cuh"
#include "backward_sm90_results.cuh"

namespace backward::sm90 {

template <class C> struct Consumer : Results<C> {
    using Base = Results<C>;
    using Base::arrive, Base::cuts, Base::first_key, Base::isolates, Base::key_work, Base::repair;
    using Base::p, Base::layout, Base::head_mask, Base::repair_k;
    using Base::sequence, Base::warp_key, Base::warpgroup;
    using typename Base::Element;
    using typename Base::L;
    using typename Base::Mask;
    using typename Base::TileDout;
    using typename Base::TileK;
    using typename Base::TileQ;
    using typename Base::TileV;
    using Score = typename C::Score;
    using TileDs = typename L::TileDs;
    static_assert(C::BLOCK_K == 128, "two warpgroups own 64 keys each");
    static constexpr int Q8 = C::BLOCK_Q / 8;
    // Scores that take registers of their own to work out come a part of a tile at a time where a whole one does
    // not fit beside them.
    static constexpr int PARTS = C::BLOCK_Q / QUERIES_AT_ONCE<C>;
    // Where registers allow, dV is under way while dS is made.
    static constexpr bool EARLY_DV =
        Score::FOLDED && !C::DROPOUT && Mask::CONTIGUOUS && C::BLOCK_Q == 64;
    static constexpr int PART_Q = C::BLOCK_Q / PARTS, PART_Q8 = PART_Q / 8;
    using Scores = Accumulator<1, PART_Q8>;
    using Operand = Rounded<Element, Q8>;
    // A warpgroup makes 64 rows and 64 columns of dQ: the other half of the rows or of the columns is the
    // other one's.
    static constexpr bool SPLIT_ROWS = C::BLOCK_Q == 128;
    static constexpr int DQ8 = C::HEAD_DIM < 64 ? C::HEAD_DIM / 8 : 8;
    static_assert(C::BLOCK_Q * L::COLUMNS == 128 * 64 || !C::ACCUMULATE_DQ,
                  "a tile of dQ is two halves of 64 x 64");

    Accumulator<1, C::HEAD_DIM / 8> dk;
    Accumulator<1, C::HEAD_DIM_V / 8> dv;

    DEV_METHOD Consumer(const BackwardSm90Params& params, const L& place) : Base(params, place) {
        dk.zero();
        dv.zero();
    }

    DEV_METHOD void walk() {
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

    DEV_METHOD void step(const Score& score, int head, int tile, Visit<C::STAGES> visit) {
        Operand weights, gradients;
        const bool isolate = make_operands(score, head, tile, visit, weights, gradients);
        const u32 ds_smem = layout.ds(visit.ds_stage());
        Accumulator<1, DQ8> dq;
        if constexpr (C::ACCUMULATE_DQ) {
            gradients.template store<TileDs>(ds_smem, warp_key());
            // dS of both warpgroups is there. It also says that the other one is through with the products
            // of the tile before, whose dS is overwritten next.
            named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);
            wgmma_fence();
            multiply_dq<Element, TileDs, TileK>(
                dq, ds_smem + (SPLIT_ROWS ? warpgroup() * TileDs::SLAB_BYTES : 0),
                layout.k() + (SPLIT_ROWS ? 0 : warpgroup() * TileK::SLAB_BYTES));
            wgmma_commit();
        }
        wgmma_fence();
        multiply_gradient<TileQ>(dk, gradients, layout.q(visit.stage()));
        wgmma_commit();
        if constexpr (C::ACCUMULATE_DQ) {
            wgmma_wait<1>();
            wgmma_pin(dq);
            arrive(layout.dout_empty(visit.stage()));
            put_dq(dq, warpgroup(), visit);
        }
        wgmma_wait<0>();
        wgmma_pin(dv);
        wgmma_pin(dk);
        if constexpr (!C::ACCUMULATE_DQ) arrive(layout.dout_empty(visit.stage()));
        arrive(layout.q_empty(visit.stage()));
        if (isolate && repair_k) this->restore_keys();
    }

    // P and dS of a tile, rounded and with pairs hidden; dV is under way when this returns. True if some pairs
    // that are hidden must not meet NaN and inf, which have been left out then.
    DEV_METHOD bool make_operands(const Score& score, int head, int tile, Visit<C::STAGES> visit,
                                  Operand& weights, Operand& gradients) {
        const u32 q_smem = layout.q(visit.stage()), dout_smem = layout.dout(visit.stage());
        const int group = warpgroup();
        bool isolate;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            Scores s, ds;
            if (part == 0) mbarrier_wait(layout.q_full(visit.stage()), visit.parity());
            wgmma_fence();
            multiply_scores<Element, TileK, TileQ, C::HEAD_DIM>(
                s, layout.k() + group * 64 * TileK::ROW_BYTES,
                q_smem + part * PART_Q * TileQ::ROW_BYTES);
            wgmma_commit();
            if (part == 0) mbarrier_wait(layout.dout_full(visit.stage()), visit.parity());
            wgmma_fence();
            multiply_scores<Element, TileV, TileDout, C::HEAD_DIM_V>(
                ds, layout.v() + group * 64 * TileV::ROW_BYTES,
                dout_smem + part * PART_Q * TileDout::ROW_BYTES);
            wgmma_commit();
            const u32 statistics =
                layout.lse_log2(visit.stage()) + part * PART_Q * 4 + fresh_thread_id() % 4 * 8;
            if constexpr (EARLY_DV) {
                make_weights(score, s, statistics);
                weights.put(0, s);
                isolate = isolates(tile);
                if (isolate || cuts(tile)) hide(tile, weights);
                if (isolate) {
                    wgmma_wait<0>();
                    repair(q_smem, dout_smem);
                }
                add_dv(weights, dout_smem);
                wgmma_wait<1>();
                wgmma_pin(ds);
                make_gradients(s, ds, statistics + L::DELTA);
                gradients.put(0, ds);
                if (isolate || cuts(tile)) hide(tile, gradients);
            } else {
                score_gradients(score, s, ds, head, tile * C::BLOCK_Q + part * PART_Q, statistics);
                weights.put(part, s);
                gradients.put(part, ds);
            }
        }
        if constexpr (!EARLY_DV) {
            isolate = isolates(tile);
            if (isolate || cuts(tile)) hide(tile, weights, gradients);
            if (isolate) repair(q_smem, dout_smem);
            add_dv(weights, dout_smem);
        }
        return isolate;
    }

    // dV += P^T dO, under way when this returns.
    DEV_METHOD void add_dv(const Operand& weights, u32 dout_smem) {
        wgmma_fence();
        multiply_gradient<TileDout>(dv, weights, dout_smem);
        wgmma_commit();
    }

    // s: in raw products, out P (where dropout keeps it). ds: in dP, out dS. Keys along the accumulator's
    // rows, queries along its columns. Both products are under way; the weights of a linear score are
    // made while the second one is.
    DEV_METHOD void score_gradients(const Score& score, Scores& s, Scores& ds, int head,
                                    int first_row, u32 statistics) {
        if constexpr (Score::FOLDED && !C::DROPOUT) {
            make_weights(score, s, statistics);
            wgmma_wait<0>();
            wgmma_pin(ds);
            make_gradients(s, ds, statistics + L::DELTA);
        } else {
            wgmma_wait<0>();
            wgmma_pin(s);
            wgmma_pin(ds);
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

    // dQ to where the other warpgroup's tile is reduced from, once the tile before has left.
    DEV_METHOD void put_dq(const Accumulator<1, DQ8>& dq, int group, Visit<C::STAGES> visit) const {
        const int lane = fresh_thread_id() % 32, first_column = SPLIT_ROWS ? 0 : group * 64;
        const int first_row =
            (SPLIT_ROWS ? group * 64 : 0) + fresh_thread_id() / 32 % 4 * 16 + lane / 4;
        mbarrier_wait(layout.dq_empty(), visit.dq_parity() ^ 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 8 * half;
            const u32 to = layout.dq() + row * (C::HEAD_DIM * 4);
#pragma unroll
            for (int n = 0; n < DQ8; ++n) {
                const int column = first_column + 8 * n + lane % 4 * 2;
                if (C::HEAD_DIM % 64 == 0 || first_column + 8 * n < C::HEAD_DIM)
                    st_shared_f32x2(to + 4 * dq_column(row, column), dq.x[0][n][2 * half],
                                    dq.x[0][n][2 * half + 1]);
            }
        }
        fence_proxy_async();
        arrive(layout.dq_full());
    }
};

}  // namespace backward::sm90

template <class C> __device__ void backward_sm90(const BackwardSm90Params& p) {
    using namespace backward::sm90;
    extern __shared__ __align__(1024) u8 shared_memory[];
    const Layout<C> layout(shared_address(shared_memory));
    if (threadIdx.x == 0) {
        layout.init_barriers();
        KeyWork<C>(p, layout).put();
    }
    __syncthreads();
    if constexpr (C::PACKED)
        if (KeyWork<C>(layout).work.batch < 0) return;
    if (threadIdx.x >= CONSUMERS) {
        setmaxnreg_dec<FEED_REGISTERS<C>>();
        if (warp_id() == LOAD_WARP) load_everything<C>(p, layout);
        if (C::ACCUMULATE_DQ && warp_id() == REDUCE_WARP) reduce_everything<C>(p, layout);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS<C>>();
        Consumer<C> consumer(p, layout);
        consumer.walk();
        consumer.finish(consumer.dk, consumer.dv);
    }
}
