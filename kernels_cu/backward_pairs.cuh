// A walk over pairs of query and key for gradients of what stands between the scores and the softmax: a
// bias, the parameters of a score expression. Every block owns some elements of the sum (of a bias: one
// of its tiles) and visits, in a fixed order, the tiles of pairs that add to them; what is summed, and
// where it goes, is the Consumer's matter. No atomics on floats: the same bits in every run.
//
// The axes of the score matrix (batch axes, query heads, tiles of rows, tiles of keys) are either the
// block's own or summed over (p.dbias_values.reduced). Block id = ((split, own batch index), own head, own
// row tile, own key tile), the last one fastest; split s of n visits the pairs [s R / n, (s + 1) R / n)
// of the R tiles along summed axes.
//
// Grid: splits * (product of own extents, tiles_q = ceil(len_q / BLOCK_Q) and tiles_k =
// ceil(len_k / BLOCK_K) among them; packed: of the longest). Block: WARPS * 32 threads, BLOCK_Q = 16 *
// WARPS. Shared memory: sizeof(Element::Storage) * (BLOCK_Q + BLOCK_K) * (HEAD_DIM +
// HEAD_DIM_V) bytes.
#pragma once

#include "backward_tile.cuh"

namespace backward {

// Shared memory: one tile of each operand.
template <class C> struct PairLayout {
    using Storage = typename C::Element::Storage;
    using TileQ = SharedTile<C::BLOCK_Q, C::HEAD_DIM, Storage>;
    using TileDout = SharedTile<C::BLOCK_Q, C::HEAD_DIM_V, Storage>;
    using TileK = SharedTile<C::BLOCK_K, C::HEAD_DIM, Storage>;
    using TileV = SharedTile<C::BLOCK_K, C::HEAD_DIM_V, Storage>;
    static constexpr int DOUT = TileQ::BYTES, K = DOUT + TileDout::BYTES, V = K + TileK::BYTES;
    static constexpr int BYTES = V + TileV::BYTES;
    static_assert(BYTES == C::SHARED_BYTES,
                  "_tuning.backward_shared_bytes disagrees with the layout");

    u32 q;
    DEV_METHOD explicit PairLayout(u32 base) : q(base) {}
    DEV_METHOD u32 dout() const { return q + DOUT; }
    DEV_METHOD u32 k() const { return q + K; }
    DEV_METHOD u32 v() const { return q + V; }
};

// Shared memory of a kernel that takes slices.
template <class C> struct PairLayoutOfSlices {
    using Operands = Slices<C, C::BLOCK_Q, C::BLOCK_K>;
    using TileQ = typename Operands::TileA;  // names that the other layout has
    using TileDout = TileQ;
    using TileK = typename Operands::TileB;
    using TileV = TileK;
    static_assert(Operands::BYTES == C::SHARED_BYTES,
                  "_tuning_wide.backward_shared_bytes disagrees with the layout");
    u32 q;
    DEV_METHOD explicit PairLayoutOfSlices(u32 base) : q(base) {}
    DEV_METHOD u32 k() const { return q; }
};

// One tile of pairs of one query head.
struct PairPlace {
    int tile_q, tile_k, head, batch;
};

// Which tiles a block visits, in which order: an odometer over the summed axes, tiles of keys fastest, so
// that one tile of queries meets many.
struct PairOrder {
    const BiasGradient& values;
    const Shape& shape;
    PairPlace place;
    i64 left;  // tiles not yet visited, this one included

    DEV_METHOD PairOrder(const BackwardParams& p)
        : values(p.dbias_values), shape(p.shape), place{0, 0, 0, 0} {
        const unsigned blocks = gridDim.x / values.splits, split = fresh_block_id() / blocks;
        u64 own = fresh_block_id() % blocks, total = 1;
        each_axis([&](int& index, int extent, int step, bool summed) {
            if (summed) {
                total *= extent;
            } else {
                index += (int)(own % extent) * step;
                own /= extent;
            }
        });
        u64 first = total * split / values.splits;
        left = total * (split + 1) / values.splits - first;
        each_axis([&](int& index, int extent, int step, bool summed) {
            if (!summed) return;
            index += (int)(first % extent) * step;
            first /= extent;
        });
    }

