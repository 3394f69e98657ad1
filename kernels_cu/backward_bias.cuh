// Gradient of a bias of any broadcast shape: dbias = P * (dP * Z - delta), summed over the axes that the
// bias lacks. Every block keeps one tile of the score matrix in float32 registers, to which all of its
// tiles of pairs are added; sums over rows or keys follow once, at the end.
//
// Grid, block and shared memory: see backward_pairs.cuh. Needs Element, Mask, Score, DROPOUT, PACKED,
// VECTOR_ONLY, HEAD_DIM, HEAD_DIM_V, BLOCK_Q, BLOCK_K, WARPS, SHARED_BYTES of Config. With
// p.dbias_values.splits > 1 each split leaves sums of its own, split_stride elements apart, for the host
// to add up.
#pragma once

#include "backward_pairs.cuh"

namespace backward {

template <class C> struct BiasSums {
    using Real = typename C::Element::Real;
    static constexpr int N8 = C::BLOCK_K / 8, BYTES = sizeof(Real);
    Accumulator<1, N8, Real> sum;

    DEV_METHOD explicit BiasSums(const BackwardParams&) { sum.zero(); }

    DEV_METHOD void add(const BackwardParams&, const Work&, int, int,
                        const Accumulator<1, N8, Real>&, const Accumulator<1, N8, Real>& ds) {
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum.x[0][n][e] += ds.x[0][n][e];
    }

    DEV_METHOD void finish(const BackwardParams& p, const Work& work, const PairPlace& place,
                           u32 smem) {
        const int reduced = p.dbias_values.reduced, lane = fresh_thread_id() % 32;
        const int first_row = place.tile_q * C::BLOCK_Q + fresh_thread_id() / 32 * 16 + lane / 4;
        const int first_key = place.tile_k * C::BLOCK_K + lane % 4 * 2;
        if (reduced & REDUCED_ROW && reduced & REDUCED_KEY) {
            const Real total = block_sum<C::WARPS>(of_all(), smem);
            if (threadIdx.x == 0) store(p, work, 0, 0, total);
        } else if (reduced & REDUCED_ROW) {
            sum_rows(p, work, place, smem);
        } else if (reduced & REDUCED_KEY) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Real total = 0;
#pragma unroll
                for (int n = 0; n < N8; ++n)
                    total += sum.x[0][n][2 * half] + sum.x[0][n][2 * half + 1];
                total += shfl_xor(total, 1);
                total += shfl_xor(total, 2);
                if (lane % 4 == 0) store(p, work, first_row + 8 * half, 0, total);
            }
        } else {
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    store(p, work, first_row + e / 2 * 8, first_key + 8 * n + e % 2,
                          sum.x[0][n][e]);
        }
    }

  private:
    DEV_METHOD Real of_all() const {
        Real total = 0;
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) total += sum.x[0][n][e];
        return total;
    }

    // One sum per key: over the warp's rows by shuffles, over the warps through shared memory.
    DEV_METHOD void sum_rows(const BackwardParams& p, const Work& work, const PairPlace& place,
                             u32 smem) {
        const int lane = fresh_thread_id() % 32, warp = fresh_thread_id() / 32;
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                Real total = sum.x[0][n][e] + sum.x[0][n][e + 2];
#pragma unroll
                for (int step = 4; step < 32; step *= 2) total += shfl_xor(total, step);
                if (lane < 4)
                    st_shared(smem + BYTES * (warp * C::BLOCK_K + 8 * n + 2 * lane + e), total);
            }
        __syncthreads();
        for (int key = fresh_thread_id(); key < C::BLOCK_K; key += C::WARPS * 32) {
            Real total = 0;
            for (int w = 0; w < C::WARPS; ++w) {
                Real share;
                ld_shared(share, smem + BYTES * (w * C::BLOCK_K + key));
                total += share;
            }
            store(p, work, 0, place.tile_k * C::BLOCK_K + key, total);
        }
    }

    DEV_METHOD static void store(const BackwardParams& p, const Work& work, int row, int key,
                                 Real x) {
        if (row >= p.shape.len_q || key >= p.shape.len_k) return;
        const BiasGradient& values = p.dbias_values;
        const unsigned split = fresh_block_id() / (gridDim.x / values.splits);
        const i64 at = split * values.split_stride + head_offset(work, values.strides, work.head) +
                       row * values.strides.row + key * values.strides.key;
        if (p.shape.flags & FLAG_DBIAS_ELEMENT)
            st_global((typename C::Element::Storage*)p.dbias + at, C::Element::from_real(x));
        else if (values.splits > 1)
            ((Real*)p.dbias)[at] = x;  // to be added up
        else
            ((float*)p.dbias)[at] = (float)x;
    }
};

}  // namespace backward

template <class C> __device__ void backward_bias(const BackwardParams& p) {
    extern __shared__ __align__(128) u8 shared_memory[];
    backward::PairBlock<C, backward::BiasSums<C>> block(p, shared_address(shared_memory));
    block.walk();
}
