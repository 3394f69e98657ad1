// Attention forward with mma.sync: one block per (head, tile of query rows), a walk over the key tiles those rows see.
#pragma once

#include "finite.cuh"
#include "masks.cuh"
#include "score.cuh"
#include "softmax.cuh"

// Shared memory of a block: Q | K stages | V stages. The output is staged where Q was.
template <class C>
struct ForwardLayout {
    using QTile = SharedTile<C::BLOCK_Q, C::HEAD_DIM>;
    using KTile = SharedTile<C::BLOCK_K, C::HEAD_DIM>;
    using VTile = SharedTile<C::BLOCK_K, C::HEAD_DIM_V>;
    using OutTile = SharedTile<C::BLOCK_Q, C::HEAD_DIM_V>;
    static constexpr int THREADS = C::WARPS * 32, WARP_Q = C::BLOCK_Q / C::WARPS, M16 = WARP_Q / 16;
    static constexpr int Q = 0, K = QTile::BYTES, V = K + C::STAGES * KTile::BYTES;
    static constexpr int BYTES = V + C::STAGES * VTile::BYTES;

    static_assert(BYTES == C::SHARED_BYTES, "forward_shared_bytes in _tuning.py computes the same sum");
    static_assert(WARP_Q % 16 == 0 && C::BLOCK_K % 16 == 0, "mma works on 16 rows and 16 keys");
    static_assert(QTile::SLAB_BYTES == OutTile::SLAB_BYTES && C::HEAD_DIM_V <= C::HEAD_DIM,
                  "a warp stages its output over its own rows of Q, which nobody else reads");
};

// Brings K and V tiles to shared memory ahead of their use. Per tile: k(tile), products with K, v(tile), products with V.
//   1 stage    V is under way during Q K^T, the next K during softmax and P V; two barriers per tile
//   2 or more  whole tiles are under way during a whole tile step; one barrier per tile
template <class C>
struct KeyValuePipeline {
    using L = ForwardLayout<C>;
    TileLoader<typename L::KTile, L::THREADS, C::VECTOR_ONLY> k_loader;
    TileLoader<typename L::VTile, L::THREADS, C::VECTOR_ONLY> v_loader;
    u32 k_smem, v_smem;
    int end;        // tiles [.., end) exist
    int stage = 0;  // of the tile in use
    static_assert(C::STAGES == 1 || HAS_ASYNC_COPY, "tiles that travel through registers need no second stage");

    DEV_METHOD KeyValuePipeline(const GlobalRows& k_gmem, const GlobalRows& v_gmem, u32 smem, int end_tile)
        : k_loader(k_gmem), v_loader(v_gmem), k_smem(smem + L::K), v_smem(smem + L::V), end(end_tile) {}

    // Groups of copies under way after start.
    static constexpr int STARTED = C::STAGES == 1 ? 1 : C::STAGES - 1;

