// dQ without atomics: one block per query tile and head walks the keys its rows see. Bitwise
// reproducible. With p.slope_partial it also leaves the tile's share of the ALiBi slope's gradient;
// p.dq may be null then.
//
// Grid: batch * heads * schedule.tiles blocks, schedule.tiles = ceil(len_q / BLOCK_Q).
#pragma once

#include "backward_dq_layout.cuh"
#include "wide_work.cuh"

namespace backward {

// One query tile of one head.
template <class C> struct QueryBlock {
    using Element = typename C::Element;
    using Storage = typename Element::Storage;
    using Real = typename Element::Real;
    using Score = typename C::Score;
    using Mask = typename C::Mask;
    static constexpr bool SLICED = SLICE<C> > 0;
    using Layout = Chosen<SLICED, QueryLayoutOfSlices<C>, QueryLayout<C>>;
    using TileQ = typename Layout::TileQ;
    using TileDout = typename Layout::TileDout;
    using TileK = typename Layout::TileK;
    using TileV = typename Layout::TileV;
    // Columns of dQ made at a time, and the tiles seen from the first of them.
    static constexpr int PART = part_columns<C>(C::HEAD_DIM);
    using PartQ = SharedTile<C::BLOCK_Q, PART, Storage>;
    using PartK = SharedTile<C::BLOCK_K, PART, Storage>;
    static constexpr int THREADS = C::WARPS * 32, M16 = C::BLOCK_Q / (16 * C::WARPS);
    static_assert(M16 * 16 * C::WARPS == C::BLOCK_Q, "a warp owns whole 16-row strips");
    static constexpr int CHUNK = chunk_columns<C, M16, PART, C::BLOCK_K>();

    const BackwardParams& p;
    const Layout layout;
    const Chosen<FRESH_MASK<C>, Later<Mask>, Mask> mask;
    const Chosen<FRESH_SCORE<C>, Later<Score>, Score> score;
    const int first_column;
    int first_row;
    Range repaired_tiles = {0, 0};  // none, or all: add_back looks which
    Accumulator<M16, PART / 8, Real> dq;
    Real lse_log2[M16][2], delta[M16][2];
    Real slope_sum = 0;

    DEV_METHOD QueryBlock(const BackwardParams& params, u32 smem, int column)
        : p(params),
          layout(smem),
          first_column(column),
          mask(params, query_work(), query_work().head),
          score(make_score<C>(params, query_work(), query_work().head)) {
        const Work work = query_work();
        first_row = work.tile * C::BLOCK_Q;
        dq.zero();
        const i64 first = statistics_row<C>(p, work, work.head);
        const int i_0 = first_row + warp_row() + lane_id() / 4;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = i_0 + 16 * m + 8 * half;
                // A row past the end has P = exp2(s - inf) = 0.
                const bool exists = i < p.shape.len_q;
                lse_log2[m][half] =
                    exists ? ((const Real*)p.lse_log2)[first + i] : Real(positive_infinity());
                delta[m][half] = exists ? ((const Real*)p.delta)[first + i] : Real(0);
            }
    }

    DEV_METHOD Work query_work() const { return decode<C>(p, p.shape.heads); }
    // Score and mask of the head: what is kept, or made anew.
    DEV_METHOD const Score& at_hand(const Score& kept) const { return kept; }
    DEV_METHOD Score at_hand(const Later<Score>&) const {
        return make_score<C>(p, query_work(), query_work().head);
    }
    DEV_METHOD const Mask& at_hand(const Mask& kept) const { return kept; }
    DEV_METHOD Mask at_hand(const Later<Mask>&) const {
        return Mask(p, query_work(), query_work().head);
    }
    DEV_METHOD Range rows() const { return {first_row, first_row + C::BLOCK_Q}; }
    DEV_METHOD static Range keys_of_tile(int tile) {
        return {tile * C::BLOCK_K, (tile + 1) * C::BLOCK_K};
    }
    DEV_METHOD bool isolates(int tile) const {
        return at_hand(mask).isolates(rows(), keys_of_tile(tile), tile);
    }
    // First row of this warp inside the tile.
    DEV_METHOD static int warp_row() { return fresh_thread_id() / 32 * (16 * M16); }

    DEV_METHOD GlobalRows<Storage> k_gmem() const {
        const Work work = query_work();
        return head_rows<Storage>(p.k, p.k_strides, work, work.head / p.shape.group, p.shape.len_k,
                                  p.shape.head_dim, p.shape.flags & FLAG_K_VECTOR);
    }

