// What happens to q.k before the softmax: scale, soft cap, ALiBi, in this order.
#pragma once

#include "schedule.cuh"

// Relative error below 4e-7 everywhere: tanh.approx (5e-4) would be visible in the output.
DEV float tanh_accurate(float x) {
    const float a = fabsf(x), x2 = x * x;
    // Near 0 the exponential form cancels; odd polynomial, minimax on [0, 0.55].
    const float p =
        fmaf(x2, fmaf(x2, fmaf(x2, 0.0163248945f, -0.0526107661f), 0.133198217f), -0.333329231f);
    const float small = fmaf(x * x2, p, x);
    const float large = 1.f - 2.f * rcp_approx(ex2_approx(a * (2.f * LOG2_E)) + 1.f);
    return a < 0.55f ? small : copysignf(large, x);
}

// What one raw product q.k turns into.
struct Logit {
    float log2;        // final logit times log2(e): the argument of exp2
    float derivative;  // d(logit) / d(scale * q.k)
};

namespace score {

// Score concept, by example. A new score copies this form:
//   FOLDED                 true: the logit is a factor times q.k, so forward keeps raw products and
//                          folds the factor into exp2
//   folded_factor()        log2 units per unit of the scores that forward keeps, > 0; 1 unless FOLDED
//   negative()             FOLDED: must q.k change its sign first?
//   Score(shape, slope)    slope: of this query head, 0 without ALiBi
//   at(s, row, key)        Logit of the raw product s of a query row and a key (members that are
//                          not used cost nothing)
//   apply(map)             the same for a whole tile: map(f) replaces every raw product by
//                          f(product, row, key). Run-time choices stand outside the calls of map,
//                          so that they are made once per tile

// scale * q.k, scale != 0.
struct Linear {
    static constexpr bool FOLDED = true;
    float factor;  // signed

    DEV_METHOD Linear(const Shape& shape, float) : factor(shape.scale * LOG2_E) {}

    DEV_METHOD float folded_factor() const { return fabsf(factor); }
    DEV_METHOD bool negative() const { return factor < 0.f; }

    DEV_METHOD Logit at(float s, int, int) const { return {s * factor, 1.f}; }

    template <class Map> DEV_METHOD void apply(Map map) const {
        map([&](float s, int, int) { return s * factor; });
    }
};

// Everything, decided at run time by branches that all threads take alike: any scale, soft cap,
// ALiBi.
struct Shaped {
    static constexpr bool FOLDED = false;
    float scale, softcap, inverse_softcap;
    float slope_log2;  // slope * log2(e)
    int q_offset;

    DEV_METHOD Shaped(const Shape& shape, float slope)
        : scale(shape.scale),
          softcap(shape.softcap),
          inverse_softcap(shape.softcap > 0.f ? 1.f / shape.softcap : 0.f),
          slope_log2(slope * LOG2_E),
          q_offset(shape.q_offset) {}

    DEV_METHOD float folded_factor() const { return 1.f; }
    DEV_METHOD bool negative() const { return false; }

    DEV_METHOD Logit at(float s, int row, int key) const {
        Logit logit = softcap > 0.f ? capped(s) : Logit{s * (scale * LOG2_E), 1.f};
        if (slope_log2 != 0.f) logit.log2 = biased(logit.log2, row, key);
        return logit;
    }
    template <class Map> DEV_METHOD void apply(Map map) const {
        if (softcap > 0.f)
            map([&](float s, int, int) { return capped(s).log2; });
        else
            map([&](float s, int, int) { return s * (scale * LOG2_E); });
        if (slope_log2 != 0.f) map([&](float s, int row, int key) { return biased(s, row, key); });
    }
    // d(logit) / d(slope)
    DEV_METHOD float alibi_distance(int row, int key) const {
        return -fabsf((float)(row + q_offset - key));
    }

  private:
    DEV_METHOD Logit capped(float s) const {
        const float t = tanh_accurate(s * scale * inverse_softcap);
        return {softcap * LOG2_E * t, 1.f - t * t};
    }
    DEV_METHOD float biased(float log2, int row, int key) const {
        return fmaf(slope_log2, alibi_distance(row, key), log2);
    }
};

}  // namespace score

// The score of one query head, from any kernel's params.
template <class Config, class Params>
DEV typename Config::Score make_score(const Params& p, const Work& work, int head) {
    float slope = 0.f;
    if constexpr (!Config::Score::FOLDED)
        if (p.alibi_slopes != nullptr) {
            const i64 at = head_offset(work, p.slope_strides, head);
            slope = p.shape.flags & FLAG_SLOPES_16BIT
                        ? Config::Element::to_float(ld_global_u16((const u16*)p.alibi_slopes + at))
                        : ((const float*)p.alibi_slopes)[at];
        }
    return typename Config::Score(p.shape, slope);
}
