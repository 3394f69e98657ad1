// ops.h - the instructions that generated code calls by name: warp collectives, matrices, and hopper.h on top.
#pragma once
#include "emu.h"

namespace emu {
void warp_barrier(Thread& t, u32 mask);

// shfl.sync: value of the source lane; *ok is the predicate result (false: the own value was kept).
u32 shuffle_up(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok);
u32 shuffle_down(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok);
u32 shuffle_bfly(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok);
u32 shuffle_idx(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok);

u32 vote(Thread& t, bool value, u32 mask);      // ballot among `mask`
u32 match_any(Thread& t, u64 value, u32 mask);  // lanes of `mask` with the same value
enum Redux { REDUX_ADD, REDUX_MIN, REDUX_MAX, REDUX_AND, REDUX_OR, REDUX_XOR };
u32 redux_u32(Thread& t, Redux op, u32 value, u32 mask);
s32 redux_s32(Thread& t, Redux op, s32 value, u32 mask);
float redux_f32(Thread& t, bool maximum, bool absolute, bool nan_wins, float value, u32 mask);
u32 active_mask(Thread& t);  // every lane of the warp that has not exited

void stmatrix(Thread& t, u32 address, u32 matrices, bool trans, const u32* values);
u32 movmatrix(Thread& t, u32 value);

// ldmatrix and mma.sync of one batch (see mma.cpp). Numbers in a, b, c, d are indices into the thread's matrix registers.
// Every product of 16-bit or tf32 operands is exact in float; sums are formed in float in order of k, starting from C,
// rounding to nearest at each step (MMA_F16_F16: rounded to f16 at the end). Hardware adds groups of products with truncation,
// so results agree with it to a few units in the last place of the largest term, not bit for bit.
enum MatrixKind : u8 { LDMATRIX, MMA_F16, MMA_BF16, MMA_TF32, MMA_F16_F16 };
struct MatrixOp {
    u8 kind, count, trans, k;  // ldmatrix: number of matrices, transposed; mma: depth
    u32 site;
    s32 offset;  // ldmatrix: added to the address in a[0]
    u16 d[4], a[4], b[2], c[4];
};
void matrix_batch(Thread& t, u32* registers, const MatrixOp* ops, u32 count);
void mma_f64(Thread& t, u32 rows, u32 k, const double* a, const double* b,
             double* d);  // fused multiply-add in order of k
}  // namespace emu

#if __has_include("hopper.h")
#include "hopper.h"
#endif
