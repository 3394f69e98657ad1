// dK and dV: one block per key tile and key head walks the rows that see the tile, for every query head of the group. Gradients of
// a group are summed in registers, in a fixed order: no atomics and no expanded K or V.
//
// Grid: batch * heads_kv * schedule.tiles blocks, schedule.tiles = ceil(len_k / BLOCK_K). p.dk or p.dv may be null.
#pragma once

#include "backward_tile.cuh"

namespace backward {

// Shared memory: the key tiles stay, query tiles and their statistics come in STAGES buffers.
template <class C>
struct KeyLayout {
    using TileK = SharedTile<C::BLOCK_K, C::HEAD_DIM>;
    using TileV = SharedTile<C::BLOCK_K, C::HEAD_DIM_V>;
    using TileQ = SharedTile<C::BLOCK_Q, C::HEAD_DIM>;
    using TileDout = SharedTile<C::BLOCK_Q, C::HEAD_DIM_V>;
    static constexpr int STATISTICS_BYTES = C::BLOCK_Q * 2 * 4;  // lse_log2 [BLOCK_Q], delta [BLOCK_Q]
    static constexpr int STAGE_BYTES = TileQ::BYTES + TileDout::BYTES + STATISTICS_BYTES;
    static constexpr int BYTES = TileK::BYTES + TileV::BYTES + C::STAGES * STAGE_BYTES;
    static_assert(BYTES == C::SHARED_BYTES, "_tuning.backward_dkdv_shared_bytes disagrees with the layout");
    static_assert(STATISTICS_BYTES % 128 == 0, "tiles begin at multiples of 128");

    u32 k, v, stages;
    DEV_METHOD explicit KeyLayout(u32 base) : k(base), v(base + TileK::BYTES), stages(base + TileK::BYTES + TileV::BYTES) {}
    DEV_METHOD u32 q(int stage) const { return stages + stage * STAGE_BYTES; }
    DEV_METHOD u32 dout(int stage) const { return q(stage) + TileQ::BYTES; }
    DEV_METHOD u32 lse_log2(int stage) const { return dout(stage) + TileDout::BYTES; }
    DEV_METHOD u32 delta(int stage) const { return lse_log2(stage) + C::BLOCK_Q * 4; }
};

// Streams the query tiles: all visible tiles of the group's first head, then of the next.
template <class C>
struct QueryStream {
    using Layout = KeyLayout<C>;
    static constexpr int THREADS = C::WARPS * 32;

    TileLoader<typename Layout::TileQ, THREADS, C::VECTOR_ONLY> q_loader;
    TileLoader<typename Layout::TileDout, THREADS, C::VECTOR_ONLY> dout_loader;
    const float *lse_log2, *delta;  // of the current head
    int first, end, tile;           // tiles: first to fetch per head, one past the last, next to fetch
    i64 q_head, dout_head;
    int len_q;

    DEV_METHOD QueryStream(const BackwardParams& p, const Work& work, int head, int first_tile, int end_tile)
        : q_loader(head_rows(p.q, p.q_strides, work, head, p.shape.len_q, p.shape.head_dim, p.shape.flags & FLAG_Q_VECTOR)),
          dout_loader(head_rows(p.dout, p.dout_strides, work, head, p.shape.len_q, p.shape.head_dim_v, p.shape.flags & FLAG_DOUT_VECTOR)),
          first(first_tile), end(end_tile), tile(first_tile), q_head(p.q_strides.head), dout_head(p.dout_strides.head), len_q(p.shape.len_q) {
        const i64 at = ((i64)work.batch * p.shape.heads + head) * len_q;
        lse_log2 = p.lse_log2 + at;
        delta = p.delta + at;
    }

    // Starts the next tile's copies and moves on.
    DEV_METHOD void fetch(const Layout& layout, int stage) {
        const int row = tile * C::BLOCK_Q;
        q_loader.fetch(layout.q(stage), row);
        dout_loader.fetch(layout.dout(stage), row);
        fetch_statistics(lse_log2 + row, layout.lse_log2(stage), len_q - row);
        fetch_statistics(delta + row, layout.delta(stage), len_q - row);
        cp_async_commit();
        if (++tile < end) return;
        tile = first;
        q_loader.advance(q_head);
        dout_loader.advance(dout_head);
        lse_log2 += len_q;
        delta += len_q;
    }

    DEV_METHOD void land(const Layout& layout, int stage) {
        q_loader.template land<0>(layout.q(stage));
        dout_loader.template land<0>(layout.dout(stage));
    }

