// What happens to q.k before the softmax: scale, soft cap, score expression, bias, ALiBi, in this
// order.
#pragma once

#include "packed.cuh"

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
//   Score(p, work, head, slope)  of a query head, from any kernel's params; slope: 0 without ALiBi
//   at(s, row, key)        Logit of the raw product s of a query row and a key (members that are
//                          not used cost nothing)
//   apply(map)             the same for a whole tile: map(f) replaces every raw product by
//                          f(product, row, key). Run-time choices stand outside the calls of map,
//                          so that they are made once per tile

// scale * q.k, scale != 0.
struct Linear {
    static constexpr bool FOLDED = true;
    float factor;  // signed

    template <class Params> DEV_METHOD Linear(const Params& p, const Work&, int, float)
        : factor(p.shape.scale * LOG2_E) {}

    DEV_METHOD float folded_factor() const { return fabsf(factor); }
    DEV_METHOD bool negative() const { return factor < 0.f; }

    DEV_METHOD Logit at(float s, int, int) const { return {s * factor, 1.f}; }

    template <class Map> DEV_METHOD void apply(Map map) const {
        map([&](float s, int, int) { return s * factor; });
    }
};

// Any scale, soft cap and ALiBi, decided at run time by branches that all threads take alike.
struct Shaped {
    static constexpr bool FOLDED = false;
    float scale, softcap, inverse_softcap;
    float slope_log2;  // slope * log2(e)
    int q_offset;

    template <class Params> DEV_METHOD Shaped(const Params& p, const Work&, int, float slope)
        : scale(p.shape.scale),
          softcap(p.shape.softcap),
          inverse_softcap(p.shape.softcap > 0.f ? 1.f / p.shape.softcap : 0.f),
          slope_log2(slope * LOG2_E),
          q_offset(p.shape.q_offset) {}

    DEV_METHOD float folded_factor() const { return 1.f; }
    DEV_METHOD bool negative() const { return false; }

    DEV_METHOD Logit at(float s, int row, int key) const {
        Logit logit = scaled(s, LOG2_E);
        if (slope_log2 != 0.f) logit.log2 = biased(logit.log2, row, key);
        return logit;
    }
    template <class Map> DEV_METHOD void apply(Map map) const {
        apply_scale(map, LOG2_E);
        apply_alibi(map);
    }
    // d(logit) / d(slope)
    DEV_METHOD float alibi_distance(int row, int key) const {
        return -fabsf((float)(row + q_offset - key));
    }

    // The same made from constant memory at this place, so that a main loop does not carry it.
    DEV_METHOD Shaped anew(const Shape& shape) const {
        Shaped made = *this;
        made.scale = __uint_as_float(opaque(__float_as_uint(shape.scale)));
        made.softcap = __uint_as_float(opaque(__float_as_uint(shape.softcap)));
        made.inverse_softcap = made.softcap > 0.f ? 1.f / made.softcap : 0.f;
        return made;
    }

    // ---- the steps, for scores that put others between them; `unit`: 1 for natural, LOG2_E for log2 units

    DEV_METHOD Logit scaled(float s, float unit) const {
        return softcap > 0.f ? capped(s, unit) : Logit{s * (scale * unit), 1.f};
    }
    DEV_METHOD Logit capped(float s, float unit) const {
        const float t = tanh_accurate(s * scale * inverse_softcap);
        return {softcap * unit * t, 1.f - t * t};
    }
    DEV_METHOD float biased(float log2, int row, int key) const {
        return fmaf(slope_log2, alibi_distance(row, key), log2);
    }
    template <class Map> DEV_METHOD void apply_scale(Map map, float unit) const {
        if (softcap > 0.f)
            map([&](float s, int, int) { return capped(s, unit).log2; });
        else
            map([&](float s, int, int) { return s * (scale * unit); });
    }
    template <class Map> DEV_METHOD void apply_alibi(Map map) const {
        if (slope_log2 != 0.f) map([&](float s, int row, int key) { return biased(s, row, key); });
    }
};

// Modifier concept, by example: what a score expression does to the scaled, soft-capped score of
// (batch or sequence b, query head h, row i, key j). Generated ones: cuflash/_scoremod_source.py.
//   CHANGES          false: nothing is called
//   Modifier(p)      from any kernel's params
//   value(s, b, h, i, j)            the new score
//   with_derivative(s, b, h, i, j)  the new score and its derivative in s
struct Unmodified {
    static constexpr bool CHANGES = false;
    template <class Params> DEV_METHOD explicit Unmodified(const Params&) {}
    DEV_METHOD float value(float s, int, int, int, int) const { return s; }
    DEV_METHOD float2 with_derivative(float s, int, int, int, int) const {
        return make_float2(s, 1.f);
    }
};

