// Products over head dims whose tiles do not fit shared memory: both operands come from global memory in
// slices of SLICE columns, are used at once and given up. Slow, as nothing stays for the next tile (most of
// it comes from L2), and the only way where a tile of 16 rows of each operand is too much.
#pragma once

#include "wide_products.cuh"

// Columns of a slice; 0 in kernels that keep whole tiles, whose Config does not speak of it.
template <class C, class = void> constexpr int SLICE = 0;
template <class C> constexpr int SLICE<C, decltype((void)C::SLICE)> = C::SLICE;

// From a column on.
template <class Storage> DEV GlobalRows<Storage> from_column(GlobalRows<Storage> rows, int first) {
    rows.base += first;
    rows.columns -= first;
    return rows;
}

__device__ constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <bool FIRST, class A, class B> struct Either {
    using Type = A;
};
template <class A, class B> struct Either<false, A, B> {
    using Type = B;
};
template <bool FIRST, class A, class B> using Chosen = typename Either<FIRST, A, B>::Type;

// A tile of A with a tile of B in shared memory, a slice of columns at a time.
template <class C, int ROWS_A, int ROWS_B> struct Slices {
    using Element = typename C::Element;
    using Storage = typename Element::Storage;
    using TileA = SharedTile<ROWS_A, SLICE<C>, Storage>;
    using TileB = SharedTile<ROWS_B, SLICE<C>, Storage>;
    static constexpr int BYTES = TileA::BYTES + TileB::BYTES, THREADS = C::WARPS * 32;

    // Copies rows from first_row on to `smem`, which everybody may read when it returns. What was there
    // must be read no more by anybody when it is called.
    template <class Tile> DEV void load(const GlobalRows<Storage>& gmem, int first_row, u32 smem) {
        start<Tile>(gmem, first_row, smem);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    }

    // scores = A B^T: of A the 16 M16 rows from a_row + warp_row on, of B all rows from b_row on.
    // All threads of the block; a barrier comes before and after the use of every slice.
    template <int M16, int N8, class Real>
    DEV void product(Accumulator<M16, N8, Real>& scores, const GlobalRows<Storage>& a, int a_row,
                     const GlobalRows<Storage>& b, int b_row, int warp_row, u32 smem) {
        static_assert(N8 * 8 == ROWS_B, "all rows of B");
        scores.zero();
#pragma unroll 1
        for (int column = 0; column < a.columns; column += SLICE<C>) {
            __syncthreads();  // every warp is through with what was there
            start<TileA>(from_column(a, column), a_row, smem);
            load<TileB>(from_column(b, column), b_row, smem + TileA::BYTES);
            multiply(scores, smem + warp_row * TileA::ROW_BYTES, smem + TileA::BYTES);
        }
        __syncthreads();
    }

  private:
    template <class Tile> DEV void start(const GlobalRows<Storage>& gmem, int first_row, u32 smem) {
        TileLoader<Tile, THREADS, C::VECTOR_ONLY> loader(gmem);
        loader.fetch(smem, first_row);
        if (!HAS_ASYNC_COPY) loader.template land<0>(smem);
    }
    template <int M16, int N8, class Real>
    DEV void multiply(Accumulator<M16, N8, Real>& scores, u32 a_smem, u32 b_smem) {
        if constexpr (wide::MULTIPLIES_BY_LANES<Element>)
            return wide::multiply_add_transposed<TileA, TileB>(scores, a_smem, b_smem);
        const u32 a_lane = lane_a<TileA>(a_smem), b_lane = lane_b<TileB>(b_smem);
#pragma unroll(Element::STEPS_AT_ONCE)
        for (int k = 0; k < SLICE<C>; k += 16) {
            typename Element::Operand a[M16], b;
#pragma unroll
            for (int m = 0; m < M16; ++m) load_a<TileA>(a[m], a_lane, 16 * m, k);
#pragma unroll
            for (int n = 0; n < N8; n += 2) {
                load_b<TileB>(b, b_lane, 8 * n, k);
#pragma unroll
                for (int m = 0; m < M16; ++m)
                    Element::multiply(scores.x[m][n], scores.x[m][n + 1], a[m], b);
            }
        }
    }
};