  private:
    // Rows past the end get 0; `cut` tiles leave them out.
    DEV_METHOD void fetch_statistics(const float* gmem, u32 smem, int rows) {
        for (int i = threadIdx.x; i < C::BLOCK_Q; i += THREADS) {
            const bool exists = i < rows;
            if constexpr (HAS_ASYNC_COPY)
                cp_async_4(smem + 4 * i, exists ? gmem + i : gmem, exists ? 4 : 0);
            else
                st_shared_f32(smem + 4 * i, exists ? gmem[i] : 0.f);
        }
    }
};

// One key tile of one key head. Both gradients at once, or (head dim 256, whose two accumulators do not fit the registers) one.
template <class C, bool WANT_DK, bool WANT_DV>
struct KeyBlock {
    using Element = typename C::Element;
    using Layout = KeyLayout<C>;
    using TileQ = typename Layout::TileQ;
    using TileDout = typename Layout::TileDout;
    using TileK = typename Layout::TileK;
    using TileV = typename Layout::TileV;
    static constexpr int THREADS = C::WARPS * 32, M16 = C::BLOCK_K / (16 * C::WARPS);
    static_assert(M16 * 16 * C::WARPS == C::BLOCK_K, "a warp owns whole strips of 16 keys");
    static constexpr int COLUMNS = (WANT_DK ? C::HEAD_DIM : 0) + (WANT_DV ? C::HEAD_DIM_V : 0);
    static constexpr int CHUNK = chunk_columns<M16, COLUMNS, C::BLOCK_Q>();

    const BackwardParams& p;
    const Layout layout;
    const Work work;
    const typename C::Mask mask;
    const Range keys;
    const int warp_key;  // first key of this warp inside the tile
    Accumulator<M16, WANT_DK ? C::HEAD_DIM / 8 : 1> dk;
    Accumulator<M16, WANT_DV ? C::HEAD_DIM_V / 8 : 1> dv;

    DEV_METHOD KeyBlock(const BackwardParams& params, u32 smem)
        : p(params),
          layout(smem),
          work(decode(params.schedule, params.shape, params.shape.heads_kv)),
          mask(params.shape),
          keys{work.tile * C::BLOCK_K, (work.tile + 1) * C::BLOCK_K},
          warp_key(warp_id() * 16 * M16) {
        dk.zero();
        dv.zero();
    }

    DEV_METHOD int key(int m, int half) const { return keys.begin + warp_key + 16 * m + 8 * half + lane_id() / 4; }

    // All rows of all query heads that see the tile.
    DEV_METHOD void walk() {
        const Range rows = mask.rows(keys);
        if (rows.empty()) return;
        const int first = rows.begin / C::BLOCK_Q, end = (rows.end - 1) / C::BLOCK_Q + 1;
        const int first_head = work.head * p.shape.group;
        QueryStream<C> stream(p, work, first_head, first, end);
        load_keys();
        stream.fetch(layout, 0);
        int stage = 0;
#pragma unroll 1
        for (int head = 0; head < p.shape.group; ++head) {
            const typename C::Score score = make_score<C>(p, work, first_head + head);
#pragma unroll 1
            for (int tile = first; tile < end; ++tile) {
                const bool last = tile + 1 == end && head + 1 == p.shape.group;
                stream.land(layout, stage);
                // After this barrier the tile is complete, and every warp is through with the tile before: its buffer is free.
                __syncthreads();
                if (C::STAGES == 2 && !last) stream.fetch(layout, stage ^ 1);
                step(score, first_head + head, {tile * C::BLOCK_Q, (tile + 1) * C::BLOCK_Q}, stage);
                if (C::STAGES == 1) {
                    __syncthreads();
                    if (!last) stream.fetch(layout, 0);
                } else {
                    stage ^= 1;
                }
            }
        }
    }

    DEV_METHOD void load_keys() {
        const Shape& shape = p.shape;
        TileLoader<TileK, THREADS, C::VECTOR_ONLY> k_loader(head_rows(p.k, p.k_strides, work, work.head, shape.len_k, shape.head_dim, shape.flags & FLAG_K_VECTOR));
        k_loader.fetch(layout.k, keys.begin);
        k_loader.template land<0>(layout.k);
        if (!WANT_DK) return;
        TileLoader<TileV, THREADS, C::VECTOR_ONLY> v_loader(head_rows(p.v, p.v_strides, work, work.head, shape.len_k, shape.head_dim_v, shape.flags & FLAG_V_VECTOR));
        v_loader.fetch(layout.v, keys.begin);
        v_loader.template land<0>(layout.v);
    }

