// Which pairs of a block of scores dropout keeps, as bits: one random word per pair, four words per call of
// Philox (four neighbouring keys of a row), and no call made twice in a warp. Lanes tell each other
// the outcome, a bit per word, not the words. Serves both layouts of backward: queries or keys along
// the rows of the accumulator.
#pragma once

#include "dropout.cuh"

namespace dropout {

// KEYS_ALONG_ROWS false: rows of the accumulator are queries, columns are keys (backward_dq);
// true: the other way round (backward_dkdv). Without dropout everything is kept.
template <bool DROPOUT, int M16, int N8, bool KEYS_ALONG_ROWS> struct KeepBits {
    template <class Params> DEV_METHOD KeepBits(const Params&, const Work&, int, int, int) {}
    DEV_METHOD bool kept(int, int, int) const { return true; }
    template <class Real> DEV_METHOD Real weighted(Real x, int, int, int) const { return x; }
};

template <int M16, int N8, bool KEYS_ALONG_ROWS> struct KeepBits<true, M16, N8, KEYS_ALONG_ROWS> {
    static constexpr int CALLS = M16 * N8;         // of this lane: one per 16x8 block
    static constexpr int WORDS = (CALLS + 7) / 8;  // a call leaves four bits
    static constexpr int SOURCES = KEYS_ALONG_ROWS ? 4 : 2;
    // Bits of the calls that this lane's elements come from, shifted so that the places are constants.
    u32 bits[WORDS][SOURCES];
    float factor;
    const double* factor_f64;  // in constant memory

    // The block begins at (first_row, first_key) of a query head; first_key is a multiple of 8.
    template <class Params>
    DEV_METHOD KeepBits(const Params& p, const Work& work, int head, int first_row, int first_key)
        : factor(p.values.dropout.factor), factor_f64(&p.values.dropout.factor_f64) {
        const int lane = fresh_thread_id() % 32;
        const Keep keep(p, work, head);
        // Element e of a block, transposed: key lane / 4 + 8 * (e / 2), row lane % 4 * 2 + e % 2. The four
        // lanes that differ in lane / 4 % 4 share four calls; this lane makes the one of element
        // `mine`. Not transposed: row lane / 4 + 8 * (e / 2), key lane % 4 * 2 + e % 2, and two lanes
        // share two calls.
        const int mine = KEYS_ALONG_ROWS ? lane / 4 % 4 : lane % 2;
        const u32 row =
            KEYS_ALONG_ROWS ? first_row + lane % 4 * 2 + mine % 2 : first_row + lane / 4 + 8 * mine;
        const u32 quad = KEYS_ALONG_ROWS ? first_key / 4 + 2 * (mine / 2) + lane / 16
                                         : first_key / 4 + lane % 4 / 2;
        constexpr int ROW_STEP_M = KEYS_ALONG_ROWS ? 0 : 16, ROW_STEP_N = KEYS_ALONG_ROWS ? 8 : 0;
        constexpr int QUAD_STEP_M = KEYS_ALONG_ROWS ? 4 : 0, QUAD_STEP_N = KEYS_ALONG_ROWS ? 0 : 2;
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            u32 own = 0;
#pragma unroll 1
            for (int call = 8 * word; call < min(CALLS, 8 * word + 8); ++call) {
                const int m = call / N8, n = call % N8;
                const u32 kept = keep.quad(row + ROW_STEP_M * m + ROW_STEP_N * n,
                                           quad + QUAD_STEP_M * m + QUAD_STEP_N * n);
                own |= kept << (call % 8 * 4);
            }
#pragma unroll
            for (int source = 0; source < SOURCES; ++source) {
                const int from =
                    KEYS_ALONG_ROWS ? (lane & ~12) | source << 2 : (lane & ~1) | source;
                const u32 theirs = __shfl_sync(FULL_WARP, own, from);
                bits[word][source] = theirs >> (KEYS_ALONG_ROWS ? lane / 4 % 4 : lane % 2 * 2);
            }
        }
    }

    // Is element e of block (m, n) kept? All three are constants after unrolling.
    DEV_METHOD bool kept(int m, int n, int e) const {
        const int call = m * N8 + n, source = KEYS_ALONG_ROWS ? e : e / 2;
        const int place = call % 8 * 4 + (KEYS_ALONG_ROWS ? 0 : e % 2);
        return bits[call / 8][source] >> place & 1;
    }
    // x times the pair's Z: 0, or 1 / (1 - p).
    DEV_METHOD float weighted(float x, int m, int n, int e) const {
        return kept(m, n, e) ? x * factor : 0.f;
    }
    DEV_METHOD double weighted(double x, int m, int n, int e) const {
        return kept(m, n, e) ? x * *factor_f64 : 0.0;
    }
};

}  // namespace dropout
