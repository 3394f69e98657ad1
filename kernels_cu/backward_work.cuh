// Which rows a block of a backward kernel works on, and where their workspaces lie; for packed sequences
// too, each of which every kernel treats as a call of its own.
#pragma once

#include "masks.cuh"
#include "score.cuh"

namespace backward {

// Calls run(p) with the params of this block's call or packed sequence; not at all where the table of
// packed work holds none for it.
template <class C, class Run>
DEV void with_sequence(const BackwardParams& params, int heads, Run run) {
    if constexpr (C::PACKED) {
        const Work work = decode<C>(params, heads);
        if (work.batch < 0) return;
        BackwardParams p = params;
        packed::enter<C>(p, work);
        run(p);
    } else {
        run(params);
    }
}

// Where this block's share of a slope's gradient lies: [heads, tiles] of the batch element or, packed, of
// the work table.
template <class C> DEV i64 slope_place(const BackwardParams& p) {
    const Work work = C::PACKED ? decode_flat(p.schedule, 1, p.shape.heads)
                                : decode(p.schedule, p.shape, p.shape.heads);
    return ((i64)work.batch * p.shape.heads + work.head) * p.schedule.tiles + work.tile;
}

// Blocks that take turns in adding to dQ count them per so many rows, for which backward_prepare has one block.
constexpr int TURN_ROWS = 32;
// The counter of a row: [B, H, ceil(len_q / TURN_ROWS)], or [H, total_q / TURN_ROWS + sequences], where those of
// sequence n begin at q_start / TURN_ROWS + n, always behind those of the one before. In front of them, at 0, is the
// number of blocks that have started.
template <class C>
DEV i64 turn_place(const BackwardParams& p, int batch, int head, int q_start, int row) {
    if constexpr (C::PACKED) {
        const i64 counters = p.values.packed.total_q / TURN_ROWS + p.shape.batch;
        return 1 + head * counters + q_start / TURN_ROWS + batch + row / TURN_ROWS;
    } else {
        const int counters = (p.shape.len_q - 1) / TURN_ROWS + 1;
        return 1 + ((i64)batch * p.shape.heads + head) * counters + row / TURN_ROWS;
    }
}

// From a head's first row in the statistics and in dq_accum to the next head's.
template <class C> DEV i64 statistics_stride(const BackwardParams& p) {
    if constexpr (C::PACKED) return p.values.packed.total_q;
    return p.shape.len_q;
}

}  // namespace backward
