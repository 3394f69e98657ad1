// The walk of a block of dK and dV over the rows that see its keys, and what becomes of their scores.
#pragma once

#include "backward_dkdv_rows.cuh"

namespace backward {

// Self is what derives from this, and says what one step of the walk is:
//   begin()                       before the first tile, whose copies (and the keys') are under way
//   add_tile(score, place, stage, cut, isolate)   True if a NaN or inf was left out: add_back has to
//                                 follow
//   end(tiles)                    after the last tile
//   FORMS_DS, reads_v()           whether dS is formed, not only P, and V is needed
template <class C, class Self> struct KeyWalk : KeyRows<C> {
    using Rows = KeyRows<C>;
    using Rows::key_work, Rows::keys, Rows::rows_of_tile, Rows::warp_key;
    using Rows::M16;
    using Rows::p, Rows::layout, Rows::first_key;
    using typename Rows::Element, typename Rows::Layout, typename Rows::Real;
    using Place = RowPlace;
    using Mask = typename C::Mask;
    using Score = typename C::Score;
    using KeptScore = Chosen<FRESH_SCORE<C>, Later<Score>, Score>;

    Chosen<FRESH_MASK<C>, Later<Mask>, Mask> mask;  // of the query head at hand
    Range repaired_tiles = {0, 0};                  // none, or all: add_back looks which

    DEV_METHOD KeyWalk(const BackwardParams& params, u32 smem)
        : Rows(params, smem), mask(mask_of(0)) {}

    DEV_METHOD Self& self() { return *static_cast<Self*>(this); }

    DEV_METHOD Mask mask_of(int head) const {
        const Work work = key_work();
        return Mask(p, work, work.head * p.shape.group + head);
    }
    DEV_METHOD Score score_of(int head) const {
        const Work work = key_work();
        return make_score<C>(p, work, work.head * p.shape.group + head);
    }
    // Mask and score of a query head: what is kept, or made anew.
    DEV_METHOD static const Mask& at_hand(const Mask& kept, int) { return kept; }
    DEV_METHOD Mask at_hand(const Later<Mask>&, int head) const { return mask_of(head); }
    DEV_METHOD static const Score& at_hand(const Score& kept, int) { return kept; }
    DEV_METHOD Score at_hand(const Later<Score>&, int head) const { return score_of(head); }
    DEV_METHOD void enter_head(int head) {
        if constexpr (!Mask::CONTIGUOUS && !FRESH_MASK<C>) mask = mask_of(head);
    }
    DEV_METHOD bool isolates(Place place) const {
        return at_hand(mask, place.head).isolates(rows_of_tile(place.tile), keys(), place.tile);
    }

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
        const Range rows = at_hand(mask, 0).rows(keys());
        if (rows.empty()) return;
        const Range tiles = {rows.begin / C::BLOCK_Q, (rows.end - 1) / C::BLOCK_Q + 1};
        const Place first = first_visible(0, tiles);
        if (!Mask::CONTIGUOUS && first.head == p.shape.group) return;
        Rows::load_keys(self().reads_v());
        Rows::load_rows(first, 0);
        self().begin();
        int stage = 0;
        bool repaired = false;
#pragma unroll 1
        for (int head = first.head; head < p.shape.group; ++head) {
            const KeptScore score(score_of(head));
            enter_head(head);
            int tile = at_hand(mask, head).next_tile(tiles.begin, tiles.end);
#pragma unroll 1
            while (tile < tiles.end) {
                int after;
                Place next;
                bool last;
                const auto look_ahead = [&] {
                    after = at_hand(mask, head).next_tile(tile + 1, tiles.end);
                    const bool wraps = after == tiles.end;
                    next = wraps ? first_visible(head + 1, tiles) : Place{head, after};
                    last = wraps && next.head == p.shape.group;
                };
                if (C::STAGES == 2) look_ahead();
                cp_async_wait<0>();
                // After this barrier the tile is complete, and every warp is through with the tile
                // before: its buffer is free.
                __syncthreads();
                if (C::STAGES == 2 && !last) Rows::load_rows(next, stage ^ 1);
                repaired |= step(score, {head, tile}, stage);
                if (C::STAGES == 1) {
                    __syncthreads();
                    look_ahead();
                    if (!last) Rows::load_rows(next, 0);
                } else {
                    stage ^= 1;
                }
                tile = after;
            }
        }
        if (repaired) repaired_tiles = tiles;
        self().end(tiles);
    }

