// What the parts of Hopper's backward that multiply know of their block: its work, its mask, and which rows it
// reads. Everything is read anew where it is needed, because registers are scarce here.
#pragma once

#include "backward_sm90_layout.cuh"

namespace backward::sm90 {

// One thread's view of the block's key tile and of the query heads that walk over it.
template <class C> struct KeyTile {
    using Element = typename C::Element;
    using Mask = typename C::Mask;
    using L = Layout<C>;

    const BackwardSm90Params& p;
    const L layout;
    Mask head_mask;         // of the query head at hand
    bool repair_k = false;  // K has a NaN or inf, which dQ of rows that do not see it must not meet
    bool repaired = false;  // a NaN or inf of Q or dO was left out: add_back has to follow

    DEV_METHOD KeyTile(const BackwardSm90Params& params, const L& place)
        : p(params), layout(place), head_mask(key_work().mask(params, 0)) {}

    DEV_METHOD int first_key() const { return (int)ld_shared_u32(layout.work()) * C::BLOCK_K; }
    DEV_METHOD KeyWork<C> key_work() const { return KeyWork<C>(layout); }
    DEV_METHOD Sequence sequence() const { return layout.sequence(p); }
    DEV_METHOD Range keys() const { return {first_key(), first_key() + C::BLOCK_K}; }
    DEV_METHOD static Range rows_of_tile(int tile) {
        return {tile * C::BLOCK_Q, (tile + 1) * C::BLOCK_Q};
    }
    // First key of this warp inside the tile.
    DEV_METHOD static int warp_key() {
        return DIVIDED<C> ? fresh_thread_id() / 32 % 4 * 16 : fresh_thread_id() / 32 * 16;
    }
    // The same in all lanes, for the compiler too.
    DEV_METHOD static int warpgroup() {
        return __shfl_sync(FULL_WARP, (int)(fresh_thread_id() / 128), 0);
    }
    // One arrival for the warp, whose lanes are all through with what they did before.
    DEV_METHOD static void arrive(u32 barrier) {
        __syncwarp();
        if (fresh_thread_id() % 32 == 0) mbarrier_arrive(barrier);
    }

    // A packed sequence's band is not in constant memory.
    DEV_METHOD Mask mask() const {
        if constexpr (C::PACKED && Mask::CONTIGUOUS) return layout.band(p);
        return head_mask;
    }
    // Does the tile reach past the last query?
    DEV_METHOD bool ends_in(int tile) const { return (tile + 1) * C::BLOCK_Q > sequence().q_len; }
    // May pairs of the tile be hidden whose rows and keys hold something? Behind a packed sequence are the rows of
    // the next one; behind its keys there are zeros (finds_bad_keys).
    DEV_METHOD bool isolates(int tile) const {
        return mask().isolates(rows_of_tile(tile), keys(), tile) || (C::PACKED && ends_in(tile));
    }
    DEV_METHOD bool cuts(int tile) const {
        return mask().cuts(rows_of_tile(tile), keys(), tile) || ends_in(tile);
    }

    DEV_METHOD GlobalRows<u16> k_gmem() const {
        const Work work = key_work().work;
        return from_row(head_rows<u16>(p.k, p.k_strides, work, work.head, sequence().k_len,
                                       p.shape.head_dim, true),
                        sequence().k_start);
    }
    // Q or dO of one query head of the group.
    DEV_METHOD GlobalRows<u16> rows_gmem(const void* array, const Strides& strides, int columns,
                                         int head) const {
        const Work work = key_work().work;
        return from_row(head_rows<u16>(array, strides, work, work.head * p.shape.group + head,
                                       sequence().q_len, columns, true),
                        sequence().q_start);
    }
    // A packed sequence's rows of an array.
    DEV_METHOD static GlobalRows<u16> from_row(GlobalRows<u16> rows, int first) {
        if constexpr (C::PACKED) rows.base += first * rows.stride;
        return rows;
    }
};

}  // namespace backward::sm90
