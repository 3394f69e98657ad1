// Which pairs of a block of scores must not be seen, in both layouts of backward.
#pragma once

#include "masks.cuh"

namespace backward {

// Bits of a mask's source, asked for once per row and 16 keys and traded between lanes.
// KEYS_ALONG_ROWS false: rows of the accumulator are queries, columns are keys (dq, pairs); true: the
// other way round (dkdv). (first_row, first_key) is the warp's first pair; first_key is a multiple of 16.
template <class Source, int M16, int N8, bool KEYS_ALONG_ROWS> struct SourceBits;

// Each of the four lanes of a row asks for a quarter of the row's bits.
template <class Source, int M16, int N8> struct SourceBits<Source, M16, N8, false> {
    static constexpr int QUARTER = N8 * 2, WORDS = (N8 * 8 + 31) / 32;
    static_assert(QUARTER <= 16, "a quarter of a row is one word of bits");
    u32 bits[M16][2][WORDS];

    DEV_METHOD SourceBits(const Source& source, int first_row, int first_key) {
        const unsigned lane = fresh_thread_id() % 32;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * m + 8 * half + lane / 4;
                u32 mine = source.template bits<QUARTER>(row, first_key + lane % 4 * QUARTER)
                           << (lane % 4 * QUARTER % 32);
                mine |= __shfl_xor_sync(FULL_WARP, mine, 1);
                const u32 other = __shfl_xor_sync(FULL_WARP, mine, 2);
#pragma unroll
                for (int word = 0; word < WORDS; ++word) {
                    const bool own = WORDS == 1 || (lane >> 1 & 1) == word;
                    const u32 all = WORDS == 1 ? mine | other : own ? mine : other;
                    bits[m][half][word] = all >> (lane % 4 * 2);
                }
            }
    }
    DEV_METHOD bool keep(int m, int n, int e) const {
        return bits[m][e / 2][n / 4] >> (n % 4 * 8 + e % 2) & 1u;
    }
};

// Keys of a lane are lane / 4 and 8 more, its rows lane % 4 * 2 and the next of every 8. The eight
// lanes of equal rows share the asking, a row at a time.
template <class Source, int M16, int N8> struct SourceBits<Source, M16, N8, true> {
    static constexpr int ROWS = 2 * N8;
    u32 bits[M16][ROWS];

    DEV_METHOD SourceBits(const Source& source, int first_row, int first_key) {
        const int lane = fresh_thread_id() % 32;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int first = 0; first < ROWS; first += 8) {
                const int r = first + lane / 4 % ROWS;
                const u32 mine = source.template bits<16>(
                    first_row + r / 2 * 8 + lane % 4 * 2 + r % 2, first_key + 16 * m);
#pragma unroll
                for (int n = first; n < min(ROWS, first + 8); ++n)
                    bits[m][n] = __shfl_sync(FULL_WARP, mine, n % 8 * 4 + lane % 4) >> (lane / 4);
            }
    }
    DEV_METHOD bool keep(int m, int n, int e) const {
        return bits[m][2 * n + e % 2] >> (e / 2 * 8) & 1u;
    }
};

// The band alone asks for nothing.
struct NoBits {
    DEV_METHOD bool keep(int, int, int) const { return true; }
};
template <int M16, int N8, bool KEYS_ALONG_ROWS>
DEV NoBits source_bits(const mask::Band&, int, int) {
    return {};
}
template <int M16, int N8, bool KEYS_ALONG_ROWS, class Source>
DEV SourceBits<Source, M16, N8, KEYS_ALONG_ROWS> source_bits(const mask::Mapped<Source>& mask,
                                                             int first_row, int first_key) {
    return {mask.source, first_row, first_key};
}
DEV const mask::Band& band_of(const mask::Band& mask) { return mask; }
template <class Source> DEV const mask::Band& band_of(const mask::Mapped<Source>& mask) {
    return mask.band;
}

// hide(m, n, e) for every element of a warp's accumulator whose pair is not visible.
template <int M16, int N8, bool KEYS_ALONG_ROWS, class Mask, class Hide>
DEV void each_hidden(const Mask& mask, int len_q, int first_row, int first_key, Hide hide) {
    const int lane = fresh_thread_id() % 32;
    const int i_0 = first_row + (KEYS_ALONG_ROWS ? lane % 4 * 2 : lane / 4);
    const int j_0 = first_key + (KEYS_ALONG_ROWS ? lane / 4 : lane % 4 * 2);
    const auto source = source_bits<M16, N8, KEYS_ALONG_ROWS>(mask, first_row, first_key);
    const mask::Band& band = band_of(mask);
#pragma unroll
    for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int major = 16 * m + e / 2 * 8, minor = 8 * n + e % 2;
                const int i = i_0 + (KEYS_ALONG_ROWS ? minor : major);
                const int j = j_0 + (KEYS_ALONG_ROWS ? major : minor);
                const bool kept = source.keep(m, n, e);
                if (!kept || !band.keep(i, j) || i >= len_q) hide(m, n, e);
            }
}

}  // namespace backward
