// Tiles in shared memory: where an element lies, how global rows get there, how fragments come out.
// Tiles of 32- and 64-bit elements have the same interface (wide_tile.cuh).
#pragma once

#include "element.cuh"
#include "wide_element.cuh"

// A [ROWS, COLUMNS] tile kept as slabs of 64 columns (128-byte rows), or 32 where COLUMNS is no
// multiple of 64. Inside a slab the 16-byte chunks of a row are permuted by XOR with the row
// number, so that 8 rows at one column (ldmatrix) and 8 chunks of one row (copies) both touch all
// 32 banks once. Tile addresses are multiples of 128.
template <int ROWS_, int COLUMNS_, class Storage_ = u16> struct SharedTile;

template <int ROWS_, int COLUMNS_> struct SharedTile<ROWS_, COLUMNS_, u16> {
    using Storage = u16;
    static_assert(ROWS_ % 8 == 0 && COLUMNS_ % 32 == 0,
                  "the swizzle repeats every 8 rows; slabs have 32 or 64 columns");
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
    static constexpr int SLAB = COLUMNS % 64 == 0 ? 64 : 32, SLABS = COLUMNS / SLAB;
    static constexpr int PER_CHUNK = 8;      // elements in 16 bytes
    static constexpr int CHUNKS = SLAB / 8;  // 16-byte chunks in a row of a slab
    static constexpr int ROW_BYTES = SLAB * 2, SLAB_BYTES = ROWS * ROW_BYTES,
                         BYTES = SLABS * SLAB_BYTES;

    // Byte offset of the chunk that begins at (row, column); column is a multiple of 8.
    DEV u32 offset(int row, int column) {
        const int chunk = column % SLAB / 8;
        const int place = SLAB == 64 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
        return column / SLAB * SLAB_BYTES + row * ROW_BYTES + place * 16;
    }
    // Moves an address by (row, column), multiples of 8 and 16. With constants this is one XOR (or
    // none) and an immediate.
    DEV u32 moved(u32 address, int row, int column) {
        return (address ^ (column % SLAB * 2)) + column / SLAB * SLAB_BYTES + row * ROW_BYTES;
    }
};

// ---- fragments: every load_* reads the 16x16 block at (row, column) of the tile as stored -------
// A lane address is computed once per tile and warp (lane_a for load_a, ...); the loads move it. Of
// 16-bit tiles one lane address serves two kinds of load:
//   lane_major: load_a  (stored [m][k])  and  load_b_trans  (stored [k][n])
//   lane_minor: load_b  (stored [n][k])  and  load_a_trans  (stored [k][m])
// A comes out as the 4 registers of mma; B as two n8 operands: b[0], b[1] for columns 0-7, b[2],
// b[3] for 8-15.

template <class Tile> DEV u32 lane_major(u32 smem) {
    return smem + Tile::offset(lane_id() & 15, lane_id() >> 4 << 3);
}
template <class Tile> DEV u32 lane_minor(u32 smem) {
    return smem + Tile::offset((lane_id() & 7) + (lane_id() >> 4 << 3), lane_id() & 8);
}
template <class Tile> DEV u32 lane_a(u32 smem) {
    if constexpr (Tile::PER_CHUNK == 8)
        return lane_major<Tile>(smem);
    else
        return Tile::lane_rows(smem);
}
template <class Tile> DEV u32 lane_b(u32 smem) {
    if constexpr (Tile::PER_CHUNK == 8)
        return lane_minor<Tile>(smem);
    else
        return Tile::lane_rows(smem);
}
template <class Tile> DEV u32 lane_b_trans(u32 smem) {
    if constexpr (Tile::PER_CHUNK == 8)
        return lane_major<Tile>(smem);
    else
        return Tile::lane_row_pairs(smem);
}
template <class Tile> DEV void load_a(u32 (&a)[4], u32 lane_major, int row, int column) {
    ldmatrix_x4(a, Tile::moved(lane_major, row, column));
}
template <class Tile> DEV void load_b_trans(u32 (&b)[4], u32 lane_major, int row, int column) {
    ldmatrix_x4_trans(b, Tile::moved(lane_major, row, column));
}
template <class Tile> DEV void load_b(u32 (&b)[4], u32 lane_minor, int row, int column) {
    ldmatrix_x4(b, Tile::moved(lane_minor, row, column));
}
template <class Tile> DEV void load_a_trans(u32 (&a)[4], u32 lane_minor, int row, int column) {
    ldmatrix_x4_trans(a, Tile::moved(lane_minor, row, column));
}

// Accumulators of a warp: [M16][N8][4] numbers. Element e of a block: row lane/4 + 8*(e/2), column
// 2*(lane%4) + e%2.
template <int M16, int N8, class Real = float> struct Accumulator {
    Real x[M16][N8][4];

    DEV_METHOD void zero() {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
    }
    DEV_METHOD void negate() {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[m][n][e] = -x[m][n][e];
    }
};

