// What backward adds to ptx_sm90.cuh. Blocks that take turns share a counter in global memory: one raises it after
// its asynchronous sums, the next waits for it before its own.
#pragma once

#include "ptx_sm90.cuh"

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
DEV void st_shared_f32x2(u32 smem, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(smem), "f"(x), "f"(y) : "memory");
}
