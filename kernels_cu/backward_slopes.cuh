// Gradient of the ALiBi slopes: sums of the partials that backward_dq left per query tile, in a
// fixed order.
//
// Grid: batch * heads blocks. Slopes broadcast over a batch axis have stride 0 there in
// dslope_strides: the block at index 0 of those axes sums over all of them, the others leave.
#pragma once

#include "masks.cuh"
#include "score.cuh"

template <class C> __device__ void backward_slopes(const BackwardParams& p) {
    using Element = typename C::Element;
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
    float sum = 0.f;
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
        const float* partial = p.slope_partial + ((i64)b * shape.heads + h) * tiles;
        for (int tile = threadIdx.x; tile < tiles; tile += THREADS) sum += partial[tile];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    if (threadIdx.x != 0) return;
    if (shape.flags & FLAG_SLOPES_16BIT)
        ((u16*)p.dslopes)[at] = Element::from_float(sum);
    else
        ((float*)p.dslopes)[at] = sum;
}
