// What a block works on, kept in shared memory. Kernels of 16 bits decode their block's number again where they
// need it, which takes no registers across a loop, but ten divisions. Kernels of 32 and 64 bits ask in every tile,
// and their code is long enough without: one thread writes it down, everybody reads it.
#pragma once

#include "packed.cuh"

template <class C> constexpr bool WORK_IN_SHARED = sizeof(typename C::Element::Storage) > 2;
template <class C> constexpr int WORK_BYTES = WORK_IN_SHARED<C> ? 32 : 0;
// Behind it the params of a packed sequence: see with_shared_params.
template <class C, class Params> constexpr int PARAMS_BYTES =
    WORK_IN_SHARED<C> && C::PACKED ? (int)(sizeof(Params) + 15) / 16 * 16 : 0;

// All threads; anybody may read when it returns.
template <class C, class Params> DEV void write_work(u32 smem, const Params& p, int heads) {
    if constexpr (WORK_IN_SHARED<C>) {
        static_assert(MAX_BATCH_AXES == 4, "two chunks of 16 bytes");
        if (fresh_thread_id() == 0) {
            const Work work = decode<C>(p, heads);
            const int (&index)[4] = work.batch_index;
            st_shared_v4(smem, make_uint4(work.tile, work.batch, work.head, 0));
            st_shared_v4(smem + 16, make_uint4(index[0], index[1], index[2], index[3]));
        }
        __syncthreads();
    }
}

// Read anew at every call, as decode works it out anew.
template <class C, class Params> DEV Work read_work(u32 smem, const Params& p, int heads) {
    if constexpr (WORK_IN_SHARED<C>) {
        const uint4 place = ld_shared_v4(smem), index = ld_shared_v4(smem + 16);
        return {(int)place.x,
                (int)place.y,
                (int)place.z,
                {(int)index.x, (int)index.y, (int)index.z, (int)index.w}};
    } else {
        return decode<C>(p, heads);
    }
}

// A packed sequence's params differ from the call's in some twenty numbers, which a kernel would carry through its
// loops: here they come from shared memory, `place` and the bytes behind it, at every use. As with_sequence.
template <class C, class Params, class Run>
DEV void with_shared_params(const Params& params, int heads, u8* place, Run run) {
    const Work work = decode<C>(params, heads);
    if (work.batch < 0) return;
    Params& own = *(Params*)place;
    if (fresh_thread_id() == 0) {
        own = params;
        packed::enter<C>(own, work);
    }
    __syncthreads();
    run(own);
}

// In the place of a T that other kernels keep in registers across a main loop: it is made anew for every use, as
// registers are scarcer than instructions (a float64 number takes two).
template <class T> struct Later {
    template <class... Any> DEV_METHOD explicit Later(const Any&...) {}
};
// So are the scores of wide elements, and masks of theirs that are more than a band.
template <class C> constexpr bool FRESH_SCORE = WORK_IN_SHARED<C>;
template <class C> constexpr bool FRESH_MASK = WORK_IN_SHARED<C> && !C::Mask::CONTIGUOUS;