// Everything: Shaped, and between soft cap and ALiBi a score expression and a bias.
template <class Element, bool HAS_BIAS, class Modifier> struct General {
    static constexpr bool FOLDED = false;
    Shaped shaped;
    // Into constant memory: a main loop has no registers to keep what it can read there.
    const Shape* shape;
    const PairStrides* steps;
    int batch, head;
    const u8* bias;  // of the head
    Modifier modifier;

    template <class Params>
    DEV_METHOD General(const Params& p, const Work& work, int head_, float slope)
        : shaped(p, work, head_, slope),
          shape(&p.shape),
          steps(&p.values.bias),
          batch(work.batch),
          head(head_),
          modifier(p) {
        if constexpr (HAS_BIAS)
            bias = (const u8*)p.options.bias + (head_offset(work, *steps, head) << log2_bytes());
    }

    DEV_METHOD float folded_factor() const { return 1.f; }
    DEV_METHOD bool negative() const { return false; }

    DEV_METHOD Logit at(float s, int row, int key) const {
        Logit logit = shaped.scaled(s, UNIT);
        if constexpr (Modifier::CHANGES) {
            const float2 changed = modifier.with_derivative(logit.log2, batch, head, row, key);
            logit = {changed.x * LOG2_E, logit.derivative * changed.y};
        }
        if constexpr (HAS_BIAS) logit.log2 = with_bias(logit.log2, bias_at(row, key));
        if (shaped.slope_log2 != 0.f) logit.log2 = shaped.biased(logit.log2, row, key);
        return logit;
    }
    template <class Map> DEV_METHOD void apply(Map map) const {
        const Shaped shaped = this->shaped.anew(*shape);
        shaped.apply_scale(map, UNIT);
        if constexpr (Modifier::CHANGES)
            map([&](float s, int row, int key) {
                return modifier.value(s, batch, head, row, key) * LOG2_E;
            });
        if constexpr (HAS_BIAS) apply_bias(map);
        shaped.apply_alibi(map);
    }
    DEV_METHOD float alibi_distance(int row, int key) const {
        return shaped.alibi_distance(row, key);
    }
    // Of the nearest pair that exists: a bias has no element past the ends, where scores are not
    // used.
    DEV_METHOD float bias_at(int row, int key) const {
        // opaque: products of steps are not kept from one pair to the next.
        const int i = opaque(min(row, shape->len_q - 1)), j = opaque(min(key, shape->len_k - 1));
        const u8* from = bias + ((i * steps->row + j * steps->key) << log2_bytes());
        return bias_16bit() ? Element::to_float(ld_global_u16((const u16*)from))
                            : ld_global_f32((const float*)from);
    }

  private:
    static constexpr float UNIT = Modifier::CHANGES ? 1.f : LOG2_E;

    DEV_METHOD bool bias_16bit() const { return (shape->flags & FLAG_BIAS_16BIT) != 0; }
    DEV_METHOD int log2_bytes() const { return bias_16bit() ? 1 : 2; }
    DEV float with_bias(float log2, float bias) { return fmaf(bias, LOG2_E, log2); }

    template <class Map> DEV_METHOD void apply_bias(Map map) const {
        const bool wide_loads = steps->key == 1 && map.inside(shape->len_k);
        const auto row_of = [&](int row, int key) {
            return bias + ((min(row, shape->len_q - 1) * steps->row + key) << log2_bytes());
        };
        if constexpr (Map::KEYS % 32 == 0)
            if (wide_loads && bias_16bit() && aligned(8))
                return map.octets([&](u32(&word)[4], int row,
                                      int key) { ld_global_words(word, row_of(row, key)); },
                                  [&](float& x, float& y, u32 word) {
                                      const float2 pair = unpack<Element>(word);
                                      x = with_bias(x, pair.x), y = with_bias(y, pair.y);
                                  });
        if (wide_loads && !bias_16bit() && aligned(2))
            return map.pairs([&](float& x, float& y, int row, int key) {
                u32 words[2];
                ld_global_words(words, row_of(row, key));
                x = with_bias(x, __uint_as_float(words[0]));
                y = with_bias(y, __uint_as_float(words[1]));
            });
        map.pairs([&](float& x, float& y, int row, int key) {
            x = with_bias(x, bias_at(row, key)), y = with_bias(y, bias_at(row, key + 1));
        });
    }
    // Do rows begin at multiples of so many elements?
    DEV_METHOD bool aligned(int elements) const {
        return (((u64)bias >> log2_bytes()) | (u64)steps->row) % elements == 0;
    }
};

}  // namespace score

// One element of an array of floats, or of 16-bit elements where `narrow`.
template <class Element> DEV float side_value(const void* array, i64 at, bool narrow) {
    return narrow ? Element::to_float(ld_global_u16((const u16*)array + at))
                  : ((const float*)array)[at];
}

// The score of one query head, from any kernel's params.
template <class Config, class Params>
DEV typename Config::Score make_score(const Params& p, const Work& work, int head) {
    float slope = 0.f;
    if constexpr (!Config::Score::FOLDED)
        if (p.alibi_slopes != nullptr)
            slope = side_value<typename Config::Element>(p.alibi_slopes,
                                                         head_offset(work, p.slope_strides, head),
                                                         p.shape.flags & FLAG_SLOPES_16BIT);
    return typename Config::Score(p, work, head, slope);
}

// The sink of a query head in log2 units, -inf without sinks.
template <class Config, class Params> DEV float sink_log2(const Params& p, int head) {
    if constexpr (Config::SINKS)
        return LOG2_E * side_value<typename Config::Element>(p.options.sinks, head,
                                                             p.shape.flags & FLAG_SINKS_16BIT);
    else
        return neg_infinity();
}