    DEV_METHOD GlobalRows<Storage> v_gmem(const Work& work) const {
        return head_rows<Storage>(p.v, p.v_strides, work, work.head / p.shape.group, p.shape.len_k,
                                  p.shape.head_dim_v, p.shape.flags & FLAG_V_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> q_gmem(const Work& work) const {
        return head_rows<Storage>(p.q, p.q_strides, work, work.head, p.shape.len_q,
                                  p.shape.head_dim, p.shape.flags & FLAG_Q_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> dout_gmem(const Work& work) const {
        return head_rows<Storage>(p.dout, p.dout_strides, work, work.head, p.shape.len_q,
                                  p.shape.head_dim_v, p.shape.flags & FLAG_DOUT_VECTOR);
    }

    // All keys that the tile's rows see.
    DEV_METHOD void walk() {
        const Range keys = at_hand(mask).keys(rows());
        if (keys.empty()) return;
        const Work work = query_work();
        TileLoader<TileK, THREADS, C::VECTOR_ONLY> k_loader(k_gmem());
        TileLoader<TileV, THREADS, C::VECTOR_ONLY> v_loader(v_gmem(work));
        const auto load_keys = [&](int tile, int stage) {
            if constexpr (!SLICED) {
                load(k_loader, layout.k(stage), tile * C::BLOCK_K);
                load(v_loader, layout.v(stage), tile * C::BLOCK_K);
            }
            cp_async_commit();
        };
        const int end = (keys.end - 1) / C::BLOCK_K + 1;
        const int first = at_hand(mask).next_tile(keys.begin / C::BLOCK_K, end);
        if (!C::Mask::CONTIGUOUS && first == end) return;
        load_rows(work);
        load_keys(first, 0);
        int stage = 0;
        bool repaired = false;
#pragma unroll 1
        for (int tile = first; tile < end;) {
            const int next = at_hand(mask).next_tile(tile + 1, end);
            const bool last = next == end;
            cp_async_wait<0>();
            // After this barrier the tile is complete, and every warp is through with the tile
            // before: its buffer is free.
            __syncthreads();
            if (C::STAGES == 2 && !last) load_keys(next, stage ^ 1);
            repaired |= step(tile, layout.k(stage), layout.v(stage));
            if (C::STAGES == 1) {
                __syncthreads();
                if (!last) load_keys(next, 0);
            } else {
                stage ^= 1;
            }
            tile = next;
        }
        if (repaired) repaired_tiles = {first, end};
    }

    DEV_METHOD void load_rows(const Work& work) {
        if constexpr (!SLICED) {
            TileLoader<TileQ, THREADS, C::VECTOR_ONLY> q_loader(q_gmem(work));
            TileLoader<TileDout, THREADS, C::VECTOR_ONLY> dout_loader(dout_gmem(work));
            load(q_loader, layout.q, first_row);
            load(dout_loader, layout.dout, first_row);
        }
    }

    // dQ += dS K over one tile of keys. True if a NaN or inf was left out: add_back has to follow.
    DEV_METHOD bool step(int tile, u32 k_smem, u32 v_smem) {
        const int first_key = tile * C::BLOCK_K;
        const bool isolate = isolates(tile);
        const bool cut = isolate || at_hand(mask).cuts(rows(), keys_of_tile(tile), tile) ||
                         first_row + C::BLOCK_Q > p.shape.len_q;
        if constexpr (SLICED)
            return step_by_slices(first_key, cut, isolate);
        else
            return step_by_tiles(first_key, k_smem, v_smem, cut, isolate);
    }

    DEV_METHOD bool step_by_tiles(int first_key, u32 k_smem, u32 v_smem, bool cut, bool isolate) {
        bool repaired = false;
#pragma unroll 1
        for (int column = 0; column < C::BLOCK_K; column += CHUNK) {
            Accumulator<M16, CHUNK / 8, Real> s, ds;
            s.zero();
            ds.zero();
            multiply_transposed<Element, TileQ, TileK>(s, row_address<TileQ>(layout.q, warp_row()),
                                                       row_address<TileK>(k_smem, column));
            multiply_transposed<Element, TileDout, TileV>(
                ds, row_address<TileDout>(layout.dout, warp_row()),
                row_address<TileV>(v_smem, column));
            logit_gradients(s, ds, first_key + column);
            if (cut) hide(s, ds, first_key + column);
            if constexpr (!Score::FOLDED) score_gradients(s, ds, first_key + column);
            if (isolate) {
                // Scores come from K as it is, so every warp must have its own before the repair.
                __syncthreads();
                repaired |= remove_non_finite<Element, TileK, THREADS, CHUNK>(k_smem, column);
            }
            // A part begins at a slab, and slabs of a tile lie one behind the other.
            const u32 part =
                PART == C::HEAD_DIM ? 0 : first_column / TileK::SLAB * TileK::SLAB_BYTES;
            multiply<Element, PartK>(dq, ds, row_address<TileK>(k_smem, column) + part);
        }
        return repaired;
    }

    // The same with operands in slices.
    DEV_METHOD bool step_by_slices(int first_key, bool cut, bool isolate) {
        using Operands = typename QueryLayoutOfSlices<C>::Operands;
        const Work work = query_work();
        Accumulator<M16, C::BLOCK_K / 8, Real> s, ds;
        Operands::product(s, q_gmem(work), first_row, k_gmem(), first_key, warp_row(),
                          layout.operands);
        Operands::product(ds, dout_gmem(work), first_row, v_gmem(work), first_key, warp_row(),
                          layout.operands);
        logit_gradients(s, ds, first_key);
        if (cut) hide(s, ds, first_key);
        if constexpr (!Score::FOLDED) score_gradients(s, ds, first_key);
        Operands::template load<PartK>(from_column(k_gmem(), first_column), first_key,
                                       layout.operands);
        const bool repaired =
            isolate && remove_non_finite<Element, PartK, THREADS>(layout.operands);
        multiply<Element, PartK>(dq, ds, layout.operands);
        return repaired;
    }

    // What repairs took out of dQ: a NaN or inf in a key spreads to exactly the rows that see it.
    // Walks the tiles that are repaired (the others met their NaN and inf in the products).
    DEV_METHOD void add_back() {
#pragma unroll 1
        for (int tile = repaired_tiles.begin; tile < repaired_tiles.end;
             tile = at_hand(mask).next_tile(tile + 1, repaired_tiles.end))
            if (isolates(tile))
                add_non_finite<Element, PartQ, 16 * M16>(
                    layout.q, warp_row(), from_column(k_gmem(), first_column), keys_of_tile(tile),
                    scale_of<Real>(p.shape),
                    [&](int r, int j) { return at_hand(mask).keep(first_row + r, j); });
    }

    // ds: in dP, out the gradient of the logit. s: in raw products, out d(logit) / d(scale * q.k).
    template <int N8> DEV_METHOD void logit_gradients(Accumulator<M16, N8, Real>& s,
                                                      Accumulator<M16, N8, Real>& ds,
                                                      int first_key) {
        const int lane = fresh_thread_id() % 32, i_0 = first_row + warp_row() + lane / 4,
                  j_0 = first_key + lane % 4 * 2;
        const dropout::KeepBits<C::DROPOUT, M16, N8, false> keep(p, query_work(), query_work().head,
                                                                 first_row + warp_row(), first_key);
        const Score& here = at_hand(score);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const Logit<Real> logit =
                        here.at(s.x[m][n][e], i_0 + 16 * m + e / 2 * 8, j_0 + 8 * n + e % 2);
                    ds.x[m][n][e] = probability(logit.log2, lse_log2[m][e / 2]) *
                                    (keep.weighted(ds.x[m][n][e], m, n, e) - delta[m][e / 2]);
                    s.x[m][n][e] = logit.derivative;
                }
    }

    // Sets both of pairs that do not exist to 0. Nothing is multiplied: they may be NaN.
    template <int N8> DEV_METHOD void hide(Accumulator<M16, N8, Real>& s,
                                           Accumulator<M16, N8, Real>& ds, int first_key) {
        each_hidden<M16, N8, false>(at_hand(mask), p.shape.len_q, first_row + warp_row(), first_key,
                                    [&](int m, int n, int e) { s.x[m][n][e] = ds.x[m][n][e] = 0; });
    }

    // From gradients of the logit to dS; the sum for the slope is taken in between, ALiBi being
    // added after the soft cap.
    template <int N8> DEV_METHOD void score_gradients(const Accumulator<M16, N8, Real>& s,
                                                      Accumulator<M16, N8, Real>& ds,
                                                      int first_key) {
        const int lane = fresh_thread_id() % 32, i_0 = first_row + warp_row() + lane / 4,
                  j_0 = first_key + lane % 4 * 2;
        const bool want_slope = p.slope_partial != nullptr;
        const Score& here = at_hand(score);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (want_slope)
                        slope_sum += ds.x[m][n][e] * here.alibi_distance(i_0 + 16 * m + e / 2 * 8,
                                                                         j_0 + 8 * n + e % 2);
                    ds.x[m][n][e] *= s.x[m][n][e];
                }
    }

    DEV_METHOD void finish() {
        const Shape& shape = p.shape;
        const Work work = query_work();
        if (p.dq != nullptr)
            store_gradient<C, PartQ>(
                from_column(head_rows<Storage>(p.dq, p.dq_strides, work, work.head, shape.len_q,
                                               shape.head_dim, shape.flags & FLAG_DQ_VECTOR),
                            first_column),
                layout.q, warp_row(), first_row, dq, scale_of<Real>(shape), [&] { add_back(); });
        if constexpr (!Score::FOLDED)
            if (p.slope_partial != nullptr) {
                const Real sum = block_sum<C::WARPS>(slope_sum, layout.stages);
                if (threadIdx.x == 0) ((Real*)p.slope_partial)[slope_place<C>(p)] = sum;
            }
    }
};

}  // namespace backward

template <class C> __device__ void backward_dq(const BackwardParams& params) {
    extern __shared__ __align__(128) u8 shared_memory[];
    backward::with_sequence<C>(params, params.shape.heads, [&](const BackwardParams& p) {
        using Block = backward::QueryBlock<C>;
#pragma unroll 1
        for (int column = 0; column < (Block::PART == C::HEAD_DIM ? 1 : p.shape.head_dim);
             column += Block::PART) {
            if (column > 0) __syncthreads();  // rows go where the part before was staged
            Block block(p, shared_address(shared_memory), column);
            block.walk();
            block.finish();
        }
    });
}
