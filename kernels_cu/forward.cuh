// Attention forward with mma.sync: one block per (head, tile of query rows), a walk over the key
// tiles those rows see.
#pragma once

#include "dropout.cuh"
#include "finite.cuh"
#include "masks.cuh"
#include "score.cuh"
#include "softmax.cuh"
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

// V of a query head and its output, from a column on.
template <class C> DEV GlobalRows<typename C::Element::Storage> value_rows(const ForwardParams& p,
                                                                           const Work& work,
                                                                           int first_column) {
    return from_column(head_rows<typename C::Element::Storage>(
                           p.v, p.v_strides, work, work.head / p.shape.group, p.shape.len_k,
                           p.shape.head_dim_v, p.shape.flags & FLAG_V_VECTOR),
                       first_column);
}
template <class C> DEV GlobalRows<typename C::Element::Storage> output_rows(const ForwardParams& p,
                                                                            const Work& work,
                                                                            int first_column) {
    return from_column(head_rows<typename C::Element::Storage>(
                           p.out, p.out_strides, work, work.head, p.shape.len_q, p.shape.head_dim_v,
                           p.shape.flags & FLAG_OUT_VECTOR),
                       first_column);
}

// Brings K and V tiles to shared memory ahead of their use. Per tile, where `next` is the one after
// it: k(tile, next), products with K, v(next), products with V.
//   1 stage    V is under way during Q K^T, the next K during softmax and P V; two barriers per
//              tile
//   2 stages   whole tiles are under way during a whole tile step; one barrier per tile
template <class C> struct KeyValuePipeline {
    using L = ForwardLayout<C>;
    TileLoader<typename L::KTile, L::THREADS, C::VECTOR_ONLY> k_loader;
    TileLoader<typename L::VTile, L::THREADS, C::VECTOR_ONLY> v_loader;
    u32 k_smem, v_smem;
    int end;        // tiles [.., end) exist
    int stage = 0;  // of the tile in use
    static_assert(C::STAGES <= 2, "a walk that skips tiles knows the next one, not the one after");
    static_assert(C::STAGES == 1 || HAS_ASYNC_COPY,
                  "tiles that travel through registers need no second stage");

    DEV_METHOD KeyValuePipeline(const ForwardParams& p, const Work& work, int first_column,
                                u32 smem, int end_tile)
        : k_loader(head_rows<typename L::Storage>(p.k, p.k_strides, work, work.head / p.shape.group,
                                                  p.shape.len_k, p.shape.head_dim,
                                                  p.shape.flags & FLAG_K_VECTOR)),
          v_loader(value_rows<C>(p, work, first_column)),
          k_smem(smem + L::K),
          v_smem(smem + L::V),
          end(end_tile) {}

    // One group of copies is under way after it.
    DEV_METHOD void start(int tile) { fetch(tile, 0, C::STAGES > 1); }
    DEV_METHOD u32 k(int tile, int next) {
        if constexpr (C::STAGES == 1) {
            k_loader.template land<0>(k_smem);
            __syncthreads();  // K is visible, and every warp is done with the V before
            v_loader.fetch(v_smem, tile * C::BLOCK_K);
            cp_async_commit();
            return k_smem;
        } else {
            k_loader.template land<0>(k_smem);
            __syncthreads();  // K and V are visible, and every warp is done with the tile before
            fetch(next, stage ^ 1, true);
            return k_smem + stage * L::KTile::BYTES;
        }
    }
    DEV_METHOD u32 v(int next) {
        if constexpr (C::STAGES == 1) {
            v_loader.template land<0>(v_smem);
            __syncthreads();  // V is visible, and every warp is done with K
            fetch(next, 0, false);
            return v_smem;
        } else {
            const u32 here = v_smem + stage * L::VTile::BYTES;
            stage ^= 1;
            return here;
        }
    }

  private:
    DEV_METHOD void fetch(int tile, int to_stage, bool with_v) {
        if (tile < end) {
            k_loader.fetch(k_smem + to_stage * L::KTile::BYTES, tile * C::BLOCK_K);
            if (with_v) v_loader.fetch(v_smem + to_stage * L::VTile::BYTES, tile * C::BLOCK_K);
        }
        cp_async_commit();  // also when empty, so that the count of groups stays the same
    }
};

