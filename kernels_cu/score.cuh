// What happens to q.k before the softmax: scale, soft cap, score expression, bias, ALiBi, in this
// order.
#pragma once

#include "packed.cuh"
#include "rows.cuh"

// Scale and soft cap in the type that scores are kept in.
template <class Real> DEV Real scale_of(const Shape& shape) {
    if constexpr (sizeof(Real) == 8)
        return shape.scale_f64;
    else
        return shape.scale;
}
template <class Real> DEV Real softcap_of(const Shape& shape) {
    if constexpr (sizeof(Real) == 8)
        return shape.softcap_f64;
    else
        return shape.softcap;
}

// One element of an array of floats, or of elements where `element`.
template <class Element>
DEV typename Element::Real side_value(const void* array, i64 at, bool element) {
    return element ? Element::to_real(ld_global((const typename Element::Storage*)array + at))
                   : ((const float*)array)[at];
}

// What one raw product q.k turns into.
template <class Real> struct Logit {
    Real log2;        // final logit times log2(e): the argument of exp2
    Real derivative;  // d(logit) / d(scale * q.k)
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
template <class Real> struct Linear {
    static constexpr bool FOLDED = true;
    Real factor;  // signed

    template <class Params> DEV_METHOD Linear(const Params& p, const Work&, int, Real)
        : factor(scale_of<Real>(p.shape) * LOG2_E_OF<Real>) {}

    DEV_METHOD Real folded_factor() const { return abs_of(factor); }
    DEV_METHOD bool negative() const { return factor < 0; }

    DEV_METHOD Logit<Real> at(Real s, int, int) const { return {s * factor, 1}; }

    template <class Map> DEV_METHOD void apply(Map map) const {
        map([&](Real s, int, int) { return s * factor; });
    }
};

// Rows of one head, whose slope a score carries.
struct OwnRows : HeadRows {
    template <class Params> DEV_METHOD OwnRows(const Params& p, const Work&, int)
        : HeadRows(p.shape) {}
    template <class Real> DEV_METHOD Real slope_log2(Real own, int) const { return own; }
};

// Rows of a group of heads, whose slopes are read where they are used: a few of the first-level
// cache per tile, instead of registers throughout.
template <class Element> struct SlopedRows : GroupRows {
    using Real = typename Element::Real;
    const ForwardParams* params;
    i64 first;  // slope of the first head

    DEV_METHOD SlopedRows(const ForwardParams& p, const Work& work, int head)
        : GroupRows(p.shape), params(&p), first(head_offset(work, p.slope_strides, head)) {}
    DEV_METHOD Real slope_log2(Real, int row) const {
        return LOG2_E_OF<Real> *
               side_value<Element>(params->alibi_slopes,
                                   first + member(row) * params->slope_strides.head,
                                   shape->flags & FLAG_SLOPES_ELEMENT);
    }
};

// Any scale, soft cap and ALiBi, decided at run time by branches that all threads take alike.
template <class Real, class Rows = OwnRows> struct Shaped {
    static constexpr bool FOLDED = false;
    Real scale, softcap, inverse_softcap;
    Real slope_log2;  // slope * log2(e), of a group anything but 0 where there are slopes
    int q_offset;
    Rows rows;

    template <class Params>
    DEV_METHOD Shaped(const Params& p, const Work& work, int head, Real slope)
        : scale(scale_of<Real>(p.shape)),
          softcap(softcap_of<Real>(p.shape)),
          inverse_softcap(softcap > 0 ? 1 / softcap : 0),
          slope_log2(slope * LOG2_E_OF<Real>),
          q_offset(p.shape.q_offset),
          rows(p, work, head) {}

    DEV_METHOD Real folded_factor() const { return 1; }
    DEV_METHOD bool negative() const { return false; }

    DEV_METHOD Logit<Real> at(Real s, int row, int key) const {
        Logit<Real> logit = scaled(s, LOG2_E_OF<Real>);
        if (slope_log2 != 0) logit.log2 = biased(logit.log2, row, key);
        return logit;
    }
    template <class Map> DEV_METHOD void apply(Map map) const {
        apply_scale(map, LOG2_E_OF<Real>);
        apply_alibi(map);
    }
    // d(logit) / d(slope)
    DEV_METHOD Real alibi_distance(int row, int key) const {
        return -abs_of((Real)(rows.query(row) + q_offset - key));
    }

    // The same made from constant memory at this place, so that a main loop does not carry it.
    DEV_METHOD Shaped anew(const Shape& shape) const {
        Shaped made = *this;
        made.scale = opaque(scale_of<Real>(shape));
        made.softcap = opaque(softcap_of<Real>(shape));
        made.inverse_softcap = made.softcap > 0 ? 1 / made.softcap : 0;
        return made;
    }

    // ---- the steps, for scores that put others between them; `unit`: 1 for natural, LOG2_E for log2 units

    DEV_METHOD Logit<Real> scaled(Real s, Real unit) const {
        return softcap > 0 ? capped(s, unit) : Logit<Real>{s * (scale * unit), 1};
    }
    DEV_METHOD Logit<Real> capped(Real s, Real unit) const {
        const Real t = tanh_of(s * scale * inverse_softcap);
        return {softcap * unit * t, 1 - t * t};
    }
    DEV_METHOD Real biased(Real log2, int row, int key) const {
        return fma_of(rows.slope_log2(slope_log2, row), alibi_distance(row, key), log2);
    }
    template <class Map> DEV_METHOD void apply_scale(Map map, Real unit) const {
        if (softcap > 0)
            map([&](Real s, int, int) { return capped(s, unit).log2; });
        else
            map([&](Real s, int, int) { return s * (scale * unit); });
    }
    template <class Map> DEV_METHOD void apply_alibi(Map map) const {
        if (slope_log2 != 0) map([&](Real s, int row, int key) { return biased(s, row, key); });
    }
};

// Modifier concept, by example: what a score expression does to the scaled, soft-capped score of
// (batch or sequence b, query head h, row i, key j). Generated ones: cuflash/_scoremod_source.py.
//   CHANGES          false: nothing below is called, nor need it be there
//   Modifier(p)      from any kernel's params
//   value(s, b, h, i, j)            the new score
//   with_derivative(s, b, h, i, j)  the new score and its derivative in s
struct Unmodified {
    static constexpr bool CHANGES = false;
    template <class Params> DEV_METHOD explicit Unmodified(const Params&) {}
};

// Everything: Shaped, and between soft cap and ALiBi a score expression and a bias.
template <class Element, bool HAS_BIAS, class Modifier, class Rows = OwnRows> struct General {
    static constexpr bool FOLDED = false;
    using Storage = typename Element::Storage;
    using Real = typename Element::Real;
    Shaped<Real, Rows> shaped;
    // Into constant memory: a main loop has no registers to keep what it can read there.
    const Shape* shape;
    const PairStrides* steps;
    int batch, head;
    const u8* bias;  // of the (first) head
    Modifier modifier;

    template <class Params>
    DEV_METHOD General(const Params& p, const Work& work, int head_, Real slope)
        : shaped(p, work, head_, slope),
          shape(&p.shape),
          steps(&p.values.bias),
          batch(work.batch),
          head(head_),
          modifier(p) {
        if constexpr (HAS_BIAS)
            bias = (const u8*)p.options.bias + (head_offset(work, *steps, head) << log2_bytes());
    }

    DEV_METHOD Real folded_factor() const { return 1; }
    DEV_METHOD bool negative() const { return false; }

    DEV_METHOD Logit<Real> at(Real s, int row, int key) const {
        Logit<Real> logit = shaped.scaled(s, UNIT);
        if constexpr (Modifier::CHANGES) {
            const auto changed =
                modifier.with_derivative(logit.log2, batch, head_of(row), query_of(row), key);
            logit = {changed.x * LOG2_E_OF<Real>, logit.derivative * changed.y};
        }
        if constexpr (HAS_BIAS) logit.log2 = with_bias(logit.log2, bias_at(row, key));
        if (shaped.slope_log2 != 0) logit.log2 = shaped.biased(logit.log2, row, key);
        return logit;
    }
    template <class Map> DEV_METHOD void apply(Map map) const {
        const Shaped<Real, Rows> shaped = this->shaped.anew(*shape);
        shaped.apply_scale(map, UNIT);
        if constexpr (Modifier::CHANGES)
            map([&](Real s, int row, int key) {
                return modifier.value(s, batch, head_of(row), query_of(row), key) * LOG2_E_OF<Real>;
            });
        if constexpr (HAS_BIAS) apply_bias(map);
        shaped.apply_alibi(map);
    }
    DEV_METHOD Real alibi_distance(int row, int key) const {
        return shaped.alibi_distance(row, key);
    }
    // Of the nearest pair that exists: a bias has no element past the ends, where scores are not
    // used.
    DEV_METHOD Real bias_at(int row, int key) const {
        // opaque: products of steps are not kept from one pair to the next.
        const int i = opaque(min(query_of(row), shape->len_q - 1)),
                  j = opaque(min(key, shape->len_k - 1));
        const u8* from =
            bias + ((member_offset(row) + i * steps->row + j * steps->key) << log2_bytes());
        return bias_is_element() ? Element::to_real(ld_global((const Storage*)from))
                                 : (Real)ld_global_f32((const float*)from);
    }

  private:
    static constexpr Real UNIT = Modifier::CHANGES ? 1 : LOG2_E_OF<Real>;

    DEV_METHOD int query_of(int row) const { return shaped.rows.query(row); }
    DEV_METHOD int head_of(int row) const { return head + shaped.rows.member(row); }
    // Elements from the first head's bias to that of a row's head.
    DEV_METHOD i64 member_offset(int row) const {
        if constexpr (Rows::GROUPED)
            return shaped.rows.member(row) * steps->head;
        else
            return 0;
    }

    static constexpr bool HALVES = sizeof(Storage) == 2;
    static constexpr int LOG2_SIZE = HALVES ? 1 : sizeof(Storage) == 4 ? 2 : 3;
    DEV_METHOD bool bias_is_element() const { return (shape->flags & FLAG_BIAS_ELEMENT) != 0; }
    DEV_METHOD int log2_bytes() const { return bias_is_element() ? LOG2_SIZE : 2; }
    DEV Real with_bias(Real log2, Real bias) { return fma_of(bias, LOG2_E_OF<Real>, log2); }

    template <class Map> DEV_METHOD void apply_bias(Map map) const {
        const bool wide_loads = steps->key == 1 && map.inside(shape->len_k);
        const auto row_of = [&](int row, int key) {
            const i64 to_row =
                member_offset(row) + min(query_of(row), shape->len_q - 1) * steps->row;
            return bias + ((to_row + key) << log2_bytes());
        };
        if constexpr (HALVES && Map::KEYS % 32 == 0)
            if (wide_loads && bias_is_element() && aligned(8))
                return map.octets([&](u32(&word)[4], int row,
                                      int key) { ld_global_words(word, row_of(row, key)); },
                                  [&](float& x, float& y, u32 word) {
                                      const float2 pair = unpack<Element>(word);
                                      x = with_bias(x, pair.x), y = with_bias(y, pair.y);
                                  });
        if (wide_loads && !bias_is_element() && aligned(2))
            return map.pairs([&](Real& x, Real& y, int row, int key) {
                u32 words[2];
                ld_global_words(words, row_of(row, key));
                x = with_bias(x, __uint_as_float(words[0]));
                y = with_bias(y, __uint_as_float(words[1]));
            });
        map.pairs([&](Real& x, Real& y, int row, int key) {
            x = with_bias(x, bias_at(row, key)), y = with_bias(y, bias_at(row, key + 1));
        });
    }
    // Do rows begin at multiples of so many elements?
    DEV_METHOD bool aligned(int elements) const {
        const i64 to_head = Rows::GROUPED ? steps->head : 0;
        return (((u64)bias >> log2_bytes()) | (u64)steps->row | (u64)to_head) % elements == 0;
    }
};

}  // namespace score

// The score of one query head, from any kernel's params.
template <class Config, class Params>
DEV typename Config::Score make_score(const Params& p, const Work& work, int head) {
    typename Config::Element::Real slope = 0;
    if constexpr (!Config::Score::FOLDED)
        if (p.alibi_slopes != nullptr) {
            if constexpr (GROUPED<Config>)
                slope = 1;
            else
                slope = side_value<typename Config::Element>(
                    p.alibi_slopes, head_offset(work, p.slope_strides, head),
                    p.shape.flags & FLAG_SLOPES_ELEMENT);
        }
    return typename Config::Score(p, work, head, slope);
}

// The sink of a query head in log2 units, -inf without sinks.
template <class Config, class Params>
DEV typename Config::Element::Real sink_log2(const Params& p, int head) {
    using Real = typename Config::Element::Real;
    if constexpr (Config::SINKS)
        return LOG2_E_OF<Real> * side_value<typename Config::Element>(
                                     p.options.sinks, head, p.shape.flags & FLAG_SINKS_ELEMENT);
    else
        return neg_infinity();
}
