// Sequences of different lengths packed into one row of every array. A block finds its sequence in
// a table made on the device (packed_plan.cuh) and puts that sequence's lengths and rows in the
// place of the call's, so that the rest of a kernel does not know.
#pragma once

#include "schedule.cuh"

// sequences[0]: the header {bad, 0, 0, 0}; sequences[1 + b]: this.
struct Sequence {
    int q_start, q_len, k_start, k_len;
};

namespace packed {

// Do the cumulative lengths contradict themselves or the maxima? The tables are safe to use even
// then, but mean nothing.
DEV bool is_bad(const OptionPointers& options) { return options.sequences[0].x != 0; }

DEV Sequence sequence(const OptionPointers& options, int number) {
    const int4 entry = options.sequences[1 + number];
    return {entry.x, entry.y, entry.z, entry.w};
}

// The sequence's lengths, band and offset, which its length of keys may shift.
DEV void enter(Shape& shape, const Sequence& here) {
    const int shift = shape.flags & FLAG_ALIGN_END ? here.k_len - here.q_len : 0;
    const auto bound = [&](int relative) {
        const i64 lowest = -(i64)here.q_len - 1, highest = (i64)here.k_len + 1;
        const i64 wanted = (i64)relative + shift;
        return (int)(wanted < lowest ? lowest : wanted > highest ? highest : wanted);
    };
    shape.len_q = here.q_len;
    shape.len_k = here.k_len;
    shape.band_low = bound(shape.band_low);
    shape.band_high = bound(shape.band_high);
    shape.q_offset += shift;
}

template <class Element> DEV void move(const Element*& array, i64 elements) {
    if (array != nullptr) array += elements;
}
template <class Element> DEV void move(Element*& array, i64 elements) {
    if (array != nullptr) array += elements;
}
// Arrays whose type the params do not say.
template <class Element> DEV void move_as(const void*& array, i64 elements) {
    if (array != nullptr) array = (const Element*)array + elements;
}
template <class Element> DEV void move_as(void*& array, i64 elements) {
    if (array != nullptr) array = (Element*)array + elements;
}

// A kernel's own copy of its params becomes that of one sequence.
template <class C> DEV void enter(ForwardParams& p, const Work& work) {
    using Storage = typename C::Element::Storage;
    using Real = typename C::Element::Real;
    const Sequence here = sequence(p.options, work.batch);
    move_as<Storage>(p.q, here.q_start * p.q_strides.row);
    move_as<Storage>(p.k, here.k_start * p.k_strides.row);
    move_as<Storage>(p.v, here.k_start * p.v_strides.row);
    move_as<Storage>(p.out, here.q_start * p.out_strides.row);
    move_as<Real>(p.lse, here.q_start);
    enter(p.shape, here);
}
template <class C> DEV void enter(BackwardParams& p, const Work& work) {
    using Storage = typename C::Element::Storage;
    using Real = typename C::Element::Real;
    const Sequence here = sequence(p.options, work.batch);
    move_as<Storage>(p.q, here.q_start * p.q_strides.row);
    move_as<Storage>(p.k, here.k_start * p.k_strides.row);
    move_as<Storage>(p.v, here.k_start * p.v_strides.row);
    move_as<Storage>(p.out, here.q_start * p.out_strides.row);
    move_as<Storage>(p.dout, here.q_start * p.dout_strides.row);
    move_as<Real>(p.lse, here.q_start * p.lse_strides.row);
    move_as<Real>(p.dlse, here.q_start * p.dlse_strides.row);
    move_as<Storage>(p.dq, here.q_start * p.dq_strides.row);
    move_as<Storage>(p.dk, here.k_start * p.dk_strides.row);
    move_as<Storage>(p.dv, here.k_start * p.dv_strides.row);
    move_as<Real>(p.lse_log2, here.q_start);
    move_as<Real>(p.delta, here.q_start);
    move(p.dq_accum, (i64)here.q_start * C::HEAD_DIM);
    enter(p.shape, here);
}

// The tile of a packed launch: an entry of its work table.
template <class C, class Params> DEV Work decode(const Params& p, int heads, unsigned block) {
    Work work = decode_flat(p.schedule, 1, heads, block);
    const int2 entry = p.options.work[p.values.packed.work_offset + work.tile];
    work.batch = entry.x;
    work.tile = entry.y;
#pragma unroll
    for (int axis = 0; axis < MAX_BATCH_AXES; ++axis) work.batch_index[axis] = 0;
    work.batch_index[MAX_BATCH_AXES - 1] = work.batch;
    return work;
}

}  // namespace packed

// What this block works on. Packed sequences: `batch` is the sequence, -1 where the table holds no
// work for this block, which must leave before anything else. From the call's params or a
// sequence's own.
template <class C, class Params>
DEV Work decode(const Params& p, int heads, unsigned block = fresh_block_id()) {
    if constexpr (C::PACKED)
        return packed::decode<C>(p, heads, block);
    else
        return decode(p.schedule, p.shape, heads, block);
}

// A head's first row in lse and in the workspaces [B, H, len_q], which for packed sequences are
// [H, total_q].
template <class C, class Params>
DEV i64 statistics_row(const Params& p, const Work& work, int head) {
    if constexpr (C::PACKED)
        return head * p.values.packed.total_q;
    else
        return ((i64)work.batch * p.shape.heads + head) * p.shape.len_q;
}
