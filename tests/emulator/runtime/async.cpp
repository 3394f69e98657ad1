// async.cpp - cp.async: the destination holds 0xFF from issue until the wait that completes the copy, so both reading
// too early and overwriting what others still read show in the values, besides being races.
#include "hopper.h"
#include "state.h"

#include <algorithm>
#include <cstdlib>

namespace emu {
void cp_async(Thread& t, u32 dst, u64 src, u32 size, u32 bytes) {
    if (size != 4 && size != 8 && size != 16) fail(ASYNC_MISUSE, "cp.async of %u bytes", size);
    if (bytes > size)
        fail(ASYNC_MISUSE, "cp.async reads %u bytes into a destination of %u", bytes, size);
    u8* p = shared_at(t, dst, size, size);
    if (src & (size - 1))
        fail(MISALIGNED, "cp.async source 0x%llx is not a multiple of %u", (unsigned long long)src,
             size);
    if (bytes) {
        global_at(t, src, bytes, 1, READ);
        if (counting) count_global(t, src, bytes, true);
        if (request->race) race_global(t, src, bytes, READ);
    }
    if (counting) count_shared(t, dst, size);
    async_begin(t, dst, size, WRITE);
    mark_initialised(t, dst, size, false);
    memset(p, 0xff, size);
    if (t.ncopies == t.copies_capacity) {
        t.copies_capacity = 2 * t.copies_capacity + 32;
        t.copies = (Copy*)realloc(t.copies, sizeof(Copy) * t.copies_capacity);
    }
    t.copies[t.ncopies++] = {dst, size, bytes, t.site, src, t.copy_group, t.copy_seq++};
}
void cp_async_commit(Thread& t) { ++t.copy_group; }

static void deliver(Thread& t, const Copy& c) {
    u8* p = shared_at(t, c.dst, c.size, c.size);
    memset(p, 0, c.size);
    if (c.bytes) memcpy(p, (const void*)c.src, c.bytes);
    mark_initialised(t, c.dst, c.size);
    async_end(t, c.dst, c.size, WRITE);
    if (t.block->hopper)
        hopper_generic_write(t, c.dst, c.size);  // cp.async is of the generic proxy
}
template <class Done> static void deliver_if(Thread& t, Done done) {
    u32 kept = 0;
    for (u32 i = 0; i < t.ncopies; ++i) {
        if (done(t.copies[i]))
            deliver(t, t.copies[i]);
        else
            t.copies[kept++] = t.copies[i];
    }
    t.ncopies = kept;
}
void cp_async_wait(Thread& t, u32 keep) {
    deliver_if(t, [&](const Copy& c) { return c.group + keep < t.copy_group; });
}
void cp_async_deliver(Thread& t, u64 before_seq) {
    deliver_if(t, [&](const Copy& c) { return c.seq < before_seq; });
}
}  // namespace emu