    DEV_METHOD void advance() {
        --left;
        bool carry = true;
        each_axis([&](int& index, int extent, int step, bool summed) {
            if (!summed || !carry) return;
            index += step;
            carry = index / step % extent == 0;
            if (carry) index -= extent * step;
        });
    }
    // To the last tile of keys of this tile of queries: those left have no pair to add.
    DEV_METHOD void skip_keys() {
        if (!(values.reduced & REDUCED_KEY)) return;
        const int tiles = (int)min((i64)values.tiles_k - 1 - place.tile_k, left - 1);
        place.tile_k += tiles;
        left -= tiles;
    }

  private:
    // axis(index, extent, step, summed) for every axis, fastest first; `step` is what one more of it
    // adds to its index (batch axes share one).
    template <class Axis> DEV_METHOD void each_axis(Axis axis) {
        axis(place.tile_k, values.tiles_k, 1, values.reduced & REDUCED_KEY);
        axis(place.tile_q, values.tiles_q, 1, values.reduced & REDUCED_ROW);
        axis(place.head, shape.heads, 1, values.reduced & REDUCED_HEAD);
        int step = 1;
#pragma unroll
        for (int n = MAX_BATCH_AXES - 1; n >= 0; --n) {
            axis(place.batch, shape.batch_extent[n], step, values.reduced >> n & 1);
            step *= shape.batch_extent[n];
        }
    }
};

// The loop of one block. Consumer:
//   Consumer(p)
//   add(p, work, first_row, first_key, s, ds)   s: raw products q.k, ds: gradients of the logits, 0 where
//                                               a pair is hidden; accumulator of 16 rows, 8 N8 keys, of
//                                               which the first is (first_row, first_key) for this warp
//   finish(p, work, place, smem)                after the last tile; smem is free
template <class C, class Consumer> struct PairBlock {
    using Element = typename C::Element;
    using Storage = typename Element::Storage;
    using Real = typename Element::Real;
    using Mask = typename C::Mask;
    static constexpr bool SLICED = SLICE<C> > 0;
    using Layout = Chosen<SLICED, PairLayoutOfSlices<C>, PairLayout<C>>;
    using TileQ = typename Layout::TileQ;
    using TileDout = typename Layout::TileDout;
    using TileK = typename Layout::TileK;
    using TileV = typename Layout::TileV;
    static constexpr int THREADS = C::WARPS * 32, N8 = C::BLOCK_K / 8;
    static_assert(C::BLOCK_Q == 16 * C::WARPS, "a warp owns 16 rows");

    const BackwardParams& call;
    const Layout layout;
    PairOrder order;
    Consumer consumer;
    Real lse_log2[2], delta[2];

    DEV_METHOD PairBlock(const BackwardParams& params, u32 smem)
        : call(params), layout(smem), order(params), consumer(params) {}

    DEV_METHOD void walk() {
        PairPlace rows = {-1, -1, -1, -1}, keys = rows;  // whose tiles are in shared memory
#pragma unroll 1
        for (; order.left > 0; order.advance()) {
            const PairPlace place = order.place;
            const Work work = work_at(place);
            if (past_the_end(place)) {
                order.skip_keys();
                continue;
            }
            of_batch(work, [&](const BackwardParams& p) {
                const Mask mask(p, work, place.head);
                if (!visible(p, mask, place)) return;
                __syncthreads();  // every warp is through with the tile before
                if (rows.batch != place.batch || rows.head != place.head ||
                    rows.tile_q != place.tile_q) {
                    load_rows(p, work);
                    rows = place;
                }
                const int kv_head = place.head / p.shape.group;
                if (keys.batch != place.batch || keys.head != kv_head ||
                    keys.tile_k != place.tile_k) {
                    load_keys(p, work, kv_head, place.tile_k);
                    keys = place;
                    keys.head = kv_head;
                }
                cp_async_commit();
                cp_async_wait<0>();
                __syncthreads();
                step(p, mask, work, place);
            });
        }
        __syncthreads();
        consumer.finish(call, work_at(order.place), order.place, layout.q);
    }

  private:
    DEV_METHOD Work work_at(const PairPlace& place) const {
        Work work;
        work.tile = place.tile_q;
        work.batch = place.batch;
        work.head = place.head;
        int rest = place.batch;
#pragma unroll
        for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
            work.batch_index[axis] = rest % call.shape.batch_extent[axis];
            rest /= call.shape.batch_extent[axis];
        }
        return work;
    }
    // Of a packed sequence shorter than the tiles reach: asked first, as its params cost far more.
    DEV_METHOD bool past_the_end(const PairPlace& place) const {
        if constexpr (C::PACKED) {
            const Sequence here = packed::sequence(call.options, place.batch);
            return rows_of(place).begin >= here.q_len || keys_of(place).begin >= here.k_len;
        }
        return false;
    }
    // run(p) with the params of the call, or of the sequence.
    template <class Run> DEV_METHOD void of_batch(const Work& work, Run run) const {
        if constexpr (C::PACKED) {
            BackwardParams p = call;
            packed::enter<C>(p, work);
            run(p);
        } else {
            run(call);
        }
    }
    DEV_METHOD static Range rows_of(const PairPlace& place) {
        return {place.tile_q * C::BLOCK_Q, (place.tile_q + 1) * C::BLOCK_Q};
    }
    DEV_METHOD static Range keys_of(const PairPlace& place) {
        return {place.tile_k * C::BLOCK_K, (place.tile_k + 1) * C::BLOCK_K};
    }
    DEV_METHOD static int warp_row() { return fresh_thread_id() / 32 * 16; }