// The A operand of Q K^T for one warp: its rows of Q, from registers or read again for every key
// tile.
template <class C> struct Queries {
    using L = ForwardLayout<C>;
    static constexpr int STEPS = C::HEAD_DIM / 16;
    u32 lane;
    using Operand = typename C::Element::Operand;
    Operand kept[C::Q_IN_REGISTERS ? STEPS : 1][L::M16];

    DEV_METHOD explicit Queries(u32 smem) : lane(lane_a<typename L::QTile>(smem)) {
        lane += warp_id() * L::WARP_Q * L::QTile::ROW_BYTES;
        if constexpr (C::Q_IN_REGISTERS)
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int m = 0; m < L::M16; ++m)
                    load_a<typename L::QTile>(kept[step][m], lane, m * 16, step * 16);
    }
    DEV_METHOD void load(Operand& a, int m, int step) const {
        if constexpr (C::Q_IN_REGISTERS)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = kept[step][m][i];
        else
            load_a<typename L::QTile>(a, lane, m * 16, step * 16);
    }
};

// S = Q K^T. Column 0 of every slab first, then column 16 of every slab, ...: the addresses of one
// column differ by constants, so that few of them are alive at a time.
template <class C, int M16, int N8, class Real>
DEV void query_key_product(Accumulator<M16, N8, Real>& s, const Queries<C>& q, u32 k_smem) {
    using KTile = typename ForwardLayout<C>::KTile;
    using Operand = typename C::Element::Operand;
    const u32 lane = lane_b<KTile>(k_smem);
    s.zero();
#pragma unroll(C::Element::STEPS_AT_ONCE)
    for (int i = 0; i < C::HEAD_DIM / 16; ++i) {
        const int column = i % KTile::SLABS * KTile::SLAB + i / KTile::SLABS * 16;
        Operand a[M16];
#pragma unroll
        for (int m = 0; m < M16; ++m) q.load(a[m], m, column / 16);
#pragma unroll
        for (int n = 0; n < N8; n += 2) {
            Operand b;
            load_b<KTile>(b, lane, n * 8, column);
#pragma unroll
            for (int m = 0; m < M16; ++m) C::Element::multiply(s.x[m][n], s.x[m][n + 1], a[m], b);
        }
    }
}

// O += P V
template <class C, int M16, int N8, int O8, class Real>
DEV void add_probability_value_product(Accumulator<M16, O8, Real>& o,
                                       const RoundedOperand<typename C::Element, M16, N8>& p,
                                       u32 v_smem) {
    using VTile = typename ForwardLayout<C>::VTile;
    using Operand = typename C::Element::Operand;
    const u32 lane = lane_b_trans<VTile>(v_smem);
#pragma unroll
    for (int step = 0; step < N8 / 2; ++step) {
        Operand a[M16];
#pragma unroll
        for (int m = 0; m < M16; ++m) p.load(a[m], m, step);
#pragma unroll
        for (int n = 0; n < O8; n += 2) {
            Operand b;
            load_b_trans<VTile>(b, lane, step * 16, n * 8);
#pragma unroll
            for (int m = 0; m < M16; ++m) C::Element::multiply(o.x[m][n], o.x[m][n + 1], a[m], b);
        }
    }
}