    // dV += P^T dO and dK += dS^T Q over one tile of rows of query head `head`.
    DEV_METHOD void step(const typename C::Score& score, int head, Range rows, int stage) {
        const bool cut = mask.cuts(rows, keys) || rows.end > p.shape.len_q;
        const u32 q_smem = layout.q(stage), dout_smem = layout.dout(stage);
        const bool isolate = mask.isolates(rows, keys);
        bool repaired = false;
#pragma unroll 1
        for (int column = 0; column < C::BLOCK_Q; column += CHUNK) {
            Accumulator<M16, CHUNK / 8> s, ds;
            s.zero();
            multiply_transposed<Element, TileK, TileQ>(s, lane_major<TileK>(layout.k), warp_key, lane_minor<TileQ>(q_smem), column);
            if (WANT_DK) {
                ds.zero();
                multiply_transposed<Element, TileV, TileDout>(ds, lane_major<TileV>(layout.v), warp_key, lane_minor<TileDout>(dout_smem), column);
            }
            score_gradients(score, s, ds, rows.begin, column, stage, cut);
            if (isolate) {
                // Scores come from Q and dO as they are, so every warp must have its own before the repair.
                __syncthreads();
                if (WANT_DV) repaired |= remove_non_finite<Element, TileDout, THREADS, CHUNK>(dout_smem, column);
                if (WANT_DK) repaired |= remove_non_finite<Element, TileQ, THREADS, CHUNK>(q_smem, column);
            }
            if constexpr (WANT_DV) multiply<Element, TileDout>(dv, s, lane_major<TileDout>(dout_smem), column);
            if constexpr (WANT_DK) multiply<Element, TileQ>(dk, ds, lane_major<TileQ>(q_smem), column);
        }
        if (repaired) add_back(head, rows);
    }

    // What the repair took out of dV and dK: a NaN or inf in a row spreads to exactly the keys that the row sees.
    DEV_METHOD void add_back(int head, Range rows) {
        const Shape& shape = p.shape;
        const auto sees = [&](int j, int i) { return mask.keep(i, j); };
        if constexpr (WANT_DV)
            add_non_finite<Element>(dv, head_rows(p.dout, p.dout_strides, work, head, shape.len_q, shape.head_dim_v, false), rows,
                                    keys.begin + warp_key, sees);
        if constexpr (WANT_DK)
            add_non_finite<Element>(dk, head_rows(p.q, p.q_strides, work, head, shape.len_q, shape.head_dim, false), rows,
                                    keys.begin + warp_key, sees);
    }

    // s: in raw products, out P. ds: in dP, out dS. Keys along the accumulator's rows, queries along its columns.
    template <int N8>
    DEV_METHOD void score_gradients(const typename C::Score& score, Accumulator<M16, N8>& s, Accumulator<M16, N8>& ds, int first_row,
                                    int column, int stage, bool cut) {
#pragma unroll
        for (int n = 0; n < N8; ++n) {
            const int c = column + 8 * n + lane_id() % 4 * 2;
            const float2 lse_log2 = ld_shared_f32x2(layout.lse_log2(stage) + 4 * c);
            const float2 delta = WANT_DK ? ld_shared_f32x2(layout.delta(stage) + 4 * c) : make_float2(0.f, 0.f);
#pragma unroll
            for (int m = 0; m < M16; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = first_row + c + e % 2, j = key(m, e / 2);
                    const Logit logit = score.at(s.x[m][n][e], i, j);
                    const float weight = probability(logit.log2, e % 2 ? lse_log2.y : lse_log2.x);
                    // Hidden pairs are skipped, not multiplied by 0: their scores may be NaN.
                    const bool hidden = cut && !(mask.keep(i, j) && i < p.shape.len_q);
                    s.x[m][n][e] = hidden ? 0.f : weight;
                    if (!WANT_DK) continue;
                    const float gradient = weight * (ds.x[m][n][e] - (e % 2 ? delta.y : delta.x)) * logit.derivative;
                    ds.x[m][n][e] = hidden ? 0.f : gradient;
                }
        }
    }

    DEV_METHOD void finish() {
        const Shape& shape = p.shape;
        if constexpr (WANT_DV)
            if (p.dv != nullptr)
                store_gradient<C, TileV>(head_rows(p.dv, p.dv_strides, work, work.head, shape.len_k, shape.head_dim_v, shape.flags & FLAG_DV_VECTOR),
                                         layout.v, warp_key, keys.begin, dv, 1.f);
        if constexpr (WANT_DK)
            if (p.dk != nullptr)
                store_gradient<C, TileK>(head_rows(p.dk, p.dk_strides, work, work.head, shape.len_k, shape.head_dim, shape.flags & FLAG_DK_VECTOR),
                                         layout.k, warp_key, keys.begin, dk, shape.scale);
    }
};

}  // namespace backward

template <class C>
__device__ void backward_dkdv(const BackwardParams& p) {
    extern __shared__ __align__(128) u8 shared_memory[];
    if constexpr (C::HEAD_DIM + C::HEAD_DIM_V <= 384) {
        backward::KeyBlock<C, true, true> block(p, shared_address(shared_memory));
        block.walk();
        block.finish();
    } else {
        // 2 x 128 accumulator registers leave none to work with: the scores are computed twice instead.
        if (p.dv != nullptr) {
            backward::KeyBlock<C, false, true> block(p, shared_address(shared_memory));
            block.walk();
            block.finish();
            __syncthreads();
        }
        if (p.dk != nullptr) {
            backward::KeyBlock<C, true, false> block(p, shared_address(shared_memory));
            block.walk();
            block.finish();
        }
    }
}
