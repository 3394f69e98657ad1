// dQ without atomics: one block per query tile and head walks the keys its rows see. Bitwise reproducible.
// With p.slope_partial it also leaves the tile's share of the ALiBi slope's gradient; p.dq may be null then.
//
// Grid: batch * heads * schedule.tiles blocks, schedule.tiles = ceil(len_q / BLOCK_Q).
#pragma once

#include "backward_tile.cuh"

namespace backward {

// Shared memory: the query tiles stay, key tiles come in STAGES buffers.
template <class C>
struct QueryLayout {
    using TileQ = SharedTile<C::BLOCK_Q, C::HEAD_DIM>;
    using TileDout = SharedTile<C::BLOCK_Q, C::HEAD_DIM_V>;
    using TileK = SharedTile<C::BLOCK_K, C::HEAD_DIM>;
    using TileV = SharedTile<C::BLOCK_K, C::HEAD_DIM_V>;
    static constexpr int STAGE_BYTES = TileK::BYTES + TileV::BYTES;
    static constexpr int BYTES = TileQ::BYTES + TileDout::BYTES + C::STAGES * STAGE_BYTES;
    static_assert(BYTES == C::SHARED_BYTES, "_tuning.backward_dq_shared_bytes disagrees with the layout");

    u32 q, dout, stages;
    DEV_METHOD explicit QueryLayout(u32 base)
        : q(base), dout(base + TileQ::BYTES), stages(base + TileQ::BYTES + TileDout::BYTES) {}
    DEV_METHOD u32 k(int stage) const { return stages + stage * STAGE_BYTES; }
    DEV_METHOD u32 v(int stage) const { return k(stage) + TileK::BYTES; }
};

// One query tile of one head.
template <class C>
struct QueryBlock {
    using Element = typename C::Element;
    using Layout = QueryLayout<C>;
    using TileQ = typename Layout::TileQ;
    using TileDout = typename Layout::TileDout;
    using TileK = typename Layout::TileK;
    using TileV = typename Layout::TileV;
    static constexpr int THREADS = C::WARPS * 32, M16 = C::BLOCK_Q / (16 * C::WARPS);
    static_assert(M16 * 16 * C::WARPS == C::BLOCK_Q, "a warp owns whole 16-row strips");
    static constexpr int CHUNK = chunk_columns<M16, C::HEAD_DIM, C::BLOCK_K>();

    const BackwardParams& p;
    const Layout layout;
    const Work work;
    const typename C::Mask mask;
    const typename C::Score score;
    const Range rows;
    const int warp_row;           // first row of this warp inside the tile
    GlobalRows k_gmem;
    Accumulator<M16, C::HEAD_DIM / 8> dq;
    float lse_log2[M16][2], delta[M16][2];
    float slope_sum;

    DEV_METHOD QueryBlock(const BackwardParams& params, u32 smem)
        : p(params),
          layout(smem),
          work(decode(params.schedule, params.shape, params.shape.heads)),
          mask(params.shape),
          score(make_score<C>(params, work, work.head)),
          rows{work.tile * C::BLOCK_Q, (work.tile + 1) * C::BLOCK_Q},
          warp_row(warp_id() * 16 * M16),
          slope_sum(0.f) {
        const int kv_head = work.head / p.shape.group;
        k_gmem = head_rows(p.k, p.k_strides, work, kv_head, p.shape.len_k, p.shape.head_dim, p.shape.flags & FLAG_K_VECTOR);
        dq.zero();
        const i64 first = ((i64)work.batch * p.shape.heads + work.head) * p.shape.len_q;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = row(m, half);
                // A row past the end has P = exp2(s - inf) = 0.
                lse_log2[m][half] = i < p.shape.len_q ? p.lse_log2[first + i] : positive_infinity();
                delta[m][half] = i < p.shape.len_q ? p.delta[first + i] : 0.f;
            }
    }

    DEV_METHOD int row(int m, int half) const { return rows.begin + warp_row + 16 * m + 8 * half + lane_id() / 4; }

    // All keys that the tile's rows see.
    DEV_METHOD void walk() {
        const Range keys = mask.keys(rows);
        if (keys.empty()) return;
        const Shape& shape = p.shape;
        const int kv_head = work.head / shape.group;
        TileLoader<TileK, THREADS, C::VECTOR_ONLY> k_loader(k_gmem);
        TileLoader<TileV, THREADS, C::VECTOR_ONLY> v_loader(head_rows(p.v, p.v_strides, work, kv_head, shape.len_k, shape.head_dim_v, shape.flags & FLAG_V_VECTOR));
        load_queries();
        const int first = keys.begin / C::BLOCK_K, end = (keys.end - 1) / C::BLOCK_K + 1;
        k_loader.fetch(layout.k(0), first * C::BLOCK_K);
        v_loader.fetch(layout.v(0), first * C::BLOCK_K);
        cp_async_commit();
#pragma unroll 1
        for (int tile = first; tile < end; ++tile) {
            const int stage = C::STAGES == 1 ? 0 : (tile - first) & 1;
            if (C::STAGES == 1 && tile > first) {
                __syncthreads();  // the only buffer is free once every warp is through with the previous tile
                k_loader.fetch(layout.k(0), tile * C::BLOCK_K);
                v_loader.fetch(layout.v(0), tile * C::BLOCK_K);
                cp_async_commit();
            }
            k_loader.template land<0>(layout.k(stage));
            v_loader.template land<0>(layout.v(stage));
            // After this barrier the tile is complete, and every warp is through with the tile before: its buffer is free.
            __syncthreads();
            if (C::STAGES == 2 && tile + 1 < end) {
                k_loader.fetch(layout.k(stage ^ 1), (tile + 1) * C::BLOCK_K);
                v_loader.fetch(layout.v(stage ^ 1), (tile + 1) * C::BLOCK_K);
                cp_async_commit();
            }
            step({tile * C::BLOCK_K, (tile + 1) * C::BLOCK_K}, layout.k(stage), layout.v(stage));
        }
    }

