// dK, dV and, in the same walk, dQ on Hopper: one block per key tile and key head visits the tiles of queries that
// see it, for every query head of the group. A tile of queries takes five products of warpgroups:
//
//   S^T = K Q^T, dP^T = V dO^T    64 keys x queries; P^T and dS^T stay in registers, where they are A
//   dV += P^T dO, dK += dS^T Q    64 keys x head dim, accumulated over the walk
//   dQ = dS K                     dS^T of both warpgroups through shared memory; added to dq_accum
//
// Grid: batch * heads_kv * schedule.tiles blocks, schedule.tiles = ceil(len_k / BLOCK_K). p.dk or
// p.dv may be null. C::TURNS: blocks add to a tile of dQ in the order of their numbers, so that its
// bits are the same in every run. Above 128 columns warpgroups share the work in another way:
// backward_sm90_divided.cuh.
#pragma once

#include "backward_sm90_feed.cuh"
#include "backward_sm90_products.cuh"
#include "backward_sm90_divided.cuh"

namespace backward::sm90 {

template <class C> struct Consumer : Scorer<C> {
    using Base = Scorer<C>;
    using Base::arrive, Base::cuts, Base::first_key, Base::isolates, Base::key_work, Base::repair;
    using Base::hide, Base::PART_Q, Base::PARTS;
    using Base::p, Base::layout, Base::head_mask, Base::repair_k;
    using Base::sequence, Base::warp_key, Base::warpgroup;
    using typename Base::Element;
    using typename Base::L;
    using typename Base::Mask;
    using typename Base::Operand;
    using typename Base::Score;
    using typename Base::Scores;
    using typename Base::TileDout;
    using typename Base::TileK;
    using typename Base::TileQ;
    using typename Base::TileV;
    using TileDs = typename L::TileDs;
    static_assert(C::BLOCK_K == 128, "two warpgroups own 64 keys each");
    // Where registers allow, dV is under way while dS is made.
    static constexpr bool EARLY_DV =
        Score::FOLDED && !C::DROPOUT && Mask::CONTIGUOUS && C::BLOCK_Q == 64;
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

    DEV_METHOD void run() {
        this->walk([&](const Score& score, int head, int tile, Visit<C::STAGES> visit) {
            step(score, head, tile, visit);
        });
        this->end_walk();
        this->store_dv(dv);
        this->store_dk(dk);
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
                make_weights<true>(score, s, statistics);
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
                this->template score_gradients<true>(score, s, ds, head,
                                                     tile * C::BLOCK_Q + part * PART_Q, statistics);
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
    static_assert(C::WARPS == 12, "two warpgroups and one that feeds them");
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
        if (C::ACCUMULATE_DQ && warp_id() == REDUCE_WARP) {
            if constexpr (DIVIDED<C>)
                reduce_slabs<C>(p, layout);
            else
                reduce_everything<C>(p, layout);
        }
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS<C>>();
        if constexpr (DIVIDED<C>)
            consume_divided<C>(p, layout);
        else
            Consumer<C>(p, layout).run();
    }
}
