// dK and dV: one block per key tile and key head walks the rows that see the tile, for every query
// head of the group. Gradients of a group are summed in registers, in a fixed order: no atomics and
// no expanded K or V.
//
// Grid: batch * heads_kv * schedule.tiles blocks, schedule.tiles = ceil(len_k / BLOCK_K). p.dk or
// p.dv may be null.
#pragma once

#include "backward_dkdv_layout.cuh"

namespace backward {

// One key tile of one key head. Both gradients at once, or (head dim 256, whose two accumulators do
// not fit the registers) one.
//
// Registers are the scarce thing here: two accumulators take half of a thread's 255. Whatever is
// cheap to work out again (the block's work, a thread's place) is not kept across the loop, hence
// the fresh_* and opaque() calls.
template <class C, bool WANT_DK, bool WANT_DV> struct KeyBlock {
    using Element = typename C::Element;
    using Storage = typename Element::Storage;
    using Real = typename Element::Real;
    using Mask = typename C::Mask;
    using Score = typename C::Score;
    static constexpr bool SLICED = SLICE<C> > 0;
    using Layout = Chosen<SLICED, KeyLayoutOfSlices<C>, KeyLayout<C>>;
    using Dq = QueryAccumulator<C>;
    using TileQ = typename Layout::TileQ;
    using TileDout = typename Layout::TileDout;
    using TileK = typename Layout::TileK;
    using TileV = typename Layout::TileV;
    // Columns of dK and dV made at a time, and the tiles seen from the first of them.
    static constexpr int PART_K = WANT_DV ? C::HEAD_DIM : part_columns<C>(C::HEAD_DIM);
    static constexpr int PART_V = WANT_DK ? C::HEAD_DIM_V : part_columns<C>(C::HEAD_DIM_V);
    static constexpr bool WHOLE = PART_K == C::HEAD_DIM && PART_V == C::HEAD_DIM_V;
    using PartQ = SharedTile<C::BLOCK_Q, PART_K, Storage>;
    using PartDout = SharedTile<C::BLOCK_Q, PART_V, Storage>;
    using PartK = SharedTile<C::BLOCK_K, PART_K, Storage>;
    using PartV = SharedTile<C::BLOCK_K, PART_V, Storage>;
    static constexpr int THREADS = C::WARPS * 32, M16 = C::BLOCK_K / (16 * C::WARPS);
    static_assert(M16 * 16 * C::WARPS == C::BLOCK_K, "a warp owns whole strips of 16 keys");
    static constexpr int COLUMNS = (WANT_DK ? PART_K : 0) + (WANT_DV ? PART_V : 0);
    static constexpr bool ACCUMULATE_DQ = C::ACCUMULATE_DQ && WANT_DK;
    static constexpr int CHUNK = chunk_columns<C, M16, COLUMNS, C::BLOCK_Q>();

    const BackwardParams& p;
    const Layout layout;
    const int first_column;
    Mask mask;  // of the query head at hand
    int first_key;
    bool repair_k;  // K has a NaN or inf, which dQ of rows that do not see it must not meet
    Range repaired_tiles = {0, 0};  // none, or all: add_back looks which
    i64 q_at, dout_at, rows_at;     // offsets of the group's first head in Q, dO and the statistics
    Accumulator<M16, WANT_DK ? PART_K / 8 : 1, Real> dk;
    Accumulator<M16, WANT_DV ? PART_V / 8 : 1, Real> dv;

    DEV_METHOD KeyBlock(const BackwardParams& params, u32 smem, int column)
        : p(params), layout(smem), first_column(column), mask(mask_of(0)) {
        const Work work = key_work();
        const int head = work.head * p.shape.group;
        first_key = work.tile * C::BLOCK_K;
        q_at = head_offset(work, p.q_strides, head);
        dout_at = head_offset(work, p.dout_strides, head);
        rows_at = statistics_row<C>(p, work, head);
    }

    DEV_METHOD Work key_work() const { return decode<C>(p, p.shape.heads_kv); }
    DEV_METHOD Mask mask_of(int head) const {
        const Work work = key_work();
        return Mask(p, work, work.head * p.shape.group + head);
    }
    DEV_METHOD Score score_of(int head) const {
        const Work work = key_work();
        return make_score<C>(p, work, work.head * p.shape.group + head);
    }
    DEV_METHOD static Range rows_of_tile(int tile) {
        return {tile * C::BLOCK_Q, (tile + 1) * C::BLOCK_Q};
    }
    DEV_METHOD bool isolates(int tile) const {
        return mask.isolates(rows_of_tile(tile), keys(), tile);
    }
    DEV_METHOD Range keys() const { return {first_key, first_key + C::BLOCK_K}; }
    // First key of this warp inside the tile.
    DEV_METHOD static int warp_key() { return fresh_thread_id() / 32 * (16 * M16); }

    // Q and dO of one query head of the group.
    DEV_METHOD GlobalRows<Storage> q_gmem(int head) const {
        return rows_of(p.q, q_at + head * p.q_strides.head, p.q_strides.row, p.shape.head_dim,
                       FLAG_Q_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> dout_gmem(int head) const {
        return rows_of(p.dout, dout_at + head * p.dout_strides.head, p.dout_strides.row,
                       p.shape.head_dim_v, FLAG_DOUT_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> rows_of(const void* array, i64 at, i64 stride, int columns,
                                           int flag) const {
        return {(Storage*)array + at, stride, p.shape.len_q, columns,
                (p.shape.flags & flag) && columns % TileQ::PER_CHUNK == 0};
    }

    // A tile of rows of one of the group's query heads.
    struct Place {
        int head, tile;
    };

    // The first visible tile of query heads `head` and later; head == group when there is none.
    DEV_METHOD Place first_visible(int head, Range tiles) const {
        if constexpr (Mask::CONTIGUOUS) return {head, tiles.begin};
        int tile = tiles.end;
        for (; head < p.shape.group; ++head) {
            tile = mask_of(head).next_tile(tiles.begin, tiles.end);
            if (tile < tiles.end) break;
        }
        return {head, tile};
    }

    // All rows of all query heads that see the tile.
    DEV_METHOD void walk() {
        const Range rows = mask.rows(keys());
        dk.zero();
        dv.zero();
        if (rows.empty()) return;
        const Range tiles = {rows.begin / C::BLOCK_Q, (rows.end - 1) / C::BLOCK_Q + 1};
        const Place first = first_visible(0, tiles);
        if (!Mask::CONTIGUOUS && first.head == p.shape.group) return;
        load_keys();
        load_rows(first, 0);
        if constexpr (ACCUMULATE_DQ) {
            cp_async_wait<0>();
            __syncthreads();
            repair_k = has_non_finite<Element, TileK, THREADS>(layout.k);
        }
        int stage = 0;
        bool repaired = false;
#pragma unroll 1
        for (int head = first.head; head < p.shape.group; ++head) {
            const Score score = score_of(head);
            if constexpr (!Mask::CONTIGUOUS) mask = mask_of(head);
            int tile = mask.next_tile(tiles.begin, tiles.end);
#pragma unroll 1
            while (tile < tiles.end) {
                int after;
                Place next;
                bool last;
                const auto look_ahead = [&] {
                    after = mask.next_tile(tile + 1, tiles.end);
                    const bool wraps = after == tiles.end;
                    next = wraps ? first_visible(head + 1, tiles) : Place{head, after};
                    last = wraps && next.head == p.shape.group;
                };
                if (C::STAGES == 2) look_ahead();
                cp_async_wait<0>();
                // After this barrier the tile is complete, and every warp is through with the tile
                // before: its buffer is free.
                __syncthreads();
                if (C::STAGES == 2 && !last) load_rows(next, stage ^ 1);
                repaired |= step(score, {head, tile}, stage);
                if (C::STAGES == 1) {
                    __syncthreads();
                    look_ahead();
                    if (!last) load_rows(next, 0);
                } else {
                    stage ^= 1;
                }
                tile = after;
            }
        }
        if (repaired) repaired_tiles = tiles;
        if constexpr (ACCUMULATE_DQ) {
            if (repair_k) add_back_dq(tiles);
            __syncthreads();  // every warp has read all of K, over which gradients are staged next
        }
    }

    DEV_METHOD GlobalRows<Storage> k_gmem() const {
        const Work work = key_work();
        return head_rows<Storage>(p.k, p.k_strides, work, work.head, p.shape.len_k,
                                  p.shape.head_dim, p.shape.flags & FLAG_K_VECTOR);
    }

    DEV_METHOD GlobalRows<Storage> v_gmem() const {
        const Work work = key_work();
        return head_rows<Storage>(p.v, p.v_strides, work, work.head, p.shape.len_k,
                                  p.shape.head_dim_v, p.shape.flags & FLAG_V_VECTOR);
    }

    DEV_METHOD void load_keys() {
        if constexpr (!SLICED) {
            load_tile<TileK>(k_gmem(), layout.k, first_key);
            if (!WANT_DK) return;
            load_tile<TileV>(v_gmem(), layout.v, first_key);
        }
    }

    // Starts the copies of a tile of rows and of their statistics.
    DEV_METHOD void load_rows(Place place, int stage) {
        const int row = place.tile * C::BLOCK_Q;
        if constexpr (!SLICED) {
            load_tile<TileQ>(q_gmem(place.head), layout.q(stage), row);
            load_tile<TileDout>(dout_gmem(place.head), layout.dout(stage), row);
        }
        const i64 at = rows_at + place.head * statistics_stride<C>(p) + row;
#pragma unroll
        for (int first = 0; first < 2 * C::BLOCK_Q; first += THREADS) {
            const int i = first + fresh_thread_id(), r = i % C::BLOCK_Q;
            if (2 * C::BLOCK_Q % THREADS != 0 && i >= 2 * C::BLOCK_Q) break;
            const Real* from = (const Real*)(i < C::BLOCK_Q ? p.lse_log2 : p.delta) + at + r;
            // Rows past the end get 0: cut tiles leave them out.
            const bool exists = row + r < p.shape.len_q;
            const u32 to = layout.lse_log2(stage) + Layout::REAL_BYTES * i;
            if constexpr (!HAS_ASYNC_COPY)
                st_shared(to, exists ? *from : Real(0));
            else if constexpr (sizeof(Real) == 8)
                cp_async_8(to, from, exists ? 8 : 0);
            else
                cp_async_4(to, from, exists ? 4 : 0);
        }
        cp_async_commit();
    }

    template <class Tile>
    DEV_METHOD void load_tile(const GlobalRows<Storage>& gmem, u32 smem, int row) {
        TileLoader<Tile, THREADS, C::VECTOR_ONLY> loader(gmem);
        load(loader, smem, row);
    }

    // dV += P^T dO and dK += dS^T Q over one tile of rows. True if a NaN or inf was left out:
    // add_back has to follow.
    DEV_METHOD bool step(const Score& score, Place place, int stage) {
        const int first_row = place.tile * C::BLOCK_Q;
        const bool isolate = isolates(place.tile);
        const bool cut = isolate || mask.cuts(rows_of_tile(place.tile), keys(), place.tile) ||
                         first_row + C::BLOCK_Q > p.shape.len_q;
        if constexpr (SLICED)
            return step_by_slices(score, place, cut, isolate);
        else
            return step_by_tiles(score, place, stage, cut, isolate);
    }

    DEV_METHOD bool step_by_tiles(const Score& score, Place place, int stage, bool cut,
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
            score_gradients(score, s, ds, place, column, stage);
            if (cut) hide(s, ds, first_row + column);
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
                multiply<Element, PartDout>(
                    dv, s,
                    row_address<TileDout>(layout.dout(stage), column) + part_offset<TileDout>());
            if constexpr (WANT_DK)
                multiply<Element, PartQ>(
                    dk, ds, row_address<TileQ>(layout.q(stage), column) + part_offset<TileQ>());
        }
        if constexpr (ACCUMULATE_DQ) add_dq(place.head, first_row, isolate && repair_k);
        return repaired;
    }

    // The same, of one of the gradients, with operands in slices.
    DEV_METHOD bool step_by_slices(const Score& score, Place place, bool cut, bool isolate) {
        using Operands = typename KeyLayoutOfSlices<C>::Operands;
        static_assert(WANT_DK != WANT_DV, "operands of one gradient");
        const int first_row = place.tile * C::BLOCK_Q;
        Accumulator<M16, C::BLOCK_Q / 8, Real> s, ds;
        Operands::product(s, k_gmem(), first_key, q_gmem(place.head), first_row, warp_key(),
                          layout.operands);
        if constexpr (WANT_DK)
            Operands::product(ds, v_gmem(), first_key, dout_gmem(place.head), first_row, warp_key(),
                              layout.operands);
        score_gradients(score, s, ds, place, 0, 0);
        if (cut) hide(s, ds, first_row);
        using Part = Chosen<WANT_DK, PartQ, PartDout>;
        const auto rows = WANT_DK ? q_gmem(place.head) : dout_gmem(place.head);
        Operands::template load<Part>(from_column(rows, first_column), first_row, layout.operands);
        const bool repaired = isolate && remove_non_finite<Element, Part, THREADS>(layout.operands);
        if constexpr (WANT_DK)
            multiply<Element, PartQ>(dk, ds, layout.operands);
        else
            multiply<Element, PartDout>(dv, s, layout.operands);
        return repaired;
    }

    // Where a part begins in a tile: at a slab, and slabs lie one behind the other.
    template <class Tile> DEV_METHOD u32 part_offset() const {
        return WHOLE ? 0 : first_column / Tile::SLAB * Tile::SLAB_BYTES;
    }

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
        repairs(tiles, [&](Place place) {
            const int first_row = place.tile * C::BLOCK_Q;
            Dq::add_back(accum(place.head, first_row), k_gmem(), mask,
                         Range{first_row, min(first_row + C::BLOCK_Q, p.shape.len_q)}, keys());
        });
    }

    // act(place) for every tile that the main loop repaired.
    template <class Act> DEV_METHOD void repairs(Range tiles, Act act) {
#pragma unroll 1
        for (int head = 0; head < p.shape.group; ++head) {
            if constexpr (!Mask::CONTIGUOUS) mask = mask_of(head);
#pragma unroll 1
            for (int tile = mask.next_tile(tiles.begin, tiles.end); tile < tiles.end;
                 tile = mask.next_tile(tile + 1, tiles.end))
                if (isolates(tile)) act(Place{head, tile});
        }
    }

    // Row `row` of the group's query head `head` in the workspace.
    DEV_METHOD float* accum(int head, int row) const {
        return p.dq_accum + (rows_at + (i64)head * p.shape.len_q + row) * C::HEAD_DIM;
    }

    // What repairs took out of dV or dK: a NaN or inf in a row spreads to exactly the keys that the
    // row sees. Walks the tiles that are repaired (the others met their NaN and inf in the products).
    // rows_gmem(head): dO or Q; smem: where the gradient is staged.
    template <class Tile, class Rows>
    DEV_METHOD void add_back(u32 smem, Real factor, Rows rows_gmem) {
        repairs(repaired_tiles, [&](Place place) {
            add_non_finite<Element, Tile, 16 * M16>(
                smem, warp_key(), from_column(rows_gmem(place.head), first_column),
                rows_of_tile(place.tile), factor,
                [&](int r, int i) { return mask.keep(i, first_key + r); });
        });
    }

    // s: in raw products, out P (where dropout keeps it). ds: in dP, out dS. Keys along the
    // accumulator's rows, queries along its columns.
    template <int N8> DEV_METHOD void score_gradients(const Score& score,
                                                      Accumulator<M16, N8, Real>& s,
                                                      Accumulator<M16, N8, Real>& ds, Place place,
                                                      int column, int stage) {
        using Pair = typename PairOf<Real>::Type;
        const int lane = fresh_thread_id() % 32, first_row = place.tile * C::BLOCK_Q + column;
        const int i_0 = first_row + lane % 4 * 2, j_0 = first_key + warp_key() + lane / 4;
        constexpr int BYTES = Layout::REAL_BYTES;
        const u32 statistics = layout.lse_log2(stage) + BYTES * (column + lane % 4 * 2);
        const dropout::KeepBits<C::DROPOUT, M16, N8, true> keep(
            p, key_work(), key_work().head * p.shape.group + place.head, first_row,
            first_key + warp_key());
#pragma unroll
        for (int n = 0; n < N8; ++n) {
            Pair lse_log2, delta = {0, 0};
            ld_shared(lse_log2, statistics + 8 * BYTES * n);
            if (WANT_DK) ld_shared(delta, statistics + 8 * BYTES * n + Layout::DELTA);
#pragma unroll
            for (int m = 0; m < M16; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const Logit<Real> logit =
                        score.at(s.x[m][n][e], i_0 + 8 * n + e % 2, j_0 + 16 * m + e / 2 * 8);
                    const Real weight = probability(logit.log2, e % 2 ? lse_log2.y : lse_log2.x);
                    s.x[m][n][e] = keep.kept(m, n, e) ? weight : Real(0);
                    if (WANT_DK)
                        ds.x[m][n][e] =
                            weight *
                            (keep.weighted(ds.x[m][n][e], m, n, e) - (e % 2 ? delta.y : delta.x)) *
                            logit.derivative;
                }
        }
    }

    // Sets P and dS of pairs that do not exist to 0. Nothing is multiplied: they may be NaN.
    template <int N8> DEV_METHOD void hide(Accumulator<M16, N8, Real>& s,
                                           Accumulator<M16, N8, Real>& ds, int first_row) {
        each_hidden<M16, N8, true>(mask, p.shape.len_q, first_row, first_key + warp_key(),
                                   [&](int m, int n, int e) {
                                       s.x[m][n][e] = 0;
                                       if (WANT_DK) ds.x[m][n][e] = 0;
                                   });
    }

    DEV_METHOD void finish() {
        const Work work = key_work();
        const Shape& shape = p.shape;
        if constexpr (WANT_DV)
            if (p.dv != nullptr) {
                const Real factor = C::DROPOUT ? dropout::factor_of<Real>(p) : Real(1);
                store_gradient<C, PartV>(
                    from_column(head_rows<Storage>(p.dv, p.dv_strides, work, work.head, shape.len_k,
                                                   shape.head_dim_v, shape.flags & FLAG_DV_VECTOR),
                                first_column),
                    layout.v, warp_key(), first_key, dv, factor, [&] {
                        add_back<PartV>(layout.v, factor,
                                        [&](int head) { return dout_gmem(head); });
                    });
            }
        if constexpr (WANT_DK)
            if (p.dk != nullptr) {
                const Real factor = scale_of<Real>(shape);
                store_gradient<C, PartK>(
                    from_column(head_rows<Storage>(p.dk, p.dk_strides, work, work.head, shape.len_k,
                                                   shape.head_dim, shape.flags & FLAG_DK_VECTOR),
                                first_column),
                    layout.k, warp_key(), first_key, dk, factor, [&] {
                        add_back<PartK>(layout.k, factor, [&](int head) { return q_gmem(head); });
                    });
            }
    }
};

// One of the gradients, in as many walks as its accumulator needs.
template <class C, bool WANT_DK> DEV void one_gradient(const BackwardParams& p, u32 smem) {
    using Block = KeyBlock<C, WANT_DK, !WANT_DK>;
    constexpr int PART = WANT_DK ? Block::PART_K : Block::PART_V;
    const int columns = Block::WHOLE ? 1 : WANT_DK ? p.shape.head_dim : p.shape.head_dim_v;
#pragma unroll 1
    for (int column = 0; column < columns; column += PART) {
        if (column > 0) __syncthreads();  // keys go where the part before was staged
        Block block(p, smem, column);
        block.walk();
        block.finish();
    }
}

template <class C> DEV void key_tile(const BackwardParams& p, u32 smem) {
    // Columns of both accumulators that leave registers to work with.
    constexpr int COLUMNS = sizeof(typename C::Element::Storage) > 2 ? 128 : 384;
    if constexpr (C::HEAD_DIM + C::HEAD_DIM_V <= COLUMNS) {
        KeyBlock<C, true, true> block(p, smem, 0);
        block.walk();
        block.finish();
    } else {
        // The scores are computed twice instead.
        if (p.dv != nullptr) {
            one_gradient<C, false>(p, smem);
            __syncthreads();
        }
        if (p.dk != nullptr || C::ACCUMULATE_DQ) one_gradient<C, true>(p, smem);
    }
}

}  // namespace backward

template <class C> __device__ void backward_dkdv(const BackwardParams& params) {
    extern __shared__ __align__(128) u8 shared_memory[];
    backward::with_sequence<C>(params, params.shape.heads_kv, [&](const BackwardParams& p) {
        backward::key_tile<C>(p, shared_address(shared_memory));
    });
}
