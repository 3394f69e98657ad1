// Gradient of the ALiBi slopes: sums of the partials that backward_dq left per query tile, in a
// fixed order.
//
// Grid: batch * heads blocks (packed: sequences * heads) of one warp. Slopes broadcast over a batch axis have stride 0 there in
// dslope_strides: the block at index 0 of those axes sums over all of them, the others leave.
// p.schedule and, packed, the work table are those of backward_dq.
#pragma once

#include "backward_work.cuh"

namespace backward {

// The share of one thread in the sum over tiles [begin, end) of a row of partials.
template <int THREADS, class Real>
DEV Real sum_of_partials(const Real* partial, int begin, int end) {
    Real sum = 0;
    for (int tile = begin + threadIdx.x; tile < end; tile += THREADS) sum += partial[tile];
    return sum;
}

// First entry of the work table that belongs to this sequence or a later one, or to none (-1, which as
// unsigned comes last).
DEV int first_entry(const BackwardParams& p, unsigned sequence) {
    const int2* work = p.options.work + p.values.packed.work_offset;
    int low = 0, high = p.schedule.tiles;
    while (low < high) {
        const int middle = (low + high) / 2;
        if ((unsigned)work[middle].x < sequence)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

}  // namespace backward

template <class C> __device__ void backward_slopes(const BackwardParams& p) {
    using Element = typename C::Element;
    using Real = typename Element::Real;
    const Real* partial = (const Real*)p.slope_partial;
    constexpr int THREADS = C::WARPS * 32;
    static_assert(C::WARPS == 1, "the sum ends in one warp's butterfly");
    const Shape& shape = p.shape;
    const int h = blockIdx.x % shape.heads, b_0 = blockIdx.x / shape.heads;

    int copies = 1;  // how many batch elements share this slope
    int rest = b_0;
    i64 at = h * p.dslope_strides.head;
#pragma unroll
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
        const int extent = shape.batch_extent[axis], index = rest % extent;
        rest /= extent;
        at += index * p.dslope_strides.batch[axis];
        if (p.dslope_strides.batch[axis] != 0 || extent == 1) continue;
        if (index != 0) return;
        copies *= extent;
    }

    const int tiles = p.schedule.tiles;  // query tiles of backward_dq
    Real sum = 0;
    for (int copy = 0; copy < copies; ++copy) {
        // The copy's batch index: b_0 plus its digits along the shared axes.
        int digits = copy, b = b_0, step = 1;
#pragma unroll
        for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
            const int extent = shape.batch_extent[axis];
            if (p.dslope_strides.batch[axis] == 0 && extent > 1) {
                b += digits % extent * step;
                digits /= extent;
            }
            step *= extent;
        }
        if constexpr (C::PACKED)
            sum += backward::sum_of_partials<THREADS>(partial + (i64)h * tiles,
                                                      backward::first_entry(p, b),
                                                      backward::first_entry(p, b + 1));
        else
            sum += backward::sum_of_partials<THREADS>(partial + ((i64)b * shape.heads + h) * tiles,
                                                      0, tiles);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += shfl_xor(sum, step);
    if (threadIdx.x != 0) return;
    if (shape.flags & FLAG_SLOPES_ELEMENT)
        ((typename Element::Storage*)p.dslopes)[at] = Element::from_real(sum);
    else
        ((float*)p.dslopes)[at] = (float)sum;
}
