// What kernels of warpgroups share: rings of tiles between the warp that copies and the warpgroups that
// multiply, tiles in shared memory as wgmma wants them, and the work of a block that stays.
#pragma once

#include "packed.cuh"
#include "ptx_sm90_wgmma.cuh"

constexpr int WARPGROUP = 128;  // threads

// Bytes of shared memory from its start to the next multiple of 1024, where slabs begin.
DEV u32 aligned_shared_memory(const void* smem) { return (shared_address(smem) + 1023u) & ~1023u; }

// Rows of 16-bit elements as slabs of 64 columns; a last slab that is half empty is there in full.
template <int ROWS_, int COLUMNS_> struct SlabTile {
    static constexpr int ROWS = ROWS_, SLABS = (COLUMNS_ + SLAB_COLUMNS - 1) / SLAB_COLUMNS;
    static constexpr int SLAB_BYTES = ROWS * SLAB_ROW_BYTES, BYTES = SLABS * SLAB_BYTES;
    static_assert(SLAB_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
    // The same place for place, for ordinary accesses.
    using Plain = SharedTile<ROWS, SLABS * SLAB_COLUMNS>;
};

// STAGES tiles in shared memory with two barriers each: "full" counts bytes that come, "empty" the warps
// that are done. Both sides count tiles from 0 on and never meet otherwise.
template <class Tile_, int STAGES_> struct Ring {
    using Tile = Tile_;
    static constexpr int STAGES = STAGES_;
    static constexpr int BYTES = STAGES * Tile::BYTES, BARRIER_BYTES = STAGES * 16;
    u32 tiles, barriers;

    DEV_METHOD void init(int readers) const {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(full(stage), 1);
            mbarrier_init(empty(stage), readers);
        }
    }
    DEV_METHOD u32 tile(unsigned n) const { return tiles + n % STAGES * Tile::BYTES; }
    DEV_METHOD u32 full(unsigned n) const { return barriers + n % STAGES * 16; }
    DEV_METHOD u32 empty(unsigned n) const { return full(n) + 8; }

    // The copying thread: waits for room for tile n and announces its bytes.
    DEV_METHOD void open(unsigned n) const {
        mbarrier_wait(empty(n), n / STAGES % 2 ^ 1);
        mbarrier_arrive_expect(full(n), Tile::BYTES);
    }
    // Readers.
    DEV_METHOD void wait(unsigned n) const { mbarrier_wait(full(n), n / STAGES % 2); }
    // By every warp, after its last read of tile n is complete.
    DEV_METHOD void release(unsigned n) const {
        __syncwarp();
        if (lane_id() == 0) mbarrier_arrive(empty(n));
    }
};

// Where in an array a tile lies. Axes that the array is broadcast along have coordinate 0.
struct MapPlace {
    int head, outer, inner;

    DEV_METHOD MapPlace(const Strides& strides, const Work& work, int head_)
        : head(strides.head != 0 ? head_ : 0),
          outer(strides.batch[MAX_BATCH_AXES - 2] != 0 ? work.batch_index[MAX_BATCH_AXES - 2] : 0),
          inner(strides.batch[MAX_BATCH_AXES - 1] != 0 ? work.batch_index[MAX_BATCH_AXES - 1] : 0) {
    }
    // Fills a tile, slab by slab; one thread.
    template <class Tile>
    DEV_METHOD void load(u32 smem, const TensorMap* map, u32 barrier, u64 policy, int row) const {
#pragma unroll
        for (int slab = 0; slab < Tile::SLABS; ++slab)
            tma_load_5d(smem + slab * Tile::SLAB_BYTES, map, barrier, policy, slab * SLAB_COLUMNS,
                        row, head, inner, outer);
    }
};

// Blocks that stay take work after work: number `turn` of block `block` of `blocks`. Every other turn
// goes backwards, so that nobody gets the longest piece of every turn.
DEV unsigned work_number(unsigned turn, unsigned block, unsigned blocks) {
    return turn * blocks + (turn % 2 ? blocks - 1 - block : block);
}
