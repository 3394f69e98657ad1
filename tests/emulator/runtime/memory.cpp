// memory.cpp - every access in one place: which memory is it, is it there, is it aligned, was it written before.
#include "hopper.h"
#include "state.h"

#include <algorithm>
#include <cstdio>

namespace emu {
namespace {
std::vector<u32> range_of_site;  // last range a site touched: nearly always the next one too

const u64* find_range(Thread& t, u64 address, u32* index) {
    const Request& r = *request;
    u32& last = range_of_site[t.site < range_of_site.size() ? t.site : 0];
    if (last < r.nranges) {
        const u64* p = r.ranges + 3 * last;
        if (address >= p[0] && address < p[1]) return *index = last, p;
    }
    u64 low = 0, high = r.nranges;
    while (low < high) {
        u64 middle = (low + high) / 2;
        if (r.ranges[3 * middle] <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low || address >= r.ranges[3 * (low - 1) + 1]) return nullptr;
    return *index = last = (u32)(low - 1), r.ranges + 3 * last;
}
[[noreturn]] void outside(Thread& t, u64 address, u32 bytes, bool write) {
    const Request& r = *request;
    u64 best = 0, distance = ~0ull;
    bool after = false;
    for (u64 i = 0; i < r.nranges; ++i) {
        u64 below = r.ranges[3 * i] - address, above = address - r.ranges[3 * i + 1];
        if (address < r.ranges[3 * i] && below < distance)
            distance = below, best = i, after = false;
        if (address >= r.ranges[3 * i + 1] && above < distance)
            distance = above, best = i, after = true;
    }
    char hint[200] = "";
    if (distance < (1 << 20))
        snprintf(hint, sizeof hint, ": %llu bytes %s an allocation of %llu bytes",
                 (unsigned long long)distance, after ? "past the end of" : "before",
                 (unsigned long long)(r.ranges[3 * best + 1] - r.ranges[3 * best]));
    fail_for(t, OUT_OF_BOUNDS,
             "%s of %u bytes at global address 0x%llx, outside every allocation%s",
             write ? "write" : "read", bytes, (unsigned long long)address, hint);
}
// A loop of polls must not run as long as a loop of arithmetic before the others get their turn.
inline void spend_on_polling(Thread& t) {
    if (t.fuel > 8192)
        t.fuel -= 8192;
    else
        refuel(t);
}
inline u16 byte_mask(u32 offset, u32 bytes) { return (u16)(((1u << bytes) - 1) << (offset & 15)); }
}  // namespace

Block& block_of(Thread& t, u32 address, const char* what) {
    u32 rank = address >> 24;
    if (!rank) return *t.block;
    if (rank > blocks.size())
        fail_for(t, OUT_OF_BOUNDS, "%s address 0x%08x names block %u of a cluster of %zu", what,
                 address, rank - 1, blocks.size());
    if (!blocks[rank - 1]->alive)
        fail_for(t, ASYNC_MISUSE,
                 "%s memory of block %u of the cluster, whose threads have all ended", what,
                 rank - 1);
    return *blocks[rank - 1];
}
u8* shared_at(Thread& t, u32 address, u32 bytes, u32 align) {
    Block& b = block_of(t, address, "shared");
    u32 a = address & 0xffffffu, offset = a - SHARED_BASE;
    if (a < SHARED_BASE || (u64)offset + bytes > b.shared_bytes)
        fail_for(t, OUT_OF_BOUNDS,
                 "%u bytes at shared offset %d, outside the %u bytes of the launch", bytes,
                 (int)offset, b.shared_bytes);
    if (address & (align - 1))
        fail_for(t, MISALIGNED, "shared address %u (offset %u) is not a multiple of %u", address,
                 offset, align);
    return b.shared + offset;
}
void mark_initialised(Thread& t, u32 address, u32 bytes, bool value) {
    Block& b = block_of(t, address, "shared");
    u32 offset = (address & 0xffffffu) - SHARED_BASE, end = offset + bytes;
    for (u32 o = offset; o < end;) {
        u32 n = std::min(end - o, 16 - (o & 15));
        u16 mask = byte_mask(o, n);
        if (value)
            b.initialised[o / 16] |= mask;
        else
            b.initialised[o / 16] &= (u16)~mask;
        o += n;
    }
}
void check_initialised(Thread& t, u32 address, u32 bytes) {
    if (!request->uninitialised) return;
    Block& b = block_of(t, address, "shared");
    u32 offset = (address & 0xffffffu) - SHARED_BASE, end = offset + bytes;
    for (u32 o = offset; o < end;) {
        u32 n = std::min(end - o, 16 - (o & 15));
        u16 mask = byte_mask(o, n);
        if ((b.initialised[o / 16] & mask) != mask)
            fail_for(t, UNINITIALISED,
                     "read of %u bytes at shared offset %u: byte %u was never written, or its "
                     "asynchronous copy has not been waited for",
                     bytes, offset, o + __builtin_ctz(mask & ~b.initialised[o / 16]) - (o & 15));
        o += n;
    }
}
u8* shared_access(Thread& t, u32 address, u32 bytes, u32 kind) {
    u8* p = shared_at(t, address, bytes, bytes > 16 ? 16 : bytes);
    if (counting) count_shared(t, address, bytes);
    // First the others' turn: what is read is what is there now, and so is what was released.
    if (kind & POLL) spend_on_polling(t);
    if (request->race) race_shared(t, address, bytes, kind);
    if (!(kind & WRITE) || (kind & ATOMIC)) check_initialised(t, address, bytes);
    if (kind & WRITE) mark_initialised(t, address, bytes);
    if ((kind & WRITE) && t.block->hopper) hopper_generic_write(t, address, bytes);
    return p;
}
u8* global_at(Thread& t, u64 address, u32 bytes, u32 align, u32 kind) {
    u32 index;
    if (address & (align - 1))
        fail_for(t, MISALIGNED, "global address 0x%llx is not a multiple of %u",
                 (unsigned long long)address, align);
    const u64* range = find_range(t, address, &index);
    if (!range || address + bytes > range[1]) outside(t, address, bytes, kind & WRITE);
    if ((kind & WRITE) && range[2])
        fail_for(t, OUT_OF_BOUNDS, "write of %u bytes to read-only memory at 0x%llx", bytes,
                 (unsigned long long)address);
    return (u8*)address;
}
void race_global(Thread& t, u64 address, u32 bytes, u32 kind) {
    u32 index;
    const u64* range = find_range(t, address, &index);
    if (request->race && range)
        race_global_access(fiber(t), index, address - (range[0] & ~15ull), address, bytes, kind);
}
u8* global_access(Thread& t, u64 address, u32 bytes, u32 kind) {
    u8* p = global_at(t, address, bytes, bytes, kind);
    if (counting) count_global(t, address, bytes);
    if (kind & POLL) spend_on_polling(t);
    if (request->race) race_global(t, address, bytes, kind);
    return p;
}
u8* local_access(Thread& t, u64 address, u32 bytes) {
    if (address & (bytes - 1))
        fail_for(t, MISALIGNED, "local address is not a multiple of %u", bytes);
    if (address < t.local_low || address + bytes > t.local_high)
        fail_for(
            t, OUT_OF_BOUNDS,
            "%u bytes at local offset %lld, outside the %llu bytes of the thread's local variables",
            bytes, (long long)(address - t.local_low),
            (unsigned long long)(t.local_high - t.local_low));
    return (u8*)address;
}
u8* const_access(Thread& t, u64 address, u32 bytes) {
    return global_at(t, address, bytes, bytes, READ);
}
u8* generic_access(Thread& t, u64 address, u32 bytes, u32 kind) {
    if (is_shared(t, address)) return shared_access(t, (u32)address, bytes, kind);
    if (is_local(t, address)) return local_access(t, address, bytes);
    return global_access(t, address, bytes, kind);
}
bool is_shared(Thread&, u64 a) { return a >> 32 == SHARED_WINDOW >> 32; }
bool is_local(Thread& t, u64 a) {
    return a >= (u64)fiber(t).stack && a < (u64)fiber(t).stack + STACK;
}
bool is_const(Thread& t, u64 a) {
    u32 index;
    const u64* range = find_range(t, a, &index);
    return range && range[2];
}
bool is_global(Thread& t, u64 a) { return !is_shared(t, a) && !is_local(t, a) && !is_const(t, a); }
u64 to_shared_address(Thread& t, u64 generic) {
    if (!is_shared(t, generic))
        fail_for(t, OUT_OF_BOUNDS, "address 0x%llx is not in shared memory, but is used as such",
                 (unsigned long long)generic);
    return generic - SHARED_WINDOW;
}
void memory_launch_begin() { range_of_site.assign(request->nsites, 0); }
}  // namespace emu