    DEV_METHOD void load_queries() {
        const Shape& shape = p.shape;
        TileLoader<TileQ, THREADS, C::VECTOR_ONLY> q_loader(head_rows(p.q, p.q_strides, work, work.head, shape.len_q, shape.head_dim, shape.flags & FLAG_Q_VECTOR));
        q_loader.fetch(layout.q, rows.begin);
        q_loader.template land<0>(layout.q);
        TileLoader<TileDout, THREADS, C::VECTOR_ONLY> dout_loader(head_rows(p.dout, p.dout_strides, work, work.head, shape.len_q, shape.head_dim_v, shape.flags & FLAG_DOUT_VECTOR));
        dout_loader.fetch(layout.dout, rows.begin);
        dout_loader.template land<0>(layout.dout);
    }

    // dQ += dS K over one tile of keys.
    DEV_METHOD void step(Range keys, u32 k_smem, u32 v_smem) {
        const bool cut = mask.cuts(rows, keys) || rows.end > p.shape.len_q;
        const bool isolate = mask.isolates(rows, keys);
        bool repaired = false;
#pragma unroll 1
        for (int column = 0; column < C::BLOCK_K; column += CHUNK) {
            Accumulator<M16, CHUNK / 8> s, ds;
            s.zero();
            ds.zero();
            multiply_transposed<Element, TileQ, TileK>(s, lane_major<TileQ>(opaque(layout.q)), warp_row, lane_minor<TileK>(opaque(k_smem)), column);
            multiply_transposed<Element, TileDout, TileV>(ds, lane_major<TileDout>(opaque(layout.dout)), warp_row, lane_minor<TileV>(opaque(v_smem)), column);
            score_gradients(s, ds, keys.begin + column, cut);
            if (isolate) {
                // Scores come from K as it is, so every warp must have its own before the repair.
                __syncthreads();
                repaired |= remove_non_finite<Element, TileK, THREADS, CHUNK>(k_smem, column);
            }
            multiply<Element, TileK>(dq, ds, lane_major<TileK>(opaque(k_smem)), column);
        }
        if (repaired)
            add_non_finite<Element>(dq, k_gmem, keys, rows.begin + warp_row, [&](int i, int j) { return mask.keep(i, j); });
    }

    // ds: in dP, out dS. s: in raw products.
    template <int N8>
    DEV_METHOD void score_gradients(const Accumulator<M16, N8>& s, Accumulator<M16, N8>& ds, int first_key, bool cut) {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = row(m, e / 2), j = first_key + 8 * n + lane_id() % 4 * 2 + e % 2;
                    const Logit logit = score.at(s.x[m][n][e], i, j);
                    const float gradient = probability(logit.log2, lse_log2[m][e / 2]) * (ds.x[m][n][e] - delta[m][e / 2]);
                    ds.x[m][n][e] = gradient * logit.derivative;
                    // Hidden pairs are skipped, not multiplied by 0: their scores may be NaN.
                    const bool hidden = cut && !(mask.keep(i, j) && i < p.shape.len_q);
                    if (hidden) ds.x[m][n][e] = 0.f;
                    if constexpr (!C::Score::FOLDED)
                        if (!hidden && p.slope_partial != nullptr) slope_sum += gradient * score.alibi_distance(i, j);
                }
    }

    DEV_METHOD void finish() {
        const Shape& shape = p.shape;
        if (p.dq != nullptr) {
            const GlobalRows dq_gmem = head_rows(p.dq, p.dq_strides, work, work.head, shape.len_q, shape.head_dim, shape.flags & FLAG_DQ_VECTOR);
            store_gradient<C, TileQ>(dq_gmem, layout.q, warp_row, rows.begin, dq, shape.scale);
        }
        if (!C::Score::FOLDED && p.slope_partial != nullptr) {
            const float sum = block_sum<C::WARPS>(slope_sum, layout.stages);
            const i64 head = (i64)work.batch * shape.heads + work.head;
            if (threadIdx.x == 0) p.slope_partial[head * p.schedule.tiles + work.tile] = sum;
        }
    }
};

}  // namespace backward

template <class C>
__device__ void backward_dq(const BackwardParams& p) {
    extern __shared__ __align__(128) u8 shared_memory[];
    backward::QueryBlock<C> block(p, shared_address(shared_memory));
    block.walk();
    block.finish();
}