    DEV_METHOD static bool visible(const BackwardParams& p, const Mask& mask,
                                   const PairPlace& place) {
        const Range rows = rows_of(place), keys = keys_of(place);
        if (rows.begin >= p.shape.len_q || keys.begin >= p.shape.len_k) return false;
        const Range seen = mask.keys(rows);
        if (seen.end <= keys.begin || seen.begin >= keys.end) return false;
        return mask.next_tile(place.tile_k, place.tile_k + 1) == place.tile_k;
    }

    DEV_METHOD static GlobalRows<Storage> q_gmem(const BackwardParams& p, const Work& work) {
        return head_rows<Storage>(p.q, p.q_strides, work, work.head, p.shape.len_q,
                                  p.shape.head_dim, p.shape.flags & FLAG_Q_VECTOR);
    }
    DEV_METHOD static GlobalRows<Storage> dout_gmem(const BackwardParams& p, const Work& work) {
        return head_rows<Storage>(p.dout, p.dout_strides, work, work.head, p.shape.len_q,
                                  p.shape.head_dim_v, p.shape.flags & FLAG_DOUT_VECTOR);
    }
    DEV_METHOD static GlobalRows<Storage> k_gmem(const BackwardParams& p, const Work& work,
                                                 int head) {
        return head_rows<Storage>(p.k, p.k_strides, work, head, p.shape.len_k, p.shape.head_dim,
                                  p.shape.flags & FLAG_K_VECTOR);
    }
    DEV_METHOD static GlobalRows<Storage> v_gmem(const BackwardParams& p, const Work& work,
                                                 int head) {
        return head_rows<Storage>(p.v, p.v_strides, work, head, p.shape.len_k, p.shape.head_dim_v,
                                  p.shape.flags & FLAG_V_VECTOR);
    }