// A warp's scores in the tile that begins at (first_row, first_key).
template <int M16, int N8, class Real> struct ScoreMap {
    using Score = Real;
    static constexpr int KEYS = N8 * 8;
    Accumulator<M16, N8, Real>& s;
    int first_row, first_key;

    // Do all keys of the tile exist?
    DEV_METHOD bool inside(int len_k) const { return first_key + KEYS <= len_k; }
    // Makes every x of them f(x, row, key).
    template <class Function> DEV_METHOD void operator()(Function f) const {
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    s.x[m][n][e] = f(s.x[m][n][e], row + m * 16 + e / 2 * 8,
                                     first_key + n * 8 + (int)(lane % 4) * 2 + e % 2);
    }
    // f(x, y, row, key) for neighbours x and y of a row, to be changed; key is that of x, and even.
    // For functions that load.
    template <class Function> DEV_METHOD void pairs(Function f) const {
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < N8; ++n)
                    f(s.x[m][n][2 * half], s.x[m][n][2 * half + 1], row + m * 16 + half * 8,
                      first_key + n * 8 + (int)(lane % 4) * 2);
                // Loads do not pass it: otherwise all rows' loads come first, into registers that
                // are not there.
                __syncwarp();
            }
    }
    // The same for arrays of 16-bit elements: load(word, row, key) gets 8 neighbouring keys in one
    // load, and f(x, y, pair) two of them. A lane loads where its four neighbours' elements are, and
    // they trade: loads are few and wide, every byte of a sector is used.
    template <class Load, class Function> DEV_METHOD void octets(Load load, Function f) const {
        static_assert(N8 % 4 == 0, "four lanes load 32 keys");
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < N8; n += 4) {
                    u32 word[4];
                    load(word, row + m * 16 + half * 8, first_key + n * 8 + (int)(lane % 4) * 8);
                    transpose_4x4(word);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        f(s.x[m][n + i][2 * half], s.x[m][n + i][2 * half + 1], word[i]);
                }
    }
    // Makes those -inf that a mask's source hides. Each of the four lanes of a row asks for a
    // quarter of the row's bits, and tells the others.
    template <class Source> DEV_METHOD void hide_by(const Source& source) const {
        constexpr int QUARTER = N8 * 2, WORDS = (N8 * 8 + 31) / 32;
        static_assert(QUARTER <= 16, "a quarter of a row is one word of bits");
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 mine = source.template bits<QUARTER>(row + m * 16 + half * 8,
                                                         first_key + lane % 4 * QUARTER)
                           << (lane % 4 * QUARTER % 32);
                mine |= __shfl_xor_sync(FULL_WARP, mine, 1);
                const u32 other = __shfl_xor_sync(FULL_WARP, mine, 2);
                u32 word[WORDS];
                if constexpr (WORDS == 1)
                    word[0] = mine | other;
                else
                    word[0] = lane & 2 ? other : mine, word[1] = lane & 2 ? mine : other;
#pragma unroll
                for (int n = 0; n < N8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const u32 bits = word[n / 4] >> (lane % 4 * 2);
                        Real& x = s.x[m][n][2 * half + e];
                        x = bits >> (n % 4 * 8 + e) & 1u ? x : Real(neg_infinity());
                    }
            }
    }
};

// Flips the sign of every element of a tile; all threads, between barriers.
template <class Tile, int THREADS> DEV void negate(u32 smem) {
    constexpr int SIZE = sizeof(typename Tile::Storage), WORD = SIZE == 8 ? 8 : 4;
    constexpr u32 SIGNS = SIZE == 2 ? 0x80008000u : 0x80000000u;
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::BYTES / WORD; i += THREADS) {
        const u32 at = smem + i * WORD + (WORD - 4);  // of 64 bits the upper half
        st_shared_u32(at, ld_shared_u32(at) ^ SIGNS);
    }
}

// The key tiles that some of these rows see: from the first of them on, those that next_tile names.
template <class C> DEV Range key_tiles(const typename C::Mask& mask, Range rows) {
    const Range keys = mask.keys(rows);
    if (keys.empty()) return {0, 0};
    const int end = (keys.end + C::BLOCK_K - 1) / C::BLOCK_K;
    return {mask.next_tile(keys.begin / C::BLOCK_K, end), end};
}

// What a block works on. With C::SPLIT the tiles of rows are counted `splits` times: neighbours in
// the order of blocks walk parts of the same keys, and `split` says which.
struct ForwardWork : Work {
    int split;
};
template <class C> DEV ForwardWork forward_work(const ForwardParams& p) {
    ForwardWork work{decode<C>(p, p.shape.heads), 0};
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

// A part's rows of one warp, straight from the registers: floats, of which the four lanes of a row
// fill whole sectors. They wait for the merge of parts in the workspace p.out [splits, B, H, Lq, Dv].
template <class C, int M16, int O8, class Real>
DEV void write_part(const ForwardParams& p, const ForwardWork& work, i64 first, int first_column,
                    const Accumulator<M16, O8, Real>& o, const Real (&inverse)[M16][2]) {
    const int lane = lane_id(), columns = p.shape.head_dim_v;
    const int row = work.tile * C::BLOCK_Q + warp_id() * (16 * M16) + lane / 4;
#pragma unroll
    for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row + 16 * m + 8 * half;
            if (i >= p.shape.len_q) continue;
            Real* to = (Real*)p.out + (first + i) * columns;
#pragma unroll
            for (int n = 0; n < O8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column =
                        first_column + output_column<typename C::Element>(n, e, lane);
                    if (column < columns) to[column] = o.x[m][n][2 * half + e] * inverse[m][half];
                }
        }
    __syncwarp();  // repairs come from other lanes
}

