// Backward on Hopper: where everything lies in shared memory, and which tiles of queries a block visits.
//
// Two consumer warpgroups own 64 keys each (above 128 columns both the same 64, and dq is 64 columns of it), the
// third warpgroup feeds them (backward_sm90_feed.cuh):
//
//          tile                     written by           read by                      handed over by
//   k, v   keys x head dim          TMA, once            wgmma                        keys_full
//   q      queries x head dim       TMA, STAGES buffers  wgmma                        q_full, q_empty
//   dout   queries x head dim       TMA, STAGES buffers  wgmma                        dout_full, dout_empty
//   lse_log2, delta  queries        warp 8               consumers                    q_full, q_empty
//   ds     keys x queries, 2        consumers            wgmma of both warpgroups     a named barrier
//   dq     queries x head dim, f32  consumers            bulk reduction by warp 9     dq_full, dq_empty
#pragma once

#include "backward_accumulate.cuh"
#include "ptx_sm90_backward.cuh"
#include "ptx_sm90_wgmma.cuh"

namespace backward::sm90 {

constexpr int CONSUMERS = 256, CONSUMER_WARPS = CONSUMERS / 32;
constexpr int LOAD_WARP = CONSUMER_WARPS, REDUCE_WARP = CONSUMER_WARPS + 1;
// Above 128 columns dK and dV of 64 keys do not fit the registers of one warpgroup: two share the keys, and each
// sums one of the gradients (backward_sm90_divided.cuh).
template <class C> constexpr bool DIVIDED = C::BLOCK_K == 64;
// Registers per thread: (24 + 2 * 240) * 128 is what 384 threads of 168 have. Walking a mask's map of tiles takes
// more of them, and so do tiles of three or four slabs.
template <class C> constexpr bool WIDE_FEED = DIVIDED<C> || !C::Mask::CONTIGUOUS;
template <class C> constexpr int FEED_REGISTERS = WIDE_FEED<C> ? 40 : 24;
template <class C> constexpr int CONSUMER_REGISTERS = WIDE_FEED<C> ? 232 : 240;
constexpr int CONSUMER_BARRIER = 1;  // a named barrier of all consumers

template <class C> struct Layout {
    // TMA fills slabs of 64 columns; those past the head dim with zeros.
    static constexpr int COLUMNS = (C::HEAD_DIM + 63) / 64 * 64;
    static constexpr int COLUMNS_V = (C::HEAD_DIM_V + 63) / 64 * 64;
    using TileK = SharedTile<C::BLOCK_K, COLUMNS>;
    using TileV = SharedTile<C::BLOCK_K, COLUMNS_V>;
    using TileQ = SharedTile<C::BLOCK_Q, COLUMNS>;
    using TileDout = SharedTile<C::BLOCK_Q, COLUMNS_V>;
    using TileDs = SharedTile<C::BLOCK_K, C::BLOCK_Q>;  // dS^T

    static constexpr int DS_STAGES = C::ACCUMULATE_DQ ? 2 : 0;
    static constexpr int DQ_COLUMNS = DIVIDED<C> ? 64 : C::HEAD_DIM;  // reduced at a time
    static constexpr int DQ_BYTES = C::ACCUMULATE_DQ ? C::BLOCK_Q * DQ_COLUMNS * 4 : 0;
    // Warps that leave tiles of dQ to be reduced.
    static constexpr int DQ_WARPS = DIVIDED<C> ? CONSUMER_WARPS / 2 : CONSUMER_WARPS;
    static constexpr int STATISTICS_BYTES = C::BLOCK_Q * 2 * 4;
    static constexpr int V = TileK::BYTES, Q = V + TileV::BYTES;
    static constexpr int DOUT = Q + C::STAGES * TileQ::BYTES;
    static constexpr int DS = DOUT + C::STAGES * TileDout::BYTES;
    static constexpr int DQ = DS + DS_STAGES * TileDs::BYTES;
    static constexpr int STATISTICS = DQ + DQ_BYTES;
    static constexpr int BARRIERS = STATISTICS + C::STAGES * STATISTICS_BYTES;
    static constexpr int WORK = BARRIERS + (4 + 4 * C::STAGES) * 8;
    static constexpr int ALIGNMENT = 1024;      // of slabs; dynamic shared memory begins anywhere
    static constexpr int SEQUENCE = WORK + 48;  // of packed sequences
    static constexpr int BYTES = SEQUENCE + 32 + ALIGNMENT;
    static_assert(BYTES == C::SHARED_BYTES,
                  "_candidates_backward_sm90.shared_bytes disagrees with the layout");

    u32 base;
    DEV_METHOD explicit Layout(u32 smem) : base((smem + ALIGNMENT - 1) & ~(ALIGNMENT - 1)) {}
    DEV_METHOD u32 k() const { return base; }
    DEV_METHOD u32 v() const { return base + V; }
    DEV_METHOD u32 q(int stage) const { return base + Q + stage * TileQ::BYTES; }
    DEV_METHOD u32 dout(int stage) const { return base + DOUT + stage * TileDout::BYTES; }
    DEV_METHOD u32 ds(int stage) const { return base + DS + stage * TileDs::BYTES; }
    DEV_METHOD u32 dq() const { return base + DQ; }
    DEV_METHOD u32 lse_log2(int stage) const {
        return base + STATISTICS + stage * STATISTICS_BYTES;
    }
    static constexpr int DELTA = C::BLOCK_Q * 4;  // delta lies this far behind lse_log2

    DEV_METHOD u32 work() const { return base + WORK; }

    // Rows, lengths, band and offset of the block's packed sequence, or of the call. They are read anew wherever
    // they are needed, like all of the block's work.
    DEV_METHOD void put(const Sequence& here, const Shape& shape) const {
        st_shared_v4(base + SEQUENCE,
                     make_uint4(here.q_start, here.q_len, here.k_start, here.k_len));
        st_shared_v4(base + SEQUENCE + 16,
                     make_uint4(shape.band_low, shape.band_high, shape.q_offset, 0));
    }
    DEV_METHOD Sequence sequence(const BackwardParams& p) const {
        if constexpr (!C::PACKED) return {0, p.shape.len_q, 0, p.shape.len_k};
        const uint4 x = ld_shared_v4(base + SEQUENCE);
        return {(int)x.x, (int)x.y, (int)x.z, (int)x.w};
    }
    DEV_METHOD mask::Band band(const BackwardParams& p) const {
        mask::Band band(p.shape);
        if constexpr (C::PACKED) {
            const uint4 lengths = ld_shared_v4(base + SEQUENCE);
            const uint4 bounds = ld_shared_v4(base + SEQUENCE + 16);
            band.low = bounds.x, band.high = bounds.y;
            band.len_q = lengths.y, band.len_k = lengths.w;
        }
        return band;
    }
    DEV_METHOD int q_offset(const BackwardParams& p) const {
        return C::PACKED ? (int)ld_shared_u32(base + SEQUENCE + 24) : p.shape.q_offset;
    }
    DEV_METHOD u32 barrier(int n) const { return base + BARRIERS + 8 * n; }
    DEV_METHOD u32 keys_full() const { return barrier(0); }
    DEV_METHOD u32 dq_full() const { return barrier(1); }
    DEV_METHOD u32 dq_empty() const { return barrier(2); }
    DEV_METHOD u32 q_full(int stage) const { return barrier(3 + stage); }
    DEV_METHOD u32 q_empty(int stage) const { return barrier(3 + C::STAGES + stage); }
    DEV_METHOD u32 dout_full(int stage) const { return barrier(3 + 2 * C::STAGES + stage); }
    DEV_METHOD u32 dout_empty(int stage) const { return barrier(3 + 3 * C::STAGES + stage); }

    // One thread, before a block barrier.
    DEV_METHOD void init_barriers() const {
        mbarrier_init(keys_full(), 1);
        mbarrier_init(dq_full(), DQ_WARPS);
        mbarrier_init(dq_empty(), 1);
#pragma unroll
        for (int stage = 0; stage < C::STAGES; ++stage) {
            mbarrier_init(q_full(stage), 2);  // the bytes of Q, and who stored the statistics
            mbarrier_init(q_empty(stage), CONSUMER_WARPS);
            mbarrier_init(dout_full(stage), 1);
            mbarrier_init(dout_empty(stage), CONSUMER_WARPS);
        }
        fence_mbarrier_init();
    }
};

// The n-th tile of queries that a block visits: its buffers, and the parity of their barriers in this lap. There
// are two tiles of dS and one of dQ whatever STAGES is.
template <int STAGES> struct Visit {
    u32 number = 0;
    DEV_METHOD int stage() const { return number % STAGES; }
    DEV_METHOD u32 parity() const { return number / STAGES % 2; }
    DEV_METHOD int ds_stage() const { return number % 2; }
    DEV_METHOD u32 dq_parity() const { return number % 2; }
    // Of part `part` of a tile in `parts`.
    DEV_METHOD u32 dq_parity(int parts, int part) const { return (number * parts + part) % 2; }
    DEV_METHOD void advance() { ++number; }
};

// dQ in its workspace, and in shared memory on the way there: rows of HEAD_DIM floats whose 16-byte
// chunks are permuted by the row, so that the accumulators of a warp, eight rows at one column, reach all
// 32 banks, while a tile is still one piece of memory, which one reduction moves. backward_convert
// undoes it (C::DQ_PERMUTED).
DEV int dq_column(int row, int column) { return column ^ (row & 3) << 3; }

// The band of a mask is the sequence's.
DEV void set_band(mask::Band& mask, const mask::Band& band) { mask = band; }
template <class Source> DEV void set_band(mask::Mapped<Source>& mask, const mask::Band& band) {
    mask.band = band;
}

// What is done to scores, as a number of things that take registers.
template <class Score> constexpr int SCORE_BURDEN = Score::FOLDED ? 0 : 1;
template <class Element, bool HAS_BIAS, class Modifier>
constexpr int SCORE_BURDEN<score::General<Element, HAS_BIAS, Modifier>> = Modifier::CHANGES ? 3 : 2;
template <class C> constexpr int BURDEN =
    SCORE_BURDEN<typename C::Score> + C::DROPOUT + !C::Mask::CONTIGUOUS + C::PACKED;
// Queries of a tile whose scores are formed together: as many as leave registers for the rest.
template <class C> constexpr int QUERIES_AT_ONCE = BURDEN<C> >= 3 ? 32
                                                   : C::BLOCK_Q == 128 && BURDEN<C> - C::PACKED > 0
                                                       ? 64
                                                       : C::BLOCK_Q;

// A score's offset, too: ALiBi counts positions inside the sequence.
template <class Real> DEV void set_offset(score::Linear<Real>&, int) {}
template <class Real> DEV void set_offset(score::Shaped<Real>& score, int offset) {
    score.q_offset = offset;
}
template <class Element, bool HAS_BIAS, class Modifier>
DEV void set_offset(score::General<Element, HAS_BIAS, Modifier>& score, int offset) {
    score.shaped.q_offset = offset;
}

// The block's key tile, and the tiles of queries that see it: for every query head of the group.
template <class C> struct KeyWork {
    using Mask = typename C::Mask;
    const Layout<C> layout;
    Work work;  // packed sequences: batch is -1 where there is none for this block
    Range tiles = {0, 0};

    // It takes a dozen divisions: one thread works it out, the others read it from shared memory, whenever they
    // need it, for it is not worth registers.
    DEV_METHOD KeyWork(const BackwardParams& p, const Layout<C>& place)
        : layout(place), work(decode<C>(p, p.shape.heads_kv, number_of_block(p))) {
        Shape shape = p.shape;
        if constexpr (C::PACKED) {
            if (work.batch < 0) return;
            const Sequence here = packed::sequence(p.options, work.batch);
            packed::enter(shape, here);
            layout.put(here, shape);
        }
        const Range rows = mask::Band(shape).rows(keys());
        if (!rows.empty()) tiles = {rows.begin / C::BLOCK_Q, (rows.end - 1) / C::BLOCK_Q + 1};
    }
    // Blocks that wait for those before them are numbered as they start: hardware does not promise to start them in
    // the order of their ids.
    DEV u32 number_of_block(const BackwardParams& p) {
        return C::TURNS ? atom_add_global(p.dq_turns, 1) : fresh_block_id();
    }
    DEV_METHOD explicit KeyWork(const Layout<C>& place) : layout(place) {
        const u32 smem = layout.work();
        const uint4 a = ld_shared_v4(smem), b = ld_shared_v4(smem + 16);
        work.tile = a.x, work.batch = a.y, work.head = a.z;
        work.batch_index[0] = b.x, work.batch_index[1] = b.y;
        work.batch_index[2] = b.z, work.batch_index[3] = b.w;
        const float2 range = ld_shared_f32x2(smem + 32);
        tiles = {__float_as_int(range.x), __float_as_int(range.y)};
    }
    DEV_METHOD void put() const {
        static_assert(MAX_BATCH_AXES == 4, "one word each");
        const u32 smem = layout.work();
        st_shared_v4(smem, make_uint4(work.tile, work.batch, work.head, 0));
        st_shared_v4(smem + 16, make_uint4(work.batch_index[0], work.batch_index[1],
                                           work.batch_index[2], work.batch_index[3]));
        st_shared_v4(smem + 32, make_uint4(tiles.begin, tiles.end, 0, 0));
    }

    DEV_METHOD int first_key() const { return work.tile * C::BLOCK_K; }
    DEV_METHOD Range keys() const { return {first_key(), first_key() + C::BLOCK_K}; }
    DEV_METHOD Mask mask(const BackwardParams& p, int head) const {
        Mask made(p, work, work.head * p.shape.group + head);
        if constexpr (C::PACKED) set_band(made, layout.band(p));
        return made;
    }
    // A head's first row in the statistics and in dq_accum.
    DEV_METHOD i64 statistics_row(const BackwardParams& p, int query_head) const {
        return ::statistics_row<C>(p, work, query_head) + layout.sequence(p).q_start;
    }
    // visit(head, tile) for each.
    template <class Visit> DEV_METHOD void each(const BackwardParams& p, Visit visit) const {
#pragma unroll 1
        for (int head = 0; head < p.shape.group; ++head) {
            const Mask seen = mask(p, head);
#pragma unroll 1
            for (int tile = seen.next_tile(tiles.begin, tiles.end); tile < tiles.end;
                 tile = seen.next_tile(tile + 1, tiles.end))
                visit(head, tile);
        }
    }
};

}  // namespace backward::sm90