    DEV_METHOD void start(int tile) {
#pragma unroll
        for (int ahead = 0; ahead < STARTED; ++ahead) fetch(tile + ahead, ahead, C::STAGES > 1);
    }
    DEV_METHOD u32 k(int tile) {
        if constexpr (C::STAGES == 1) {
            k_loader.template land<0>(k_smem);
            __syncthreads();  // K is visible, and every warp is done with the V before
            v_loader.fetch(v_smem, tile * C::BLOCK_K);
            cp_async_commit();
            return k_smem;
        } else {
            k_loader.template land<C::STAGES - 2>(k_smem);
            __syncthreads();  // K and V are visible, and every warp is done with the tile before
            const int free = stage == 0 ? C::STAGES - 1 : stage - 1;
            fetch(tile + C::STAGES - 1, free, true);
            return k_smem + stage * L::KTile::BYTES;
        }
    }
    DEV_METHOD u32 v(int tile) {
        if constexpr (C::STAGES == 1) {
            v_loader.template land<0>(v_smem);
            __syncthreads();  // V is visible, and every warp is done with K
            fetch(tile + 1, 0, false);
            return v_smem;
        } else {
            const u32 here = v_smem + stage * L::VTile::BYTES;
            stage = stage == C::STAGES - 1 ? 0 : stage + 1;
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

// The A operand of Q K^T for one warp: its rows of Q, from registers or read again for every key tile.
template <class C>
struct Queries {
    using L = ForwardLayout<C>;
    static constexpr int STEPS = C::HEAD_DIM / 16;
    u32 lane;
    u32 kept[C::Q_IN_REGISTERS ? STEPS : 1][L::M16][4];

    DEV_METHOD explicit Queries(u32 smem) : lane(lane_major<typename L::QTile>(smem)) {
        lane += warp_id() * L::WARP_Q * L::QTile::ROW_BYTES;
        if constexpr (C::Q_IN_REGISTERS)
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int m = 0; m < L::M16; ++m) load_a<typename L::QTile>(kept[step][m], lane, m * 16, step * 16);
    }
    DEV_METHOD void load(u32 (&a)[4], int m, int step) const {
        if constexpr (C::Q_IN_REGISTERS)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = kept[step][m][i];
        else
            load_a<typename L::QTile>(a, lane, m * 16, step * 16);
    }
};

// S = Q K^T
template <class C, int M16, int N8>
DEV void query_key_product(Accumulator<M16, N8>& s, const Queries<C>& q, u32 k_smem) {
    using KTile = typename ForwardLayout<C>::KTile;
    const u32 lane = lane_minor<KTile>(k_smem);
    s.zero();
#pragma unroll
    for (int step = 0; step < C::HEAD_DIM / 16; ++step) {
        u32 a[M16][4];
#pragma unroll
        for (int m = 0; m < M16; ++m) q.load(a[m], m, step);
#pragma unroll
        for (int n = 0; n < N8; n += 2) {
            u32 b[4];
            load_b<KTile>(b, lane, n * 8, step * 16);
#pragma unroll
            for (int m = 0; m < M16; ++m) {
                C::Element::mma(s.x[m][n], a[m], b[0], b[1]);
                C::Element::mma(s.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// O += P V
template <class C, int M16, int N8, int O8>
DEV void add_probability_value_product(Accumulator<M16, O8>& o, const RoundedOperand<typename C::Element, M16, N8>& p, u32 v_smem) {
    using VTile = typename ForwardLayout<C>::VTile;
    const u32 lane = lane_major<VTile>(v_smem);
#pragma unroll
    for (int step = 0; step < N8 / 2; ++step) {
#pragma unroll
        for (int n = 0; n < O8; n += 2) {
            u32 b[4];
            load_b_trans<VTile>(b, lane, step * 16, n * 8);
#pragma unroll
            for (int m = 0; m < M16; ++m) {
                C::Element::mma(o.x[m][n], p.a[m][step], b[0], b[1]);
                C::Element::mma(o.x[m][n + 1], p.a[m][step], b[2], b[3]);
            }
        }
    }
}

// A warp's tile of scores and where it lies: map(f) makes every x of it f(x, row, key).
template <int M16, int N8>
struct ScoreMap {
    Accumulator<M16, N8>& s;
    int first_row, first_key;

    template <class Function>
    DEV_METHOD void operator()(Function f) const {
        const int lane = fresh_thread_id() % 32;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    s.x[m][n][e] = f(s.x[m][n][e], first_row + m * 16 + e / 2 * 8 + lane / 4,
                                     first_key + n * 8 + lane % 4 * 2 + e % 2);
    }
};

// Flips the sign of every element of a tile; all threads, between barriers.
template <class Tile, int THREADS>
DEV void negate(u32 smem) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::BYTES / 4; i += THREADS)
        st_shared_u32(smem + i * 4, ld_shared_u32(smem + i * 4) ^ 0x80008000u);
}

template <class C>
DEV void forward(const ForwardParams& p) {
    using L = ForwardLayout<C>;
    using Element = typename C::Element;
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 smem = shared_address(shared_memory);

    // Which rows, which keys
    const Shape& shape = p.shape;
    const Work work = decode(p.schedule, shape, shape.heads);
    const int first_row = work.tile * C::BLOCK_Q, warp_row = first_row + warp_id() * L::WARP_Q;
    const Range rows{first_row, first_row + C::BLOCK_Q}, warp_rows{warp_row, warp_row + L::WARP_Q};
    const typename C::Mask mask(shape);
    const typename C::Score score = make_score<C>(p, work, work.head);
    const Range keys = mask.keys(rows);
    const int first_tile = keys.begin / C::BLOCK_K;
    const int end_tile = keys.empty() ? first_tile : (keys.end + C::BLOCK_K - 1) / C::BLOCK_K;

    const auto gmem = [&](const void* array, const Strides& strides, int head, int length, int columns, int flag) {
        return head_rows(array, strides, work, head, length, columns, shape.flags & flag);
    };
    const int head_kv = work.head / shape.group;
    const GlobalRows q_gmem = gmem(p.q, p.q_strides, work.head, shape.len_q, shape.head_dim, FLAG_Q_VECTOR);
    const GlobalRows k_gmem = gmem(p.k, p.k_strides, head_kv, shape.len_k, shape.head_dim, FLAG_K_VECTOR);
    const GlobalRows v_gmem = gmem(p.v, p.v_strides, head_kv, shape.len_k, shape.head_dim_v, FLAG_V_VECTOR);

    // Start the copies, prepare Q
    TileLoader<typename L::QTile, L::THREADS, C::VECTOR_ONLY> q_loader(q_gmem);
    KeyValuePipeline<C> pipeline(k_gmem, v_gmem, smem, end_tile);
    q_loader.fetch(smem + L::Q, first_row);
    cp_async_commit();
    pipeline.start(first_tile);
    q_loader.template land<KeyValuePipeline<C>::STARTED>(smem + L::Q);
    __syncthreads();
    float log2_per_score = 1.f;  // scores are already in log2 units
    if constexpr (C::Score::FOLDED) {
        log2_per_score = fabsf(score.factor);
        if (score.factor < 0.f) {  // the maximum must be taken of scores that grow with the logits
            negate<typename L::QTile, L::THREADS>(smem + L::Q);
            __syncthreads();
        }
    }
    const Queries<C> q(smem + L::Q);

    Accumulator<L::M16, C::BLOCK_K / 8> s;
    Accumulator<L::M16, C::HEAD_DIM_V / 8> o;
    OnlineSoftmax<L::M16> softmax(log2_per_score);
    o.zero();
    for (int tile = first_tile; tile < end_tile; ++tile) {
        const Range tile_keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
        const u32 k_smem = pipeline.k(tile);
        query_key_product<C>(s, q, k_smem);
        const ScoreMap<L::M16, C::BLOCK_K / 8> map{s, warp_row, tile_keys.begin};
        if constexpr (!C::Score::FOLDED) score.apply(map);
        if (mask.cuts(warp_rows, tile_keys))
            map([&](float x, int row, int key) { return mask.keep(row, key) ? x : neg_infinity(); });
        softmax.update(s, o);  // s becomes P
        const RoundedOperand<Element, L::M16, C::BLOCK_K / 8> rounded(s);
        const u32 v_smem = pipeline.v(tile);
        const bool repaired = mask.isolates(rows, tile_keys) &&
                              remove_non_finite<Element, typename L::VTile, L::THREADS>(v_smem);
        add_probability_value_product<C>(o, rounded, v_smem);
        if (repaired)
            add_non_finite<Element>(o, v_gmem, tile_keys, warp_row,
                                    [&](int row, int key) { return mask.keep(row, key); });
    }

    // Divide, write lse and out
    float inverse[L::M16][2], lse[L::M16][2];
    softmax.finish(inverse, lse);
    const Work again = decode(p.schedule, shape, shape.heads);
    float* lse_gmem = p.lse + ((i64)again.batch * shape.heads + again.head) * shape.len_q;
#pragma unroll
    for (int m = 0; m < L::M16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + m * 16 + half * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && row < shape.len_q) lse_gmem[row] = lse[m][half];
        }
    __syncwarp();  // every lane has read its Q, which the output now overwrites
    accumulator_to_shared<Element, typename L::OutTile>(smem + L::Q, warp_row - first_row, o, inverse);
    __syncwarp();
    const GlobalRows out_gmem = head_rows(p.out, p.out_strides, again, again.head, shape.len_q, shape.head_dim_v,
                                          shape.flags & FLAG_OUT_VECTOR);
    store_rows<typename L::OutTile, L::WARP_Q, C::VECTOR_ONLY>(out_gmem, smem + L::Q, warp_row - first_row,
                                                               again.tile * C::BLOCK_Q);
}
