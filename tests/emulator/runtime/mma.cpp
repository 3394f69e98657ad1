// mma.cpp - ldmatrix and mma.sync of 16-bit and tf32 operands, in batches.
//
// Generated code collects neighbouring matrix instructions (translate time: codegen_matrix.py) and meets the warp once for
// all of them; the last lane to arrive executes them in order for the whole warp, on the lanes' own registers. Fragment
// layouts: PTX ISA, "Matrix Fragments for mma". With g = lane / 4 and t = lane % 4, C and D hold (row g, columns 2t, 2t+1) and
// the same columns of row g + 8.
#include "ops.h"
#include "scalar.h"
#include "state.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace emu {
namespace {
struct Lane {
    Thread* t;
    u32* registers;
    const MatrixOp* ops;
    u32 count;
};
typedef float Row __attribute__((vector_size(32)));  // one row of 8 columns

void widen(MatrixKind kind, const u16* from, float* to, u32 count) {  // count: a multiple of 8
#if defined(__F16C__)
    if (kind != MMA_BF16) {
        for (u32 i = 0; i < count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
        return;
    }
#endif
    for (u32 i = 0; i < count; ++i)
        to[i] = kind == MMA_BF16 ? from_bf16(from[i]) : from_f16(from[i]);
}
void gather_16bit(const MatrixOp& op, void** lanes, float (*A)[16], float (*B)[8]) {
    alignas(32) u16 a[16][16], b[16][8];  // bits first: whole rows are then converted at once
    u32 halves = op.k / 8;
    for (u32 i = 0; i < WARP; ++i) {
        const u32* registers = ((Lane*)lanes[i])->registers;
        u32 g = i >> 2, t = 2 * (i & 3);
        for (u32 h = 0; h < halves; ++h) {
            u32 low = registers[op.a[2 * h]], high = registers[op.a[2 * h + 1]];
            memcpy(&a[g][8 * h + t], &low, 4);
            memcpy(&a[g + 8][8 * h + t], &high, 4);
            u32 column = registers[op.b[h]];
            b[8 * h + t][g] = (u16)column, b[8 * h + t + 1][g] = (u16)(column >> 16);
        }
    }
    for (u32 r = 0; r < 16; ++r) widen((MatrixKind)op.kind, a[r], A[r], op.k);
    for (u32 k = 0; k < op.k; ++k) widen((MatrixKind)op.kind, b[k], B[k], 8);
}
void gather_tf32(const MatrixOp& op, void** lanes, float (*A)[16], float (*B)[8]) {
    for (u32 i = 0; i < WARP; ++i) {
        const u32* registers = ((Lane*)lanes[i])->registers;
        u32 g = i >> 2, t = i & 3;
        for (u32 j = 0; j < op.k / 4u; ++j) {  // the hardware ignores the low 13 bits
            A[g][t + 4 * j] = as_float(registers[op.a[2 * j]] & 0xffffe000u);
            A[g + 8][t + 4 * j] = as_float(registers[op.a[2 * j + 1]] & 0xffffe000u);
            B[t + 4 * j][g] = as_float(registers[op.b[j]] & 0xffffe000u);
        }
    }
}
// C += A B: products of the operands are exact in float; sums are rounded to nearest at each step, in order of k.
void multiply(float (*A)[16], float (*B)[8], float (*C)[8], u32 K) {
    for (u32 first = 0; first < 16;
         first += 8) {  // eight rows at a time hide the latency of the additions
        Row sum[8];
        memcpy(sum, C[first], sizeof sum);
        for (u32 k = 0; k < K; ++k) {
            Row b;
            memcpy(&b, B[k], sizeof b);
#pragma GCC unroll 8
            for (u32 r = 0; r < 8; ++r) sum[r] += A[first + r][k] * b;
        }
        memcpy(C[first], sum, sizeof sum);
    }
}
void run_mma(const MatrixOp& op, void** lanes) {
    alignas(32) float A[16][16], B[16][8], C[16][8];
    bool half_sums = op.kind == MMA_F16_F16;
    if (op.kind == MMA_TF32)
        gather_tf32(op, lanes, A, B);
    else
        gather_16bit(op, lanes, A, B);
    for (u32 i = 0; i < WARP; ++i) {
        const u32* registers = ((Lane*)lanes[i])->registers;
        u32 g = i >> 2, c = 2 * (i & 3);
        for (u32 h = 0; h < 2; ++h) {
            u32 packed = half_sums ? registers[op.c[h]] : 0;
            C[g + 8 * h][c] = half_sums ? from_f16((u16)packed) : as_float(registers[op.c[2 * h]]);
            C[g + 8 * h][c + 1] =
                half_sums ? from_f16((u16)(packed >> 16)) : as_float(registers[op.c[2 * h + 1]]);
        }
    }
    multiply(A, B, C, op.k);
    for (u32 i = 0; i < WARP; ++i) {
        u32* registers = ((Lane*)lanes[i])->registers;
        u32 g = i >> 2, c = 2 * (i & 3);
        for (u32 h = 0; h < 2; ++h) {
            float x = C[g + 8 * h][c], y = C[g + 8 * h][c + 1];
            if (half_sums)
                registers[op.d[h]] = to_f16(x) | (u32)to_f16(y) << 16;
            else
                registers[op.d[2 * h]] = bits(x), registers[op.d[2 * h + 1]] = bits(y);
        }
    }
}
void run_ldmatrix(const MatrixOp& op, void** lanes) {
    u32 addresses[WARP], rows = 8u * op.count;
    for (u32 i = 0; i < rows; ++i) {
        const Lane& lane = *(Lane*)lanes[i];
        addresses[i] = lane.registers[op.a[0]] + (u32)op.offset;
    }
    if (counting) count_shared_phase(*((Lane*)lanes[0])->t, addresses, rows, 16);
    u16 data[WARP][8];
    for (u32 i = 0; i < rows; ++i) {  // a row is an access of the lane that names it
        Thread& t = *((Lane*)lanes[i])->t;
        u8* p = shared_at(t, addresses[i], 16, 16);
        if (request->race) race_shared(t, addresses[i], 16, READ);
        check_initialised(t, addresses[i], 16);
        memcpy(data[i], p, 16);
    }
    for (u32 k = 0; k < op.count; ++k) {
        const u16(*m)[8] = data + 8 * k;
        for (u32 i = 0; i < WARP; ++i) {
            u32 g = i >> 2, c = 2 * (i & 3);
            ((Lane*)lanes[i])->registers[op.d[k]] =
                op.trans ? m[c][g] | (u32)m[c + 1][g] << 16 : m[g][c] | (u32)m[g][c + 1] << 16;
        }
    }
}
void leader(void** lanes, u32) {
    const Lane& first = *(Lane*)lanes[0];
    for (u32 n = 0; n < first.count; ++n) {
        const MatrixOp& op = first.ops[n];
        for (u32 i = 0; i < WARP; ++i) ((Lane*)lanes[i])->t->site = op.site;
        if (n) count_warp(*first.t);  // the meeting itself counts the first
        if (op.kind == LDMATRIX)
            run_ldmatrix(op, lanes);
        else
            run_mma(op, lanes);
    }
}
}  // namespace

void matrix_batch(Thread& t, u32* registers, const MatrixOp* ops, u32 count) {
    t.site = ops[0].site;
    Lane lane{&t, registers, ops, count};
    collective(t, ~0u, ops[0].kind == LDMATRIX ? "ldmatrix" : "mma", &lane, leader);
}

// ---- f64: rare enough to meet one by one ----------------------------------------------------------------------------------
namespace {
struct Fragment {
    u32 k;
    const double *a, *b;
    double* d;
};
template <int ROWS> void f64_leader(void** lanes, u32) {
    double A[16][16], B[16][8], C[16][8];
    u32 K = ((Fragment*)lanes[0])->k;
    constexpr u32 parts = ROWS / 8;
    for (u32 i = 0; i < WARP; ++i) {
        Fragment& f = *(Fragment*)lanes[i];
        u32 g = i >> 2, t = i & 3;
        for (u32 j = 0; j < K / 4; ++j) {
            for (u32 h = 0; h < parts; ++h) A[g + 8 * h][t + 4 * j] = f.a[parts * j + h];
            B[t + 4 * j][g] = f.b[j];
        }
        for (u32 e = 0; e < 2 * parts; ++e) C[g + 8 * (e >> 1)][2 * t + (e & 1)] = f.d[e];
    }
    for (u32 r = 0; r < ROWS; ++r)
        for (u32 k = 0; k < K; ++k)
            for (u32 c = 0; c < 8; ++c) C[r][c] = __builtin_fma(A[r][k], B[k][c], C[r][c]);
    for (u32 i = 0; i < WARP; ++i)
        for (u32 e = 0; e < 2 * parts; ++e)
            ((Fragment*)lanes[i])->d[e] = C[(i >> 2) + 8 * (e >> 1)][2 * (i & 3) + (e & 1)];
}
}  // namespace
void mma_f64(Thread& t, u32 rows, u32 k, const double* a, const double* b, double* d) {
    Fragment f{k, a, b, d};
    collective(t, ~0u, "mma", &f, rows == 8 ? f64_leader<8> : f64_leader<16>);
}
}  // namespace emu
