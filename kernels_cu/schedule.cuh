// Which piece of work is this block? Blocks start roughly in the order of their ids, so ids are
// laid out to have the longest tiles first (short ones fill the end of the last wave) and heads
// whose K and V fit the L2 cache together.
#pragma once

#include "tile.cuh"

// One tile of one head.
struct Work {
    int tile;
    int batch, head;  // batch: flat over the batch axes; head: query or key head, as scheduled
    int batch_index[MAX_BATCH_AXES];
};

// Section after section of `heads_per_section` heads; inside one, tile-major from the first tile on.
// `heads` per batch entry; batch_index stays unset. `block`: blocks that take several pieces of work
// name them as blocks of a larger grid. A second call computes anew: cheaper than
// keeping its results in registers across a main loop.
DEV Work decode_flat(const Schedule& schedule, int batch, int heads,
                     unsigned block = fresh_block_id()) {
    const unsigned tiles = schedule.tiles;
    const unsigned section_heads = schedule.heads_per_section;
    const unsigned total = (unsigned)batch * heads;
    const unsigned section = block / (section_heads * tiles);
    const unsigned first_head = section * section_heads, inside = block - first_head * tiles;
    const unsigned here = min(section_heads, total - first_head);  // the last may be smaller
    const int head = first_head + inside % here;

    Work work;
    work.tile = inside / here;
    work.batch = head / heads;
    work.head = head % heads;
    return work;
}

// The same with the longest tile first.
DEV Work decode(const Schedule& schedule, const Shape& shape, int heads,
                unsigned block = fresh_block_id()) {
    Work work = decode_flat(schedule, shape.batch, heads, block);
    if (schedule.longest_last) work.tile = schedule.tiles - 1 - work.tile;
    int rest = work.batch;
#pragma unroll
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
        work.batch_index[axis] = rest % shape.batch_extent[axis];
        rest /= shape.batch_extent[axis];
    }
    return work;
}

// Element offset of a head in an array of these Strides or PairStrides.
template <class AnyStrides>
DEV i64 head_offset(const Work& work, const AnyStrides& strides, int head) {
    i64 offset = head * strides.head;
#pragma unroll
    for (int axis = 0; axis < MAX_BATCH_AXES; ++axis)
        offset += work.batch_index[axis] * strides.batch[axis];
    return offset;
}

// [rows, columns] of one head; `vector`: its rows start on 16-byte boundaries.
template <class Storage>
DEV GlobalRows<Storage> head_rows(const void* array, const Strides& strides, const Work& work,
                                  int head, int rows, int columns, bool vector) {
    Storage* base = (Storage*)array + head_offset(work, strides, head);
    constexpr int PER_CHUNK = 16 / sizeof(Storage);
    return {base, strides.row, rows, columns, vector && columns % PER_CHUNK == 0};
}
