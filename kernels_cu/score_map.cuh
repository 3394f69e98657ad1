// A warp's scores by row and key: what masks and scores are applied to, whichever instruction made them.
#pragma once

#include "score.cuh"
#include "tile.cuh"

// A warp's scores in the tile that begins at (first_row, first_key).
template <int M16, int N8, class Real> struct ScoreMap {
    using Score = Real;
    static constexpr int KEYS = N8 * 8;
    Accumulator<M16, N8, Real>& s;
    int first_row, first_key;

    // Do all keys of the tile exist?
    DEV_METHOD bool inside(int len_k) const { return first_key + KEYS <= len_k; }
    // Makes every x of them f(x, row, key).
    template <class Function> DEV_METHOD void operator()(Function f) const {
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    s.x[m][n][e] = f(s.x[m][n][e], row + m * 16 + e / 2 * 8,
                                     first_key + n * 8 + (int)(lane % 4) * 2 + e % 2);
    }
    // f(x, y, row, key) for neighbours x and y of a row, to be changed; key is that of x, and even.
    // For functions that load.
    template <class Function> DEV_METHOD void pairs(Function f) const {
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < N8; ++n)
                    f(s.x[m][n][2 * half], s.x[m][n][2 * half + 1], row + m * 16 + half * 8,
                      first_key + n * 8 + (int)(lane % 4) * 2);
                // Loads do not pass it: otherwise all rows' loads come first, into registers that
                // are not there.
                __syncwarp();
            }
    }
    // The same for arrays of 16-bit elements: load(word, row, key) gets 8 neighbouring keys in one
    // load, and f(x, y, pair) two of them. A lane loads where its four neighbours' elements are, and
    // they trade: loads are few and wide, every byte of a sector is used.
    template <class Load, class Function> DEV_METHOD void octets(Load load, Function f) const {
        static_assert(N8 % 4 == 0, "four lanes load 32 keys");
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < N8; n += 4) {
                    u32 word[4];
                    load(word, row + m * 16 + half * 8, first_key + n * 8 + (int)(lane % 4) * 8);
                    transpose_4x4(word);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        f(s.x[m][n + i][2 * half], s.x[m][n + i][2 * half + 1], word[i]);
                }
    }
    // Makes those -inf that a mask's source hides. Each of the four lanes of a row asks for a
    // quarter of the row's bits, and tells the others.
    template <class Source> DEV_METHOD void hide_by(const Source& source) const {
        constexpr int QUARTER = N8 * 2, WORDS = (N8 * 8 + 31) / 32;
        static_assert(QUARTER <= 16, "a quarter of a row is one word of bits");
        const unsigned thread = fresh_thread_id(), lane = thread % 32;
        const int row = opaque(first_row + thread / 32 * (16 * M16) + lane / 4);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 mine = source.template bits<QUARTER>(row + m * 16 + half * 8,
                                                         first_key + lane % 4 * QUARTER)
                           << (lane % 4 * QUARTER % 32);
                mine |= __shfl_xor_sync(FULL_WARP, mine, 1);
                const u32 other = __shfl_xor_sync(FULL_WARP, mine, 2);
                u32 word[WORDS];
                if constexpr (WORDS == 1)
                    word[0] = mine | other;
                else
                    word[0] = lane & 2 ? other : mine, word[1] = lane & 2 ? mine : other;
#pragma unroll
                for (int n = 0; n < N8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const u32 bits = word[n / 4] >> (lane % 4 * 2);
                        Real& x = s.x[m][n][2 * half + e];
                        x = bits >> (n % 4 * 8 + e) & 1u ? x : Real(neg_infinity());
                    }
            }
    }
};