// Columns 16*step .. of an accumulator as the A operand of the next product: the layouts agree,
// only rounding is needed.
template <class Element, int M16, int N8>
DEV void accumulator_to_a(u32 (&a)[4], const Accumulator<M16, N8>& acc, int m, int step) {
    const float (&left)[4] = acc.x[m][2 * step];
    const float (&right)[4] = acc.x[m][2 * step + 1];
    a[0] = Element::pack(left[0], left[1]);
    a[1] = Element::pack(left[2], left[3]);
    a[2] = Element::pack(right[0], right[1]);
    a[3] = Element::pack(right[2], right[3]);
}

// The A operands of the next product made of an accumulator: the layouts agree, only rounding is
// needed.
template <class Element, int M16, int N8, class Storage = typename Element::Storage>
struct RoundedOperand;

template <class Element, int M16, int N8> struct RoundedOperand<Element, M16, N8, u16> {
    u32 a[M16][N8 / 2][4];  // [.][k16 step]

    DEV_METHOD explicit RoundedOperand(const Accumulator<M16, N8>& acc) {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    a[m][n / 2][n % 2 * 2 + half] =
                        Element::pack(acc.x[m][n][2 * half], acc.x[m][n][2 * half + 1]);
    }
    DEV_METHOD void load(u32 (&to)[4], int m, int step) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = a[m][step][i];
    }
};

// Word j of lane i of every four lanes becomes word i of lane j.
DEV void transpose_4x4(u32 (&word)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = lane_id() & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const u32 got = __shfl_xor_sync(FULL_WARP, upper ? word[i] : word[i + step], step);
            if (upper)
                word[i] = got;
            else
                word[i + step] = got;
        }
    }
}

// ---- global memory ------------------------------------------------------------------------------

// [rows, columns] of one head: element (r, c) at base[r * stride + c]. `vector`: every row begins on
// a 16-byte boundary and is whole pieces of 16 bytes.
template <class Storage_> struct GlobalRows {
    using Storage = Storage_;
    Storage* base;
    i64 stride;
    int rows, columns;
    bool vector;
};

