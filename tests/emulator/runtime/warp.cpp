// warp.cpp - steps that the lanes of a warp make together: the meeting point itself, shuffles, votes, matrix loads.
#include "ops.h"
#include "hopper.h"
#include "state.h"

#include <cmath>

namespace emu {
namespace {
// An open collective: the lanes that have arrived so far. A warp may have several, with disjoint masks.
struct Meeting {
    u32 mask, arrived, site;
    const char* op;
    bool aligned;
    void* lanes[WARP];
    Fiber* who[WARP];
};
std::vector<std::vector<Meeting>> meetings;  // by warp of the blocks that run together

std::vector<Meeting>& of_warp(Thread& t) {
    size_t warp = t.block->rank * t.block->nwarps + t.warp;
    if (meetings.size() <= warp) meetings.resize(warp + 1);
    return meetings[warp];
}
Meeting* find(std::vector<Meeting>& list, Thread& t, u32 mask, const char* op, bool aligned) {
    for (Meeting& m : list) {
        if (!m.arrived || m.mask != mask) continue;  // another mask is another meeting
        if (m.op == op && !(aligned && m.site != t.site)) return &m;
        fail(DIVERGENCE,
             "warp divergence: lanes %08x wait for this lane at %s (%s), but it is at %s",
             m.arrived, m.op, where(m.site), op);
    }
    return nullptr;
}
}  // namespace
void warps_begin() {
    for (auto& list : meetings) list.clear();
}
void collective(Thread& t, u32 mask, const char* op, void* mine, Leader leader, bool aligned,
                bool orders_memory) {
    Fiber& me = fiber(t);
    if (!(mask >> t.lane & 1)) fail(DIVERGENCE, "%s: this lane is not in the mask %08x", op, mask);
    if (aligned && t.block->nthreads < (t.warp + 1) * WARP &&
        (mask >> (t.block->nthreads - t.warp * WARP)))
        fail(DIVERGENCE, "%s: the mask %08x names lanes that do not exist (block of %u threads)",
             op, mask, t.block->nthreads);
    auto& list = of_warp(t);
    Meeting* m = find(list, t, mask, op, aligned);
    if (!m) {
        for (Meeting& free : list)
            if (!free.arrived) m = &free;
        if (!m) list.reserve(WARP), list.push_back(Meeting{}), m = &list.back();
        m->mask = mask, m->op = op, m->site = t.site, m->aligned = aligned;
    }
    m->arrived |= 1u << t.lane;
    m->lanes[t.lane] = mine;
    m->who[t.lane] = &me;
    if (m->arrived != mask) {
        park(t, op);
        return;
    }
    if (counting) count_warp(t);
    if (leader) leader(m->lanes, mask);
    if (orders_memory && request->race) warp_clocks(m->who, mask);
    m->arrived = 0;
    for (u32 i = 0; i < WARP; ++i)
        if ((mask >> i & 1) && i != t.lane) wake(*m->who[i]);
}
void warp_barrier(Thread& t, u32 mask) {
    collective(t, mask, "bar.warp.sync", nullptr, nullptr, false, true);
}

// ---- shuffles, votes ------------------------------------------------------------------------------------------------------
namespace {
struct Shuffle {
    u32 value, source;
};
void shuffle_leader(void** lanes, u32 mask) {
    u32 values[WARP] = {};
    for (u32 i = 0; i < WARP; ++i)
        if (mask >> i & 1) values[i] = ((Shuffle*)lanes[i])->value;
    for (u32 i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        Shuffle& s = *(Shuffle*)lanes[i];
        if (!(mask >> s.source & 1))
            fail(DIVERGENCE, "shfl: lane %u reads lane %u, which is not in the mask %08x", i,
                 s.source, mask);
        s.value = values[s.source];
    }
}
u32 shuffle(Thread& t, const char* op, u32 value, s32 source, bool inside, u32 mask, bool* ok) {
    Shuffle s{value, inside ? (u32)source : t.lane};
    *ok = inside;
    collective(t, mask, op, &s, shuffle_leader, false);
    return s.value;
}
struct Segment {
    u32 low, high, clamp;  // first lane and the bound of the segment
    Segment(u32 lane, u32 c)
        : low(lane & (c >> 8 & 31)),
          high((lane & (c >> 8 & 31)) | (c & 31 & ~(c >> 8 & 31))),
          clamp(c >> 8 & 31) {}
};
}  // namespace
u32 shuffle_up(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok) {
    s32 source = (s32)t.lane - (s32)(b & 31);
    return shuffle(t, "shfl.up", value, source, source >= (s32)Segment(t.lane, c).high, mask, ok);
}
u32 shuffle_down(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok) {
    s32 source = (s32)t.lane + (s32)(b & 31);
    return shuffle(t, "shfl.down", value, source, source <= (s32)Segment(t.lane, c).high, mask, ok);
}
u32 shuffle_bfly(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok) {
    s32 source = (s32)(t.lane ^ (b & 31));
    return shuffle(t, "shfl.bfly", value, source, source <= (s32)Segment(t.lane, c).high, mask, ok);
}
u32 shuffle_idx(Thread& t, u32 value, u32 b, u32 c, u32 mask, bool* ok) {
    Segment s(t.lane, c);
    s32 source = (s32)(s.low | (b & 31 & ~s.clamp));
    return shuffle(t, "shfl.idx", value, source, source <= (s32)s.high, mask, ok);
}
namespace {
struct Value {
    u64 in;
    u32 out;
    u32 op;
};
void vote_leader(void** lanes, u32 mask) {
    u32 ballot = 0;
    for (u32 i = 0; i < WARP; ++i)
        if ((mask >> i & 1) && ((Value*)lanes[i])->in) ballot |= 1u << i;
    for (u32 i = 0; i < WARP; ++i)
        if (mask >> i & 1) ((Value*)lanes[i])->out = ballot;
}
void match_leader(void** lanes, u32 mask) {
    for (u32 i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        Value& v = *(Value*)lanes[i];
        v.out = 0;
        for (u32 k = 0; k < WARP; ++k)
            if ((mask >> k & 1) && ((Value*)lanes[k])->in == v.in) v.out |= 1u << k;
    }
}
template <class T> void redux_leader(void** lanes, u32 mask) {
    T sum = 0;
    bool first = true;
    for (u32 i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        Value& v = *(Value*)lanes[i];
        T x = (T)v.in;
        if (first)
            sum = x;
        else
            switch (v.op) {
                case REDUX_ADD:
                    sum = (T)((u32)sum + (u32)x);
                    break;
                case REDUX_MIN:
                    sum = x < sum ? x : sum;
                    break;
                case REDUX_MAX:
                    sum = x > sum ? x : sum;
                    break;
                case REDUX_AND:
                    sum &= x;
                    break;
                case REDUX_OR:
                    sum |= x;
                    break;
                case REDUX_XOR:
                    sum ^= x;
                    break;
            }
        first = false;
    }
    for (u32 i = 0; i < WARP; ++i)
        if (mask >> i & 1) ((Value*)lanes[i])->out = (u32)sum;
}
void redux_f32_leader(void** lanes, u32 mask) {
    float best = NAN;
    bool nan_seen = false;
    u32 op = 0;
    for (u32 i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        Value& v = *(Value*)lanes[i];
        op = v.op;
        float x = __builtin_bit_cast(float, (u32)v.in);
        if (op & 2) x = std::fabs(x);
        nan_seen |= x != x;
        if (best != best || (op & 1 ? x > best : x < best)) best = x;
    }
    u32 out = (nan_seen && (op & 4)) || best != best ? 0x7fffffffu : __builtin_bit_cast(u32, best);
    for (u32 i = 0; i < WARP; ++i)
        if (mask >> i & 1) ((Value*)lanes[i])->out = out;
}
}  // namespace
u32 vote(Thread& t, bool value, u32 mask) {
    Value v{value, 0, 0};
    collective(t, mask, "vote", &v, vote_leader, false);
    return v.out;
}
u32 match_any(Thread& t, u64 value, u32 mask) {
    Value v{value, 0, 0};
    collective(t, mask, "match", &v, match_leader, false);
    return v.out;
}
u32 redux_u32(Thread& t, Redux op, u32 value, u32 mask) {
    Value v{value, 0, op};
    collective(t, mask, "redux", &v, redux_leader<u32>, false);
    return v.out;
}
s32 redux_s32(Thread& t, Redux op, s32 value, u32 mask) {
    Value v{(u64)(s64)value, 0, op};
    collective(t, mask, "redux", &v, redux_leader<s32>, false);
    return (s32)v.out;
}
float redux_f32(Thread& t, bool maximum, bool absolute, bool nan_wins, float value, u32 mask) {
    Value v{__builtin_bit_cast(u32, value), 0,
            (u32)maximum | (u32)absolute << 1 | (u32)nan_wins << 2};
    collective(t, mask, "redux.f32", &v, redux_f32_leader, false);
    return __builtin_bit_cast(float, v.out);
}
u32 active_mask(Thread& t) {
    u32 mask = 0;
    for (u32 i = 0; i < WARP && t.warp * WARP + i < t.block->nthreads; ++i)
        if (!fiber(*t.block->threads[t.warp * WARP + i]).done) mask |= 1u << i;
    return mask;
}

// ---- matrices of 8 rows of 16 bytes -----------------------------------------------------------------------------------------
namespace {
struct Matrix {
    Thread* t;
    u32 address, count, trans;
    u32* out;
    const u32* in;
};
// The rows are accesses of the lanes that name them, all at once.
u8* row_of(void** lanes, u32 lane) {
    Matrix& m = *(Matrix*)lanes[lane];
    u8* p = shared_at(*m.t, m.address, 16, 16);
    if (request->race) race_shared(*m.t, m.address, 16, WRITE);
    mark_initialised(*m.t, m.address, 16);
    if (m.t->block->hopper) hopper_generic_write(*m.t, m.address, 16);
    return p;
}
void count_rows(void** lanes, u32 count) {
    u32 addresses[WARP];
    for (u32 i = 0; i < 8 * count; ++i) addresses[i] = ((Matrix*)lanes[i])->address;
    count_shared_phase(*((Matrix*)lanes[0])->t, addresses, 8 * count, 16);
}
void stmatrix_leader(void** lanes, u32) {
    Matrix& first = *(Matrix*)lanes[0];
    if (counting) count_rows(lanes, first.count);
    for (u32 k = 0; k < first.count; ++k) {
        u16 rows[8][8];
        for (u32 i = 0; i < WARP; ++i) {
            u32 g = i >> 2, c = 2 * (i & 3), v = ((Matrix*)lanes[i])->in[k];
            (first.trans ? rows[c][g] : rows[g][c]) = (u16)v;
            (first.trans ? rows[c + 1][g] : rows[g][c + 1]) = (u16)(v >> 16);
        }
        for (u32 r = 0; r < 8; ++r) memcpy(row_of(lanes, 8 * k + r), rows[r], 16);
    }
}
void movmatrix_leader(void** lanes, u32) {
    u16 rows[8][8];
    for (u32 i = 0; i < WARP; ++i) {
        u32 v = *((Matrix*)lanes[i])->in;
        rows[i >> 2][2 * (i & 3)] = (u16)v, rows[i >> 2][2 * (i & 3) + 1] = (u16)(v >> 16);
    }
    for (u32 i = 0; i < WARP; ++i) {
        u32 g = i >> 2, c = 2 * (i & 3);
        *((Matrix*)lanes[i])->out = rows[c][g] | (u32)rows[c + 1][g] << 16;
    }
}
}  // namespace
void stmatrix(Thread& t, u32 address, u32 matrices, bool trans, const u32* values) {
    Matrix m{&t, address, matrices, trans, nullptr, values};
    collective(t, ~0u, "stmatrix", &m, stmatrix_leader);
}
u32 movmatrix(Thread& t, u32 value) {
    u32 out;
    Matrix m{&t, 0, 1, true, &out, &value};
    collective(t, ~0u, "movmatrix", &m, movmatrix_leader);
    return out;
}
}  // namespace emu
