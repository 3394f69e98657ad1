// The warpgroup that feeds the others: warp 8 loads, warp 9 adds finished tiles of dQ to global memory. Both walk
// the same tiles as the consumers, ahead of them and behind.
#pragma once

#include "backward_sm90_layout.cuh"

namespace backward::sm90 {

// Where one head begins in a tensor map's axes.
struct MapPlace {
    int head, outer, inner;

    DEV_METHOD MapPlace(const Strides& strides, const Work& work, int head_)
        : head(strides.head != 0 ? head_ : 0),
          // Axes along which an array is broadcast have extent 1 in its map.
          outer(strides.batch[MAX_BATCH_AXES - 2] != 0 ? work.batch_index[MAX_BATCH_AXES - 2] : 0),
          inner(strides.batch[MAX_BATCH_AXES - 1] != 0 ? work.batch_index[MAX_BATCH_AXES - 1] : 0) {
    }
};

// Rows from `row` on, slab by slab of 64 columns.
template <class Tile> DEV void load_slabs(u32 smem, const TensorMap& map, u32 barrier, u64 policy,
                                          int row, const MapPlace& at) {
#pragma unroll
    for (int slab = 0; slab < Tile::SLABS; ++slab)
        tma_load_5d(smem + slab * Tile::SLAB_BYTES, &map, barrier, policy, slab * Tile::SLAB, row,
                    at.head, at.inner, at.outer);
}

template <class C> DEV void load_everything(const BackwardSm90Params& p, const Layout<C>& layout) {
    using L = Layout<C>;
    Visit<C::STAGES> visit;
    KeyWork<C>(layout).each(p, [&](int head, int tile) {
        // Read anew, and elected anew, for there are 24 registers.
        const KeyWork<C> keys(layout);
        const Work& work = keys.work;
        // Maps know the whole packed arrays: behind a sequence come the rows of the next one.
        const Sequence here = layout.sequence(p);
        if (visit.number == 0 && elect_one()) {
            mbarrier_arrive_expect(layout.keys_full(), L::TileK::BYTES + L::TileV::BYTES);
            load_slabs<typename L::TileK>(layout.k(), p.k_map, layout.keys_full(), L2_EVICT_FIRST,
                                          here.k_start + keys.first_key(),
                                          MapPlace(p.k_strides, work, work.head));
            load_slabs<typename L::TileV>(layout.v(), p.v_map, layout.keys_full(), L2_EVICT_FIRST,
                                          here.k_start + keys.first_key(),
                                          MapPlace(p.v_strides, work, work.head));
        }
        const int query_head = work.head * p.shape.group + head, row = tile * C::BLOCK_Q;
        // In the order in which the consumers release them.
        mbarrier_wait(layout.dout_empty(visit.stage()), visit.parity() ^ 1);
        if (elect_one()) {
            // Every block of the head reads these tiles.
            const u32 barrier = layout.dout_full(visit.stage());
            mbarrier_arrive_expect(barrier, L::TileDout::BYTES);
            load_slabs<typename L::TileDout>(layout.dout(visit.stage()), p.dout_map, barrier,
                                             L2_EVICT_LAST, here.q_start + row,
                                             MapPlace(p.dout_strides, work, query_head));
        }
        mbarrier_wait(layout.q_empty(visit.stage()), visit.parity() ^ 1);
        if (elect_one()) {
            const u32 barrier = layout.q_full(visit.stage());
            mbarrier_arrive_expect(barrier, L::TileQ::BYTES);
            load_slabs<typename L::TileQ>(layout.q(visit.stage()), p.q_map, barrier, L2_EVICT_LAST,
                                          here.q_start + row,
                                          MapPlace(p.q_strides, work, query_head));
        }
        // Heads begin at any multiple of 4 bytes in the statistics: too few for a bulk copy.
        const i64 first = ::statistics_row<C>(p, work, query_head) + here.q_start + row;
#pragma unroll 2
        for (int r = lane_id(); r < C::BLOCK_Q; r += 32) {
            // A row past the end has P = exp2(s - inf) = 0.
            const bool exists = row + r < here.q_len;
            const u32 to = layout.lse_log2(visit.stage()) + 4 * r;
            st_shared_f32(to, exists ? ld_global_f32((const float*)p.lse_log2 + first + r)
                                     : positive_infinity());
            st_shared_f32(to + L::DELTA,
                          exists ? ld_global_f32((const float*)p.delta + first + r) : 0.f);
        }
        __syncwarp();
        if (elect_one()) mbarrier_arrive(layout.q_full(visit.stage()));
        visit.advance();
    });
}

// Which of the blocks that add to a tile of dQ is this one, in the order of their numbers? Those before it
// started before it, so that waiting for them ends. Only under a band are they known without asking.
template <class C> DEV u32 turn_of(const BackwardParams& p, const KeyWork<C>& keys,
                                   const typename C::Mask& mask, int tile) {
    const Range seen = mask.keys({tile * C::BLOCK_Q, (tile + 1) * C::BLOCK_Q});
    return p.schedule.longest_last ? (seen.end - 1) / C::BLOCK_K - keys.work.tile
                                   : keys.work.tile - seen.begin / C::BLOCK_K;
}

// Deterministic sums: the block's place among those that add to one tile of queries. Constructed when it is its
// turn; whoever has added passes it on.
template <class C> struct Turn {
    u32* counter = nullptr;
    u32 number = 0;

    DEV_METHOD Turn(const BackwardSm90Params& p, const KeyWork<C>& keys, const Sequence& here,
                    int head, int row) {
        if constexpr (C::TURNS) {
            const int query_head = keys.work.head * p.shape.group + head;
            counter = p.dq_turns + turn_place<C>(p, keys.work.batch, query_head, here.q_start, row);
            number = turn_of<C>(p, keys, keys.mask(p, head), row / C::BLOCK_Q);
            // Cumulative lengths that contradict themselves leave out blocks; nothing is promised then.
            const bool waits = !C::PACKED || !packed::is_bad(p.options);
            while (waits && ld_acquire_global(counter) != number) {
            }
            fence_proxy_async_global();
        }
    }
    DEV_METHOD void pass() const { st_release_global(counter, number + 1); }
};

// dq_accum += the tiles of dQ that the consumers leave in shared memory.
template <class C>
DEV void reduce_everything(const BackwardSm90Params& p, const Layout<C>& layout) {
    if (!elect_one()) return;
    Visit<C::STAGES> visit;
    KeyWork<C>(layout).each(p, [&](int head, int tile) {
        // Read anew, for there are 24 registers.
        const KeyWork<C> keys(layout);
        const Sequence here = layout.sequence(p);
        const int query_head = keys.work.head * p.shape.group + head, row = tile * C::BLOCK_Q;
        const i64 first = ::statistics_row<C>(p, keys.work, query_head) + here.q_start + row;
        const int rows = min(C::BLOCK_Q, here.q_len - row);
        mbarrier_wait(layout.dq_full(), visit.dq_parity());
        visit.advance();
        const Turn<C> turn(p, keys, here, head, row);
        bulk_reduce_add_f32(p.dq_accum + first * C::HEAD_DIM, layout.dq(), rows * C::HEAD_DIM * 4);
        bulk_commit();
        bulk_wait_read<0>();
        mbarrier_arrive(layout.dq_empty());
        if constexpr (C::TURNS) {
            bulk_wait<0>();
            fence_proxy_async_global();
            turn.pass();
        }
    });
    bulk_wait<0>();
}

// The same, 64 columns at a time, row by row: a row of them is one piece of memory. By all lanes.
template <class C> DEV void reduce_slabs(const BackwardSm90Params& p, const Layout<C>& layout) {
    constexpr int SLABS = Layout<C>::TileK::SLABS, BYTES = 64 * 4;
    Visit<C::STAGES> visit;
    KeyWork<C>(layout).each(p, [&](int head, int tile) {
        const KeyWork<C> keys(layout);
        const Sequence here = layout.sequence(p);
        const int query_head = keys.work.head * p.shape.group + head, row = tile * C::BLOCK_Q;
        const i64 first = ::statistics_row<C>(p, keys.work, query_head) + here.q_start + row;
        const int rows = min(C::BLOCK_Q, here.q_len - row);
        const Turn<C> turn(p, keys, here, head, row);
#pragma unroll 1
        for (int slab = 0; slab < SLABS; ++slab) {
            mbarrier_wait(layout.dq_full(), visit.dq_parity(SLABS, slab));
#pragma unroll 1
            for (int r = lane_id(); r < rows; r += 32)
                bulk_reduce_add_f32(p.dq_accum + (first + r) * C::HEAD_DIM + slab * 64,
                                    layout.dq() + r * BYTES, BYTES);
            bulk_commit();
            bulk_wait_read<0>();
            __syncwarp();
            if (elect_one()) mbarrier_arrive(layout.dq_empty());
        }
        visit.advance();
        if constexpr (C::TURNS) {
            bulk_wait<0>();
            fence_proxy_async_global();
            __syncwarp();
            if (elect_one()) turn.pass();
        }
    });
    bulk_wait<0>();
}

}  // namespace backward::sm90
