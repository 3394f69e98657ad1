// What backward adds to ptx_sm90.cuh. Blocks that take turns share a counter in global memory: one raises it after
// its asynchronous sums, the next waits for it before its own.
#pragma once

#include "ptx_sm90_wgmma.cuh"

// Ordinary accesses to global memory and asynchronous ones of this thread keep their order.
DEV void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

DEV u32 ld_acquire_global(const u32* gmem) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(x)
                 : "l"(global_address(gmem))
                 : "memory");
    return x;
}
DEV void st_release_global(u32* gmem, u32 x) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global_address(gmem)), "r"(x)
                 : "memory");
}
// *gmem += x; what it was before.
DEV u32 atom_add_global(u32* gmem, u32 x) {
    u32 before;
    asm volatile("atom.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(global_address(gmem)), "r"(x)
                 : "memory");
    return before;
}
DEV void st_shared_f32x2(u32 smem, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(smem), "f"(x), "f"(y) : "memory");
}

// Descriptors (ptx_sm90_wgmma.cuh) as one register: the upper word is a constant, and steps stay inside the lower
// one's 14 bits of address.
struct KMajor {
    u32 low;
    DEV_METHOD explicit KMajor(u32 smem) : low((u32)k_major_descriptor(smem)) {}
    DEV_METHOD u64 at(u32 bytes) const {
        return k_major_descriptor(0) >> 32 << 32 | (low + (bytes >> 4));
    }
};
template <int SLAB_BYTES> struct MnMajor {
    u32 low;
    DEV_METHOD explicit MnMajor(u32 smem) : low((u32)mn_major_descriptor(smem, SLAB_BYTES)) {}
    DEV_METHOD u64 at(u32 bytes) const {
        return mn_major_descriptor(0, SLAB_BYTES) >> 32 << 32 | (low + (bytes >> 4));
    }
};
