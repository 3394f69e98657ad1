// What a block of forward leaves behind: the rows of a warp and their lse, or its part of them.
#pragma once

#include "dropout.cuh"
#include "finite.cuh"
#include "forward_layout.cuh"
#include "score.cuh"
#include "softmax.cuh"

// A part's rows of one warp, straight from the registers: floats, of which the four lanes of a row
// fill whole sectors. They wait for the merge of parts in the workspace p.out [splits, B, H, Lq, Dv].
template <class C, int M16, int O8, class Real>
DEV void write_part(const ForwardParams& p, const ForwardWork& work, i64 first, int first_column,
                    const Accumulator<M16, O8, Real>& o, const Real (&inverse)[M16][2]) {
    const int lane = lane_id(), columns = p.shape.head_dim_v;
    const int row = work.tile * C::BLOCK_Q + warp_id() * (16 * M16) + lane / 4;
    const TileRows<C> rows(p.shape);
#pragma unroll
    for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row + 16 * m + 8 * half;
            if (rows.query(i) >= p.shape.len_q) continue;
            Real* to = (Real*)p.out + (first + rows.place(i, p.shape.len_q)) * columns;
#pragma unroll
            for (int n = 0; n < O8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column =
                        first_column + output_column<typename C::Element>(n, e, lane);
                    if (column < columns) to[column] = o.x[m][n][2 * half + e] * inverse[m][half];
                }
        }
    __syncwarp();  // repairs come from other lanes
}

// Adds to a part what was left out of it; see add_non_finite.
template <class C> DEV void repair_part(const ForwardParams& p, const ForwardWork& work, i64 first,
                                        int first_column,
                                        const GlobalRows<typename C::Element::Storage>& v_gmem,
                                        Range keys, const typename C::Mask& mask) {
    using Real = typename C::Element::Real;
    constexpr int WARP_Q = ForwardLayout<C>::WARP_Q;
    const int first_row = work.tile * C::BLOCK_Q + warp_id() * WARP_Q;
    const TileRows<C> rows(p.shape);
    each_non_finite<typename C::Element>(
        v_gmem, keys, ForwardLayout<C>::PART, [&](int key, int column, Real x) {
#pragma unroll 1
            for (int i = first_row; i < first_row + WARP_Q; ++i) {
                if (rows.query(i) >= p.shape.len_q || !mask.keep(i, key)) continue;
                const i64 at = first + rows.place(i, p.shape.len_q);
                ((Real*)p.out)[at * p.shape.head_dim_v + first_column + column] += x;
            }
        });
}

// Divides by the sums; writes lse and the rows of one warp. `repaired`: some tile that the mask
// cuts held infinities or NaNs in V, which the pairs that see them get back here.
template <class C, int M16, int O8, class Real>
DEV void write_output(const ForwardParams& p, int first_column, u32 out_smem,
                      const Accumulator<M16, O8, Real>& o, OnlineSoftmax<M16, Real>& softmax,
                      bool repaired) {
    using L = ForwardLayout<C>;
    using OutTile = typename L::OutTile;
    const Shape& shape = p.shape;
    const ForwardWork work = forward_work<C>(p);
    const int first_row = work.tile * C::BLOCK_Q, row = warp_id() * L::WARP_Q;

    Real inverse[M16][2], lse[M16][2];
    const TileRows<C> rows(p.shape);
    const auto sink_of_head = [&](int head) {  // one of the parts has the sink
        return work.split == 0 ? sink_log2<C>(p, head) : Real(neg_infinity());
    };
    if constexpr (GROUPED<C> && C::SINKS)
        softmax.template finish<true>(inverse, lse, [&](int m, int half) {
            const int own = first_row + row + m * 16 + half * 8 + lane_id() / 4;
            return sink_of_head(work.head + rows.member(own));
        });
    else
        softmax.template finish<C::SINKS>(inverse, lse, sink_of_head(work.head));
    i64 first = statistics_row<C>(p, work, work.head);  // of the head, in lse
    if constexpr (C::SPLIT) first += (i64)work.split * shape.batch * shape.heads * shape.len_q;
    Real* lse_gmem = (Real*)p.lse + first;
#pragma unroll
    for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = first_row + row + m * 16 + half * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && rows.query(i) < shape.len_q)
                lse_gmem[rows.place(i, shape.len_q)] = lse[m][half];
            if constexpr (C::DROPOUT) inverse[m][half] *= dropout::factor_of<Real>(p);
        }

    if constexpr (C::SPLIT) {
        write_part<C>(p, work, first, first_column, o, inverse);
    } else {
        __syncwarp();  // every lane has read its Q, which the output now overwrites
        accumulator_to_shared<typename C::Element, OutTile>(out_smem, row, o, inverse);
        __syncwarp();
    }
    if (repaired) {
        const typename C::Mask mask(p, work, work.head);
        const Range rows{first_row, first_row + C::BLOCK_Q};
        const Range tiles = own_key_tiles<C>(p, work, mask, rows);
        const auto v_gmem = value_rows<C>(p, work, first_column);
        for (int tile = tiles.begin; tile < tiles.end; tile = mask.next_tile(tile + 1, tiles.end)) {
            const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
            if (!mask.isolates(rows, keys, tile)) continue;
            if constexpr (C::SPLIT)
                repair_part<C>(p, work, first, first_column, v_gmem, keys, mask);
            else
                add_non_finite<typename C::Element, OutTile, L::WARP_Q>(
                    out_smem, row, v_gmem, keys, Real(1),
                    [&](int r, int key) { return mask.keep(first_row + r, key); });
        }
        __syncwarp();
    }
    if constexpr (!C::SPLIT)
        store_rows<OutTile, L::WARP_Q, C::VECTOR_ONLY>(output_rows<C>(p, work, first_column),
                                                       out_smem, row, first_row);
}

// Lengths that contradict themselves: NaN in every row, so that nobody takes the output for one.
// Here the blocks share out the rows of the arrays, whatever the tables say.
template <class C> DEV void write_nan(const ForwardParams& p, unsigned block = fresh_block_id()) {
    const Work work = decode_flat(p.schedule, 1, p.shape.heads, block);
    using Real = typename C::Element::Real;
    const Real nan = __int_as_float(0x7fffffff);
    auto* out_gmem = (typename C::Element::Storage*)p.out + work.head * p.out_strides.head;
    Real* lse_gmem = (Real*)p.lse + work.head * p.values.packed.total_q;
    for (int i = threadIdx.x; i < C::BLOCK_Q * C::HEAD_DIM_V; i += C::WARPS * 32) {
        const i64 row = (i64)work.tile * C::BLOCK_Q + i / C::HEAD_DIM_V;
        const int column = i % C::HEAD_DIM_V;
        if (row >= p.values.packed.total_q) break;
        if (column < p.shape.head_dim_v)
            out_gmem[row * p.out_strides.row + column] = C::Element::from_real(nan);
        if (column == 0) lse_gmem[row] = nan;
    }
}