    DEV_METHOD bool step(const KeptScore& score, Place place, int stage) {
        const int first_row = place.tile * C::BLOCK_Q;
        const bool isolate = isolates(place);
        const bool cut =
            isolate ||
            at_hand(mask, place.head).cuts(rows_of_tile(place.tile), keys(), place.tile) ||
            first_row + C::BLOCK_Q > p.shape.len_q;
        return self().add_tile(score, place, stage, cut, isolate);
    }

    // act(place) for every tile that the main loop repaired.
    template <class Act> DEV_METHOD void repairs(Range tiles, Act act) {
#pragma unroll 1
        for (int head = 0; head < p.shape.group; ++head) {
            enter_head(head);
#pragma unroll 1
            for (int tile = at_hand(mask, head).next_tile(tiles.begin, tiles.end); tile < tiles.end;
                 tile = at_hand(mask, head).next_tile(tile + 1, tiles.end))
                if (isolates({head, tile})) act(Place{head, tile});
        }
    }

    // What repairs took out of dV or dK: a NaN or inf in a row spreads to exactly the keys that the
    // row sees. Walks the tiles that are repaired (the others met their NaN and inf in the products).
    // rows_gmem(head): dO or Q; smem: where the gradient is staged.
    template <class Tile, class RowsOf>
    DEV_METHOD void add_back(u32 smem, Real factor, RowsOf rows_gmem) {
        repairs(repaired_tiles, [&](Place place) {
            const Mask& mask = at_hand(this->mask, place.head);
            add_non_finite<Element, Tile, 16 * M16>(
                smem, warp_key(), rows_gmem(place.head), rows_of_tile(place.tile), factor,
                [&](int r, int i) { return mask.keep(i, first_key + r); });
        });
    }

    // s: in raw products, out P (where dropout keeps it). ds: in dP, out dS. Keys along the
    // accumulator's rows, queries along its columns.
    template <int N8> DEV_METHOD void score_gradients(const KeptScore& kept,
                                                      Accumulator<M16, N8, Real>& s,
                                                      Accumulator<M16, N8, Real>& ds, Place place,
                                                      int column, int stage) {
        using Pair = typename PairOf<Real>::Type;
        const Score& score = at_hand(kept, place.head);
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
            if (Self::FORMS_DS) ld_shared(delta, statistics + 8 * BYTES * n + Layout::DELTA);
#pragma unroll
            for (int m = 0; m < M16; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const Logit<Real> logit =
                        score.at(s.x[m][n][e], i_0 + 8 * n + e % 2, j_0 + 16 * m + e / 2 * 8);
                    const Real weight = probability(logit.log2, e % 2 ? lse_log2.y : lse_log2.x);
                    s.x[m][n][e] = keep.kept(m, n, e) ? weight : Real(0);
                    if (Self::FORMS_DS)
                        ds.x[m][n][e] =
                            weight *
                            (keep.weighted(ds.x[m][n][e], m, n, e) - (e % 2 ? delta.y : delta.x)) *
                            logit.derivative;
                }
        }
    }

    // Sets P and dS of pairs that do not exist to 0. Nothing is multiplied: they may be NaN.
    template <int N8> DEV_METHOD void hide(Accumulator<M16, N8, Real>& s,
                                           Accumulator<M16, N8, Real>& ds, Place place,
                                           int column) {
        const int first_row = place.tile * C::BLOCK_Q + column;
        each_hidden<M16, N8, true>(at_hand(mask, place.head), p.shape.len_q, first_row,
                                   first_key + warp_key(), [&](int m, int n, int e) {
                                       s.x[m][n][e] = 0;
                                       if (Self::FORMS_DS) ds.x[m][n][e] = 0;
                                   });
    }
};

}  // namespace backward
