// dK and dV on their way out, and NaN and inf of rows and keys, which only the pairs that see them may meet: they are
// taken out of tiles some of whose pairs are hidden, and added to the results.
#pragma once

#include "backward_sm90_block.cuh"

namespace backward::sm90 {

template <class C> struct Results : KeyTile<C> {
    using Base = KeyTile<C>;
    using Base::Base;
    using Base::first_key, Base::from_row, Base::k_gmem, Base::key_work, Base::rows_of_tile;
    using Base::p, Base::layout, Base::head_mask, Base::repair_k, Base::repaired;
    using Base::sequence, Base::warp_key;
    using typename Base::Element;
    using typename Base::L;
    using typename Base::Mask;
    using TileK = typename L::TileK;
    using TileV = typename L::TileV;
    using TileQ = typename L::TileQ;
    using TileDout = typename L::TileDout;

    // Has K a NaN or inf? Keys of the next packed sequence become zeros on the way.
    DEV_METHOD bool finds_bad_keys() const {
        const int keys = sequence().k_len - first_key();
        bool found = false;
#pragma unroll 1
        for (unsigned i = fresh_thread_id(); i < TileK::BYTES / 16; i += CONSUMERS) {
            if (C::PACKED && (int)(i * 16 % TileK::SLAB_BYTES / TileK::ROW_BYTES) >= keys) {
                st_shared_v4(layout.k() + i * 16, make_uint4(0, 0, 0, 0));
                continue;
            }
            const uint4 chunk = ld_shared_v4(layout.k() + i * 16);
            const uint4 clean = Element::finite_chunk(chunk);
            found |= clean.x != chunk.x || clean.y != chunk.y || clean.z != chunk.z ||
                     clean.w != chunk.w;
        }
        if constexpr (C::PACKED) fence_proxy_async();
        return found;
    }

    // Before the products of weights and gradients with a tile some of whose pairs are hidden.
    DEV_METHOD void repair(u32 q_smem, u32 dout_smem) {
        // Scores come from Q, dO and K as they are: both warpgroups must have their own.
        named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);
        bool found = remove_own_non_finite<Element, TileDout, CONSUMERS>(dout_smem);
        found |= remove_own_non_finite<Element, TileQ, CONSUMERS>(q_smem);
        if (repair_k) remove_own_non_finite<Element, TileK, CONSUMERS>(layout.k());
        fence_proxy_async();
        repaired |= named_barrier_or(CONSUMER_BARRIER, CONSUMERS, found);
    }

    // After dQ: the next scores need K as it is.
    DEV_METHOD void restore_keys() const {
        named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);
        backward::restore_tile<TileK, CONSUMERS>(k_gmem(), layout.k(), first_key());
        fence_proxy_async();
        named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);
    }

    // act(head, tile) for every tile that was repaired.
    template <class Act> DEV_METHOD void each_repaired(Act act) {
        key_work().each(p, [&](int head, int tile) {
            head_mask = key_work().mask(p, head);
            if (this->isolates(tile)) act(head, tile);
        });
    }

    // What repairs of K took out of dQ.
    DEV_METHOD void add_back_dq() {
        each_repaired([&](int head, int tile) {
            const GlobalRows<u16> k = k_gmem();
            const KeyWork<C> work = key_work();
            const i64 first = work.statistics_row(p, work.work.head * p.shape.group + head);
            const int row_0 = tile * C::BLOCK_Q, rows = min(C::BLOCK_Q, sequence().q_len - row_0);
            const Mask mask = this->mask();
#pragma unroll 1
            for (int at = fresh_thread_id(); at < rows * k.columns; at += CONSUMERS) {
                const int row = row_0 + at / k.columns, column = at % k.columns;
                float sum = 0.f;
#pragma unroll 1
                for (int key = first_key(); key < min(first_key() + C::BLOCK_K, k.rows); ++key) {
                    const u16 bits = ld_global_u16(k.base + key * k.stride + column);
                    if (!Element::is_finite_value(bits) && mask.keep(row, key))
                        sum += Element::to_real(bits);
                }
                if (sum != 0.f)
                    red_global_add_f32(
                        p.dq_accum + (first + row) * C::HEAD_DIM + dq_column(row, column), sum);
            }
        });
    }

    // After the walk, before gradients are staged over K and V: both warpgroups are through with them.
    DEV_METHOD void end_walk() {
        if (C::ACCUMULATE_DQ && repair_k) add_back_dq();
        named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);
    }
    DEV_METHOD void store_dv(const Accumulator<1, C::HEAD_DIM_V / 8>& dv) {
        if (p.dv == nullptr) return;
        store<TileV>(p.dv, p.dv_strides, p.shape.head_dim_v, FLAG_DV_VECTOR, layout.v(), dv,
                     C::DROPOUT ? dropout::factor_of<float>(p) : 1.f, [&](int head) {
                         return this->rows_gmem(p.dout, p.dout_strides, p.shape.head_dim_v, head);
                     });
    }
    DEV_METHOD void store_dk(const Accumulator<1, C::HEAD_DIM / 8>& dk) {
        if (p.dk == nullptr) return;
        store<TileK>(
            p.dk, p.dk_strides, p.shape.head_dim, FLAG_DK_VECTOR, layout.k(), dk, p.shape.scale,
            [&](int head) { return this->rows_gmem(p.q, p.q_strides, p.shape.head_dim, head); });
    }

    // A gradient times `factor`, by way of this warp's rows of a tile. other(head): the rows whose NaN and inf
    // were left out of it.
    template <class Tile, int N8, class Other>
    DEV_METHOD void store(void* array, const Strides& strides, int columns, int flag, u32 smem,
                          const Accumulator<1, N8>& gradient, float factor, Other other) {
        const float factors[1][2] = {{factor, factor}};
        accumulator_to_shared<Element, Tile>(smem, warp_key(), gradient, factors);
        __syncwarp();
        if (repaired)
            each_repaired([&](int head, int tile) {
                add_non_finite<Element, Tile, 16>(
                    smem, warp_key(), other(head), rows_of_tile(tile), factor,
                    [&](int r, int i) { return this->mask().keep(i, first_key() + r); });
            });
        __syncwarp();
        const Work work = key_work().work;
        store_rows<Tile, 16, C::VECTOR_ONLY>(
            from_row(head_rows<u16>(array, strides, work, work.head, sequence().k_len, columns,
                                    p.shape.flags & flag),
                     sequence().k_start),
            smem, warp_key(), first_key());
    }
};

}  // namespace backward::sm90
