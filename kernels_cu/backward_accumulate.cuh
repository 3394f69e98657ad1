// dQ gathered during the pass over the keys: every key tile adds its share dS K to a float32
// workspace by reductions in global memory. That saves forming the scores a second time; the order
// of the sums, and with it the last bits of dQ, differs from run to run.
#pragma once

#include "backward_tile.cuh"

namespace backward {

template <class C> struct QueryAccumulator {
    using Element = typename C::Element;
    using TileK = SharedTile<C::BLOCK_K, C::HEAD_DIM>;
    // dS^T of a whole tile of rows: keys come from all warps, so it has to pass through shared
    // memory.
    using TileDs = SharedTile<C::BLOCK_K, (C::BLOCK_Q < 32 ? 32 : C::BLOCK_Q)>;
    static constexpr int THREADS = C::WARPS * 32;

    // A warp makes 16 rows of dQ, `TOGETHER` blocks of 16 columns at a time; PARTS warps share the
    // rows.
    static constexpr int STRIPS = C::BLOCK_Q / 16,
                         PARTS = C::WARPS > STRIPS ? C::WARPS / STRIPS : 1;
    static_assert(!C::ACCUMULATE_DQ || C::WARPS % STRIPS == 0,
                  "every strip of 16 rows has the same number of warps");
    static constexpr int BLOCKS = C::HEAD_DIM / 16, SHARE = (BLOCKS + PARTS - 1) / PARTS;
    static constexpr int TOGETHER = SHARE >= 4 && BLOCKS % 4 == 0   ? 4
                                    : SHARE >= 3 && BLOCKS % 3 == 0 ? 3
                                    : SHARE >= 2 && BLOCKS % 2 == 0 ? 2
                                                                    : 1;

    // Puts dS^T of this warp's keys and of 8 N8 rows from `column` on where `add` finds it.
    template <int M16, int N8>
    DEV void put(u32 smem, const Accumulator<M16, N8>& ds, int key, int column) {
        const int lane = fresh_thread_id() % 32;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int r = key + 16 * m + 8 * half + lane / 4;
                    st_shared_u32(smem + TileDs::offset(r, column + 8 * n) + lane % 4 * 4,
                                  Element::pack(ds.x[m][n][2 * half], ds.x[m][n][2 * half + 1]));
                }
    }

    // dq_accum[row, :] += dS K for the tile's rows below `rows`; after a barrier.
    DEV void add(float* dq_accum, int rows, int columns, u32 ds_smem, u32 k_smem) {
        const int warp = fresh_thread_id() / 32, strip = warp % STRIPS;
#pragma unroll 1
        for (int group = warp / STRIPS; group < BLOCKS / TOGETHER; group += PARTS) {
            const int first_column = group * TOGETHER * 16;
            Accumulator<1, 2 * TOGETHER> dq;
            dq.zero();
            const u32 ds_lane = lane_minor<TileDs>(ds_smem), k_lane = lane_major<TileK>(k_smem);
#pragma unroll 4
            for (int key = 0; key < C::BLOCK_K; key += 16) {
                u32 a_rmem[4];
                load_a_trans<TileDs>(a_rmem, ds_lane, key, strip * 16);
#pragma unroll
                for (int n = 0; n < TOGETHER; ++n) {
                    u32 b_rmem[4];
                    load_b_trans<TileK>(b_rmem, k_lane, key, first_column + 16 * n);
                    Element::mma(dq.x[0][2 * n], a_rmem, b_rmem[0], b_rmem[1]);
                    Element::mma(dq.x[0][2 * n + 1], a_rmem, b_rmem[2], b_rmem[3]);
                }
            }
            reduce(dq_accum, rows, columns, strip * 16, first_column, dq);
        }
    }

