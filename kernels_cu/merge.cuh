// Attention over a union of key sets from the results over each: out = sum_i exp(lse_i - lse) out_i (Flash-Decoding's last step).
#pragma once

#include "element.cuh"
#include "params.cuh"

namespace merge_detail {

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// First element of output row `row` (counted over B, H, Lq).
__device__ __forceinline__ i64 out_row(const MergeParams& p, i64 row) {
    const i64 i = row % p.len_q, bh = row / p.len_q;
    i64 offset = i * p.out_strides.row + bh % p.heads * p.out_strides.head;
    i64 b = bh / p.heads;
#pragma unroll
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
        offset += b % p.batch_extent[axis] * p.out_strides.batch[axis];
        b /= p.batch_extent[axis];
    }
    return offset;
}

}  // namespace merge_detail

// One warp per row; lane i owns the lse of part i.
template <class C> __device__ void merge(const MergeParams& p) {
    using Element = typename C::Element;
    const i64 row = (i64)blockIdx.x * C::WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= p.rows) return;

    const float minus_inf = __int_as_float(0xff800000);
    const float part_lse = lane < p.parts ? p.lses[lane][row] : minus_inf;
    const float top = merge_detail::warp_max(part_lse);
    // All parts empty: (-inf) - (-inf) would be NaN.
    const float shift = top == minus_inf ? 0.f : top;
    float weight = expf(part_lse - shift);
    const u32 without_keys = __ballot_sync(0xffffffffu, part_lse == minus_inf);
    const float total = merge_detail::warp_sum(weight);
    weight = total == 0.f ? 0.f : weight / total;
    if (lane == 0) p.lse[row] = total == 0.f ? minus_inf : shift + logf(total);

    const i64 out_at = merge_detail::out_row(p, row);
    for (int first = 0; first < p.head_dim_v; first += 32) {
        const int col = first + lane;
        float sum = 0.f;
        for (int part = 0; part < p.parts; ++part) {
            const float w = __shfl_sync(0xffffffffu, weight, part);
            // A part without keys must not matter, whatever it holds. One whose weight merely
            // underflowed does: a NaN in it is a NaN of the row.
            if (without_keys >> part & 1 || col >= p.head_dim_v) continue;
            const i64 at = row * p.head_dim_v + col;
            const float x = p.outs_are_float ? ((const float*)p.outs[part])[at]
                                             : Element::to_real(((const u16*)p.outs[part])[at]);
            sum += w * x;
        }
        if (col >= p.head_dim_v) continue;
        if (p.out_is_float) {
            ((float*)p.out)[out_at + col] = sum;
        } else {
            ((u16*)p.out)[out_at + col] = Element::from_real(sum);
        }
    }
}
