// Cumulative lengths of packed sequences -> the table of sequences and the tiles of every launch.
// Runs on the device, so that nobody waits for lengths. Whatever the lengths hold, nothing outside
// an array is touched, by this kernel or by those that use its tables.
//
// Grid: a block per work table; block 0 also writes the sequences.
#pragma once

#include "packed.cuh"

namespace packed {

// Cumulative lengths of one side.
struct Lengths {
    const void* cu;
    i64 stride, total;
    bool wide;
    int longest;

    DEV_METHOD Lengths(const PackedPlanParams& p, bool keys)
        : cu(keys ? p.cu_k : p.cu_q),
          stride(keys ? p.stride_k : p.stride_q),
          total(keys ? p.total_k : p.total_q),
          wide((keys ? p.wide_k : p.wide_q) != 0),
          longest(keys ? p.max_k : p.max_q) {}

    // As given.
    DEV_METHOD i64 at(int i) const {
        return wide ? ((const i64*)cu)[i * stride] : ((const int*)cu)[i * stride];
    }
    // Start and length of a sequence, inside the array and at most `longest`.
    DEV_METHOD int2 clamped(int number) const {
        const i64 start = inside(at(number)), length = inside(at(number + 1)) - start;
        return make_int2((int)start, (int)(length < 0         ? 0
                                           : length > longest ? (i64)longest
                                                              : length));
    }
    DEV_METHOD bool bad(int number) const {
        const i64 start = at(number), end = at(number + 1);
        return (number == 0 && start != 0) || end < start || end > total || end - start > longest;
    }

  private:
    DEV_METHOD i64 inside(i64 place) const { return place < 0 ? 0 : place > total ? total : place; }
};

// Sums of `x` over the threads before this one, and (in `all`) over the block. `scratch`: one
// number per warp. 64 bits: sequences that overlap, as in bad tables, have more tiles than rows.
template <int WARPS> DEV i64 exclusive_sum(i64 x, i64* scratch, i64& all) {
    i64 sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const i64 left = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane_id() >= step) sum += left;
    }
    if (lane_id() == 31) scratch[warp_id()] = sum;
    __syncthreads();
    all = 0;
    i64 before = 0;
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_id()) before = all;
        all += scratch[warp];
    }
    return before + sum - x;
}

// `sequences`, and whether anything contradicts.
template <int THREADS> DEV void write_sequences(const PackedPlanParams& p) {
    const Lengths q(p, false), k(p, true);
    bool bad = false;
    for (int b = threadIdx.x; b < p.batch; b += THREADS) {
        const int2 rows = q.clamped(b), keys = k.clamped(b);
        p.sequences[1 + b] = make_int4(rows.x, rows.y, keys.x, keys.y);
        bad |= q.bad(b) || k.bad(b);
    }
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) p.sequences[0] = make_int4(bad, 0, 0, 0);
}

// The tiles of all sequences in order, {-1, 0} behind them. A round takes one sequence per thread,
// adds up their tiles, and shares out the entries, each of which looks for its sequence: one long
// sequence takes no longer than many short ones.
template <int WARPS>
DEV void write_work(const WorkTable& table, int2* work, int batch, const Lengths& lengths) {
    constexpr int THREADS = WARPS * 32;
    __shared__ i64 first_tile[THREADS], scratch[WARPS];
    const int thread = threadIdx.x;
    i64 written = 0;
    for (int first = 0; first < batch; first += THREADS) {
        const int b = first + thread;
        const int length = b < batch ? lengths.clamped(b).y : 0;
        i64 tiles;
        first_tile[thread] =
            exclusive_sum<WARPS>((length + table.tile - 1) / table.tile, scratch, tiles);
        __syncthreads();
        for (i64 i = thread; i < tiles && written + i < table.capacity; i += THREADS) {
            int at = 0;  // the last sequence of the round whose tiles begin at or before entry i
#pragma unroll
            for (int step = THREADS / 2; step > 0; step /= 2)
                if (first_tile[at + step] <= i) at += step;
            const i64 next = at + 1 < THREADS ? first_tile[at + 1] : tiles;
            const i64 tile = table.longest_last ? next - 1 - i : i - first_tile[at];
            work[written + i] = make_int2(first + at, (int)tile);
        }
        written += tiles;
        __syncthreads();  // the next round overwrites first_tile and scratch
    }
    for (i64 i = written + thread; i < table.capacity; i += THREADS) work[i] = make_int2(-1, 0);
}

}  // namespace packed

template <class C> DEV void packed_plan(const PackedPlanParams& p) {
    if (blockIdx.x == 0) packed::write_sequences<C::WARPS * 32>(p);
    if (blockIdx.x >= p.tables) return;
    const WorkTable& table = p.table[blockIdx.x];
    packed::write_work<C::WARPS>(table, p.work + table.offset, p.batch,
                                 packed::Lengths(p, table.by_keys));
}
