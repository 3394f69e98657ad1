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

// Facts common to every kernel of one call. Packed sequences: batch is their number, len_q and len_k
// the largest possible; kernels put each sequence's own numbers in their place (packed.cuh).
struct Shape {
    int batch_extent[MAX_BATCH_AXES];   // slowest first, padded with 1
    int batch, heads, heads_kv, group;  // group = heads / heads_kv
    int len_q, len_k, head_dim, head_dim_v;
    // Row i sees keys j with i + band_low <= j <= i + band_high, clamped by the host.
    int band_low, band_high;
    int q_offset;                   // row i sits at position i + q_offset of the key axis (ALiBi)
    float scale;                    // natural units; any sign
    float softcap;                  // 0: none
    int flags;                      // which arrays have 16-byte rows, types of side arrays: FLAG_*
    double scale_f64, softcap_f64;  // the same, for kernels of float64
};

constexpr int FLAG_Q_VECTOR = 1, FLAG_K_VECTOR = 2, FLAG_V_VECTOR = 4, FLAG_OUT_VECTOR = 8,
              FLAG_DOUT_VECTOR = 16;
constexpr int FLAG_DQ_VECTOR = 32, FLAG_DK_VECTOR = 64, FLAG_DV_VECTOR = 128;
// These arrays have the element type, else float.
constexpr int FLAG_SLOPES_ELEMENT = 256, FLAG_BIAS_ELEMENT = 512, FLAG_SINKS_ELEMENT = 1024,
              FLAG_DBIAS_ELEMENT = 2048;
// Packed sequences: q_offset counts from len_k - len_q of each sequence.
constexpr int FLAG_ALIGN_END = 4096;

// block id -> (batch, head, tile): sections of heads whose K and V share the L2 cache, longest tiles first inside one.
struct Schedule {
    int tiles;              // tiles along the walked axis of one head
    int heads_per_section;  // heads (batch * heads) walked together
    int longest_last;  // 1: the last tile has the most work, start there; 0: start at the first
    int splits;        // forward with C::SPLIT: parts that a tile's keys are shared out to
};

// ---- options that only some kernels read: Config says which ------------------------------------

// Element strides of an array seen as (*B, H, Lq, Lk).
struct PairStrides {
    i64 batch[MAX_BATCH_AXES];
    i64 head, row, key;
};

// A boolean array or a block mask, and its tile map: one bit per tile of the kernel that walks it,
// [mask's batch, mask's heads, tile rows, map_words], in two planes: tiles with a visible pair, tiles
// without a hidden one. Tile rows are tiles of queries, for dK and dV tiles of keys.
struct MaskParams {
    PairStrides
        strides;  // dense: of the bytes; blocks: of the slots, where row and key count blocks
    i64 map_batch[MAX_BATCH_AXES], map_head;  // in words
    i64 map_offset;                           // of this launch's map, in words
    i64 map_plane;                            // words from the first plane to the second
    int map_words;                            // in a row of tiles
    int block_q, block_k;                     // blocks
    int bit_words;                            // in a row of a partial block
};

// Keep a weight if its random word is at least `threshold`, and multiply it by `factor`.
struct DropoutParams {
    u32 threshold;
    float factor;
    double factor_f64;
};

constexpr int MAX_SCORE_ARRAYS = 8, MAX_SCORE_SCALARS = 8, MAX_SCORE_AXES = 4;

// C-contiguous parameter arrays of a score expression.
struct ScoreModParams {
    int extents[MAX_SCORE_ARRAYS][MAX_SCORE_AXES];  // unused axes are 1
    int element_arrays;  // bit n: array n has the element type, else float
};

struct PackedParams {
    i64 total_q;      // rows of lse and of the workspaces per head
    i64 work_offset;  // of this launch's entries in `work`
};

// Pointers come first in every struct: they alone change from call to call.
struct OptionPointers {
    const void* mask;  // dense: u8 [*B, H, Lq, Lk]; blocks: int slots [*B, H, q blocks, key blocks]
    const u32* mask_bits;  // blocks: [partial blocks, block_q, bit_words]
    const u32* mask_map;
    const void* bias;    // [*B, H, Lq, Lk], Element or float
    const void* sinks;   // [H], Element or float
    const u64* seed_at;  // null: `seed` holds it
    u64 seed;
    const int4* sequences;  // [1 + batch]; see packed.cuh
    const int2* work;
    const void* score_arrays[MAX_SCORE_ARRAYS];
    u64 score_scalars[MAX_SCORE_SCALARS];  // the bits of a Real, or an int
};

struct OptionValues {
    MaskParams mask;
    PairStrides bias;
    DropoutParams dropout;
    ScoreModParams score;
    PackedParams packed;
};

struct ForwardParams {
    const void* q;             // [*B, H, Lq, D]
    const void* k;             // [*B, Hkv, Lk, D]
    const void* v;             // [*B, Hkv, Lk, Dv]
    void* out;                 // [*B, H, Lq, Dv]
    void* lse;                 // [B, H, Lq], contiguous, Real
    const void* alibi_slopes;  // [*B, H] or null
    OptionPointers options;
    Strides q_strides, k_strides, v_strides, out_strides, slope_strides;
    Shape shape;
    Schedule schedule;
    OptionValues values;
};

