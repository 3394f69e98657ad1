// dq = scale * dq_accum, rounded once: the last step when dQ was gathered by floating-point
// reductions.
//
// Grid: batch * heads * schedule.tiles blocks, schedule.tiles = ceil(len_q / BLOCK_Q).
#pragma once

#include "backward_work.cuh"

namespace backward {

template <class C> DEV void convert_rows(const BackwardParams& p) {
    using Element = typename C::Element;
    constexpr int GROUPS = C::HEAD_DIM / 8;  // of eight columns: one 16-byte store
    const Shape& shape = p.shape;
    const Work work = decode<C>(p, shape.heads);
    const int row_0 = work.tile * C::BLOCK_Q, rows = min(C::BLOCK_Q, shape.len_q - row_0);
    const float* accum = p.dq_accum + (statistics_row<C>(p, work, work.head) + row_0) * C::HEAD_DIM;
    u16* dq_gmem =
        (u16*)p.dq + head_offset(work, p.dq_strides, work.head) + row_0 * p.dq_strides.row;
    const bool vector = C::VECTOR_ONLY || (shape.flags & FLAG_DQ_VECTOR);

    for (int i = threadIdx.x; i < rows * GROUPS; i += C::WARPS * 32) {
        const int row = i / GROUPS, first = i % GROUPS * 8;
        if (first >= shape.head_dim) continue;
        // Hopper's kernel permutes the columns by the row (dq_column in backward_sm90_layout.cuh).
        const int place = C::DQ_PERMUTED ? first ^ (row & 3) << 3 : first;
        const float4* from = (const float4*)(accum + row * C::HEAD_DIM + place);
        const float4 low = from[0], high = from[1];
        const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        u16* to = dq_gmem + row * p.dq_strides.row + first;
        if (vector) {
            uint4 packed;
            packed.x = Element::pack(shape.scale * x[0], shape.scale * x[1]);
            packed.y = Element::pack(shape.scale * x[2], shape.scale * x[3]);
            packed.z = Element::pack(shape.scale * x[4], shape.scale * x[5]);
            packed.w = Element::pack(shape.scale * x[6], shape.scale * x[7]);
            st_global_v4(to, packed);
        } else {
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (first + c < shape.head_dim) to[c] = Element::from_real(shape.scale * x[c]);
        }
    }
}

}  // namespace backward

template <class C> __device__ void backward_convert(const BackwardParams& params) {
    backward::with_sequence<C>(params, params.shape.heads,
                               [&](const BackwardParams& p) { backward::convert_rows<C>(p); });
}
