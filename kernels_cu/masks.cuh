// Which keys may a row see? A mask is a small struct chosen by Config; its bounds are run-time
// values, so no length, window or pattern ever causes a compilation.
#pragma once

#include "rows.cuh"

namespace mask {

// Mask concept, by example. A new mask copies this form:
//   Mask(p, work, head)     of one query head, from any kernel's params; work.tile is the tile of
//                           queries (forward, dq) or of keys (dkdv) that the block owns
//   keys(rows)              range that holds every key seen by at least one of these rows, within
//                           [0, len_k)
//   rows(keys)              range that holds every row seeing at least one of these keys, within
//                           [0, len_q)
//   CONTIGUOUS              every tile of such a range is visited: next_tile returns its argument
//   next_tile(tile, end)    first tile of [tile, end) of the walked axis that has a visible pair,
//                           or end
//   cuts(rows, keys, tile)  may some pair of this tile be invisible? Tiles that are not cut skip
//                           `hide` and `keep`
//   isolates(rows, keys, tile)  may an invisible pair of this tile name a row and key that exist?
//                           (then 0 * NaN must not leak; rows and keys past the end are zero filled
//                           and cannot)
//   keep(row, key)          the predicate; anything for a row past the end
//   hide(map, rows, keys)   invisible pairs of a tile that is cut become -inf; `map` as ScoreMap in
//                           forward.cuh
// rows and keys are the tile's full ranges, which may reach past len_q and len_k; `tile` is its
// number on the walked axis.

// Row i sees keys max(0, i + low) .. min(len_k - 1, i + high): full attention, causal, windows and
// ragged tails in one.
struct Band {
    static constexpr bool CONTIGUOUS = true;
    int low, high, len_q, len_k;

    DEV_METHOD explicit Band(const Shape& shape)
        : low(shape.band_low), high(shape.band_high), len_q(shape.len_q), len_k(shape.len_k) {}
    template <class Params> DEV_METHOD Band(const Params& p, const Work&, int) : Band(p.shape) {}

    DEV_METHOD Range keys(Range rows) const {
        const int last = min(rows.end, len_q) - 1;
        return {max(0, rows.begin + low), min(len_k, last + high + 1)};
    }
    DEV_METHOD Range rows(Range keys) const {
        const int last = min(keys.end, len_k) - 1;
        return {max(0, keys.begin - high), min(len_q, last - low + 1)};
    }
    DEV_METHOD int next_tile(int tile, int) const { return tile; }
    DEV_METHOD bool isolates(Range rows, Range keys, int = 0) const {
        const int last_row = min(rows.end, len_q) - 1, last_key = min(keys.end, len_k) - 1;
        return keys.begin < last_row + low || last_key > rows.begin + high;
    }
    DEV_METHOD bool cuts(Range rows, Range keys, int = 0) const {
        return keys.end > len_k || isolates(rows, keys);
    }

    DEV_METHOD bool keep(int row, int key) const {
        return key >= row + low && key <= min(row + high, len_k - 1);
    }
    template <class Map> DEV_METHOD void hide(Map map, Range, Range) const {
        using Real = typename Map::Score;
        map([&](Real s, int row, int key) { return keep(row, key) ? s : Real(neg_infinity()); });
    }

    DEV_METHOD int map_head(int head) const { return head; }
};

// The same for the rows of a group of heads.
struct GroupBand {
    static constexpr bool CONTIGUOUS = true;
    Band band;
    GroupRows group;

    template <class Params> DEV_METHOD GroupBand(const Params& p, const Work&, int)
        : band(p.shape), group(p.shape) {}

    DEV_METHOD Range keys(Range rows) const { return band.keys(group.queries(rows)); }
    DEV_METHOD int next_tile(int tile, int) const { return tile; }
    DEV_METHOD bool isolates(Range rows, Range keys, int = 0) const {
        return band.isolates(group.queries(rows), keys);
    }
    DEV_METHOD bool cuts(Range rows, Range keys, int = 0) const {
        return band.cuts(group.queries(rows), keys);
    }
    DEV_METHOD bool keep(int row, int key) const { return band.keep(group.query(row), key); }
    template <class Map> DEV_METHOD void hide(Map map, Range, Range) const {
        using Real = typename Map::Score;
        map([&](Real s, int row, int key) { return keep(row, key) ? s : Real(neg_infinity()); });
    }

    DEV_METHOD int map_head(int head) const { return group.map_head(head); }
};

// Source concept: the pairs that an array hides, of one query head. Nothing outside the array is
// read, whatever row and key are.
//   Source(p, work, head)
//   bits<COUNT>(row, key)  bit n: may the row see key + n? Bits at COUNT and above are 0, those past
//                          the array's ends anything. COUNT is 4, 8 or 16, key a multiple of it
//   advance(elements)      on to another head
template <class Source> DEV bool keeps(const Source& source, int row, int key) {
    return source.template bits<16>(row, key & ~15) >> (key & 15) & 1u;
}

// A byte per pair, not 0 where the row may see the key.
struct Dense {
    const u8* base;  // of the head
    // Into constant memory: a main loop has no registers to keep what it can read there.
    const PairStrides* steps;
    const Shape* shape;

    template <class Params> DEV_METHOD Dense(const Params& p, const Work& work, int head)
        : base((const u8*)p.options.mask + head_offset(work, p.values.mask.strides, head)),
          steps(&p.values.mask.strides),
          shape(&p.shape) {}

    DEV_METHOD void advance(i64 elements) { base += elements; }

