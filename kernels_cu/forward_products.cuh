// How K and V reach shared memory, and the two products of forward.
#pragma once

#include "forward_layout.cuh"
#include "softmax.cuh"

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
