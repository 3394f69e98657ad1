// The warpgroups of forward_sm90.cuh that multiply.
#pragma once

#include "forward_sm90.cuh"

// The score map of a warp's 16 rows. Bits of a mask come for as many keys at a time as fit its words.
template <int N8> struct WarpgroupScoreMap : ScoreMap<1, N8, float> {
    static constexpr int PART = N8 % 8 == 0 ? 8 : N8 % 4 == 0 ? 4 : 2;

    template <class Source> DEV_METHOD void hide_by(const Source& source) const {
#pragma unroll
        for (int n = 0; n < N8; n += PART) {
            Accumulator<1, PART> part;
#pragma unroll
            for (int i = 0; i < PART * 4; ++i)
                part.x[0][i / 4][i % 4] = this->s.x[0][n + i / 4][i % 4];
            ScoreMap<1, PART, float>{part, this->first_row, this->first_key + n * 8}.hide_by(
                source);
#pragma unroll
            for (int i = 0; i < PART * 4; ++i)
                this->s.x[0][n + i / 4][i % 4] = part.x[0][i / 4][i % 4];
        }
    }
};

template <class C> struct Warpgroup {
    using L = ForwardSm90Layout<C>;
    using E = typename C::Element;
    static constexpr int S8 = C::BLOCK_K / 8, O8 = C::HEAD_DIM_V / 8;
    using Scores = Accumulator<1, S8>;
    using Output = Accumulator<1, O8>;
    using Weights = RoundedOperand<E, 1, S8>;

    const ForwardSm90Params& params;  // for its maps
    L l;
    unsigned k_count = 0, v_count = 0, looks = 0;

    DEV_METHOD Warpgroup(const ForwardSm90Params& p, u32 smem) : params(p), l(smem) {}

    DEV int group() { return warp_id() / 4; }

    // Products are issued by one warpgroup at a time, in the order 0, 1, ..., 0.
    DEV void take_turn() {
        if constexpr (C::TAKE_TURNS) named_barrier_sync(BARRIER_TURN + group(), 2 * WARPGROUP);
    }
    DEV void pass_turn() {
        if constexpr (C::TAKE_TURNS)
            named_barrier_arrive(BARRIER_TURN + (group() + 1) % L::GROUPS, 2 * WARPGROUP);
    }
    // Once per block: somebody gives warpgroup 0 its first turn, and it takes the one passed to it last.
    DEV void first_turn() {
        if (group() == L::GROUPS - 1) pass_turn();
    }
    DEV void last_turn() {
        if (group() == 0) take_turn();
    }

    // S = Q K^T
    DEV_METHOD void start_scores(Scores& s, u32 q_smem, u32 k_smem) const {
        const u64 q = k_major_descriptor(q_smem + group() * 64 * SLAB_ROW_BYTES);
        const u64 k = k_major_descriptor(k_smem);
#pragma unroll
        for (int step = 0; step < C::HEAD_DIM / 16; ++step)
            wgmma_ss<E, false, false>(
                s, moved_descriptor(q, k_major_step<L::QTile::SLAB_BYTES>(step)),
                moved_descriptor(k, k_major_step<L::KTile::SLAB_BYTES>(step)), step > 0);
        wgmma_commit();
    }
    // O += P V
    DEV_METHOD void start_output(Output& o, const Weights& weights, u32 v_smem) const {
        const u64 v = mn_major_descriptor(v_smem, L::VTile::SLAB_BYTES);
#pragma unroll
        for (int step = 0; step < C::BLOCK_K / 16; ++step)
            wgmma_rs<E, true>(o, weights.a[0][step], moved_descriptor(v, mn_major_step(step)), 1);
        wgmma_commit();
    }

    // Raw products of one tile become weights; returns what the output must be scaled by.
    DEV_METHOD OnlineSoftmax<1>::Rise weigh(Scores& s, OnlineSoftmax<1>& softmax,
                                            const ForwardParams& p, const Work& work,
                                            const typename C::Mask& mask,
                                            const typename C::Score& score, int tile) const {
        const int first_row = work.tile * C::BLOCK_Q, first_group_row = first_row + group() * 64;
        const Range rows{first_group_row, first_group_row + 64};
        const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
        const WarpgroupScoreMap<S8> map{{s, first_row, keys.begin}};
        if constexpr (!C::Score::FOLDED) {
            score.apply(map);
        } else if (score.negative()) {
            // The maximum is taken of raw products, which must therefore grow with the logits.
            map([](float x, int, int) { return -x; });
        }
        if (mask.cuts(rows, keys, tile)) mask.hide(map, rows, keys);
        auto rise = softmax.raise(s);
        softmax.weigh(s, rise);
        if constexpr (C::DROPOUT)
            drop_weights(dropout::Keep(p, work, work.head), s, first_row + warp_id() * 16,
                         keys.begin);
        return rise;
    }

    // Waits for the tile of V; true if something was taken out of it.
    DEV_METHOD bool wait_for_values(const ForwardParams& p, const typename C::Mask& mask,
                                    Range rows, int tile) {
        l.v.wait(v_count);
        if (!leaks<C>(p, mask, rows, tile)) return false;
        mbarrier_wait(l.looked(looks), looks / C::STAGES % 2);
        u32 found = 0u;
#pragma unroll
        for (int warp = 0; warp < LOOKING_WARPS; ++warp)
            found |= ld_shared_u32(l.found(looks, warp));
        ++looks;
        return found != 0u;
    }

    // One tile of queries.
    DEV_METHOD void tile(const ForwardParams& p, const Work& work, unsigned n) {
        const int first_row = work.tile * C::BLOCK_Q;
        const Range rows{first_row, first_row + C::BLOCK_Q};
        const typename C::Mask mask(p, work, work.head);
        const typename C::Score score = make_score<C>(p, work, work.head);
        const Range tiles = key_tiles<C>(mask, rows);
        OnlineSoftmax<1> softmax(score.folded_factor());
        Output o;
        bool repaired = false;
        o.zero();
        l.q.wait(n);
        if (tiles.begin < tiles.end) {
            Scores s;
            l.k.wait(k_count);
            wgmma_fence();
            start_scores(s, l.q.tile(n), l.k.tile(k_count));
            wgmma_wait<0>();
            wgmma_pin(s);
            l.k.release(k_count++);
            weigh(s, softmax, p, work, mask, score, tiles.begin);
            Weights weights(s);
            int now = tiles.begin;
            for (int next = mask.next_tile(now + 1, tiles.end); next < tiles.end;
                 now = next, next = mask.next_tile(now + 1, tiles.end)) {
                l.k.wait(k_count);
                repaired |= wait_for_values(p, mask, rows, now);
                take_turn();
                wgmma_fence();
                start_scores(s, l.q.tile(n), l.k.tile(k_count));
                start_output(o, weights, l.v.tile(v_count));
                pass_turn();
                wgmma_wait<1>();
                wgmma_pin(s);
                l.k.release(k_count++);
                const auto rise = weigh(s, softmax, p, work, mask, score, next);
                finish_before_wait(softmax.sum[0][0], softmax.sum[0][1]);
                wgmma_wait<0>();
                wgmma_pin(o);
                l.v.release(v_count++);
                softmax.rescale(o, rise);
                weights = Weights(s);
            }
            if constexpr (C::OUT_APART) l.q.release(n);
            repaired |= wait_for_values(p, mask, rows, now);
            wgmma_fence();
            start_output(o, weights, l.v.tile(v_count));
            wgmma_wait<0>();
            wgmma_pin(o);
            l.v.release(v_count++);
        } else if constexpr (C::OUT_APART) {
            l.q.release(n);
        }
        write(p, work, o, softmax, repaired);
        if constexpr (!C::OUT_APART) l.q.release(n);
    }

    // Divides by the sums; writes lse and the rows of one warp.
    DEV_METHOD void write(const ForwardParams& p, const Work& work, const Output& o,
                          OnlineSoftmax<1>& softmax, bool repaired) const {
        using OutTile = typename L::OutTile::Plain;
        const Shape& shape = p.shape;
        const int first_row = work.tile * C::BLOCK_Q, row = warp_id() * 16;
        float inverse[1][2], lse[1][2];
        softmax.template finish<C::SINKS>(inverse, lse, sink_log2<C>(p, work.head));
        float* lse_gmem = (float*)p.lse + statistics_row<C>(p, work, work.head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = first_row + row + half * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && i < shape.len_q) lse_gmem[i] = lse[0][half];
            if constexpr (C::DROPOUT) inverse[0][half] *= dropout::factor_of<float>(p);
        }

        // The store before may still be reading.
        if (threadIdx.x % WARPGROUP == 0) bulk_wait_read<0>();
        named_barrier_sync(BARRIER_GROUP + group(), WARPGROUP);
        const u32 lane = lane_major<OutTile>(l.out);
#pragma unroll
        for (int n8 = 0; n8 < OutTile::COLUMNS / 8; n8 += 2) {
            u32 r[4] = {0u, 0u, 0u, 0u};  // a copy moves whole slabs, the columns it leaves out too
#pragma unroll
            for (int i = 0; i < 4 && n8 < O8; ++i)
                r[i] = E::pack(o.x[0][n8 + i / 2][i % 2 * 2] * inverse[0][i % 2],
                               o.x[0][n8 + i / 2][i % 2 * 2 + 1] * inverse[0][i % 2]);
            stmatrix_x4(OutTile::moved(lane, row, n8 * 8), r);
        }
        __syncwarp();
        if (repaired) repair(p, work, row);
        const bool whole = !C::PACKED || first_row + group() * 64 + 64 <= shape.len_q;
        if (whole) {
            fence_proxy_async();
            named_barrier_sync(BARRIER_GROUP + group(), WARPGROUP);
            if (threadIdx.x % WARPGROUP == 0) store(p, work);
        } else {
            store_rows<OutTile, 16, true>(output_rows<C>(p, work, 0), l.out, row, first_row);
        }
        if constexpr (!C::OUT_APART) {
            // The next Q comes where the output is.
            if (threadIdx.x % WARPGROUP == 0) bulk_wait_read<0>();
            fence_proxy_async();
            __syncwarp();
        }
    }
    // What look_at_values took out comes back to the pairs that see it.
    DEV_METHOD void repair(const ForwardParams& p, const Work& work, int row) const {
        const typename C::Mask mask(p, work, work.head);
        const int first_row = work.tile * C::BLOCK_Q;
        const Range rows{first_row, first_row + C::BLOCK_Q}, tiles = key_tiles<C>(mask, rows);
        const auto v_gmem = value_rows<C>(p, work, 0);
        for (int tile = tiles.begin; tile < tiles.end; tile = mask.next_tile(tile + 1, tiles.end)) {
            const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
            if (leaks<C>(p, mask, rows, tile))
                add_non_finite<E, typename L::OutTile::Plain, 16>(
                    l.out, row, v_gmem, keys, 1.f,
                    [&](int r, int key) { return mask.keep(first_row + r, key); });
        }
        __syncwarp();
    }
    // 64 rows; the map leaves out rows and columns past the ends.
    DEV_METHOD void store(const ForwardParams& p, const Work& work) const {
        const MapPlace place(p.out_strides, work, work.head);
        const int row = first_rows<C>(p, work).q + work.tile * C::BLOCK_Q + group() * 64;
#pragma unroll
        for (int slab = 0; slab < L::OutTile::SLABS; ++slab)
            tma_store_5d(&params.out_map,
                         l.out + slab * L::OutTile::SLAB_BYTES + group() * 64 * SLAB_ROW_BYTES,
                         slab * SLAB_COLUMNS, row, place.head, place.inner, place.outer);
        bulk_commit();
    }
};

template <class C> DEV void attend(const ForwardSm90Params& p, u32 smem) {
    Warpgroup<C> warpgroup(p, smem);
    warpgroup.first_turn();
    each_work<C>(p, [&](const ForwardParams& own, const Work& work, unsigned n) {
        warpgroup.tile(own, work, n);
    });
    warpgroup.last_turn();
    // Shared memory must outlive the stores.
    if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();
}
