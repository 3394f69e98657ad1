// What backward needs once per query row: delta = rowsum(dout * out) - dlse, and lse in the units
// of exp2.
//
// Grid: batch * heads * schedule.tiles blocks, schedule.tiles = ceil(len_q / BLOCK_Q).
#pragma once

#include "backward_work.cuh"

namespace backward {

// Sum of out[c] * dout[c] over columns [first, first + 8) of one row. Where out is 0 dout does not
// matter: a row without keys keeps a NaN in its dout from the gradient of a sink.
template <class C, class Storage>
DEV typename C::Element::Real dot_8(const Storage* out, const Storage* dout, int first, int columns,
                                    bool vector) {
    using Element = typename C::Element;
    typename Element::Real sum = 0;
    if constexpr (sizeof(Storage) > 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < columns && out[first + i] != 0)
                sum = fma_of(out[first + i], dout[first + i], sum);
    } else if (C::VECTOR_ONLY || vector) {
        if (first >= columns) return 0.f;  // columns is a multiple of 8 here
        const uint4 a = ld_global_v4(out + first), b = ld_global_v4(dout + first);
        const u32 pairs_a[4] = {a.x, a.y, a.z, a.w}, pairs_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 fa = unpack<Element>(pairs_a[i]), fb = unpack<Element>(pairs_b[i]);
            sum += fa.x == 0.f ? 0.f : fa.x * fb.x;
            sum += fa.y == 0.f ? 0.f : fa.y * fb.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < columns && Element::to_real(out[first + i]) != 0)
                sum += Element::to_real(out[first + i]) * Element::to_real(dout[first + i]);
    }
    return sum;
}

// lse in the units of exp2. At huge logits the three roundings on the way here (of the scaled score,
// of lse, of this product: together below 2^-22 of it, in double 2^-51) are whole powers of two, and a row with one
// key would get a weight of, say, 2^-8 instead of 1. The reference is lowered by that bound: weights
// can then only be too large, and backward::probability clamps them to 1.
template <class Real> DEV Real reference_log2(Real lse) {
    constexpr Real BOUND = sizeof(Real) == 8 ? 0x1p-51 : 0x1p-22;
    const Real x = lse * LOG2_E_OF<Real>, size = abs_of(x);
    return size > 1024 && size < positive_infinity() ? x - size * BOUND : x;
}

template <class C> DEV void prepare_rows(const BackwardParams& p) {
    using Storage = typename C::Element::Storage;
    using Real = typename C::Element::Real;
    // A power of two lanes per row, eight columns per lane: 16-byte loads, and the sum is a
    // butterfly inside the group.
    constexpr int LANES = C::HEAD_DIM_V <= 32    ? 4
                          : C::HEAD_DIM_V <= 64  ? 8
                          : C::HEAD_DIM_V <= 128 ? 16
                                                 : 32;
    constexpr int ROWS_AT_ONCE = C::WARPS * 32 / LANES;
    static_assert(C::BLOCK_Q % ROWS_AT_ONCE == 0, "a block takes whole rounds of rows");

    const Shape& shape = p.shape;
    const Work work = decode<C>(p, shape.heads);
    static_assert(C::BLOCK_Q == TURN_ROWS, "a block has one counter");
    if (p.dq_turns != nullptr && threadIdx.x == 0) {
        const int q_start = C::PACKED ? packed::sequence(p.options, work.batch).q_start : 0;
        p.dq_turns[turn_place<C>(p, work.batch, work.head, q_start, work.tile * C::BLOCK_Q)] = 0;
    }
    const int row_0 = work.tile * C::BLOCK_Q;
    const i64 first = statistics_row<C>(p, work, work.head);  // of this head in the workspaces
    const Storage* out_gmem = (const Storage*)p.out + head_offset(work, p.out_strides, work.head);
    const Storage* dout_gmem =
        (const Storage*)p.dout + head_offset(work, p.dout_strides, work.head);
    const Real* lse_gmem = (const Real*)p.lse + head_offset(work, p.lse_strides, work.head);
    const Real* dlse_gmem =
        p.dlse == nullptr ? nullptr
                          : (const Real*)p.dlse + head_offset(work, p.dlse_strides, work.head);
    const bool vector = (shape.flags & FLAG_OUT_VECTOR) && (shape.flags & FLAG_DOUT_VECTOR);

    const int lane_in_row = threadIdx.x % LANES;
#pragma unroll 1
    for (int round = 0; round < C::BLOCK_Q; round += ROWS_AT_ONCE) {
        const int row = row_0 + round + threadIdx.x / LANES;
        const bool valid = row < shape.len_q;
        Real sum = 0;
        if (valid)
            sum = dot_8<C>(out_gmem + row * p.out_strides.row, dout_gmem + row * p.dout_strides.row,
                           8 * lane_in_row, shape.head_dim_v, vector);
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) sum += shfl_xor(sum, step);
        if (valid && lane_in_row == 0) {
            const Real lse = lse_gmem[row * p.lse_strides.row];
            // A row that sees no key has lse = -inf; +inf makes exp2(s - lse) = 0 for whatever s.
            ((Real*)p.lse_log2)[first + row] =
                lse == neg_infinity() ? Real(positive_infinity()) : reference_log2(lse);
            Real delta = dlse_gmem == nullptr ? sum : sum - dlse_gmem[row * p.dlse_strides.row];
            if constexpr (C::PACKED)
                if (packed::is_bad(p.options)) delta = __int_as_float(0x7fffffff);
            ((Real*)p.delta)[first + row] = delta;
        }
    }
    if (p.dq_accum == nullptr) return;
    const int rows = min(C::BLOCK_Q, shape.len_q - row_0);
    float4* accum = (float4*)(p.dq_accum + (first + row_0) * C::HEAD_DIM);
    for (int i = threadIdx.x; i < rows * (C::HEAD_DIM / 4); i += C::WARPS * 32)
        accum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

}  // namespace backward

template <class C> __device__ void backward_prepare(const BackwardParams& params) {
    if (params.dq_turns != nullptr && fresh_block_id() == 0 && threadIdx.x == 0)
        params.dq_turns[0] = 0;
    backward::with_sequence<C>(params, params.shape.heads,
                               [&](const BackwardParams& p) { backward::prepare_rows<C>(p); });
}
