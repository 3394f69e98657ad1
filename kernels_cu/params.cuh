// What a kernel receives: one struct by value per kernel. Mirror of cuflash/_params.py (a test compares every offset).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// After merging; the host copies arrays with more axes that cannot be merged.
constexpr int MAX_BATCH_AXES = 4;

// Element (not byte) strides of one array seen as (*B, H, L, D); the last axis always has stride 1.
struct Strides {
    i64 batch[MAX_BATCH_AXES];
    i64 head;
    i64 row;
};

// Facts common to every kernel of one call.
struct Shape {
    int batch_extent[MAX_BATCH_AXES];   // slowest first, padded with 1
    int batch, heads, heads_kv, group;  // group = heads / heads_kv
    int len_q, len_k, head_dim, head_dim_v;
    // Row i sees keys j with i + band_low <= j <= i + band_high, clamped by the host.
    int band_low, band_high;
    int q_offset;   // row i sits at position i + q_offset of the key axis (ALiBi)
    float scale;    // natural units; any sign
    float softcap;  // 0: none
    int flags;      // which arrays have 16-byte rows, types of side arrays: FLAG_*
};

constexpr int FLAG_Q_VECTOR = 1, FLAG_K_VECTOR = 2, FLAG_V_VECTOR = 4, FLAG_OUT_VECTOR = 8,
              FLAG_DOUT_VECTOR = 16;
constexpr int FLAG_DQ_VECTOR = 32, FLAG_DK_VECTOR = 64, FLAG_DV_VECTOR = 128;
constexpr int FLAG_SLOPES_16BIT = 256;  // alibi_slopes have the element type, else float

// block id -> (batch, head, tile): sections of heads whose K and V share the L2 cache, longest tiles first inside one.
struct Schedule {
    int tiles;              // tiles along the walked axis of one head
    int heads_per_section;  // heads (batch * heads) walked together
    int longest_last;  // 1: the last tile has the most work, start there; 0: start at the first
};

struct ForwardParams {
    const void* q;             // [*B, H, Lq, D]
    const void* k;             // [*B, Hkv, Lk, D]
    const void* v;             // [*B, Hkv, Lk, Dv]
    void* out;                 // [*B, H, Lq, Dv]
    float* lse;                // [B, H, Lq], contiguous
    const void* alibi_slopes;  // [*B, H] or null
    Strides q_strides, k_strides, v_strides, out_strides, slope_strides;
    Shape shape;
    Schedule schedule;
};

struct BackwardParams {
    const void* q;
    const void* k;
    const void* v;
    const void* out;
    const void* dout;
    const float* lse;   // [*B, H, Lq]
    const float* dlse;  // [*B, H, Lq] or null
    const void* alibi_slopes;
    void* dq;  // null: not wanted
    void* dk;
    void* dv;
    void* dslopes;  // [slope shape], null: not wanted
    // Workspace [B, H, Lq]: lse * log2(e); +inf for rows that see no key, so that P = 0.
    float* lse_log2;
    float* delta;  // workspace [B, H, Lq]: rowsum(dout * out) - dlse
    // Workspace [B, H, Lq, HEAD_DIM]; null when dq is computed by its own pass.
    float* dq_accum;
    float* slope_partial;  // workspace [B, H, q tiles]
    Strides q_strides, k_strides, v_strides, out_strides, dout_strides, lse_strides, dlse_strides;
    Strides dq_strides, dk_strides, dv_strides, slope_strides, dslope_strides;
    Shape shape;
    Schedule schedule;
};

constexpr int MERGE_MAX_PARTS = 32;  // one lane of a warp per part

struct MergeParams {
    const void* outs[MERGE_MAX_PARTS];   // each [B, H, Lq, Dv], contiguous, Element or float
    const float* lses[MERGE_MAX_PARTS];  // each [B, H, Lq], contiguous
    void* out;                           // [*B, H, Lq, Dv]
    float* lse;                          // [B, H, Lq], contiguous
    i64 rows;                            // B * H * Lq
    int parts, head_dim_v;
    Strides out_strides;
    int batch_extent[MAX_BATCH_AXES];
    int heads, len_q;
    int outs_are_float, out_is_float;
};