    DEV_METHOD void load_rows(const BackwardParams& p, const Work& work) {
        const Shape& shape = p.shape;
        const int first_row = work.tile * C::BLOCK_Q;
        if constexpr (!SLICED) {
            load_tile<TileQ>(q_gmem(p, work), layout.q, first_row);
            load_tile<TileDout>(dout_gmem(p, work), layout.dout(), first_row);
        }
        const i64 first = statistics_row<C>(p, work, work.head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = first_row + warp_row() + lane_id() / 4 + 8 * half;
            // A row past the end has P = exp2(s - inf) = 0.
            const bool exists = i < shape.len_q;
            lse_log2[half] =
                exists ? ((const Real*)p.lse_log2)[first + i] : Real(positive_infinity());
            delta[half] = exists ? ((const Real*)p.delta)[first + i] : Real(0);
        }
    }
    DEV_METHOD void load_keys(const BackwardParams& p, const Work& work, int head, int tile) {
        if constexpr (!SLICED) {
            load_tile<TileK>(k_gmem(p, work, head), layout.k(), tile * C::BLOCK_K);
            load_tile<TileV>(v_gmem(p, work, head), layout.v(), tile * C::BLOCK_K);
        }
    }
    template <class Tile>
    DEV_METHOD static void load_tile(const GlobalRows<Storage>& gmem, u32 smem, int first_row) {
        TileLoader<Tile, THREADS, C::VECTOR_ONLY> loader(gmem);
        load(loader, smem, first_row);
    }

    DEV_METHOD void step(const BackwardParams& p, const Mask& mask, const Work& work,
                         const PairPlace& place) {
        Accumulator<1, N8, Real> s, ds;
        const int first_row = rows_of(place).begin + warp_row(), first_key = keys_of(place).begin;
        if constexpr (SLICED) {
            using Operands = typename Layout::Operands;
            const int row = rows_of(place).begin, kv_head = place.head / p.shape.group;
            Operands::product(s, q_gmem(p, work), row, k_gmem(p, work, kv_head), first_key,
                              warp_row(), layout.q);
            Operands::product(ds, dout_gmem(p, work), row, v_gmem(p, work, kv_head), first_key,
                              warp_row(), layout.q);
        } else {
            s.zero();
            ds.zero();
            multiply_transposed<Element, TileQ, TileK>(s, row_address<TileQ>(layout.q, warp_row()),
                                                       layout.k());
            multiply_transposed<Element, TileDout, TileV>(
                ds, row_address<TileDout>(layout.dout(), warp_row()), layout.v());
        }
        logit_gradients(p, work, first_row, first_key, s, ds);
        if (mask.cuts(rows_of(place), keys_of(place), place.tile_k) ||
            mask.isolates(rows_of(place), keys_of(place), place.tile_k) ||
            rows_of(place).end > p.shape.len_q)
            // Nothing is multiplied: what is hidden may be NaN.
            each_hidden<1, N8, false>(mask, p.shape.len_q, first_row, first_key,
                                      [&](int m, int n, int e) { ds.x[m][n][e] = 0; });
        consumer.add(p, work, first_row, first_key, s, ds);
    }

    // ds: in dP, out the gradient of the logit.
    DEV_METHOD void logit_gradients(const BackwardParams& p, const Work& work, int first_row,
                                    int first_key, const Accumulator<1, N8, Real>& s,
                                    Accumulator<1, N8, Real>& ds) const {
        const typename C::Score score = make_score<C>(p, work, work.head);
        const dropout::KeepBits<C::DROPOUT, 1, N8, false> keep(p, work, work.head, first_row,
                                                               first_key);
        const int lane = fresh_thread_id() % 32, i_0 = first_row + lane / 4,
                  j_0 = first_key + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Logit<Real> logit =
                    score.at(s.x[0][n][e], i_0 + e / 2 * 8, j_0 + 8 * n + e % 2);
                ds.x[0][n][e] = probability(logit.log2, lse_log2[e / 2]) *
                                (keep.weighted(ds.x[0][n][e], 0, n, e) - delta[e / 2]);
            }
    }
};

}  // namespace backward
