// Keeping an infinity or NaN with the pairs that see it. Masked pairs have probability 0, but 0 *
// NaN = NaN: without care one bad value in a key would reach rows that must not see that key. Only
// tiles cut by the mask can have such pairs.
#pragma once

#include "masks.cuh"
#include "tile.cuh"

// Replaces infinities and NaNs of a landed tile (or of ROWS of its rows) by zeros; THREADS threads, of
// which this one is number `thread`. True if it found any.
template <class Element, class Tile, int THREADS, int ROWS = Tile::ROWS>
DEV bool remove_own_non_finite(u32 smem, int first_row = 0, unsigned thread = fresh_thread_id()) {
    constexpr int CHUNKS = Tile::COLUMNS / Tile::PER_CHUNK;
    bool found = false;
#pragma unroll 1
    for (unsigned i = thread; i < ROWS * CHUNKS; i += THREADS) {
        const u32 at = smem + Tile::offset(first_row + i / CHUNKS, i % CHUNKS * Tile::PER_CHUNK);
        const uint4 chunk = ld_shared_v4(at);
        const uint4 clean = Element::finite_chunk(chunk);
        if (clean.x == chunk.x && clean.y == chunk.y && clean.z == chunk.z && clean.w == chunk.w)
            continue;
        st_shared_v4(at, clean);
        found = true;
    }
    return found;
}

// The same by all threads of the block; true (for every thread) if there were any. The tile is ready
// for use after it: the vote is a barrier.
template <class Element, class Tile, int THREADS, int ROWS = Tile::ROWS>
DEV bool remove_non_finite(u32 smem, int first_row = 0) {
    return __syncthreads_or(remove_own_non_finite<Element, Tile, THREADS, ROWS>(smem, first_row));
}

// act(other, column, x) for every infinite or NaN element among the first `most` columns of rows
// `others`, shared out to the lanes of the calling warp by columns.
template <class Element, class Act>
DEV void each_non_finite(const GlobalRows<typename Element::Storage>& source, Range others,
                         int most, Act act) {
    const int columns = min(source.columns, most);
#pragma unroll 1
    for (int other = others.begin; other < min(others.end, source.rows); ++other)
#pragma unroll 1
        for (int column = fresh_thread_id() % 32; column < columns; column += 32) {
            const auto x = ld_global(source.base + other * source.stride + column);
            if (!Element::is_finite_value(x)) act(other, column, Element::to_real(x));
        }
}

// Adds what remove_non_finite took out to the pairs that see it: finished[row, column] += factor *
// source[other, column] for every visible (row, other) and every infinite or NaN source element, on
// a finished tile of results in shared memory, of which this warp owns rows [row, row + ROWS). No
// probability is needed: NaN stays NaN and infinity times anything positive infinity. Rare, hence
// compact: nothing in it is indexed by a register, and it can follow a loop that has none left.
//   source   the rows that were repaired, in global memory, `others` among them
//   keep     (row of the tile, other) -> bool
template <class Element, class Tile, int ROWS, class Real, class Keep>
DEV void add_non_finite(u32 smem, int row, const GlobalRows<typename Element::Storage>& source,
                        Range others, Real factor, Keep keep) {
    constexpr int PER_CHUNK = Tile::PER_CHUNK;
    each_non_finite<Element>(source, others, Tile::COLUMNS, [&](int other, int column, Real x) {
#pragma unroll 1
        for (int r = row; r < row + ROWS; ++r) {
            if (!keep(r, other)) continue;
            const u32 at = smem + Tile::offset(r, column / PER_CHUNK * PER_CHUNK) +
                           column % PER_CHUNK * (int)sizeof(typename Element::Storage);
            typename Element::Storage before;
            ld_shared(before, at);
            st_shared(at, Element::from_real(Element::to_real(before) + factor * x));
        }
    });
}
