// race.cpp - data races by happens-before, on shared and on global memory.
//
// Every thread has a vector clock; barriers, bar.warp.sync and mbarriers pass clocks on, shuffles and mma do not. Memory is
// divided into cells of 16 bytes; a cell lists the accesses that a later one could still race with, each with a mask
// of its bytes, so the result is exact to the byte while a 16-byte access costs one look. An access is forgotten when a newer,
// ordered one conflicts with everything it would conflict with. Threads of blocks that do not run together are ordered only by
// a release and an acquire of the same global address (fence and flag, counters); of those readers two witnesses are enough.
#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unordered_map>

namespace emu {
namespace {
constexpr u32 KEPT =
    WRITE | STRONG | READ_ONLY | ATOMIC | ASYNC;  // bits of a kind that an entry remembers
struct Entry {
    u32 time, site, run;
    u16 slot, mask;
    u32 kind;
};
struct Cell {
    static constexpr u32 INLINE = 3;
    u32 run;  // shared cells: the run they belong to (older contents are void)
    u32 count;
    Entry* more;
    u32 capacity;
    Entry first[INLINE];
    Entry& operator[](u32 i) { return i < INLINE ? first[i] : more[i - INLINE]; }
    void remove(u32 i) { (*this)[i] = (*this)[--count]; }
    void add(const Entry& e) {
        if (count >= INLINE + capacity) {
            capacity = 2 * capacity + 5;
            more = (Entry*)realloc(more, capacity * sizeof(Entry));
        }
        (*this)[count++] = e;
    }
};
struct GlobalShadow {
    Cell* cells;
    size_t bytes;
};
// What was released at a global address: clocks of this run and, for runs that ended, their clocks at that moment.
struct Released {
    Clock clock;
    u32 run;
    std::unordered_map<u32, std::vector<u32>> others;
};

std::vector<Cell> shared_cells;  // of the blocks that run together, one after the other
size_t cells_per_block;
std::vector<GlobalShadow> global_shadows;  // by range
std::vector<u32> times;                    // all vector clocks of this run
std::vector<u32*> arena;                   // clocks of sync objects, freed with the run
u32 proxy_time[PROXIES], next_proxy;
std::unordered_map<u64, Released> releases;
std::unordered_map<u32, std::vector<u32>> seen;  // clocks of ended runs that this run has acquired

void join(u32* into, const u32* from) {
    u32 n = clocks();
    for (u32 i = 0; i < n; ++i) into[i] = into[i] > from[i] ? into[i] : from[i];
}
u32* time_of(Clock& c) {
    if (!c.time) {
        c.time = (u32*)calloc(clocks(), sizeof(u32));
        c.proxy = next_proxy++ % PROXIES;
        arena.push_back(c.time);
    }
    return c.time;
}
bool ordered(const Entry& e, const Fiber& t) {
    if (e.kind & ASYNC) return false;
    if (e.run == run_id) return e.time <= t.time[e.slot];
    auto it = seen.find(e.run);
    return it != seen.end() && e.time <= it->second[e.slot];
}
const char* describe(u32 kind) {
    return kind & ASYNC
               ? (kind & WRITE ? "asynchronous write (in flight)" : "asynchronous read (in flight)")
           : kind & ATOMIC    ? "atomic"
           : kind & WRITE     ? "write"
           : kind & READ_ONLY ? "ld.global.nc read"
                              : "read";
}
[[noreturn]] void report(const Entry& e, const Fiber& t, const char* space, u64 where_, u32 kind,
                         u16 overlap) {
    u64 byte = where_ + __builtin_ctz(overlap);
    char other[120];
    if (e.run == run_id && e.slot < fibers.size())
        snprintf(other, sizeof other, "%s", thread_name(e.slot));
    else if (e.run == run_id)
        snprintf(other, sizeof other, "an asynchronous copy");
    else
        snprintf(other, sizeof other, "a thread of another block (the %u. to run, thread %u)",
                 e.run, e.slot);
    bool own = e.run == run_id && e.slot == t.slot;
    const char* hint = own ? "; the copy has not been waited for"
                       : (kind | e.kind) & READ_ONLY
                           ? "; ld.global.nc demands memory that no one writes during the launch"
                           : "";
    fail_for(t, DATA_RACE,
             "data race on %s byte %llu%s\n  %s now\n  after the unordered %s at %s\n  by %s",
             space, (unsigned long long)byte, hint, describe(kind), describe(e.kind), where(e.site),
             other);
}
inline bool conflict(u32 a, u32 b) { return ((a | b) & WRITE) && !(a & b & STRONG); }
// Does every access that would conflict with `e` also conflict with the newer one?
inline bool covers(u32 kind, const Entry& e) {
    return ((kind & WRITE) || !(e.kind & WRITE)) && (!(kind & STRONG) || (e.kind & STRONG)) &&
           (!(e.kind & READ_ONLY) || (kind & READ_ONLY));
}
void access(Cell& cell, Fiber& t, u16 mask, u32 kind, const char* space, u64 position) {
    u32 foreign = 0;
    for (u32 i = 0; i < cell.count;) {
        Entry& e = cell[i];
        u16 overlap = e.mask & mask;
        if (!overlap) {
            ++i;
            continue;
        }
        if (e.run == run_id && e.slot == t.slot && e.time == t.time[t.slot] && e.kind == kind &&
            overlap == mask && !(kind & ASYNC))
            return;  // the same access again: whoever came since was checked against the first one
        bool before = ordered(e, t);
        if (conflict(e.kind, kind) && (!before || (((e.kind | kind) & READ_ONLY) != 0)))
            report(e, t, space, position, kind, overlap);
        if (before && covers(kind, e)) {
            e.mask &= (u16)~mask;
            if (!e.mask) {
                cell.remove(i);
                continue;
            }
        }
        foreign += e.run != run_id && e.kind == kind && overlap == mask;
        ++i;
    }
    if (foreign < 2) cell.add({t.time[t.slot], t.site, run_id, (u16)t.slot, mask, kind});
}
Cell& shared_cell(const Block& b, u32 index) {
    Cell& c = shared_cells[b.rank * cells_per_block + index];
    if (c.run != run_id) c.run = run_id, c.count = 0;
    return c;
}
template <class F> inline void for_cells(u64 offset, u32 bytes, F f) {
    for (u64 o = offset, end = offset + bytes; o < end;) {
        u32 in_cell = (u32)(o & 15), n = 16 - in_cell < end - o ? 16 - in_cell : (u32)(end - o);
        f((u32)(o / 16), (u16)(((1u << n) - 1) << in_cell), o & ~15ull);
        o += n;
    }
}
u32 window_offset(u32 address) { return (address & 0xffffffu) - SHARED_BASE; }
}  // namespace

// ---- accesses -------------------------------------------------------------------------------------------------------------
void race_shared(Thread& t, u32 address, u32 bytes, u32 kind) {
    if (!request->race) return;
    Block& b = block_of(t, address, "shared");
    for_cells(window_offset(address), bytes, [&](u32 cell, u16 mask, u64 position) {
        access(shared_cell(b, cell), fiber(t), mask, kind & KEPT, "shared", position);
    });
    if (kind & SYNC) synchronise(fiber(t), address | (u64)b.rank << 40, kind);
}
void race_global_access(Fiber& t, u32 range, u64 offset, u64 address, u32 bytes, u32 kind) {
    GlobalShadow& shadow = global_shadows[range];
    if (!shadow.cells) {
        const u64* r = request->ranges + 3 * range;
        shadow.bytes = ((r[1] - (r[0] & ~15ull)) / 16 + 1) * sizeof(Cell);
        shadow.cells = (Cell*)mmap(nullptr, shadow.bytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    for_cells(offset, bytes, [&](u32 cell, u16 mask, u64 position) {
        access(shadow.cells[cell], t, mask, kind & KEPT, "global", position);
    });
    if (kind & SYNC) synchronise(t, address, kind);
}
void async_begin(Thread& t, u32 address, u32 bytes, u32 kind) {
    if (request->race) race_shared(t, address, bytes, kind | ASYNC);
}
void async_end(Thread& t, u32 address, u32 bytes, u32 kind, Clock* clock) {
    if (!request->race) return;
    Block& b = block_of(t, address, "shared");
    u32 slot = t.slot, time = fiber(t).time[t.slot];
    if (clock) {
        u32* object = time_of(*clock);
        slot = (u32)fibers.size() + clock->proxy;
        time = object[slot] = ++proxy_time[clock->proxy];
    }
    for_cells(window_offset(address), bytes, [&](u32 index, u16 mask, u64) {
        Cell& cell = shared_cell(b, index);
        for (u32 i = 0; i < cell.count; ++i) {
            Entry& e = cell[i];
            if (e.kind == (kind | ASYNC) && e.slot == t.slot && e.mask == mask) {
                e.kind = kind, e.slot = (u16)slot, e.time = time;
                return;
            }
        }
    });
}

// ---- synchronisation ------------------------------------------------------------------------------------------------------
void release(Thread& t, Clock& clock) {
    if (!request->race) return;
    Fiber& f = fiber(t);
    join(time_of(clock), f.time);
    ++f.time[f.slot];  // what the thread does from here on is not released
}
void acquire(Thread& t, Clock& clock) {
    if (request->race && clock.time) join(fiber(t).time, clock.time);
}
void clock_reset(Clock& clock) {
    if (clock.time) memset(clock.time, 0, clocks() * sizeof(u32));
}
void warp_clocks(Fiber** lanes, u32 mask) {
    static std::vector<u32> all;
    all.assign(clocks(), 0);
    for (u32 i = 0; i < WARP; ++i)
        if (mask >> i & 1) join(all.data(), lanes[i]->time);
    for (u32 i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        Fiber& f = *lanes[i];
        u32 own = f.time[f.slot];
        memcpy(f.time, all.data(), clocks() * sizeof(u32));
        f.time[f.slot] = own + 1;
    }
}
void fence(Thread& t) {
    if (!request->race) return;
    Fiber& f = fiber(t);
    if (!f.fence_time) {
        f.fence_time = (u32*)calloc(clocks(), sizeof(u32));
        arena.push_back(f.fence_time);
    }
    memcpy(f.fence_time, f.time, clocks() * sizeof(u32));
    ++f.time[f.slot];
}
void synchronise(Fiber& f, u64 address, u32 kind) {
    bool releases_now = (kind & WRITE) && (f.fence_time || (kind & RELEASE));
    if (!releases_now && releases.empty()) return;
    auto it = releases.find(address);
    if (it == releases.end()) {
        if (!releases_now) return;
        it = releases.emplace(address, Released{}).first;
    }
    Released& r = it->second;
    r.run = run_id;
    if (!(kind & WRITE) ||
        (kind & ATOMIC)) {  // reading side, without asking for the acquiring fence
        if (r.clock.time) join(f.time, r.clock.time);
        for (auto& [run, time] : r.others) {
            auto& known = seen[run];
            if (known.empty())
                known = time;
            else
                join(known.data(), time.data());
        }
    }
    if (!releases_now) return;
    u32* object = time_of(r.clock);
    if (kind & RELEASE) {
        join(object, f.time);
        ++f.time[f.slot];
    } else {
        join(object, f.fence_time);
    }
    for (auto& [run, time] : seen) r.others.emplace(run, time);
}

// ---- life time --------------------------------------------------------------------------------------------------------------
void race_launch_begin() {
    if (!request->race) return;
    cells_per_block = request->shared_bytes / 16 + 1;
    for (Cell& c : shared_cells) c.run = 0, c.count = 0;
    if (shared_cells.size() < cells_per_block * blocks.size())
        shared_cells.resize(cells_per_block * blocks.size());
    global_shadows.assign(request->nranges, {nullptr, 0});
    releases.clear();
}
void race_run_begin() {
    if (!request->race) return;
    u32 n = clocks();
    times.assign((size_t)n * fibers.size(), 0);
    for (size_t i = 0; i < fibers.size(); ++i) {
        fibers[i]->time = times.data() + n * i;
        fibers[i]->time[i] = 1;
        fibers[i]->fence_time = nullptr;
    }
    memset(proxy_time, 0, sizeof proxy_time);
    next_proxy = 0;
    seen.clear();
}
void race_run_end() {
    if (!request->race) return;
    for (auto& [address, r] : releases) {
        if (r.run == run_id && r.clock.time)
            r.others[run_id].assign(r.clock.time, r.clock.time + clocks());
        r.clock = Clock{};
        r.run = 0;
    }
    for (u32* p : arena) free(p);
    arena.clear();
}
void race_launch_end() {
    for (size_t i = 0; i < global_shadows.size(); ++i) {
        GlobalShadow& s = global_shadows[i];
        if (!s.cells) continue;
        for (size_t c = 0; c < s.bytes / sizeof(Cell); ++c)
            if (s.cells[c].more) free(s.cells[c].more);
        munmap(s.cells, s.bytes);
    }
    global_shadows.clear();
}
}  // namespace emu