    template <int N8> DEV void reduce(float* dq_accum, int rows, int columns, int first_row,
                                      int first_column, const Accumulator<1, N8>& dq) {
        const int lane = fresh_thread_id() % 32;
        if constexpr (HAS_VECTOR_REDUCTION) {
            const int odd = lane & 1;
            // Neighbouring lanes swap, so that the even one has four columns of the upper row and
            // the odd one four of the lower: a quarter of the reductions.
            const int row = first_row + lane / 4 + 8 * odd;
            float* to = dq_accum + (i64)row * C::HEAD_DIM + first_column + (lane & 2) * 2;
#pragma unroll
            for (int n = 0; n < N8; ++n) {
                const float (&x)[4] = dq.x[0][n];
                const float p = __shfl_xor_sync(FULL_WARP, odd ? x[0] : x[2], 1);
                const float q = __shfl_xor_sync(FULL_WARP, odd ? x[1] : x[3], 1);
                const float4 sum =
                    odd ? make_float4(p, q, x[2], x[3]) : make_float4(x[0], x[1], p, q);
                if (row < rows && first_column + 8 * n < columns)
                    red_global_add_v4(to + 8 * n, sum);
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + lane / 4 + 8 * half;
                float* to = dq_accum + (i64)row * C::HEAD_DIM + first_column + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < N8; ++n)
                    if (row < rows && first_column + 8 * n < columns) {
                        red_global_add_f32(to + 8 * n, dq.x[0][n][2 * half]);
                        red_global_add_f32(to + 8 * n + 1, dq.x[0][n][2 * half + 1]);
                    }
            }
        }
    }

    // What repairs of K took out of dQ: a NaN or inf in a key spreads to exactly the rows that see
    // it. All of `rows` exist.
    template <class Mask> DEV void add_back(float* dq_accum, const GlobalRows<u16>& k_gmem,
                                            const Mask& mask, Range rows, Range keys) {
        const int count = (rows.end - rows.begin) * k_gmem.columns;
#pragma unroll 1
        for (int at = fresh_thread_id(); at < count; at += THREADS) {
            const int row = at / k_gmem.columns, column = at % k_gmem.columns;
            float sum = 0.f;
#pragma unroll 1
            for (int key = keys.begin; key < min(keys.end, k_gmem.rows); ++key) {
                const u16 bits = ld_global_u16(k_gmem.base + key * k_gmem.stride + column);
                if (!Element::is_finite_value(bits) && mask.keep(rows.begin + row, key))
                    sum += Element::to_real(bits);
            }
            if (sum != 0.f) red_global_add_f32(dq_accum + (i64)row * C::HEAD_DIM + column, sum);
        }
    }
};

// True, for every thread, if a landed tile holds a NaN or inf.
template <class Element, class Tile, int THREADS> DEV bool has_non_finite(u32 smem) {
    bool found = false;
#pragma unroll 1
    for (unsigned i = fresh_thread_id(); i < Tile::BYTES / 16; i += THREADS) {
        const uint4 chunk = ld_shared_v4(smem + i * 16);
        found |= chunk.x != finite_or_zero<Element>(chunk.x) ||
                 chunk.y != finite_or_zero<Element>(chunk.y) ||
                 chunk.z != finite_or_zero<Element>(chunk.z) ||
                 chunk.w != finite_or_zero<Element>(chunk.w);
    }
    return __syncthreads_or(found);
}

// Loads a repaired tile again. Rare, hence by elements: the usual way would need registers that the
// main loop does not have.
template <class Tile, int THREADS>
DEV void restore_tile(const GlobalRows<u16>& gmem, u32 smem, int first_row) {
#pragma unroll 1
    for (unsigned i = fresh_thread_id(); i < Tile::BYTES / 16; i += THREADS) {
        const int r = i / (Tile::COLUMNS / 8), c = i % (Tile::COLUMNS / 8) * 8;
        st_shared_v4(smem + Tile::offset(r, c), gather_chunk(gmem, first_row + r, c));
    }
}

}  // namespace backward
