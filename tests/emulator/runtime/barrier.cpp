// barrier.cpp - bar.sync / bar.arrive / bar.red of a block, and what happens to them when threads exit.
#include "state.h"

namespace emu {
namespace {
struct Barrier {
    u32 arrived, expected;  // expected: 0 = all live threads
    u32 generation;
    u32 count_and, count_or, count_true;  // of bar.red
    u32 result[3];
    Clock clock[2];
    std::vector<Fiber*> waiting;
    std::vector<u32> arrivals_of_warp;  // aligned barriers: lanes seen, and where
    std::vector<u32> site_of_warp;
};
std::vector<std::vector<Barrier>> barriers;  // [block rank][id]

void open(Barrier& b) {
    b.result[0] = b.count_and, b.result[1] = b.count_or, b.result[2] = b.count_true;
    b.count_and = 1, b.count_or = b.count_true = 0;
    b.arrived = 0;
    ++b.generation;
    std::fill(b.arrivals_of_warp.begin(), b.arrivals_of_warp.end(), 0);
    for (Fiber* f : b.waiting) wake(*f);
    b.waiting.clear();
    progress();
}
u32 live_lanes(Block& block, u32 warp) {
    u32 mask = 0;
    for (u32 i = warp * WARP; i < block.nthreads && i < (warp + 1) * WARP; ++i)
        if (!static_cast<Fiber*>(block.threads[i])->done) mask |= 1u << (i % WARP);
    return mask;
}
// An aligned barrier is one warp instruction: all live lanes must take part in this one, at the same place.
void check_aligned(Fiber& t, Barrier& b, u32 id) {
    if (b.arrivals_of_warp.empty()) {
        b.arrivals_of_warp.assign(t.block->nwarps, 0);
        b.site_of_warp.assign(t.block->nwarps, 0);
    }
    u32& lanes = b.arrivals_of_warp[t.warp];
    if (lanes && b.site_of_warp[t.warp] != t.site)
        fail(DIVERGENCE,
             "divergent barrier %u: some lanes of this warp wait at %s, this one comes from "
             "another place",
             id, where(b.site_of_warp[t.warp]));
    lanes |= 1u << t.lane;
    b.site_of_warp[t.warp] = t.site;
}
void check_whole_warps(Fiber& t, Barrier& b, u32 id) {
    for (u32 w = 0; w < b.arrivals_of_warp.size(); ++w) {
        u32 lanes = b.arrivals_of_warp[w], live = live_lanes(*t.block, w);
        if (lanes && (lanes & live) != live)
            fail(DIVERGENCE,
                 "divergent barrier %u: only lanes %08x of warp %u take part (%08x are alive), at "
                 "%s",
                 id, lanes, w, live, where(b.site_of_warp[w]));
    }
}
// Returns the generation the thread belongs to, and whether it opened the barrier.
Barrier& arrive(Fiber& t, u32 id, u32 threads, bool aligned, bool* opened, u32* generation) {
    if (id > 15) fail(LAUNCH_ERROR, "barrier %u: there are 16 barriers, 0 to 15", id);
    if (threads % WARP)
        fail(DIVERGENCE, "barrier %u: %u threads is no multiple of the warp size", id, threads);
    if (threads > (t.block->nthreads + WARP - 1) / WARP * WARP)
        fail(DEADLOCK, "barrier %u waits for %u threads, the block has %u", id, threads,
             t.block->nthreads);
    Barrier& b = barriers[t.block->rank][id];
    if (b.arrived && b.expected != threads)
        fail(DIVERGENCE, "barrier %u is used with %u and with %u threads at the same time", id,
             b.expected, threads);
    if (!b.arrived) clock_reset(b.clock[b.generation & 1]);
    if (aligned) check_aligned(t, b, id);
    b.expected = threads;
    *generation = b.generation;
    release(t, b.clock[b.generation & 1]);
    u32 need = threads ? threads : t.block->alive;
    *opened = ++b.arrived >= need;
    return b;
}
}  // namespace

void barriers_begin(u32 together) {
    barriers.resize(together);
    for (auto& of_block : barriers) {
        of_block.resize(16);
        for (Barrier& b : of_block) {
            b.arrived = b.expected = b.generation = 0;
            b.count_and = 1, b.count_or = b.count_true = 0;
            b.clock[0] = b.clock[1] = Clock{};
            b.waiting.clear();
            b.arrivals_of_warp.clear();
        }
    }
}
void barriers_thread_exit(Fiber& t) {
    for (u32 id = 0; id < 16; ++id) {
        Barrier& b = barriers[t.block->rank][id];
        if (b.arrived && !b.expected && b.arrived >= t.block->alive) {
            check_whole_warps(t, b, id);
            open(b);
        }
    }
}
static u32 wait(Thread& t, u32 id, u32 threads, bool aligned, bool value, u32 op) {
    Fiber& me = fiber(t);
    bool opened;
    u32 generation;
    count_lane(t);
    Barrier& b = arrive(me, id, threads, aligned, &opened, &generation);
    b.count_and &= value, b.count_or |= value, b.count_true += value;
    if (opened) {
        check_whole_warps(me, b, id);
        open(b);
    } else {
        b.waiting.push_back(&me);
        park(t, id ? "waits at a named barrier" : "waits at barrier 0");
    }
    acquire(t, b.clock[generation & 1]);
    return b.result[op];
}
void barrier_sync(Thread& t, u32 id, u32 threads, bool aligned) {
    wait(t, id, threads, aligned, false, 0);
}
u32 barrier_reduce(Thread& t, u32 id, u32 threads, u32 op, bool value, bool aligned) {
    return wait(t, id, threads, aligned, value, op);
}
void barrier_arrive(Thread& t, u32 id, u32 threads, bool aligned) {
    Fiber& me = fiber(t);
    bool opened;
    u32 generation;
    if (!threads) fail(LAUNCH_ERROR, "bar.arrive needs a thread count");
    count_lane(t);
    Barrier& b = arrive(me, id, threads, aligned, &opened, &generation);
    if (opened) {
        check_whole_warps(me, b, id);
        open(b);
    }
}
}  // namespace emu