// A tensor map as the driver encodes it, for the copies of sm_90 (cuflash/_tensor_maps.py).
struct alignas(64) TensorMap {
    u64 words[16];
};

// Maps come last: they change from call to call with the pointers. Axes of each, innermost first: columns,
// rows, heads, and the last two batch axes; those that an array is broadcast along have extent 1.
struct ForwardSm90Params : ForwardParams {
    TensorMap q_map, k_map, v_map, out_map;
};

// Gradient of a bias: where its elements lie, and how the sums over axes it lacks are shared out.
struct BiasGradient {
    PairStrides strides;
    i64 split_stride;  // elements from one split's partial sums to the next one's
    int reduced;       // bit a: batch axis a is summed over; REDUCED_*
    int splits;
    int tiles_q, tiles_k;
};
constexpr int REDUCED_HEAD = 16, REDUCED_ROW = 32, REDUCED_KEY = 64;

struct BackwardParams {
    const void* q;
    const void* k;
    const void* v;
    const void* out;
    const void* dout;
    const void* lse;   // [*B, H, Lq], Real
    const void* dlse;  // [*B, H, Lq] or null, Real
    const void* alibi_slopes;
    void* dq;  // null: not wanted
    void* dk;
    void* dv;
    void* dslopes;  // [slope shape], null: not wanted
    // Workspace [B, H, Lq]: lse * log2(e); +inf for rows that see no key, so that P = 0.
    void* lse_log2;  // Real, as all workspaces
    void* delta;     // workspace [B, H, Lq]: rowsum(dout * out) - dlse
    // Workspace [B, H, Lq, HEAD_DIM]; null when dq is computed by its own pass.
    float* dq_accum;
    void* slope_partial;  // workspace [B, H, q tiles]
    // Workspace [B, H, tiles of 32 rows]: how many blocks have added to dq_accum; null where their order is free.
    u32* dq_turns;
    OptionPointers options;
    // [splits, bias shape]: Real where there are several; else float unless FLAG_DBIAS_ELEMENT
    void* dbias;
    void* dsinks_partial;  // [B, H], Real
    i64* score_grads
        [MAX_SCORE_ARRAYS];  // [elements, SUM_WORDS<Real>] each (exact_sum.cuh); null: not wanted
    Strides q_strides, k_strides, v_strides, out_strides, dout_strides, lse_strides, dlse_strides;
    Strides dq_strides, dk_strides, dv_strides, slope_strides, dslope_strides;
    Shape shape;
    Schedule schedule;
    OptionValues values;
    BiasGradient dbias_values;
};

// Maps as in ForwardSm90Params.
struct BackwardSm90Params : BackwardParams {
    TensorMap q_map, k_map, v_map, dout_map;
};

// Turns exact sums into gradients of score parameters.
struct ScoreSumsParams {
    const i64* words[MAX_SCORE_ARRAYS];  // [elements, SUM_WORDS<Real>]; null: not wanted
    void* grads[MAX_SCORE_ARRAYS];       // [elements]
    i64 elements[MAX_SCORE_ARRAYS];
    int element_grads;  // bit n: gradient n has the element type, else float
};

// Makes one tile map.
struct MaskTilesParams {
    const void* mask;
    const u32* mask_bits;
    u32* map;
    MaskParams values;
    int batch_extent[MAX_BATCH_AXES], heads;  // of the mask: 1 where it is broadcast
    int len_q, len_k;
    int tile_q, tile_k;
    int by_keys;  // tile rows are tiles of keys
    int tile_rows;
    // Rows of a tile of queries are those of so many heads, query after query; then `heads` counts
    // groups. 1 for tiles of one head.
    int group;
};

constexpr int MAX_WORK_TABLES = 5;

// The tiles of one launch over packed sequences.
struct WorkTable {
    i64 offset, capacity;  // in entries
    int tile;
    int by_keys;
    int longest_last;
};

// Turns cumulative lengths into `sequences` and `work`.
struct PackedPlanParams {
    const void* cu_q;  // [batch + 1], int or i64
    const void* cu_k;
    int4* sequences;
    int2* work;
    i64 stride_q, stride_k;  // in elements
    i64 total_q, total_k;
    int wide_q, wide_k;  // 1: i64
    int batch, max_q, max_k, tables;
    WorkTable table[MAX_WORK_TABLES];
};

constexpr int MERGE_MAX_PARTS = 32;  // one lane of a warp per part

struct MergeParams {
    const void* outs[MERGE_MAX_PARTS];  // each [B, H, Lq, Dv], contiguous, Element or Real
    const void* lses[MERGE_MAX_PARTS];  // each [B, H, Lq], contiguous, Real
    void* out;                          // [*B, H, Lq, Dv]
    void* lse;                          // [B, H, Lq], contiguous, Real
    i64 rows;                           // B * H * Lq
    int parts, head_dim_v;
    Strides out_strides;
    int batch_extent[MAX_BATCH_AXES];
    int heads, len_q;
    int outs_are_float, out_is_float;  // Real, else Element
};
