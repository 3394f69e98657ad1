// Which keys may a row see? A mask is a small struct chosen by Config; its bounds are run-time
// values, so no length or window ever causes a compilation.
#pragma once

#include "ptx.cuh"

// Half-open range of rows or keys; empty when end <= begin.
struct Range {
    int begin, end;
    DEV_METHOD bool empty() const { return end <= begin; }
};

namespace mask {

// Mask concept, by example. A new mask copies this form:
//   Mask(shape)             from the call's Shape
//   keys(rows)              range that holds every key seen by at least one of these rows, within
//                           [0, len_k)
//   rows(keys)              range that holds every row seeing at least one of these keys, within
//                           [0, len_q)
//   cuts(rows, keys)        may some pair of this tile be invisible? Tiles that are not cut skip
//                           `keep`
//   isolates(rows, keys)    may an invisible pair of this tile name a row and key that exist? (then
//                           0 * NaN must not leak; rows and keys past the end are zero filled and
//                           cannot)
//   keep(row, key)          the predicate
// rows and keys are the tile's full ranges; they may reach past len_q and len_k.

// Row i sees keys max(0, i + low) .. min(len_k - 1, i + high): full attention, causal, windows and
// ragged tails in one.
struct Band {
    int low, high, len_q, len_k;

    DEV_METHOD explicit Band(const Shape& shape)
        : low(shape.band_low), high(shape.band_high), len_q(shape.len_q), len_k(shape.len_k) {}

    DEV_METHOD Range keys(Range rows) const {
        const int last = min(rows.end, len_q) - 1;
        return {max(0, rows.begin + low), min(len_k, last + high + 1)};
    }
    DEV_METHOD Range rows(Range keys) const {
        const int last = min(keys.end, len_k) - 1;
        return {max(0, keys.begin - high), min(len_q, last - low + 1)};
    }
    DEV_METHOD bool isolates(Range rows, Range keys) const {
        const int last_row = min(rows.end, len_q) - 1, last_key = min(keys.end, len_k) - 1;
        return keys.begin < last_row + low || last_key > rows.begin + high;
    }
    DEV_METHOD bool cuts(Range rows, Range keys) const {
        return keys.end > len_k || isolates(rows, keys);
    }

    DEV_METHOD bool keep(int row, int key) const {
        return key >= row + low && key <= min(row + high, len_k - 1);
    }
};

}  // namespace mask
