// Attention forward for sm_90a: one warp copies tiles by TMA, two or three warpgroups of 64 query rows
// multiply them with wgmma. Blocks stay and take tile after tile of queries.
//
// A warpgroup's step over key tiles, with S the scores and P their weights:
//     S' = Q K'^T       of the next tile, issued first
//     O += P V          of this one, P from registers
//     P' = softmax(S')  when S' is there; P V and the other warpgroups' products run meanwhile
// Named barriers let warpgroups issue their products in turns, so that one's softmax falls under the
// other's products.
#pragma once

#include "forward.cuh"
#include "sm90_ring.cuh"

// Beside the one that copies.
constexpr int LOOKING_WARPS = 3;

template <class C> struct ForwardSm90Layout {
    using QTile = SlabTile<C::BLOCK_Q, C::HEAD_DIM>;
    using KTile = SlabTile<C::BLOCK_K, C::HEAD_DIM>;
    using VTile = SlabTile<C::BLOCK_K, C::HEAD_DIM_V>;
    using OutTile = SlabTile<C::BLOCK_Q, C::HEAD_DIM_V>;
    using QRing = Ring<QTile, 1>;
    using KRing = Ring<KTile, C::STAGES>;
    using VRing = Ring<VTile, C::STAGES>;
    static constexpr int GROUPS = C::WARPS / 4 - 1;  // that multiply; the last one copies
    // Output is staged where Q was, or beside: then the next Q can come during the last steps.
    static constexpr int Q = 0, K = QTile::BYTES, V = K + KRing::BYTES;
    static constexpr int OUT = C::OUT_APART ? V + VRing::BYTES : Q;
    static constexpr int BARRIERS = C::OUT_APART ? OUT + OutTile::BYTES : V + VRing::BYTES;
    // Of the last three warps: when they have looked at a tile of V, and what they found.
    static constexpr int LOOKS =
        BARRIERS + QRing::BARRIER_BYTES + KRing::BARRIER_BYTES + VRing::BARRIER_BYTES;
    static constexpr int BYTES = LOOKS + C::STAGES * 32 + 1024;  // up to the first multiple of 1024
    static_assert(BYTES == C::SHARED_BYTES,
                  "forward_shared_bytes in _tuning_sm90.py computes the same sum");
    static_assert(C::BLOCK_Q == GROUPS * 64, "a warpgroup has 64 rows");
    static_assert(OutTile::SLABS <= QTile::SLABS || C::OUT_APART, "the output fits where Q was");

    QRing q;
    KRing k;
    VRing v;
    u32 out, looks;

    DEV_METHOD explicit ForwardSm90Layout(u32 smem)
        : q{smem + Q, smem + BARRIERS},
          k{smem + K, q.barriers + QRing::BARRIER_BYTES},
          v{smem + V, k.barriers + KRing::BARRIER_BYTES},
          out(smem + OUT),
          looks(smem + LOOKS) {}

    // Looks are counted from 0.
    DEV_METHOD u32 looked(unsigned n) const { return looks + n % C::STAGES * 32; }
    DEV_METHOD u32 found(unsigned n, int warp) const { return looked(n) + 16 + warp * 4; }
    DEV_METHOD void init() const {
        q.init(GROUPS * 4);
        k.init(GROUPS * 4);
        v.init(GROUPS * 4 + LOOKING_WARPS);
#pragma unroll
        for (int n = 0; n < C::STAGES; ++n) mbarrier_init(looked(n), LOOKING_WARPS);
        fence_mbarrier_init();
    }
};

// Named barriers.
constexpr int BARRIER_TURN = 1, BARRIER_GROUP = 4;  // + group

// Calls step(p, work, number of the tile of queries among those of this block) for every piece of work
// of this block. p: the call's params, or those of the sequence.
template <class C, class Step> DEV void each_work(const ForwardSm90Params& p, Step step) {
    // Made anew where it is asked for: warps that copy have no register for it.
    const auto count = [&] {
        return opaque((u32)p.schedule.tiles) * p.shape.heads * (C::PACKED ? 1 : p.shape.batch);
    };
    unsigned n = 0;
    for (unsigned turn = 0; turn * gridDim.x < count(); ++turn) {
        const unsigned number = work_number(turn, fresh_block_id(), gridDim.x);
        if (number >= count()) continue;
        const Work work = decode<C>(p, p.shape.heads, number);
        if constexpr (C::PACKED) {
            if (work.batch < 0) continue;
            ForwardParams own = p;
            packed::enter<C>(own, work);
            step(own, work, n++);
        } else {
            step((const ForwardParams&)p, work, n++);
        }
    }
}

// First row of a sequence in the packed arrays; the maps know the whole arrays.
struct FirstRows {
    int q, k;
};
template <class C> DEV FirstRows first_rows(const ForwardParams& p, const Work& work) {
    if constexpr (!C::PACKED) return {0, 0};
    const Sequence here = packed::sequence(p.options, work.batch);
    return {here.q_start, here.k_start};
}

