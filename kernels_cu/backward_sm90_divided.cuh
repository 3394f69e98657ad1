// Head dims above 128: a block has 64 keys, and of both warpgroups, which form the same S^T, the first one sums dV
// and makes dQ, the other one sums dK. So each has three of six products, and one accumulator of 64 x head dim.
//
//   first    S^T  |  P, dV += P^T dO            |  barrier  |  dQ = dS K, 64 columns at a time
//   second   S^T, dP^T  |  dS to shared memory  |  barrier  |  dK += dS^T Q
#pragma once

#include "backward_sm90_scores.cuh"

namespace backward::sm90 {

template <class C, bool SUMS_DV> struct Divided : Scorer<C> {
    using Base = Scorer<C>;
    using Base::arrive, Base::cuts, Base::hide, Base::isolates, Base::repair;
    using Base::p, Base::layout, Base::repair_k, Base::warp_key;
    using Base::PART_Q, Base::PARTS;
    using typename Base::Element;
    using typename Base::L;
    using typename Base::Operand;
    using typename Base::Score;
    using typename Base::Scores;
    using TileDs = typename L::TileDs;
    using TileK = typename L::TileK;
    using TileV = typename L::TileV;
    using TileQ = typename L::TileQ;
    using TileDout = typename L::TileDout;
    static_assert(C::BLOCK_Q == 64 && C::BLOCK_K == 64, "a warpgroup has all of a tile's scores");

    Accumulator<1, (SUMS_DV ? C::HEAD_DIM_V : C::HEAD_DIM) / 8> gradient;

    DEV_METHOD Divided(const BackwardSm90Params& params, const L& place) : Base(params, place) {
        gradient.zero();
    }

    DEV_METHOD void run() {
        this->walk([&](const Score& score, int head, int tile, Visit<C::STAGES> visit) {
            step(score, head, tile, visit);
        });
        this->end_walk();
        if constexpr (SUMS_DV)
            this->store_dv(gradient);
        else
            this->store_dk(gradient);
    }

    DEV_METHOD void step(const Score& score, int head, int tile, Visit<C::STAGES> visit) {
        const u32 ds_smem = layout.ds(visit.ds_stage());
        Operand operand;
        const bool isolate = make_operand(score, head, tile, visit, operand);
        if constexpr (C::ACCUMULATE_DQ && !SUMS_DV)
            operand.template store<TileDs>(ds_smem, warp_key());
        wgmma_fence();
        if constexpr (SUMS_DV)
            multiply_gradient<TileDout>(gradient, operand, layout.dout(visit.stage()));
        else
            multiply_gradient<TileQ>(gradient, operand, layout.q(visit.stage()));
        wgmma_commit();
        // dS is there, and of the tile before nobody reads it any more.
        if constexpr (C::ACCUMULATE_DQ) named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);
        if constexpr (C::ACCUMULATE_DQ && SUMS_DV) make_dq(ds_smem, visit);
        wgmma_wait<0>();
        wgmma_pin(gradient);
        arrive(layout.dout_empty(visit.stage()));
        arrive(layout.q_empty(visit.stage()));
        if (isolate && repair_k) this->restore_keys();
    }

    // P or dS, rounded and with pairs hidden. True as in Consumer.
    DEV_METHOD bool make_operand(const Score& score, int head, int tile, Visit<C::STAGES> visit,
                                 Operand& operand) {
        const u32 q_smem = layout.q(visit.stage()), dout_smem = layout.dout(visit.stage());
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            Scores s, ds;
            if (part == 0) mbarrier_wait(layout.q_full(visit.stage()), visit.parity());
            wgmma_fence();
            multiply_scores<Element, TileK, TileQ, C::HEAD_DIM>(
                s, layout.k(), q_smem + part * PART_Q * TileQ::ROW_BYTES);
            wgmma_commit();
            if (part == 0) mbarrier_wait(layout.dout_full(visit.stage()), visit.parity());
            if constexpr (!SUMS_DV) {
                wgmma_fence();
                multiply_scores<Element, TileV, TileDout, C::HEAD_DIM_V>(
                    ds, layout.v(), dout_smem + part * PART_Q * TileDout::ROW_BYTES);
                wgmma_commit();
            }
            const u32 statistics =
                layout.lse_log2(visit.stage()) + part * PART_Q * 4 + fresh_thread_id() % 4 * 8;
            this->template score_gradients<!SUMS_DV>(score, s, ds, head,
                                                     tile * C::BLOCK_Q + part * PART_Q, statistics);
            operand.put(part, SUMS_DV ? s : ds);
        }
        const bool isolate = isolates(tile);
        if (isolate || cuts(tile)) hide(tile, operand);
        if (isolate) repair(q_smem, dout_smem);
        return isolate;
    }

    // 64 columns after 64 columns, each to where it is reduced from once those before have left.
    DEV_METHOD void make_dq(u32 ds_smem, Visit<C::STAGES> visit) {
        const int lane = fresh_thread_id() % 32, first_row = warp_key() + lane / 4;
#pragma unroll 1
        for (int slab = 0; slab < TileK::SLABS; ++slab) {
            Accumulator<1, 8> dq;
            wgmma_fence();
            multiply_dq<Element, TileDs, TileK>(dq, ds_smem, layout.k() + slab * TileK::SLAB_BYTES);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(dq);
            mbarrier_wait(layout.dq_empty(), visit.dq_parity(TileK::SLABS, slab) ^ 1);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 8 * half;
                const u32 to = layout.dq() + row * (L::DQ_COLUMNS * 4);
#pragma unroll
                for (int n = 0; n < 8; ++n)
                    st_shared_f32x2(to + 4 * dq_column(row, 8 * n + lane % 4 * 2),
                                    dq.x[0][n][2 * half], dq.x[0][n][2 * half + 1]);
            }
            fence_proxy_async();
            arrive(layout.dq_full());
        }
    }
};

template <class C> DEV void consume_divided(const BackwardSm90Params& p, const Layout<C>& layout) {
    if (KeyTile<C>::warpgroup() == 0)
        Divided<C, true>(p, layout).run();
    else
        Divided<C, false>(p, layout).run();
}

}  // namespace backward::sm90
