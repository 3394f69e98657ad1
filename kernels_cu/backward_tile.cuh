// The steps that dK/dV and dQ share. Both kernels are the same loop with queries and keys exchanged:
//
//          rows (a warp owns 16 or 32)   columns (tiles stream)   accumulates
//   dkdv   keys:    K, V resident        queries: Q, dO           dV += P^T dO, dK += dS^T Q
//   dq     queries: Q, dO resident       keys:    K, V            dQ += dS K
//
// Scores are formed rows x columns, so dkdv works on S^T = K Q^T. The accumulator layout of two
// neighbouring 8-column blocks is the A layout of one 16-wide product step: P and dS go from the
// scores into the gradient products without leaving registers. That costs no shared memory, no
// barrier between the products and no sum across warps; the price is that the statistics of a
// query (lse, delta) lie along columns in dkdv and are read from shared memory.
#pragma once

#include "backward_hide.cuh"
#include "backward_work.cuh"
#include "dropout_transposed.cuh"
#include "finite.cuh"
#include "masks.cuh"
#include "score.cuh"
#include "tile.cuh"
#include "wide_slices.cuh"

namespace backward {

template <class Score> constexpr bool IS_GENERAL = false;
template <class Element, bool HAS_BIAS, class Modifier>
constexpr bool IS_GENERAL<score::General<Element, HAS_BIAS, Modifier>> = true;

// How many score columns to hold at a time, so that two score accumulators and the gradients fit
// the 255 registers of a thread with what addresses and operands need. Turing also stages copies
// there.
template <class C, int M16, int GRADIENT_COLUMNS, int BLOCK> DEV constexpr int chunk_columns() {
    using Element = typename C::Element;
    if constexpr (sizeof(typename Element::Storage) > 2) {
        const int registers = M16 * GRADIENT_COLUMNS / 8 * (int)sizeof(typename Element::Real);
        const bool options = !C::Mask::CONTIGUOUS || C::DROPOUT || C::PACKED;
        return BLOCK >= 32 && registers <= 64 && !options ? 32 : 16;
    }
    const int available = (HAS_ASYNC_COPY ? 191 : 127) - M16 * GRADIENT_COLUMNS / 2;
    int columns = available >= 64 * M16 ? 64 : available >= 32 * M16 ? 32 : 16;
    // What masks, dropout and sequences need to find their places, and general scores the addresses of
    // biases and parameters.
    if (!C::Mask::CONTIGUOUS || C::DROPOUT || C::PACKED) columns = columns < 32 ? columns : 32;
    if (IS_GENERAL<typename C::Score>) columns = columns < 64 || M16 > 1 ? 16 : 32;
    return columns < BLOCK ? columns : BLOCK;
}

// Starts a tile's copy. On Turing it is over when this returns.
template <class Loader> DEV void load(Loader& loader, u32 smem, int first_row) {
    loader.fetch(smem, first_row);
    if (!HAS_ASYNC_COPY) loader.template land<0>(smem);
}

// The address of row `row` of a tile, as a value of unknown origin: what a product makes of it is
// not kept for the next one.
template <class Tile> DEV u32 row_address(u32 smem, int row) {
    const u32 address = smem + row * Tile::ROW_BYTES;
    return HAS_ASYNC_COPY ? opaque(address)
                          : address;  // measured: Turing spills with it, not without
}

// scores += A B^T over the head dim, 16 M16 rows of A from a_smem on, 8 N8 rows of B from b_smem
// on.
template <class Element, class TileA, class TileB, int M16, int N8>
DEV void multiply_transposed(Accumulator<M16, N8, typename Element::Real>& scores, u32 a_smem,
                             u32 b_smem) {
    static_assert(TileA::COLUMNS == TileB::COLUMNS, "both operands run over the head dim");
    if constexpr (wide::MULTIPLIES_BY_LANES<Element>)
        return wide::multiply_add_transposed<TileA, TileB>(scores, a_smem, b_smem);
    const u32 a_lane = lane_a<TileA>(a_smem), b_lane = lane_b<TileB>(b_smem);
#pragma unroll(Element::STEPS_AT_ONCE)
    for (int k = 0; k < TileA::COLUMNS; k += 16) {
        typename Element::Operand a_rmem[M16];
#pragma unroll
        for (int m = 0; m < M16; ++m) load_a<TileA>(a_rmem[m], a_lane, 16 * m, k);
#pragma unroll
        for (int n = 0; n < N8; n += 2) {
            typename Element::Operand b_rmem;
            load_b<TileB>(b_rmem, b_lane, 8 * n, k);
#pragma unroll
            for (int m = 0; m < M16; ++m)
                Element::multiply(scores.x[m][n], scores.x[m][n + 1], a_rmem[m], b_rmem);
        }
    }
}

// gradient += scores B, the scores rounded to the element type, 8 N8 rows of B from b_smem on.
template <class Element, class TileB, int M16, int N8, class Real>
DEV void multiply(Accumulator<M16, TileB::COLUMNS / 8, Real>& gradient,
                  const Accumulator<M16, N8, Real>& scores, u32 b_smem) {
    wide::multiply_part<Element, TileB, false>(gradient, scores, b_smem, TileB::COLUMNS);
}

// P of one pair. lse_log2 is rounded, so for huge logits the difference may come out positive: P
// is at most 1. NaN must pass (a plain fminf would drop it).
template <class Real> DEV Real probability(Real logit_log2, Real lse_log2) {
    return exp2_of(min_or_nan(logit_log2 - lse_log2, Real(0)));
}

// A gradient to its rows in global memory, times `factor`: through the warp's own rows of a tile
// that it has no more use for. repair() may change them there.
template <class C, class Tile, int M16, class Real, class Repair>
DEV void store_gradient(const GlobalRows<typename Tile::Storage>& gmem, u32 smem, int row,
                        int first_row, const Accumulator<M16, Tile::COLUMNS / 8, Real>& acc,
                        Real factor, Repair repair) {
    Real factors[M16][2];
#pragma unroll
    for (int m = 0; m < M16; ++m) factors[m][0] = factors[m][1] = factor;
    __syncwarp();  // every lane has read its operands, which the gradient now overwrites
    accumulator_to_shared<typename C::Element, Tile>(smem, row, acc, factors);
    __syncwarp();
    repair();
    __syncwarp();
    store_rows<Tile, 16 * M16, C::VECTOR_ONLY>(gmem, smem, row, first_row);
}

// The sum of `x` over the block in a fixed order, valid in thread 0. `scratch`: one number per
// warp, no longer in use.
template <int WARPS, class Real> DEV Real block_sum(Real x, u32 scratch) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += shfl_xor(x, step);
    __syncthreads();
    if (lane_id() == 0) st_shared(scratch + (int)sizeof(Real) * warp_id(), x);
    __syncthreads();
    Real sum = 0;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < WARPS; ++warp) {
            Real share;
            ld_shared(share, scratch + (int)sizeof(Real) * warp);
            sum += share;
        }
    return sum;
}

// Columns of a gradient made at a time: an accumulator of more than 128 doubles per 16 rows does not
// fit the registers.
template <class C> DEV constexpr int part_columns(int columns) {
    return sizeof(typename C::Element::Real) == 8 && columns > 128 ? columns / 2 : columns;
}

}  // namespace backward