// The 16-byte chunk of `rows` at (row, column) gathered element by element; zero outside. For rows
// that are not aligned.
DEV uint4 gather_chunk(const GlobalRows<u16>& gmem, int row, int column) {
    u32 pair[4] = {0u, 0u, 0u, 0u};
    if (row < gmem.rows) {
        const u16* from = gmem.base + row * gmem.stride + column;
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (column + e < gmem.columns)
                pair[e / 2] |= (u32)ld_global_u16(from + e) << (e % 2 * 16);
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

#include "wide_tile.cuh"

// Copies rows [first_row, first_row + ROWS) of a head into a tile; rows and columns that do not
// exist become zero. All THREADS of the block take part. `fetch` starts (the destination must be
// free), `land` waits for this thread's share; a barrier makes it visible:
//     loader.fetch(smem, row);  cp_async_commit();  ...
//     loader.template land<PENDING>(smem);  __syncthreads();
// sm_80+: fetch issues cp.async, PENDING counts younger groups. Turing: fetch loads into registers,
// land stores them. Rows without 16-byte alignment are gathered by elements and stored at once
// (compact code; only when !VECTOR_ONLY).
template <class Tile, int THREADS, bool VECTOR_ONLY> struct TileLoader {
    static constexpr int PASS_ROWS = THREADS / Tile::CHUNKS;  // rows that all threads copy at once
    static constexpr int PASSES = (Tile::ROWS + PASS_ROWS - 1) / PASS_ROWS;
    // The swizzle repeats every 8 rows: with fewer at once a thread's place differs from pass to pass.
    static constexpr bool STEADY = PASS_ROWS % 8 == 0;

    using Rows = GlobalRows<typename Tile::Storage>;
    Rows gmem;
    // Wide tiles would take too many registers: they are stored at once.
    static constexpr bool STAGED = !HAS_ASYNC_COPY && Tile::PER_CHUNK == 8;
    uint4 staged[STAGED ? PASSES * Tile::SLABS : 1];
    // Of those only as many passes are under way as leave registers to a kernel in its main loop.
    static constexpr int AT_ONCE =
        HAS_ASYNC_COPY || STAGED || !STEADY || Tile::SLABS < 4 ? PASSES : 1;

    DEV_METHOD explicit TileLoader(const Rows& rows) : gmem(rows) {}

    DEV_METHOD bool vector() const { return VECTOR_ONLY || gmem.vector; }

    // On to an array that begins `elements` later, the next head for example.
    DEV_METHOD void advance(i64 elements) { gmem.base += elements; }

    DEV_METHOD void fetch(u32 smem, int first_row) {
        if (!vector()) return gather(smem, first_row);
        const unsigned thread = fresh_thread_id();
        const int row = thread / Tile::CHUNKS, column = thread % Tile::CHUNKS * Tile::PER_CHUNK;
        const u32 first_to = smem + Tile::offset(row, column);
        const auto* from = gmem.base + (first_row + row) * gmem.stride + column;
        const int left = gmem.rows - first_row - row;  // rows from this thread's first on
#pragma unroll(AT_ONCE)
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int slab = 0; slab < Tile::SLABS; ++slab) {
                if (Tile::ROWS % PASS_ROWS != 0 && row + pass * PASS_ROWS >= Tile::ROWS) continue;
                const bool exists =
                    pass * PASS_ROWS < left && slab * Tile::SLAB + column < gmem.columns;
                const auto* source = from + pass * PASS_ROWS * gmem.stride + slab * Tile::SLAB;
                const u32 to = (STEADY ? first_to + pass * PASS_ROWS * Tile::ROW_BYTES
                                       : smem + Tile::offset(row + pass * PASS_ROWS, column)) +
                               slab * Tile::SLAB_BYTES;
                if constexpr (HAS_ASYNC_COPY)
                    // Of 0 bytes, the address is not used.
                    cp_async_16(to, source, exists ? 16 : 0);
                else if constexpr (STAGED)
                    staged[pass * Tile::SLABS + slab] =
                        exists ? ld_global_v4(source) : make_uint4(0, 0, 0, 0);
                else
                    st_shared_v4(to, exists ? ld_global_v4(source) : make_uint4(0, 0, 0, 0));
            }
    }

    template <int PENDING> DEV_METHOD void land(u32 smem) {
        cp_async_wait<PENDING>();
        if (!STAGED || !vector()) return;
        const unsigned thread = fresh_thread_id();
        const int row = thread / Tile::CHUNKS, column = thread % Tile::CHUNKS * Tile::PER_CHUNK;
        const u32 to = smem + Tile::offset(row, column);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (int slab = 0; slab < Tile::SLABS; ++slab)
                if (Tile::ROWS % PASS_ROWS == 0 || row + pass * PASS_ROWS < Tile::ROWS)
                    st_shared_v4((STEADY ? to + pass * PASS_ROWS * Tile::ROW_BYTES
                                         : smem + Tile::offset(row + pass * PASS_ROWS, column)) +
                                     slab * Tile::SLAB_BYTES,
                                 staged[pass * Tile::SLABS + slab]);
    }

  private:
    DEV_METHOD void gather(u32 smem, int first_row) {
#pragma unroll 1
        for (unsigned i = fresh_thread_id(); i < Tile::BYTES / 16; i += THREADS) {
            constexpr int CHUNKS = Tile::COLUMNS / Tile::PER_CHUNK;
            const int r = i / CHUNKS, c = i % CHUNKS * Tile::PER_CHUNK;
            st_shared_v4(smem + Tile::offset(r, c), gather_chunk(gmem, first_row + r, c));
        }
    }
};

// Writes an accumulator, times a factor per row, to rows [row, row + 16*M16) of a tile, rounded to
// 16 bits.
template <class Element, class Tile, int M16, int N8, class Real>
DEV void accumulator_to_shared(u32 smem, int row, const Accumulator<M16, N8, Real>& acc,
                               const Real (&factor)[M16][2]) {
    if constexpr (Tile::PER_CHUNK != 8)
        return Tile::put(smem, row, acc, factor);
    else
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int r = row + m * 16 + half * 8 + lane_id() / 4;
                    const float scale = factor[m][half];
                    st_shared_u32(smem + Tile::offset(r, n * 8) + lane_id() % 4 * 4,
                                  Element::pack(acc.x[m][n][2 * half] * scale,
                                                acc.x[m][n][2 * half + 1] * scale));
                }
}

// The first `count` elements of 16 bytes, one by one.
DEV void store_chunk(u16* to, uint4 chunk, int count) {
    const u32 pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (e < count) st_global_u16(to + e, (u16)(pair[e / 2] >> (e % 2 * 16)));
}

// Stores rows [row, row + ROWS_PER_WARP) of a tile to the global rows first_row + ...: one warp,
// after __syncwarp. Nothing outside [rows, columns] is written.
template <class Tile, int ROWS_PER_WARP, bool VECTOR_ONLY>
DEV void store_rows(const GlobalRows<typename Tile::Storage>& gmem, u32 smem, int row,
                    int first_row) {
    constexpr int CHUNKS = Tile::COLUMNS / Tile::PER_CHUNK;
#pragma unroll(VECTOR_ONLY ? 2 : 1)
    for (int i = lane_id(); i < ROWS_PER_WARP * CHUNKS; i += 32) {
        const int r = row + i / CHUNKS, column = i % CHUNKS * Tile::PER_CHUNK;
        if (first_row + r >= gmem.rows || column >= gmem.columns) continue;
        const uint4 chunk = ld_shared_v4(smem + Tile::offset(r, column));
        auto* to = gmem.base + (first_row + r) * gmem.stride + column;
        if (VECTOR_ONLY || gmem.vector) {
            st_global_v4(to, chunk);
            continue;
        }
        store_chunk(to, chunk, gmem.columns - column);
    }
}