// Adds to a part what was left out of it; see add_non_finite.
template <class C> DEV void repair_part(const ForwardParams& p, const ForwardWork& work, i64 first,
                                        int first_column,
                                        const GlobalRows<typename C::Element::Storage>& v_gmem,
                                        Range keys, const typename C::Mask& mask) {
    using Real = typename C::Element::Real;
    constexpr int WARP_Q = ForwardLayout<C>::WARP_Q;
    const int first_row = work.tile * C::BLOCK_Q + warp_id() * WARP_Q;
    each_non_finite<typename C::Element>(
        v_gmem, keys, ForwardLayout<C>::PART, [&](int key, int column, Real x) {
#pragma unroll 1
            for (int i = first_row; i < min(first_row + WARP_Q, p.shape.len_q); ++i)
                if (mask.keep(i, key))
                    ((Real*)p.out)[(first + i) * p.shape.head_dim_v + first_column + column] += x;
        });
}

// Divides by the sums; writes lse and the rows of one warp. `repaired`: some tile that the mask
// cuts held infinities or NaNs in V, which the pairs that see them get back here.
template <class C, int M16, int O8, class Real>
DEV void write_output(const ForwardParams& p, int first_column, u32 out_smem,
                      const Accumulator<M16, O8, Real>& o, OnlineSoftmax<M16, Real>& softmax,
                      bool repaired) {
    using L = ForwardLayout<C>;
    using OutTile = typename L::OutTile;
    const Shape& shape = p.shape;
    const ForwardWork work = forward_work<C>(p);
    const int first_row = work.tile * C::BLOCK_Q, row = warp_id() * L::WARP_Q;

    Real inverse[M16][2], lse[M16][2];
    // One of the parts has the sink.
    const Real sink = work.split == 0 ? sink_log2<C>(p, work.head) : Real(neg_infinity());
    softmax.template finish<C::SINKS>(inverse, lse, sink);
    i64 first = statistics_row<C>(p, work, work.head);  // of the head, in lse
    if constexpr (C::SPLIT) first += (i64)work.split * shape.batch * shape.heads * shape.len_q;
    Real* lse_gmem = (Real*)p.lse + first;
#pragma unroll
    for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = first_row + row + m * 16 + half * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && i < shape.len_q) lse_gmem[i] = lse[m][half];
            if constexpr (C::DROPOUT) inverse[m][half] *= dropout::factor_of<Real>(p);
        }

    if constexpr (C::SPLIT) {
        write_part<C>(p, work, first, first_column, o, inverse);
    } else {
        __syncwarp();  // every lane has read its Q, which the output now overwrites
        accumulator_to_shared<typename C::Element, OutTile>(out_smem, row, o, inverse);
        __syncwarp();
    }
    if (repaired) {
        const typename C::Mask mask(p, work, work.head);
        const Range rows{first_row, first_row + C::BLOCK_Q};
        const Range tiles = own_key_tiles<C>(p, work, mask, rows);
        const auto v_gmem = value_rows<C>(p, work, first_column);
        for (int tile = tiles.begin; tile < tiles.end; tile = mask.next_tile(tile + 1, tiles.end)) {
            const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
            if (!mask.isolates(rows, keys, tile)) continue;
            if constexpr (C::SPLIT)
                repair_part<C>(p, work, first, first_column, v_gmem, keys, mask);
            else
                add_non_finite<typename C::Element, OutTile, L::WARP_Q>(
                    out_smem, row, v_gmem, keys, Real(1),
                    [&](int r, int key) { return mask.keep(first_row + r, key); });
        }
        __syncwarp();
    }
    if constexpr (!C::SPLIT)
        store_rows<OutTile, L::WARP_Q, C::VECTOR_ONLY>(output_rows<C>(p, work, first_column),
                                                       out_smem, row, first_row);
}

