// Keeping an infinity or NaN with the pairs that see it. Masked pairs have probability 0, but 0 *
// NaN = NaN: without care one bad value in a key would reach rows that must not see that key. Only
// tiles cut by the mask can have such pairs.
#pragma once

#include "masks.cuh"
#include "tile.cuh"

// Replaces infinities and NaNs of a landed tile (or of ROWS of its rows) by zeros; all threads of
// the block. True (for every thread) if there were any. The tile is ready for use after it: the
// vote is a barrier.
template <class Element, class Tile, int THREADS, int ROWS = Tile::ROWS>
DEV bool remove_non_finite(u32 smem, int first_row = 0) {
    constexpr int CHUNKS = Tile::COLUMNS / Tile::PER_CHUNK;
    bool found = false;
#pragma unroll 1
    for (unsigned i = fresh_thread_id(); i < ROWS * CHUNKS; i += THREADS) {
        const u32 at = smem + Tile::offset(first_row + i / CHUNKS, i % CHUNKS * Tile::PER_CHUNK);
        const uint4 chunk = ld_shared_v4(at);
        const uint4 clean = Element::finite_chunk(chunk);
        if (clean.x == chunk.x && clean.y == chunk.y && clean.z == chunk.z && clean.w == chunk.w)
            continue;
        st_shared_v4(at, clean);
        found = true;
    }
    return __syncthreads_or(found);
}

// Adds what remove_non_finite took out to the pairs that see it: acc[row, column] += source[key,
// column] for every visible (row, key) and every infinite or NaN source element. No probability is
// needed: NaN stays NaN and infinity times anything positive infinity.
//   source      the tile's rows in global memory, `keys` among them
//   first_row   of this warp's accumulator
//   keep        (row, key) -> bool
template <class Element, int M16, int N8, class Keep>
DEV void add_non_finite(Accumulator<M16, N8, typename Element::Real>& acc,
                        const GlobalRows<typename Element::Storage>& source, Range keys,
                        int first_row, Keep keep) {
    using Real = typename Element::Real;
    constexpr int TOGETHER =
        4;  // column blocks per walk: all at once would need a register per load in flight
    const int lane = fresh_thread_id() % 32;
#pragma unroll
    for (int first = 0; first < N8; first += TOGETHER)
#pragma unroll 1
        for (int key = keys.begin; key < min(keys.end, source.rows); ++key) {
            const auto* row = source.base + key * source.stride;
            bool sees[M16][2];
#pragma unroll
            for (int m = 0; m < M16; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    sees[m][half] = keep(first_row + m * 16 + half * 8 + lane / 4, key);
#pragma unroll
            for (int n = first; n < min(N8, first + TOGETHER); ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = output_column<Element>(n, e, lane);
                    const auto x = column < source.columns ? ld_global(row + column)
                                                           : typename Element::Storage(0);
                    const Real removed =
                        Element::is_finite_value(x) ? Real(0) : Element::to_real(x);
#pragma unroll
                    for (int m = 0; m < M16; ++m)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            acc.x[m][n][2 * half + e] += sees[m][half] ? removed : Real(0);
                }
        }
}

// The same on a finished tile of output in shared memory, rows [row, row + ROWS) of it by
// one warp: compact, because nothing in it is indexed by a register.
template <class Element, class Tile, int ROWS, class Mask>
DEV void add_non_finite(u32 smem, int row, const GlobalRows<typename Element::Storage>& source,
                        Range keys, int first_row, const Mask& mask) {
    constexpr int PER_CHUNK = Tile::PER_CHUNK;
#pragma unroll 1
    for (int key = keys.begin; key < min(keys.end, source.rows); ++key)
#pragma unroll 1
        for (int column = fresh_thread_id() % 32; column < source.columns; column += 32) {
            const auto x = ld_global(source.base + key * source.stride + column);
            if (Element::is_finite_value(x)) continue;
#pragma unroll 1
            for (int r = row; r < row + ROWS; ++r) {
                if (!mask.keep(first_row + r, key)) continue;
                const u32 at = smem + Tile::offset(r, column / PER_CHUNK * PER_CHUNK) +
                               column % PER_CHUNK * (int)sizeof(x);
                typename Element::Storage before;
                ld_shared(before, at);
                st_shared(at, Element::from_real(Element::to_real(before) + Element::to_real(x)));
            }
        }
}
