// Tile maps of a boolean array or a block mask, for the tiles of one kernel: which tiles have a
// visible pair, and which have no hidden one. Both answers are exact, band aside, for tiles of one
// head; a tile with rows of a group of heads is taken for all rows of its queries.
//
// Grid: batch extents * heads * tile_rows * map_words of the mask, a word of 32 tiles per block.
#pragma once

#include "masks.cuh"

namespace mask {

// What a lane, or after `voted` its warp, has seen of a tile.
struct TileFacts {
    bool visible = false, hidden = false;

    DEV_METHOD bool decided() const { return visible && hidden; }
    DEV_METHOD TileFacts voted() const {
        return {__any_sync(FULL_WARP, visible) != 0, __any_sync(FULL_WARP, hidden) != 0};
    }
};

// Offset of the mask's head that this block looks at, and its place in the map below that.
struct TileWord {
    i64 head_offset;
    int tile_row, word;

    DEV_METHOD explicit TileWord(const MaskTilesParams& p) {
        unsigned rest = fresh_block_id();
        word = rest % p.values.map_words;
        rest /= p.values.map_words;
        tile_row = rest % p.tile_rows;
        rest /= p.tile_rows;
        head_offset = (i64)(rest % p.heads * p.group) * p.values.strides.head;
        rest /= p.heads;
#pragma unroll
        for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
            head_offset += (i64)(rest % p.batch_extent[axis]) * p.values.strides.batch[axis];
            rest /= p.batch_extent[axis];
        }
    }
};

// Bytes in lines: `width` neighbours per load, `length` loads per line.
template <int WIDTH>
DEV TileFacts scan_lines(const u8* from, i64 line_step, i64 step, int lines, int length) {
    constexpr int TOGETHER = 8;  // loads in flight; between them a tile may be decided
    TileFacts facts;
    const int total = lines * length;
    for (int first = 0; first < total && !facts.decided(); first += 32 * TOGETHER) {
        TileFacts mine;
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n) {
            const int i = first + n * 32 + lane_id();
            if (i >= total) continue;
            const u8* at = from + i / length * line_step + i % length * step;
            if constexpr (WIDTH == 16) {
                const uint4 bytes = *(const uint4*)at;
                const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    mine.visible |= words[w] != 0u;
                    // Subtracting 1 from a byte borrows into its top bit if it was 0.
                    mine.hidden |= ((words[w] - 0x01010101u) & ~words[w] & 0x80808080u) != 0u;
                }
            } else {
                mine.visible |= *at != 0;
                mine.hidden |= *at == 0;
            }
        }
        mine = mine.voted();
        facts.visible |= mine.visible;
        facts.hidden |= mine.hidden;
    }
    return facts;
}

// Rows and keys exist. An axis along which the array is broadcast is looked at once.
DEV TileFacts scan(const Dense*, const MaskTilesParams& p, i64 head_offset, Range rows,
                   Range keys) {
    const i64 row_step = p.values.strides.row, key_step = p.values.strides.key;
    const u8* from =
        (const u8*)p.mask + head_offset + rows.begin * row_step + keys.begin * key_step;
    const int height = row_step == 0 ? 1 : rows.end - rows.begin;
    const int width = key_step == 0 ? 1 : keys.end - keys.begin;
    if (key_step == 1 && ((u64)from | row_step | width) % 16 == 0)
        return scan_lines<16>(from, row_step, 16, height, width / 16);
    const bool along_rows =
        (row_step < 0 ? -row_step : row_step) < (key_step < 0 ? -key_step : key_step);
    return along_rows ? scan_lines<1>(from, key_step, row_step, width, height)
                      : scan_lines<1>(from, row_step, key_step, height, width);
}

