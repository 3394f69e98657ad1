// Dropout's random numbers: Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011, section 3.3). A pure function of the seed and of an element's place,
// so that every tile size, kernel and backend keeps the same weights.
#pragma once

#include "packed.cuh"
#include "rows.cuh"

namespace dropout {

// Ten rounds on counter x under a key.
DEV uint4 philox(uint4 x, u32 key_low, u32 key_high) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 first = (u64)x.x * 0xD2511F53u, second = (u64)x.z * 0xCD9E8D57u;
        x = make_uint4((u32)(second >> 32) ^ x.y ^ key_low, (u32)second,
                       (u32)(first >> 32) ^ x.w ^ key_high, (u32)first);
        key_low += 0x9E3779B9u;   // the golden ratio
        key_high += 0xBB67AE85u;  // sqrt(3) - 1
    }
    return x;
}

// What kept weights are multiplied by.
template <class Real, class Params> DEV Real factor_of(const Params& p) {
    if constexpr (sizeof(Real) == 8)
        return p.values.dropout.factor_f64;
    else
        return p.values.dropout.factor;
}

// Which weights of one query head are kept.
struct Keep {
    u32 key_low, key_high, threshold;
    u32 batch, head;

    template <class Params> DEV_METHOD Keep(const Params& p, const Work& work, int head_)
        : threshold(p.values.dropout.threshold), batch(work.batch), head(head_) {
        const u64 seed = p.options.seed_at != nullptr ? *p.options.seed_at : p.options.seed;
        key_low = (u32)seed;
        key_high = (u32)(seed >> 32);
    }

    // Bit e: is key 4 * quad + e of this row kept? One call of Philox.
    DEV_METHOD u32 quad(int row, int quad) const {
        const uint4 x = philox(make_uint4(quad, row, head, batch), key_low, key_high);
        return (u32)(x.x >= threshold) | (u32)(x.y >= threshold) << 1 |
               (u32)(x.z >= threshold) << 2 | (u32)(x.w >= threshold) << 3;
    }
};

// The same of the rows of a group of heads.
struct GroupKeep {
    Keep first;
    GroupRows group;

    template <class Params> DEV_METHOD GroupKeep(const Params& p, const Work& work, int head)
        : first(p, work, head), group(p.shape) {}

    DEV_METHOD u32 quad(int row, int quad) const {
        Keep own = first;
        own.head += group.member(row);
        return own.quad(group.query(row), quad);
    }
};

}  // namespace dropout

// Sets dropped weights of a warp's accumulator to 0: queries along its rows, keys along its columns
// (forward and dq). first_row: of the warp; first_key: of the tile, a multiple of 16.
//
// Columns 2 * (lane % 4) and the next of a lane and those of its neighbour make one quad of keys:
// one block of random numbers. Of two neighbouring quads the even lane draws the left one and the
// odd lane the right one, and they exchange the halves.
template <class Keep, int M16, int N8, class Real>
DEV void drop_weights(const Keep& keep, Accumulator<M16, N8, Real>& p, int first_row,
                      int first_key) {
    const unsigned lane = fresh_thread_id() % 32, odd = lane & 1;
    // Of 16 keys the lane draws quad 0 or 1 of n even, and 2 or 3 of n odd.
    const int quad = first_key / 4 + (lane >> 1 & 1) + odd * 2;
#pragma unroll
    for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Two bits per column block: of n = 2 step + odd in `mine`, of the other n in `theirs`.
            u32 mine = 0u, theirs = 0u;
#pragma unroll 1
            for (int step = N8 / 2 - 1; step >= 0; --step) {
                const u32 bits =
                    keep.quad(first_row + m * 16 + half * 8 + lane / 4, quad + step * 4);
                mine = mine << 2 | (bits >> (odd * 2) & 3u);
                theirs = theirs << 2 | (bits >> ((odd ^ 1) * 2) & 3u);
            }
            const u32 from_neighbour = __shfl_xor_sync(FULL_WARP, theirs, 1);
            const u32 even = odd ? from_neighbour : mine, uneven = odd ? mine : from_neighbour;
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const u32 bits = n % 2 ? uneven : even;
                    Real& x = p.x[m][n][2 * half + e];
                    x = bits >> (n / 2 * 2 + e) & 1u ? x : Real(0);
                }
        }
}