// The copying thread. K comes a tile ahead of V, as it is used.
template <class C> DEV void copy_tiles(const ForwardSm90Params& params, u32 smem) {
    using L = ForwardSm90Layout<C>;
    const L l(smem);
    unsigned k_count = 0, v_count = 0;
    prefetch_tensor_map(&params.q_map);
    prefetch_tensor_map(&params.k_map);
    prefetch_tensor_map(&params.v_map);
    each_work<C>(params, [&](const ForwardParams& p, const Work& work, unsigned n) {
        const int first_row = work.tile * C::BLOCK_Q, head_kv = work.head / p.shape.group;
        const MapPlace q_place(p.q_strides, work, work.head);
        const MapPlace k_place(p.k_strides, work, head_kv), v_place(p.v_strides, work, head_kv);
        const FirstRows first = first_rows<C>(p, work);
        const typename C::Mask mask(p, work, work.head);
        const Range tiles = key_tiles<C>(mask, {first_row, first_row + C::BLOCK_Q});
        const auto load_k = [&](int tile) {
            l.k.open(k_count);
            k_place.template load<typename L::KTile>(l.k.tile(k_count), &params.k_map,
                                                     l.k.full(k_count), L2_EVICT_LAST,
                                                     first.k + tile * C::BLOCK_K);
            ++k_count;
        };
        if (tiles.begin < tiles.end) load_k(tiles.begin);
        // After the first K, which does not have to wait for the block's output.
        l.q.open(n);
        q_place.template load<typename L::QTile>(l.q.tile(n), &params.q_map, l.q.full(n),
                                                 L2_EVICT_FIRST, first.q + first_row);
        for (int tile = tiles.begin, next; tile < tiles.end; tile = next) {
            next = mask.next_tile(tile + 1, tiles.end);
            if (next < tiles.end) load_k(next);
            l.v.open(v_count);
            v_place.template load<typename L::VTile>(l.v.tile(v_count), &params.v_map,
                                                     l.v.full(v_count), L2_EVICT_LAST,
                                                     first.k + tile * C::BLOCK_K);
            ++v_count;
        }
    });
}

// May infinities and NaNs of a tile of V reach rows that must not see them? Masked pairs have weight 0, and
// 0 * NaN is NaN. Behind a packed sequence there are rows of the next one.
template <class C>
DEV bool leaks(const ForwardParams& p, const typename C::Mask& mask, Range rows, int tile) {
    const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
    return mask.isolates(rows, keys, tile) || (C::PACKED && keys.end > p.shape.len_k);
}

// Replaces infinities and NaNs of a whole tile by zeros, in the order of memory: fewer registers than by rows and
// columns (finite.cuh), of which these warps have 24. THREADS threads, this one is number `thread`.
template <class Element, class Tile, int THREADS>
DEV bool clear_non_finite(u32 smem, unsigned thread) {
    bool found = false;
#pragma unroll 1
    for (u32 at = smem + 16 * thread; at < smem + Tile::BYTES; at += 16 * THREADS) {
        uint4 chunk = ld_shared_v4(at);
        u32 changed = 0u;
        const auto clear = [&](u32& pair) {
            const u32 clean = finite_or_zero<Element>(pair);
            changed |= pair ^ clean;
            pair = clean;
        };
        clear(chunk.x), clear(chunk.y), clear(chunk.z), clear(chunk.w);
        if (changed == 0u) continue;
        st_shared_v4(at, chunk);
        found = true;
    }
    return found;
}

// The warps beside the copying one: take infinities and NaNs out of the tiles of V that leak, before
// anybody multiplies with them.
template <class C> DEV void look_at_values(const ForwardSm90Params& params, u32 smem) {
    using L = ForwardSm90Layout<C>;
    constexpr int FIRST_WARP = C::WARPS - LOOKING_WARPS;
    const L l(smem);
    unsigned v_count = 0, looks = 0;
    each_work<C>(params, [&](const ForwardParams& p, const Work& work, unsigned) {
        const int first_row = work.tile * C::BLOCK_Q;
        const Range rows{first_row, first_row + C::BLOCK_Q};
        const typename C::Mask mask(p, work, work.head);
        const Range tiles = key_tiles<C>(mask, rows);
        for (int tile = tiles.begin; tile < tiles.end;
             tile = mask.next_tile(tile + 1, tiles.end), ++v_count) {
            // Of every tile: parities tell a phase only from its neighbours.
            l.v.wait(v_count);
            if (leaks<C>(p, mask, rows, tile)) {
                const bool mine =
                    clear_non_finite<typename C::Element, typename L::VTile, LOOKING_WARPS * 32>(
                        l.v.tile(v_count), fresh_thread_id() - FIRST_WARP * 32);
                fence_proxy_async();
                const bool found = __any_sync(FULL_WARP, mine);
                __syncwarp();
                if (lane_id() == 0) {
                    st_shared_u32(l.found(looks, warp_id() - FIRST_WARP), found);
                    mbarrier_arrive(l.looked(looks));
                }
                ++looks;
            }
            l.v.release(v_count);
        }
    });
}

#include "forward_sm90_consumer.cuh"

template <class C> DEV void forward_sm90(const ForwardSm90Params& p) {
    using L = ForwardSm90Layout<C>;
    extern __shared__ __align__(1024) u8 shared_memory[];
    const u32 smem = aligned_shared_memory(shared_memory);
    if constexpr (C::PACKED)
        if (packed::is_bad(p.options)) {
            const unsigned count = (unsigned)p.schedule.tiles * p.shape.heads;
            for (unsigned number = fresh_block_id(); number < count; number += gridDim.x)
                write_nan<C>(p, number);
            return;
        }
    if (threadIdx.x == 0) L(smem).init();
    __syncthreads();
    if (warp_id() >= L::GROUPS * 4) {
        setmaxnreg_dec<C::COPY_REGISTERS>();
        if (warp_id() > L::GROUPS * 4)
            look_at_values<C>(p, smem);
        else if (elect_one())
            copy_tiles<C>(p, smem);
    } else {
        setmaxnreg_inc<C::REGISTERS>();
        attend<C>(p, smem);
    }
}
