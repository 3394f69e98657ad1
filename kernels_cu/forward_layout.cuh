// What a block of forward works on: its shared memory, its rows of arrays, its tiles of keys.
#pragma once

#include "dropout.cuh"
#include "group_rows.cuh"
#include "masks.cuh"
#include "packed.cuh"
#include "wide_slices.cuh"

// Shared memory of a block: Q | K stages | V stages. The output is staged where Q was.
template <class C> struct ForwardLayout {
    using Storage = typename C::Element::Storage;
    using Real = typename C::Element::Real;
    // Columns of the output made at a time: what its accumulator has registers for.
    static constexpr int PART =
        sizeof(Real) == 8 && C::HEAD_DIM_V > 128 ? C::HEAD_DIM_V / 2 : C::HEAD_DIM_V;
    using QTile = SharedTile<C::BLOCK_Q, C::HEAD_DIM, Storage>;
    using KTile = SharedTile<C::BLOCK_K, C::HEAD_DIM, Storage>;
    using VTile = SharedTile<C::BLOCK_K, PART, Storage>;
    using OutTile = SharedTile<C::BLOCK_Q, PART, Storage>;
    static constexpr int THREADS = C::WARPS * 32, WARP_Q = C::BLOCK_Q / C::WARPS, M16 = WARP_Q / 16;
    static constexpr int Q = 0, K = QTile::BYTES, V = K + C::STAGES * KTile::BYTES;
    static constexpr int BYTES = V + C::STAGES * VTile::BYTES;

    static_assert(SLICE<C> > 0 || BYTES == C::SHARED_BYTES,
                  "forward_shared_bytes in _tuning.py computes the same sum");
    static_assert(WARP_Q % 16 == 0 && C::BLOCK_K % 16 == 0, "mma works on 16 rows and 16 keys");
    static_assert(QTile::SLAB_BYTES == OutTile::SLAB_BYTES && C::HEAD_DIM_V <= C::HEAD_DIM,
                  "a warp stages its output over its own rows of Q, which nobody else reads");
};

// What the rows of a tile are, how they come in, and what is kept of their weights.
template <class C> using TileRows = Chosen<GROUPED<C>, GroupRows, HeadRows>;
template <class C> using QueryLoader =
    Chosen<GROUPED<C>, GroupLoader<typename ForwardLayout<C>::QTile, C::WARPS * 32, C::VECTOR_ONLY>,
           TileLoader<typename ForwardLayout<C>::QTile, C::WARPS * 32, C::VECTOR_ONLY>>;
template <class C> using Keep = Chosen<GROUPED<C>, dropout::GroupKeep, dropout::Keep>;

// Queries of a tile's rows, V of their head of k and v, and their output from a column on.
template <class C, class Storage> DEV auto tile_rows(const ForwardParams& p, const Strides& strides,
                                                     const GlobalRows<Storage>& first) {
    if constexpr (GROUPED<C>)
        return GroupedRows<Storage>{first, strides.head, GroupRows(p.shape)};
    else
        return first;
}
template <class C> DEV auto query_rows(const ForwardParams& p, const Work& work) {
    return tile_rows<C>(
        p, p.q_strides,
        head_rows<typename C::Element::Storage>(p.q, p.q_strides, work, work.head, p.shape.len_q,
                                                p.shape.head_dim, p.shape.flags & FLAG_Q_VECTOR));
}
template <class C> DEV GlobalRows<typename C::Element::Storage> value_rows(const ForwardParams& p,
                                                                           const Work& work,
                                                                           int first_column) {
    return from_column(head_rows<typename C::Element::Storage>(
                           p.v, p.v_strides, work, work.head / p.shape.group, p.shape.len_k,
                           p.shape.head_dim_v, p.shape.flags & FLAG_V_VECTOR),
                       first_column);
}
template <class C>
DEV auto output_rows(const ForwardParams& p, const Work& work, int first_column) {
    const auto first = head_rows<typename C::Element::Storage>(
        p.out, p.out_strides, work, work.head, p.shape.len_q, p.shape.head_dim_v,
        p.shape.flags & FLAG_OUT_VECTOR);
    return tile_rows<C>(p, p.out_strides, from_column(first, first_column));
}

// The key tiles that some of these rows see: from the first of them on, those that next_tile names.
template <class C> DEV Range key_tiles(const typename C::Mask& mask, Range rows) {
    const Range keys = mask.keys(rows);
    if (keys.empty()) return {0, 0};
    const int end = (keys.end + C::BLOCK_K - 1) / C::BLOCK_K;
    return {mask.next_tile(keys.begin / C::BLOCK_K, end), end};
}

// What a block works on. With C::SPLIT the tiles of rows are counted `splits` times: neighbours in
// the order of blocks walk parts of the same keys, and `split` says which. With C::GROUPED the heads
// counted are those of k and v, and `head` is the first query head of one.
struct ForwardWork : Work {
    int split;
};
template <class C> DEV ForwardWork forward_work(const ForwardParams& p) {
    ForwardWork work{decode<C>(p, GROUPED<C> ? p.shape.heads_kv : p.shape.heads), 0};
    if constexpr (GROUPED<C>) work.head *= p.shape.group;
    if constexpr (C::SPLIT) {
        work.split = work.tile % p.schedule.splits;
        work.tile /= p.schedule.splits;
    }
    return work;
}

// The key tiles that this block walks: those that its rows see, or its part of them.
template <class C> DEV Range own_key_tiles(const ForwardParams& p, const ForwardWork& work,
                                           const typename C::Mask& mask, Range rows) {
    const Range all = key_tiles<C>(mask, rows);
    if constexpr (!C::SPLIT) return all;
    const i64 count = all.end - all.begin;
    const int begin = all.begin + (int)(count * work.split / p.schedule.splits);
    const int end = all.begin + (int)(count * (work.split + 1) / p.schedule.splits);
    return {mask.next_tile(begin, end), end};
}
