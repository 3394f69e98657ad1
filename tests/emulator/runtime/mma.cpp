// mma.cpp - mma.sync: gather the fragments of a warp, multiply, scatter. Fragment layouts: PTX ISA, "Matrix Fragments for mma".
// With g = lane / 4 and t = lane % 4, C and D hold (row g, columns 2t, 2t+1) and, for 16 rows, the same of row g + 8.
#include "ops.h"
#include "scalar.h"
#include "state.h"

#include <cmath>

namespace emu {
namespace {
struct Fragment {
  u32 k;
  const void* a;
  const void* b;
  void* d;
};
typedef float Row __attribute__((vector_size(32)));  // one row of 8 columns

template <class Decode> void gather_16bit(void** lanes, u32 K, float (*A)[16], float (*B)[8], Decode decode) {
  for (u32 i = 0; i < WARP; ++i) {
    Fragment& f = *(Fragment*)lanes[i];
    const u32 *a = (const u32*)f.a, *b = (const u32*)f.b;
    u32 g = i >> 2, t = i & 3;
    for (u32 half = 0; half < K / 8; ++half)
      for (u32 e = 0; e < 2; ++e) {
        u32 k = 8 * half + 2 * t + e;
        A[g][k] = decode((u16)(a[2 * half] >> 16 * e));
        A[g + 8][k] = decode((u16)(a[2 * half + 1] >> 16 * e));
        B[k][g] = decode((u16)(b[half] >> 16 * e));
      }
  }
}
void gather_tf32(void** lanes, u32 K, float (*A)[16], float (*B)[8]) {
  for (u32 i = 0; i < WARP; ++i) {
    Fragment& f = *(Fragment*)lanes[i];
    const u32 *a = (const u32*)f.a, *b = (const u32*)f.b;
    u32 g = i >> 2, t = i & 3;
    for (u32 j = 0; j < K / 4; ++j) {  // the hardware ignores the low 13 bits
      A[g][t + 4 * j] = as_float(a[2 * j] & 0xffffe000u);
      A[g + 8][t + 4 * j] = as_float(a[2 * j + 1] & 0xffffe000u);
      B[t + 4 * j][g] = as_float(b[j] & 0xffffe000u);
    }
  }
}
void multiply(float (*A)[16], float (*B)[8], float (*C)[8], u32 K) {
  for (u32 r = 0; r < 16; ++r) {
    Row sum;
    memcpy(&sum, C[r], 32);
    for (u32 k = 0; k < K; ++k) {
      Row b;
      memcpy(&b, B[k], 32);
      sum += A[r][k] * b;
    }
    memcpy(C[r], &sum, 32);
  }
}
template <bool HALF_SUMS> void with_sums(void** lanes, float (*A)[16], float (*B)[8], u32 K) {
  float C[16][8];
  for (u32 i = 0; i < WARP; ++i) {
    void* d = ((Fragment*)lanes[i])->d;
    u32 g = i >> 2, c = 2 * (i & 3);
    for (u32 e = 0; e < 4; ++e) {
      float& x = C[g + 8 * (e >> 1)][c + (e & 1)];
      x = HALF_SUMS ? from_f16((u16)(((u32*)d)[e >> 1] >> 16 * (e & 1))) : ((float*)d)[e];
    }
  }
  multiply(A, B, C, K);
  for (u32 i = 0; i < WARP; ++i) {
    void* d = ((Fragment*)lanes[i])->d;
    u32 g = i >> 2, c = 2 * (i & 3);
    for (u32 h = 0; h < 2; ++h) {
      float x = C[g + 8 * h][c], y = C[g + 8 * h][c + 1];
      if (HALF_SUMS) ((u32*)d)[h] = to_f16(x) | (u32)to_f16(y) << 16;
      else ((float*)d)[2 * h] = x, ((float*)d)[2 * h + 1] = y;
    }
  }
}
template <bool HALF_SUMS> void f16_leader(void** lanes, u32) {
  float A[16][16], B[16][8];
  u32 K = ((Fragment*)lanes[0])->k;
  gather_16bit(lanes, K, A, B, [](u16 h) { return from_f16(h); });
  with_sums<HALF_SUMS>(lanes, A, B, K);
}
void bf16_leader(void** lanes, u32) {
  float A[16][16], B[16][8];
  u32 K = ((Fragment*)lanes[0])->k;
  gather_16bit(lanes, K, A, B, [](u16 h) { return from_bf16(h); });
  with_sums<false>(lanes, A, B, K);
}
void tf32_leader(void** lanes, u32) {
  float A[16][16], B[16][8];
  u32 K = ((Fragment*)lanes[0])->k;
  gather_tf32(lanes, K, A, B);
  with_sums<false>(lanes, A, B, K);
}
template <int ROWS> void f64_leader(void** lanes, u32) {
  double A[16][16], B[16][8], C[16][8];
  u32 K = ((Fragment*)lanes[0])->k;
  constexpr u32 parts = ROWS / 8;
  for (u32 i = 0; i < WARP; ++i) {
    Fragment& f = *(Fragment*)lanes[i];
    u32 g = i >> 2, t = i & 3;
    for (u32 j = 0; j < K / 4; ++j) {
      for (u32 h = 0; h < parts; ++h) A[g + 8 * h][t + 4 * j] = ((const double*)f.a)[parts * j + h];
      B[t + 4 * j][g] = ((const double*)f.b)[j];
    }
    for (u32 e = 0; e < 2 * parts; ++e) C[g + 8 * (e >> 1)][2 * t + (e & 1)] = ((double*)f.d)[e];
  }
  for (u32 r = 0; r < ROWS; ++r)
    for (u32 k = 0; k < K; ++k)
      for (u32 c = 0; c < 8; ++c) C[r][c] = std::fma(A[r][k], B[k][c], C[r][c]);
  for (u32 i = 0; i < WARP; ++i)
    for (u32 e = 0; e < 2 * parts; ++e) ((double*)((Fragment*)lanes[i])->d)[e] = C[(i >> 2) + 8 * (e >> 1)][2 * (i & 3) + (e & 1)];
}
}  // namespace

#define EMU_MMA(name, operand, sum, leader)                                                    \
  void name(Thread& t, u32 k, const operand* a, const operand* b, sum* d) {                    \
    Fragment f{k, a, b, d};                                                                    \
    collective(t, ~0u, #name, &f, leader);                                                     \
  }
EMU_MMA(mma_f16, u32, float, f16_leader<false>)
EMU_MMA(mma_f16_f16, u32, u32, f16_leader<true>)
EMU_MMA(mma_bf16, u32, float, bf16_leader)
EMU_MMA(mma_tf32, u32, float, tf32_leader)
#undef EMU_MMA
void mma_f64(Thread& t, u32 rows, u32 k, const double* a, const double* b, double* d) {
  Fragment f{k, a, b, d};
  collective(t, ~0u, "mma_f64", &f, rows == 8 ? f64_leader<8> : f64_leader<16>);
}
}  // namespace emu