// One tile of rows of one head, output columns from first_column on.
template <class C> DEV void forward_tile(const ForwardParams& p, int first_column) {
    using L = ForwardLayout<C>;
    using Real = typename L::Real;
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 smem = shared_address(shared_memory);

    // Which rows, which keys
    const Shape& shape = p.shape;
    const ForwardWork work = forward_work<C>(p);
    const int first_row = work.tile * C::BLOCK_Q;
    const auto rows = [&] {
        const int first = opaque(first_row);
        return Range{first, first + C::BLOCK_Q};
    };
    const typename C::Mask mask(p, work, work.head);
    const typename C::Score score = make_score<C>(p, work, work.head);
    const Range tiles = own_key_tiles<C>(p, work, mask, rows());

    // Start the copies, prepare Q
    TileLoader<typename L::QTile, L::THREADS, C::VECTOR_ONLY> q_loader(
        head_rows<typename L::Storage>(p.q, p.q_strides, work, work.head, shape.len_q,
                                       shape.head_dim, shape.flags & FLAG_Q_VECTOR));
    KeyValuePipeline<C> pipeline(p, work, first_column, smem, tiles.end);
    q_loader.fetch(smem + L::Q, first_row);
    cp_async_commit();
    pipeline.start(tiles.begin);
    q_loader.template land<1>(smem + L::Q);
    __syncthreads();
    if (C::Score::FOLDED && score.negative()) {
        // The maximum is taken of raw products, which must therefore grow with the logits.
        negate<typename L::QTile, L::THREADS>(smem + L::Q);
        __syncthreads();
    }
    const Queries<C> q(smem + L::Q);

    // S = Q K^T, P = softmax(S), O = P V, one tile of keys at a time
    Accumulator<L::M16, C::BLOCK_K / 8, Real> s;
    Accumulator<L::M16, L::PART / 8, Real> o;
    OnlineSoftmax<L::M16, Real> softmax(score.folded_factor());
    bool repaired = false;
    o.zero();
    for (int tile = tiles.begin, next; tile < tiles.end; tile = next) {
        next = mask.next_tile(tile + 1, tiles.end);
        const Range tile_keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
        const u32 k_smem = pipeline.k(tile, next);
        query_key_product<C>(s, q, k_smem);
        const ScoreMap<L::M16, C::BLOCK_K / 8, Real> map{s, first_row, tile_keys.begin};
        if constexpr (!C::Score::FOLDED) score.apply(map);
        if (mask.cuts(rows(), tile_keys, tile)) mask.hide(map, rows(), tile_keys);
        softmax.update(s, o);  // s becomes P
        if constexpr (C::DROPOUT) {
            const ForwardWork here = forward_work<C>(p);  // anew, as always
            drop_weights(dropout::Keep(p, here, here.head), s,
                         here.tile * C::BLOCK_Q + warp_id() * L::WARP_Q, tile_keys.begin);
        }
        const RoundedOperand<typename C::Element, L::M16, C::BLOCK_K / 8> probabilities(s);
        const u32 v_smem = pipeline.v(next);
        if (mask.isolates(rows(), tile_keys, tile))
            repaired |=
                remove_non_finite<typename C::Element, typename L::VTile, L::THREADS>(v_smem);
        add_probability_value_product<C>(o, probabilities, v_smem);
    }
    write_output<C>(p, first_column, smem + L::Q, o, softmax, repaired);
}

