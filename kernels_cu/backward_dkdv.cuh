// dK and dV: one block per key tile and key head walks the rows that see the tile, for every query
// head of the group. Gradients of a group are summed in registers, in a fixed order: no atomics and
// no expanded K or V.
//
// Grid: batch * heads_kv * schedule.tiles blocks, schedule.tiles = ceil(len_k / BLOCK_K). p.dk or
// p.dv may be null.
#pragma once

#include "backward_dkdv_walk.cuh"
#include "wide_dkdv.cuh"

namespace backward {

// One key tile of one key head. Both gradients at once, or (16 bits and head dim 256, whose two
// accumulators do not fit the registers) one.
//
// Registers are the scarce thing here: two accumulators take half of a thread's 255. Whatever is
// cheap to work out again (the block's work, a thread's place) is not kept across the loop, hence
// the fresh_* and opaque() calls.
template <class C, bool WANT_DK, bool WANT_DV> struct KeyBlock
    : KeyWalk<C, KeyBlock<C, WANT_DK, WANT_DV>> {
    using Walk = KeyWalk<C, KeyBlock<C, WANT_DK, WANT_DV>>;
    using Rows = KeyRows<C>;
    using Rows::keys, Rows::warp_key, Rows::q_gmem, Rows::dout_gmem, Rows::k_gmem, Rows::accum;
    using Rows::M16, Rows::SLICED, Rows::THREADS;
    using Rows::p, Rows::layout, Rows::first_key;
    using typename Rows::Element, typename Rows::Real;
    using typename Rows::TileQ, typename Rows::TileDout, typename Rows::TileK, typename Rows::TileV;
    using typename Walk::Place, typename Walk::KeptScore;
    using Dq = QueryAccumulator<C>;
    static_assert(!SLICED, "operands of both gradients");
    static constexpr int COLUMNS = (WANT_DK ? C::HEAD_DIM : 0) + (WANT_DV ? C::HEAD_DIM_V : 0);
    static constexpr bool ACCUMULATE_DQ = C::ACCUMULATE_DQ && WANT_DK;
    static constexpr int CHUNK = chunk_columns<C, M16, COLUMNS, C::BLOCK_Q>();

    bool repair_k;  // K has a NaN or inf, which dQ of rows that do not see it must not meet
    Accumulator<M16, WANT_DK ? C::HEAD_DIM / 8 : 1, Real> dk;
    Accumulator<M16, WANT_DV ? C::HEAD_DIM_V / 8 : 1, Real> dv;

    DEV_METHOD KeyBlock(const BackwardParams& params, u32 smem) : Walk(params, smem) {}

    DEV_METHOD void run() {
        dk.zero();
        dv.zero();
        Walk::walk();
        finish();
    }

    // ---- what KeyWalk asks for ----

    static constexpr bool FORMS_DS = WANT_DK;
    DEV_METHOD static constexpr bool reads_v() { return WANT_DK; }

    DEV_METHOD void begin() {
        if constexpr (ACCUMULATE_DQ) {
            cp_async_wait<0>();
            __syncthreads();
            repair_k = has_non_finite<Element, TileK, THREADS>(layout.k);
        }
    }

    // dV += P^T dO and dK += dS^T Q over one tile of rows.
    DEV_METHOD bool add_tile(const KeptScore& score, Place place, int stage, bool cut,
                             bool isolate) {
        const int first_row = place.tile * C::BLOCK_Q;
        bool repaired = false;
#pragma unroll 1
        for (int column = 0; column < C::BLOCK_Q; column += CHUNK) {
            Accumulator<M16, CHUNK / 8, Real> s, ds;
            s.zero();
            multiply_transposed<Element, TileK, TileQ>(s, row_address<TileK>(layout.k, warp_key()),
                                                       row_address<TileQ>(layout.q(stage), column));
            if (WANT_DK) {
                ds.zero();
                multiply_transposed<Element, TileV, TileDout>(
                    ds, row_address<TileV>(layout.v, warp_key()),
                    row_address<TileDout>(layout.dout(stage), column));
            }
            Walk::score_gradients(score, s, ds, place, column, stage);
            if (cut) Walk::hide(s, ds, place, column);
            if (isolate) {
                // Scores come from Q and dO as they are, so every warp must have its own before the
                // repair.
                __syncthreads();
                if (WANT_DV)
                    repaired |= remove_non_finite<Element, TileDout, THREADS, CHUNK>(
                        layout.dout(stage), column);
                if (WANT_DK)
                    repaired |=
                        remove_non_finite<Element, TileQ, THREADS, CHUNK>(layout.q(stage), column);
            }
            if constexpr (ACCUMULATE_DQ) Dq::put(layout.ds, ds, warp_key(), column);
            if constexpr (WANT_DV)
                multiply<Element, TileDout>(dv, s,
                                            row_address<TileDout>(layout.dout(stage), column));
            if constexpr (WANT_DK)
                multiply<Element, TileQ>(dk, ds, row_address<TileQ>(layout.q(stage), column));
        }
        if constexpr (ACCUMULATE_DQ) add_dq(place.head, first_row, isolate && repair_k);
        return repaired;
    }

    DEV_METHOD void end(Range tiles) {
        if constexpr (ACCUMULATE_DQ) {
            if (repair_k) add_back_dq(tiles);
            __syncthreads();  // every warp has read all of K, over which gradients are staged next
        }
    }

  private:
    // dQ += dS K for one tile of rows.
    DEV_METHOD void add_dq(int head, int first_row, bool repair) {
        __syncthreads();  // dS of all keys is there
        if (repair) remove_non_finite<Element, TileK, THREADS>(layout.k);
        Dq::add(accum(head, first_row), p.shape.len_q - first_row, p.shape.head_dim, layout.ds,
                layout.k);
        if (!repair) return;
        __syncthreads();
        restore_tile<TileK, THREADS>(k_gmem(), layout.k,
                                     first_key);  // the next scores need K as it is
    }

    DEV_METHOD void add_back_dq(Range tiles) {
        Walk::repairs(tiles, [&](Place place) {
            const int first_row = place.tile * C::BLOCK_Q;
            Dq::add_back(accum(place.head, first_row), k_gmem(), Walk::mask,
                         Range{first_row, min(first_row + C::BLOCK_Q, p.shape.len_q)}, keys());
        });
    }

    DEV_METHOD void finish() {
        const Work work = Rows::key_work();
        if constexpr (WANT_DV)
            if (p.dv != nullptr) {
                const Real factor = C::DROPOUT ? dropout::factor_of<Real>(p) : Real(1);
                store_gradient<C, TileV>(
                    Rows::dv_gmem(work), layout.v, warp_key(), first_key, dv, factor, [&] {
                        Walk::template add_back<TileV>(layout.v, factor,
                                                       [&](int head) { return dout_gmem(head); });
                    });
            }
        if constexpr (WANT_DK)
            if (p.dk != nullptr) {
                const Real factor = scale_of<Real>(p.shape);
                store_gradient<C, TileK>(
                    Rows::dk_gmem(work), layout.k, warp_key(), first_key, dk, factor, [&] {
                        Walk::template add_back<TileK>(layout.k, factor,
                                                       [&](int head) { return q_gmem(head); });
                    });
            }
    }
};

template <class C> DEV void key_tile(const BackwardParams& p, u32 smem) {
    constexpr bool WIDE = sizeof(typename C::Element::Storage) > 2;
    // Columns of both accumulators that leave registers to work with.
    constexpr int COLUMNS = WIDE ? 128 : 384;
    write_work<C>(typename KeyRows<C>::Layout(smem).work(), p, p.shape.heads_kv);
    if constexpr (C::HEAD_DIM + C::HEAD_DIM_V <= COLUMNS) {
        KeyBlock<C, true, true>(p, smem).run();
    } else if constexpr (WIDE) {
        each_gradient<C>(p, smem);
    } else {
        // The scores are computed twice instead.
        if (p.dv != nullptr) {
            KeyBlock<C, false, true>(p, smem).run();
            __syncthreads();
        }
        if (p.dk != nullptr || C::ACCUMULATE_DQ) KeyBlock<C, true, false>(p, smem).run();
    }
}

}  // namespace backward

template <class C> __device__ void backward_dkdv(const BackwardParams& params) {
    extern __shared__ __align__(128) u8 shared_memory[];
    const auto run = [&](const BackwardParams& p) {
        backward::key_tile<C>(p, shared_address(shared_memory));
    };
    if constexpr (C::PACKED && WORK_IN_SHARED<C>) {
        u8* place = shared_memory + backward::KeyRows<C>::Layout::PARAMS;
        with_shared_params<C>(params, params.shape.heads_kv, place, run);
    } else {
        backward::with_sequence<C>(params, params.shape.heads_kv, run);
    }
}
