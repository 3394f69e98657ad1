// A tiled attention forward for the emulator's own tests: small, but with every hazard of the real kernels. fp16 in and out,
// head dim 64, 4 warps of 16 query rows, K and V double-buffered by cp.async, ldmatrix, mma, online softmax, shared epilogue.
// Each PLANT_* macro plants one mistake that the emulator must catch (tests/test_emulator_catches.py).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
#define DEVICE static __device__ __forceinline__

constexpr int ROWS = 64, COLS = 64, DIM = 64, THREADS = 128;
constexpr int TILE_BYTES = 64 * DIM * 2;

struct Params {
    const u16 *q, *k, *v;  // [heads, len, 64]
    u16* o;                // [heads, len_q, 64]
    float* lse;            // [heads, len_q]
    int len_q, len_k, causal;
    float scale_log2;
};

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy_async(u32 dst, const void* src, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
#ifdef PLANT_OUTPUT_ONLY_SUM
#define SUM "=f"
#else
#define SUM "+f"
#endif
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : SUM(d[0]), SUM(d[1]), SUM(d[2]), SUM(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u32 pack(float low, float high) {
    u32 r;
#ifdef PLANT_SWAPPED_PACK
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(low), "f"(high));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}
DEVICE float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// A row is 8 chunks of 16 bytes; chunk c of row r is stored at c ^ (r & 7), so ldmatrix meets every bank once.
DEVICE u32 place(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

DEVICE void load_tile(u32 tile, const u16* from, int first_row, int rows) {
#pragma unroll
    for (int i = 0; i < 64 * 8 / THREADS; ++i) {
        const int c = i * THREADS + threadIdx.x, row = c >> 3, chunk = c & 7;
        const bool inside = first_row + row < rows;
#ifdef PLANT_GLOBAL_OVERRUN
        copy_async(tile + place(row, chunk), from + (long long)(first_row + row) * DIM + chunk * 8,
                   16);
#elif defined(PLANT_NO_ZERO_FILL)
        if (inside)
            copy_async(tile + place(row, chunk),
                       from + (long long)(first_row + row) * DIM + chunk * 8, 16);
#else
        copy_async(tile + place(row, chunk),
                   from + (inside ? (long long)(first_row + row) * DIM + chunk * 8 : 0),
                   inside ? 16 : 0);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 smem[];
    const u32 q_smem = shared_address(smem), k_smem = q_smem + TILE_BYTES,
              v_smem = k_smem + 2 * TILE_BYTES;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    const int first_row = blockIdx.x * ROWS;
    const long long head = blockIdx.y;
    const u16* q = p.q + head * p.len_q * DIM;
    const u16* k = p.k + head * p.len_k * DIM;
    const u16* v = p.v + head * p.len_k * DIM;

    int tiles = (p.len_k + COLS - 1) / COLS;
    if (p.causal) {
        const int seen = (first_row + ROWS + p.len_k - p.len_q + COLS - 1) / COLS;
        tiles = seen < tiles ? (seen < 0 ? 0 : seen) : tiles;
    }
    load_tile(q_smem, q, first_row, p.len_q);
    if (tiles > 0) load_tile(k_smem, k, 0, p.len_k);
    commit();
    if (tiles > 0) load_tile(v_smem, v, 0, p.len_k);
    commit();

    float o[8][4] = {}, row_max[2] = {minus_infinity(), minus_infinity()}, row_sum[2] = {};
    u32 q_frag[4][4];
    for (int it = 0; it < tiles; ++it) {
        const u32 k_now = k_smem + (it & 1) * TILE_BYTES, v_now = v_smem + (it & 1) * TILE_BYTES;
#ifndef PLANT_NO_WAIT
        wait_group<1>();  // K of this tile, and Q, are there; V may be on its way
#endif
#ifndef PLANT_NO_BARRIER_1
        __syncthreads();
#endif
#ifdef PLANT_DIVERGENT_BARRIER
        if (warp == 1 && lane == 7) __syncthreads();
#endif
        if (it == 0) {
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                load_matrices(q_frag[kk],
                              q_smem + place(warp * 16 + (lane & 15), kk * 2 + (lane >> 4)));
        }
        if (it + 1 < tiles)
            load_tile(k_smem + ((it + 1) & 1) * TILE_BYTES, k, (it + 1) * COLS, p.len_k);
        commit();

        float s[8][4] = {};
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 b[4];
                load_matrices(b, k_now + place(j * 16 + (lane & 7) + (lane >> 4) * 8,
                                               kk * 2 + ((lane >> 3) & 1)));
                multiply(s[2 * j], q_frag[kk], b[0], b[1]);
                multiply(s[2 * j + 1], q_frag[kk], b[2], b[3]);
            }
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int col = it * COLS + j * 8 + 2 * t + (e & 1),
                          row = first_row + warp * 16 + g + (e >> 1) * 8;
                const bool seen = col < p.len_k && (!p.causal || col <= row + p.len_k - p.len_q);
                s[j][e] = seen ? s[j][e] * p.scale_log2 : minus_infinity();
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float best = row_max[r];
#pragma unroll
            for (int j = 0; j < 8; ++j) best = fmaxf(best, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            const float base = best == minus_infinity()
                                   ? 0.f
                                   : best;  // a row without keys so far: avoid -inf minus -inf
            const float shrink = exp2_fast(row_max[r] - base);
            row_max[r] = best;
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sum += (s[j][2 * r] = exp2_fast(s[j][2 * r] - base));
                sum += (s[j][2 * r + 1] = exp2_fast(s[j][2 * r + 1] - base));
                o[j][2 * r] *= shrink;
                o[j][2 * r + 1] *= shrink;
            }
            row_sum[r] = row_sum[r] * shrink + sum;
        }
#ifdef PLANT_WAIT_ONE_LESS
        wait_group<2>();
#else
        wait_group<1>();  // V of this tile
#endif
#ifndef PLANT_NO_BARRIER_2
        __syncthreads();
#endif
        if (it + 1 < tiles)
            load_tile(v_smem + ((it + 1) & 1) * TILE_BYTES, v, (it + 1) * COLS, p.len_k);
        commit();
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
            const u32 a[4] = {pack(s[2 * kk][0], s[2 * kk][1]), pack(s[2 * kk][2], s[2 * kk][3]),
                              pack(s[2 * kk + 1][0], s[2 * kk + 1][1]),
                              pack(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 b[4];
                load_matrices_transposed(b,
                                         v_now + place(kk * 16 + (lane & 15), j * 2 + (lane >> 4)));
                multiply(o[2 * j], a, b[0], b[1]);
                multiply(o[2 * j + 1], a, b[2], b[3]);
            }
        }
    }
    wait_group<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
        row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
        const int in_tile = warp * 16 + g + r * 8, row = first_row + in_tile;
        const float inverse = row_sum[r] > 0.f ? 1.f / row_sum[r] : 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#ifdef PLANT_SHARED_OVERRUN
            const int to =
                in_tile == 63 ? 5 * 64 : in_tile;  // the first row after the 40 KiB of the launch
#else
            const int to = in_tile;
#endif
            *(u32*)(smem + place(to, j) + 4 * t) =
                pack(o[j][2 * r] * inverse, o[j][2 * r + 1] * inverse);
        }
        if (t == 0 && row < p.len_q)
            p.lse[head * p.len_q + row] =
                row_sum[r] > 0.f ? (row_max[r] + __log2f(row_sum[r])) * 0.693147180559945f
                                 : minus_infinity();
    }
#ifndef PLANT_NO_SYNCWARP
    __syncwarp();
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int in_tile = warp * 16 + i * 4 + (lane >> 3), chunk = lane & 7;
        if (first_row + in_tile < p.len_q)
            *(uint4*)(p.o + (head * p.len_q + first_row + in_tile) * DIM + chunk * 8) =
                *(const uint4*)(smem + place(in_tile, chunk));
    }
}
