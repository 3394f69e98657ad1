// The rows of a group of heads between global memory and a tile: where a row lies follows no stride.
#pragma once

#include "rows.cuh"
#include "tile.cuh"

// Rows of all heads of a group in global memory.
template <class Storage_> struct GroupedRows {
    using Storage = Storage_;
    GlobalRows<Storage> first;  // of the first head
    i64 head_step;
    GroupRows group;

    // A row alone, with the nearest query that exists; `rows` tells whether its own does.
    DEV_METHOD GlobalRows<Storage> row(int number) const {
        const int query = group.query(number);
        const i64 at = group.member(number) * head_step + min(query, first.rows - 1) * first.stride;
        return {first.base + at, 0, query < first.rows, first.columns, first.vector};
    }
};

// As TileLoader. A tile of them is read once, at the start: places are computed as they are needed.
template <class Tile, int THREADS, bool VECTOR_ONLY> struct GroupLoader {
    using Rows = GroupedRows<typename Tile::Storage>;
    Rows gmem;

    DEV_METHOD explicit GroupLoader(const Rows& rows) : gmem(rows) {}

    DEV_METHOD void fetch(u32 smem, int first_row) {
        constexpr int CHUNKS = Tile::COLUMNS / Tile::PER_CHUNK;
#pragma unroll 2
        for (unsigned i = fresh_thread_id(); i < Tile::ROWS * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, column = i % CHUNKS * Tile::PER_CHUNK;
            const auto one = gmem.row(first_row + r);
            const u32 to = smem + Tile::offset(r, column);
            if (!VECTOR_ONLY && !one.vector) {
                st_shared_v4(to, gather_chunk(one, 0, column));
                continue;
            }
            const bool exists = one.rows > 0 && column < one.columns;
            if constexpr (HAS_ASYNC_COPY)
                cp_async_16(to, one.base + column, exists ? 16 : 0);
            else
                st_shared_v4(to, exists ? ld_global_v4(one.base + column) : make_uint4(0, 0, 0, 0));
        }
    }
    template <int PENDING> DEV_METHOD void land(u32) { cp_async_wait<PENDING>(); }
};

// As the other store_rows.
template <class Tile, int ROWS_PER_WARP, bool VECTOR_ONLY>
DEV void store_rows(const GroupedRows<typename Tile::Storage>& gmem, u32 smem, int row,
                    int first_row) {
    constexpr int CHUNKS = Tile::COLUMNS / Tile::PER_CHUNK;
#pragma unroll 1
    for (int i = lane_id(); i < ROWS_PER_WARP * CHUNKS; i += 32) {
        const int r = row + i / CHUNKS, column = i % CHUNKS * Tile::PER_CHUNK;
        const auto one = gmem.row(first_row + r);
        if (one.rows == 0 || column >= one.columns) continue;
        const uint4 chunk = ld_shared_v4(smem + Tile::offset(r, column));
        if (VECTOR_ONLY || one.vector)
            st_global_v4(one.base + column, chunk);
        else
            store_chunk(one.base + column, chunk, one.columns - column);
    }
}
