// Products of accumulators and tiles of 32- and 64-bit elements.
#pragma once

#include "tile.cuh"

namespace wide {

// Without matrix instructions for the element (Turing) lanes multiply and add: what a lane of an accumulator needs
// of its rows and columns it reads from shared memory, where lanes that want the same share one access.
template <class Element> constexpr bool MULTIPLIES_BY_LANES =
    !HAS_ASYNC_COPY && sizeof(typename Element::Storage) > 2;

DEV void load_chunk(float (&x)[4], u32 address) {
    const float4 chunk = ld_shared_f32x4(address);
    x[0] = chunk.x, x[1] = chunk.y, x[2] = chunk.z, x[3] = chunk.w;
}
DEV void load_chunk(double (&x)[2], u32 address) {
    const double2 chunk = ld_shared_f64x2(address);
    x[0] = chunk.x, x[1] = chunk.y;
}
// Four neighbouring columns, the first a multiple of 4.
DEV void load_four(float (&x)[4], u32 address) { load_chunk(x, address); }
DEV void load_four(double (&x)[4], u32 address) {
    const double2 left = ld_shared_f64x2(address), right = ld_shared_f64x2(address ^ 16);
    x[0] = left.x, x[1] = left.y, x[2] = right.x, x[3] = right.y;
}

// scores += A B^T over the columns of both, 16 M16 rows of A from a_smem on, 8 N8 rows of B from b_smem on.
// Half a slab at a time: a loop that the compiler gets through.
template <class TileA, class TileB, int M16, int N8, class Real>
DEV void multiply_add_transposed(Accumulator<M16, N8, Real>& scores, u32 a_smem, u32 b_smem) {
    constexpr int PER_CHUNK = TileA::PER_CHUNK, HALF = TileA::SLAB / 2;
    static_assert(TileA::COLUMNS == TileB::COLUMNS, "both operands run over the head dim");
    const int lane = lane_id();
    const u32 a_lane = a_smem + TileA::offset(lane / 4, 0);
    const u32 b_lane = b_smem + TileB::offset(lane % 4 * 2, 0);
#pragma unroll 1
    for (int first = 0; first < TileA::COLUMNS; first += HALF) {
        const u32 a_half = TileA::moved(a_lane, 0, first), b_half = TileB::moved(b_lane, 0, first);
#pragma unroll
        for (int chunk = 0; chunk < HALF / PER_CHUNK; ++chunk) {
            const u32 a_at = a_half ^ chunk * 16, b_at = b_half ^ chunk * 16;
            Real a[M16][2][PER_CHUNK];
#pragma unroll
            for (int r = 0; r < 2 * M16; ++r)
                load_chunk(a[r / 2][r % 2], a_at + 8 * r * TileA::ROW_BYTES);
#pragma unroll
            for (int row = 0; row < 2 * N8; ++row) {
                const int n = row / 2, e = row % 2;
                Real b[PER_CHUNK];
                // The number that permutes the chunks of the next row differs in bit 2.
                load_chunk(b,
                           (e ? (b_at ^ 64) + TileB::ROW_BYTES : b_at) + 8 * n * TileB::ROW_BYTES);
#pragma unroll
                for (int m = 0; m < M16; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int i = 0; i < PER_CHUNK; ++i) {
                            Real& sum = scores.x[m][n][2 * half + e];
                            sum = fma_of(a[m][half][i], b[i], sum);
                        }
            }
        }
    }
}

// gradient += scores B, 8 N8 rows of B from b_smem on; of UNEVEN ones only the columns below `columns`, a multiple
// of 64. Columns of the gradient lie as load_b_trans would leave them: of 16 a lane has four neighbours.
template <class TileB, bool UNEVEN, int M16, int N8, class Real>
DEV void multiply_add(Accumulator<M16, TileB::COLUMNS / 8, Real>& gradient,
                      const Accumulator<M16, N8, Real>& scores, u32 b_smem, int columns) {
    const int lane = lane_id();
    // Rows 2 t and 2 t + 1 of every 8: the columns of the scores that lane t of four has.
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
        const u32 even = b_smem + TileB::offset(2 * t, lane % 4 * 4);
#pragma unroll
        for (int k = 0; k < 2 * N8; ++k) {
            const int n = k / 2, e = k % 2;
            Real row[M16][2];
#pragma unroll
            for (int r = 0; r < 2 * M16; ++r)
                row[r / 2][r % 2] =
                    __shfl_sync(FULL_WARP, scores.x[r / 2][n][r % 2 * 2 + e], (lane & ~3) + t);
            const u32 at = e ? (even ^ 64) + TileB::ROW_BYTES : even;
#pragma unroll
            for (int column = 0; column < TileB::COLUMNS; column += 16) {
                if (UNEVEN && column % 64 == 0 && column >= columns) break;
                Real b[4];
                load_four(b, TileB::moved(at, 8 * n, column));
#pragma unroll
                for (int m = 0; m < M16; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            Real& sum = gradient.x[m][column / 8 + i % 2][2 * half + i / 2];
                            sum = fma_of(row[m][half], b[i], sum);
                        }
            }
        }
    }
}

// The same by matrix instructions where there are some.
template <class Element, class TileB, bool UNEVEN, int M16, int N8, class Real>
DEV void multiply_part(Accumulator<M16, TileB::COLUMNS / 8, Real>& gradient,
                       const Accumulator<M16, N8, Real>& scores, u32 b_smem, int columns) {
    static_assert(!UNEVEN || TileB::COLUMNS % 64 == 0, "columns are asked for in 64s");
    if constexpr (MULTIPLIES_BY_LANES<Element>)
        return multiply_add<TileB, UNEVEN>(gradient, scores, b_smem, columns);
    const u32 b_lane = lane_b_trans<TileB>(b_smem);
#pragma unroll
    for (int k = 0; k < N8 / 2; ++k) {
        typename Element::Operand a_rmem[M16];
#pragma unroll
        for (int m = 0; m < M16; ++m) accumulator_to_a<Element>(a_rmem[m], scores, m, k);
#pragma unroll
        for (int n = 0; n < TileB::COLUMNS; n += 16) {
            if (UNEVEN && n % 64 == 0 && n >= columns) break;
            typename Element::Operand b_rmem;
            load_b_trans<TileB>(b_rmem, b_lane, 16 * k, n);
#pragma unroll
            for (int m = 0; m < M16; ++m)
                Element::multiply(gradient.x[m][n / 8], gradient.x[m][n / 8 + 1], a_rmem[m],
                                  b_rmem);
        }
    }
}

}  // namespace wide