    template <int COUNT> DEV_METHOD u32 bits(int row, int key) const {
        const u8* from = base + min(row, shape->len_q - 1) * steps->row;
        const bool aligned = steps->key == 1 && ((u64)base | (u64)steps->row) % COUNT == 0;
        u32 found = 0u;
        if (aligned && key + COUNT <= shape->len_k) {
            u32 words[COUNT / 4];
            ld_global_words(words, from + key);
#pragma unroll
            for (int w = 0; w < COUNT / 4; ++w) found |= nonzero_bytes(words[w]) << (4 * w);
        } else {
#pragma unroll 1
            for (int n = 0; n < COUNT; ++n)
                found |= (u32)(from[min(key + n, shape->len_k - 1) * steps->key] != 0) << n;
        }
        return found;
    }

  private:
    // Bit n: is byte n not 0?
    DEV u32 nonzero_bytes(u32 x) {
        const u32 tops = ((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u) >> 7;
        return tops * 0x01020408u >> 24;  // bits 0, 8, 16, 24 side by side
    }
};

// Blocks whose sides are multiples of 16: absent, full, or with a bit per pair.
struct Blocks {
    static constexpr int ABSENT = -1, FULL = -2;
    const int* slots;  // of the head
    const u32* partial;
    i64 row_step, key_step;  // between slots
    int block_q, block_k, bit_words;
    int last_row, last_key;

    template <class Params> DEV_METHOD Blocks(const Params& p, const Work& work, int head)
        : slots((const int*)p.options.mask + head_offset(work, p.values.mask.strides, head)),
          partial(p.options.mask_bits),
          row_step(p.values.mask.strides.row),
          key_step(p.values.mask.strides.key),
          block_q(p.values.mask.block_q),
          block_k(p.values.mask.block_k),
          bit_words(p.values.mask.bit_words),
          last_row(p.shape.len_q - 1),
          last_key(p.shape.len_k - 1) {}

    DEV_METHOD void advance(i64 elements) { slots += elements; }

    // 16 keys that begin at a multiple of 16 lie in one block and in one word of its bits.
    template <int COUNT> DEV_METHOD u32 bits(int row, int key) const {
        constexpr u32 ALL = (1u << COUNT) - 1u;
        row = min(row, last_row);
        if (key > last_key) return 0u;
        const int block_row = (u32)row / (u32)block_q, block_key = (u32)key / (u32)block_k;
        const int slot = slots[block_row * row_step + block_key * key_step];
        if (slot < 0) return slot == FULL ? ALL : 0u;
        const int inside_q = row - block_row * block_q, inside_k = key - block_key * block_k;
        const i64 at = ((i64)slot * block_q + inside_q) * bit_words + inside_k / 32;
        return partial[at] >> (inside_k % 32) & ALL;
    }
};

// The pairs that an array hides from the rows of a group of heads.
template <class Source> struct OfGroup {
    Source first;  // of the first head
    GroupRows group;
    const i64* head_step;

    template <class Params> DEV_METHOD OfGroup(const Params& p, const Work& work, int head)
        : first(p, work, head), group(p.shape), head_step(&p.values.mask.strides.head) {}

    template <int COUNT> DEV_METHOD u32 bits(int row, int key) const {
        Source own = first;
        own.advance(group.member(row) * *head_step);
        return own.template bits<COUNT>(group.query(row), key);
    }
};

// The band and what a boolean array or a block mask says. Tiles come from a map made beforehand
// (mask_tiles.cuh): one bit per tile in two planes, "has a visible pair" and "has no hidden pair".
template <class Source, class Bounds = Band> struct Mapped {
    static constexpr bool CONTIGUOUS = false;
    Bounds band;
    Source source;
    const u32* visible;  // of the tiles in this block's row of the map
    const i64* plane;    // words from there to the plane of full tiles

    template <class Params> DEV_METHOD Mapped(const Params& p, const Work& work, int head)
        : band(p, work, head), source(p, work, head), plane(&p.values.mask.map_plane) {
        const MaskParams& values = p.values.mask;
        i64 at = values.map_offset + band.map_head(head) * values.map_head +
                 (i64)work.tile * values.map_words;
#pragma unroll
        for (int axis = 0; axis < MAX_BATCH_AXES; ++axis)
            at += work.batch_index[axis] * values.map_batch[axis];
        visible = p.options.mask_map + at;
    }

    DEV_METHOD Range keys(Range rows) const { return band.keys(rows); }
    DEV_METHOD Range rows(Range keys) const { return band.rows(keys); }
    DEV_METHOD int next_tile(int tile, int end) const {
        while (tile < end) {
            const u32 left = visible[tile / 32] >> tile % 32;
            if (left != 0u) return min(end, tile + __ffs(left) - 1);
            tile = (tile | 31) + 1;
        }
        return end;
    }
    DEV_METHOD bool hides(int tile) const {
        return (visible[*plane + tile / 32] >> tile % 32 & 1u) == 0u;
    }
    DEV_METHOD bool isolates(Range rows, Range keys, int tile) const {
        return hides(tile) || band.isolates(rows, keys);
    }
    DEV_METHOD bool cuts(Range rows, Range keys, int tile) const {
        return hides(tile) || band.cuts(rows, keys);
    }
    DEV_METHOD bool keep(int row, int key) const {
        return band.keep(row, key) && keeps(source, row, key);
    }
    template <class Map> DEV_METHOD void hide(Map map, Range rows, Range keys) const {
        if (band.cuts(rows, keys)) band.hide(map, rows, keys);
        map.hide_by(source);
    }
};

}  // namespace mask