// The same with operands in slices, of which nothing stays in shared memory.
template <class C> DEV void forward_tile_by_slices(const ForwardParams& p, int first_column) {
    using L = ForwardLayout<C>;
    using Real = typename L::Real;
    using Element = typename C::Element;
    using Operands = Slices<C, C::BLOCK_Q, C::BLOCK_K>;
    static_assert(C::SHARED_BYTES == larger_of(Operands::BYTES, L::OutTile::BYTES) &&
                      L::VTile::BYTES <= C::SHARED_BYTES,
                  "forward_shared_bytes in _tuning_wide.py computes the same");
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 smem = shared_address(shared_memory);
    const Shape& shape = p.shape;
    const ForwardWork work = forward_work<C>(p);
    const int first_row = work.tile * C::BLOCK_Q;
    const Range rows{first_row, first_row + C::BLOCK_Q};
    const typename C::Mask mask(p, work, work.head);
    const typename C::Score score = make_score<C>(p, work, work.head);
    const auto q_gmem =
        head_rows<typename L::Storage>(p.q, p.q_strides, work, work.head, shape.len_q,
                                       shape.head_dim, shape.flags & FLAG_Q_VECTOR);
    const auto k_gmem =
        head_rows<typename L::Storage>(p.k, p.k_strides, work, work.head / shape.group, shape.len_k,
                                       shape.head_dim, shape.flags & FLAG_K_VECTOR);

    Accumulator<L::M16, C::BLOCK_K / 8, Real> s;
    Accumulator<L::M16, L::PART / 8, Real> o;
    OnlineSoftmax<L::M16, Real> softmax(score.folded_factor());
    bool repaired = false;
    o.zero();
    const Range tiles = own_key_tiles<C>(p, work, mask, rows);
    for (int tile = tiles.begin; tile < tiles.end; tile = mask.next_tile(tile + 1, tiles.end)) {
        const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
        Operands::product(s, q_gmem, first_row, k_gmem, keys.begin, warp_id() * L::WARP_Q, smem);
        // The maximum is taken of raw products, which must grow with the logits.
        if (C::Score::FOLDED && score.negative()) s.negate();
        const ScoreMap<L::M16, C::BLOCK_K / 8, Real> map{s, first_row, keys.begin};
        if constexpr (!C::Score::FOLDED) score.apply(map);
        if (mask.cuts(rows, keys, tile)) mask.hide(map, rows, keys);
        softmax.update(s, o);  // s becomes P
        if constexpr (C::DROPOUT)
            drop_weights(dropout::Keep(p, work, work.head), s, first_row + warp_id() * L::WARP_Q,
                         keys.begin);
        const RoundedOperand<Element, L::M16, C::BLOCK_K / 8> probabilities(s);
        Operands::template load<typename L::VTile>(value_rows<C>(p, work, first_column), keys.begin,
                                                   smem);
        if (mask.isolates(rows, keys, tile))
            repaired |= remove_non_finite<Element, typename L::VTile, L::THREADS>(smem);
        add_probability_value_product<C>(o, probabilities, smem);
    }
    __syncthreads();  // the output is staged where V was
    write_output<C>(p, first_column, smem, o, softmax, repaired);
}

// Lengths that contradict themselves: NaN in every row, so that nobody takes the output for one.
// Here the blocks share out the rows of the arrays, whatever the tables say.
template <class C> DEV void write_nan(const ForwardParams& p, unsigned block = fresh_block_id()) {
    const Work work = decode_flat(p.schedule, 1, p.shape.heads, block);
    using Real = typename C::Element::Real;
    const Real nan = __int_as_float(0x7fffffff);
    auto* out_gmem = (typename C::Element::Storage*)p.out + work.head * p.out_strides.head;
    Real* lse_gmem = (Real*)p.lse + work.head * p.values.packed.total_q;
    for (int i = threadIdx.x; i < C::BLOCK_Q * C::HEAD_DIM_V; i += C::WARPS * 32) {
        const i64 row = (i64)work.tile * C::BLOCK_Q + i / C::HEAD_DIM_V;
        const int column = i % C::HEAD_DIM_V;
        if (row >= p.values.packed.total_q) break;
        if (column < p.shape.head_dim_v)
            out_gmem[row * p.out_strides.row + column] = C::Element::from_real(nan);
        if (column == 0) lse_gmem[row] = nan;
    }
}

// All columns of a tile's output, in as many walks as the accumulator needs.
template <class C> DEV void forward_columns(const ForwardParams& p) {
    constexpr int PART = ForwardLayout<C>::PART;
    if constexpr (SLICE<C> > 0) {
#pragma unroll 1
        for (int column = 0; column < p.shape.head_dim_v; column += PART) {
            if (column > 0) __syncthreads();  // operands go where the output was staged
            forward_tile_by_slices<C>(p, column);
        }
    } else {
        forward_tile<C>(p, 0);
        if constexpr (PART < C::HEAD_DIM_V)
            if (PART < p.shape.head_dim_v) {
                __syncthreads();  // Q goes where the output was staged
                forward_tile<C>(p, PART);
            }
    }
}

template <class C> DEV void forward(const ForwardParams& p) {
    if constexpr (C::PACKED) {
        if (packed::is_bad(p.options)) return write_nan<C>(p);
        const Work work = decode<C>(p, p.shape.heads);
        if (work.batch < 0) return;
        ForwardParams own = p;
        packed::enter<C>(own, work);
        forward_columns<C>(own);
    } else {
        forward_columns<C>(p);
    }
}
