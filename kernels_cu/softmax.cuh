// Online softmax of a warp's rows: scores come in tile by tile, probabilities relative to a running
// reference go out.
#pragma once

#include "tile.cuh"

// Statistics of 16*M16 rows; a lane holds rows lane/4 and lane/4 + 8 of each 16.
//
// Probabilities are exp2(s*c - reference*c), not yet divided by their sum. The reference is a
// recent maximum, not always the newest: as long as the maximum has grown by at most HEADROOM in
// log2 units, keeping the old one is exact too (P stays below 2^HEADROOM, with the same relative
// precision) and saves the rescaling of the output, which otherwise costs as much as the
// exponentials.
template <int M16, class Real = float> struct OnlineSoftmax {
    static constexpr Real HEADROOM = 8;  // 2^8 is far below 65504, the largest float16
    static constexpr Real LOWEST = sizeof(Real) == 8 ? -1.7976931348623157e308 : -3.4028234e38f;
    // Beyond this, rounding reference*c apart from s*c moves exp2 of the maximum visibly off 1 (and
    // off any scale for logits near 2^37), so the reference is subtracted before the
    // multiplication.
    static constexpr Real HUGE_LOGIT = 1024;

    Real c;                  // log2 units per score unit, > 0
    Real reference[M16][2];  // score units
    Real sum[M16][2];        // of this lane's columns only, until finish

    DEV_METHOD explicit OnlineSoftmax(Real log2_per_score) : c(log2_per_score) {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                reference[m][half] = neg_infinity(), sum[m][half] = 0;
    }

    // Finite even when every score so far is -inf: there is no (-inf) - (-inf), and exp2(-inf -
    // LOWEST) = 0.
    DEV_METHOD Real in_log2(Real score) const { return max_of(score * c, LOWEST); }

    // How a tile of scores moves the references.
    struct Rise {
        Real offset[M16][2];  // the references in log2 units
        Real growth[M16][2];  // what the output is to be multiplied by, if any row's grew
        bool grew, huge;
    };

    // s: scores in, probabilities out. o: scaled to the reference they are relative to.
    template <int N8, int O8>
    DEV_METHOD void update(Accumulator<M16, N8, Real>& s, Accumulator<M16, O8, Real>& o) {
        Rise rise = raise(s);
        rescale(o, rise);
        weigh(s, rise);
    }

    // The steps of `update`, for those who have other work between them.
    template <int N8> DEV_METHOD Rise raise(const Accumulator<M16, N8, Real>& s) {
        Rise rise;
        rise.grew = rise.huge = false;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Real highest = max_of(row_maximum(s.x[m], half), reference[m][half]);
                const Real before = in_log2(reference[m][half]), after = in_log2(highest);
                // Two huge maxima may round to one product; their difference is exact before the
                // multiplication (and infinite when there was no maximum, so that growth is 0).
                const Real higher =
                    is_huge(after) ? (highest - reference[m][half]) * c : after - before;
                const bool moves = higher > HEADROOM;
                rise.growth[m][half] = moves ? exp2_of(-higher) : Real(1);
                rise.offset[m][half] = moves ? after : before;
                reference[m][half] = moves ? highest : reference[m][half];
                sum[m][half] *= rise.growth[m][half];
                rise.grew |= moves;
                rise.huge |= is_huge(rise.offset[m][half]);
            }
        return rise;
    }
    template <int O8>
    DEV_METHOD void rescale(Accumulator<M16, O8, Real>& o, const Rise& rise) const {
        if (!__any_sync(FULL_WARP, rise.grew)) return;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < O8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o.x[m][n][e] *= rise.growth[m][e / 2];
    }
    template <int N8> DEV_METHOD void weigh(Accumulator<M16, N8, Real>& s, Rise& rise) {
        if (__any_sync(FULL_WARP, rise.huge)) subtract_first(s, rise.offset);
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const Real probability =
                        exp2_of(fma_of(s.x[m][n][e], c, -rise.offset[m][e / 2]));
                    s.x[m][n][e] = probability;
                    sum[m][e / 2] += probability;
                }
    }

    // Completes the sums. inverse: factor of the output rows (0 for a row that saw no key); lse:
    // natural log. HAS_SINK: one more logit, sink_log2 (else -inf), takes part in the sums, and has
    // no value.
    template <bool HAS_SINK>
    DEV_METHOD void finish(Real (&inverse)[M16][2], Real (&lse)[M16][2], Real sink_log2) {
        finish<HAS_SINK>(inverse, lse, [&](int, int) { return sink_log2; });
    }
    // The same with a sink per row: sink_of(m, half).
    template <bool HAS_SINK, class SinkOf>
    DEV_METHOD void finish(Real (&inverse)[M16][2], Real (&lse)[M16][2], SinkOf sink_of) {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Real sink_log2 = sink_of(m, half);
                Real total = sum[m][half], share = 1;
                total += shfl_xor(total, 1);
                total += shfl_xor(total, 2);
                // False for NaN, which thus reaches the output and lse. Before the sink: a row that
                // saw no key is 0 whatever the sink is, even if that is infinite or NaN.
                const bool keyless = total == 0;
                Real offset = in_log2(reference[m][half]);
                if constexpr (HAS_SINK) {
                    const Real highest = max_of(offset, sink_log2);  // relative to the larger one
                    share = exp2_of(offset - highest);
                    total = total * share + exp2_of(sink_log2 - highest);
                    offset = highest;
                }
                inverse[m][half] = keyless ? Real(0) : share / total;
                const Real log2_sum = offset + log2_of(total);
                lse[m][half] = (keyless ? sink_log2 : log2_sum) * LN_2_OF<Real>;
            }
    }

  private:
    DEV bool is_huge(Real offset) { return abs_of(offset) > HUGE_LOGIT && offset != LOWEST; }

    template <int N8> DEV Real row_maximum(const Real (&x)[N8][4], int half) {
        Real highest = neg_infinity();
#pragma unroll
        for (int n = 0; n < N8; ++n)
            highest = max_of(highest, max_of(x[n][2 * half], x[n][2 * half + 1]));
        highest = max_of(highest, shfl_xor(highest, 1));  // the 4 lanes of a row
        return max_of(highest, shfl_xor(highest, 2));
    }

    template <int N8>
    DEV_METHOD void subtract_first(Accumulator<M16, N8, Real>& s, Real (&offset)[M16][2]) const {
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool here = is_huge(offset[m][half]);
                const Real first = here ? reference[m][half] : Real(0);
                offset[m][half] = here ? Real(0) : offset[m][half];
#pragma unroll
                for (int n = 0; n < N8; ++n)
                    s.x[m][n][2 * half] -= first, s.x[m][n][2 * half + 1] -= first;
            }
    }
};
