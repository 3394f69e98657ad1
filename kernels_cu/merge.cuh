// Attention over a union of key sets from the results over each: out = sum_i exp(lse_i - lse) out_i (Flash-Decoding's last step).
#pragma once

#include "params.cuh"
#include "wide_element.cuh"

namespace merge_detail {

template <class Real> DEV Real warp_max(Real x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max_of(x, shfl_xor(x, step));
    return x;
}

template <class Real> DEV Real warp_sum(Real x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += shfl_xor(x, step);
    return x;
}

// First element of output row `row` (counted over B, H, Lq).
DEV i64 out_row(const MergeParams& p, i64 row) {
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
    using Storage = typename Element::Storage;
    using Real = typename Element::Real;
    const i64 row = (i64)blockIdx.x * C::WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= p.rows) return;

    const Real minus_inf = neg_infinity();
    const Real part_lse = lane < p.parts ? ((const Real*)p.lses[lane])[row] : minus_inf;
    const Real top = merge_detail::warp_max(part_lse);
    // All parts empty, or infinite sinks in some: the difference of equal infinities would be NaN.
    const bool empty = top == minus_inf;
    const Real shift = empty ? Real(0) : top;
    Real weight = part_lse == top && !empty ? Real(1) : exp(part_lse - shift);
    const u32 without_keys = __ballot_sync(FULL_WARP, part_lse == minus_inf);
    const Real total = merge_detail::warp_sum(weight);
    weight = total == 0 ? Real(0) : weight / total;
    if (lane == 0) ((Real*)p.lse)[row] = total == 0 ? minus_inf : shift + log(total);
    // One part alone is the row, even if its lse is NaN: a row without keys is 0 beside any sink.
    if (__popc(~without_keys) == 1) weight = 1;

    const i64 out_at = merge_detail::out_row(p, row);
    for (int first = 0; first < p.head_dim_v; first += 32) {
        const int col = first + lane;
        Real sum = 0;
        for (int part = 0; part < p.parts; ++part) {
            const Real w = __shfl_sync(FULL_WARP, weight, part);
            // A part without keys must not matter, whatever it holds. One whose weight merely
            // underflowed does: a NaN in it is a NaN of the row.
            if (without_keys >> part & 1 || col >= p.head_dim_v) continue;
            const i64 at = row * p.head_dim_v + col;
            const Real x = p.outs_are_float ? ((const Real*)p.outs[part])[at]
                                            : Element::to_real(((const Storage*)p.outs[part])[at]);
            sum += w * x;
        }
        if (col >= p.head_dim_v) continue;
        if (p.out_is_float) {
            ((Real*)p.out)[out_at + col] = sum;
        } else {
            ((Storage*)p.out)[out_at + col] = Element::from_real(sum);
        }
    }
}