// Rows and keys inside a partial block.
DEV TileFacts scan_bits(const u32* bits, int bit_words, Range rows, Range keys) {
    TileFacts mine;
    const int first_word = keys.begin / 32, words = (keys.end - 1) / 32 - first_word + 1;
    bits += (i64)rows.begin * bit_words;
    for (int i = lane_id(); i < (rows.end - rows.begin) * words; i += 32) {
        const int word = first_word + i % words, row = i / words;
        const int low = max(keys.begin - word * 32, 0), high = min(keys.end - word * 32, 32);
        const u32 inside = 0xffffffffu >> (32 - (high - low)) << low;
        const u32 found = bits[(i64)row * bit_words + word];
        mine.visible |= (found & inside) != 0u;
        mine.hidden |= (~found & inside) != 0u;
    }
    return mine.voted();
}

// Slots tell most; bits are read of partial blocks only.
DEV TileFacts scan(const Blocks*, const MaskTilesParams& p, i64 head_offset, Range rows,
                   Range keys) {
    const int* slots = (const int*)p.mask + head_offset;
    const int block_q = p.values.block_q, block_k = p.values.block_k;
    TileFacts facts;
    for (int i = rows.begin / block_q; i * block_q < rows.end && !facts.decided(); ++i)
        for (int j = keys.begin / block_k; j * block_k < keys.end && !facts.decided(); ++j) {
            const int slot = slots[i * p.values.strides.row + j * p.values.strides.key];
            TileFacts here{slot == Blocks::FULL, slot != Blocks::FULL};
            if (slot >= 0) {
                const int row = i * block_q, key = j * block_k;
                here = scan_bits(p.mask_bits + (i64)slot * block_q * p.values.bit_words,
                                 p.values.bit_words,
                                 {max(rows.begin - row, 0), min(rows.end - row, block_q)},
                                 {max(keys.begin - key, 0), min(keys.end - key, block_k)});
            }
            facts.visible |= here.visible;
            facts.hidden |= here.hidden;
        }
    return facts;
}

// Tile `tile` along an axis, as far as it exists.
DEV Range tile_range(int tile, int size, int length) {
    const i64 begin = (i64)tile * size;
    return {(int)(begin < length ? begin : length),
            (int)(begin + size < length ? begin + size : length)};
}

// The queries of a tile.
DEV Range query_range(int tile, const MaskTilesParams& p) {
    const i64 begin = (i64)tile * p.tile_q, end = begin + p.tile_q;
    const i64 first = begin / p.group, last = (end + p.group - 1) / p.group;
    return {(int)(first < p.len_q ? first : p.len_q), (int)(last < p.len_q ? last : p.len_q)};
}

}  // namespace mask

template <class C> DEV void mask_tiles(const MaskTilesParams& p) {
    __shared__ u32 visible[C::WARPS], full[C::WARPS];
    const mask::TileWord place(p);
    u32 my_visible = 0u, my_full = 0u;
    for (int bit = warp_id(); bit < 32; bit += C::WARPS) {
        const int tile = place.word * 32 + bit;
        const int tile_q = p.by_keys ? tile : place.tile_row;
        const int tile_k = p.by_keys ? place.tile_row : tile;
        const Range rows = mask::query_range(tile_q, p);
        const Range keys = mask::tile_range(tile_k, p.tile_k, p.len_k);
        if (rows.empty() || keys.empty()) continue;  // there is no such tile
        mask::TileFacts facts;
        const int heads = p.values.strides.head != 0 ? p.group : 1;
        for (int head = 0; head < heads && !facts.decided(); ++head) {
            const i64 offset = place.head_offset + head * p.values.strides.head;
            const mask::TileFacts own =
                mask::scan((const typename C::Source*)nullptr, p, offset, rows, keys);
            facts.visible |= own.visible;
            facts.hidden |= own.hidden;
        }
        if (facts.visible) my_visible |= 1u << bit;
        if (!facts.hidden) my_full |= 1u << bit;
    }
    if (lane_id() == 0) visible[warp_id()] = my_visible, full[warp_id()] = my_full;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < C::WARPS; ++warp) {
        my_visible |= visible[warp];
        my_full |= full[warp];
    }
    u32* const map = p.map + p.values.map_offset + fresh_block_id();
    map[0] = my_visible;
    map[p.values.map_plane] = my_full;
}
