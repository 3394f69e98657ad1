// emu.h - what generated code and every part of the runtime share.
//
// A CUDA thread is a fiber: `Thread` is what its code sees. Generated kernels receive `Thread& t`, set `t.site` (the index
// of the static PTX instruction) before every call into the runtime, and the runtime reports errors by that site's CUDA line.
// One launch runs at a time, on one host thread, so the runtime's state is plain globals.
// Kernels include this file: no <cmath> here or in other headers, it alone would cost a quarter of a kernel's compilation.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;

namespace emu {

// ---- addresses ------------------------------------------------------------------------------------------------------
// A shared address is 32 bits: bits 0..23 an offset from SHARED_BASE inside the block's window, bits 24..31 zero for the own
// block or 1 + rank for a block of the cluster (what mapa returns). Offset 0 is never valid, as on hardware.
// A generic address is a host pointer, except that SHARED_WINDOW + shared address stands for shared memory.
constexpr u32 SHARED_BASE = 1024;
constexpr u64 SHARED_WINDOW = 0x00ff000000000000ull;

struct uint3_ {
    u32 x, y, z;
};

// One static PTX instruction that can report or count something.
struct Site {
    const char* opcode;  // "ld.shared.v4.u32"
    const char* file;    // CUDA file and line, innermost inlined function
    u32 line;
    u32 outer_line;  // line inside the kernel function itself (equal to `line` when nothing was inlined)
};

// One cp.async that was issued and not yet delivered.
struct Copy {
    u32 dst;    // shared address
    u32 size;   // bytes written (4, 8, 16)
    u32 bytes;  // bytes read from `src`; the rest is zero
    u32 site;
    u64 src;    // global address
    u32 group;  // value of Thread::copy_group at issue
    u64 seq;    // Thread::copy_seq at issue, 0, 1, 2, ... within the thread
};

struct Block;

struct Thread {
    uint3_ tid, ctaid, ntid, nctaid;
    u32 lane, warp;  // warp: index within the block
    u32 index;       // linear thread index within the block
    u32 slot;        // linear index within the blocks that run together (vector-clock index)
    u32 site;        // current static instruction
    Block* block;
    // cp.async queue of this thread (async.cpp)
    Copy* copies;
    u32 ncopies, copies_capacity, copy_group;
    u64 copy_seq;
    u64 local_low, local_high;  // bytes of the .local variables that are alive
    u32 fuel, refuels;          // backward branches until the next look at the others
};

// A thread block that is running; several of them when they form a cluster.
struct Block {
    uint3_ ctaid;
    u32 linear;  // linear block index within the grid
    u32 rank;    // rank within the cluster
    u32 nthreads, nwarps, alive;
    u8* shared;        // host bytes of shared memory
    u32 shared_bytes;  // static + dynamic
    u16* initialised;  // one bit per byte, one word per 16 bytes
    Thread** threads;  // nthreads pointers
    void* hopper;  // hopper.h's own state of the block (created on first use, freed by its hook)
};

// What the launch asked for and what it found; the fields after `error_kind` are results.
struct Launch {
    uint3_ grid, block, cluster;
    u32 static_shared, shared_bytes;  // bytes of shared memory: static part, static + dynamic
    u32 seed;
    u32 race, uninitialised, counters;
    const Site* sites;
    u32 nsites;
};
extern Launch launch;

// ---- errors ---------------------------------------------------------------------------------------------------------
enum Error : int {
    OK = 0,
    OUT_OF_BOUNDS = 1,
    MISALIGNED = 2,
    DATA_RACE = 3,
    DEADLOCK = 4,
    DIVERGENCE = 5,
    UNINITIALISED = 6,
    LAUNCH_ERROR = 7,
    UNSUPPORTED = 8,
    TRAP = 9,
    ASYNC_MISUSE = 10,
};
// End the launch with a message; CUDA line, block and thread of the running fiber are appended. Never returns.
[[noreturn]] void fail(Error kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
// The same on behalf of another thread (a leader's check of one lane's address).
[[noreturn]] void fail_for(const Thread& t, Error kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
const char* where(
    u32 site);  // "fa_fwd.cu:51 (from line 88), ld.shared.u32", in one of a few static buffers

// ---- fibers ---------------------------------------------------------------------------------------------------------
extern Thread* current;  // the running fiber (kernels use their own `t`)
void refuel(Thread& t);  // after many backward branches: let others run, end endless loops
void yield(
    Thread& t);  // polling loops: let others run; fails with DEADLOCK when nothing can ever change
void progress();  // call when something a polling fiber may wait for has changed (resets that counter)
void park(Thread& t,
          const char*
              why);  // sleep until wake(); `why` appears in deadlock reports (string must outlive)
void wake(Thread& t);

// Warp-wide step: every lane of `mask` calls it with the same `op` text; the last to arrive runs leader(lanes, mask), where
// lanes[i] is what lane i passed as `mine` (usually a struct on its stack), and all go on.
// aligned: all lanes must be at the same static instruction. orders_memory: happens-before among the lanes (bar.warp.sync).
typedef void (*Leader)(void** lanes, u32 mask);
void collective(Thread& t, u32 mask, const char* op, void* mine, Leader leader, bool aligned = true,
                bool orders_memory = false);

// Barriers of the block. threads == 0 means all (live) threads. Returns only when the barrier opens.
void barrier_sync(Thread& t, u32 id, u32 threads, bool aligned = true);
void barrier_arrive(Thread& t, u32 id, u32 threads, bool aligned = true);
u32 barrier_reduce(Thread& t, u32 id, u32 threads, u32 op /*0 and, 1 or, 2 popc*/, bool value,
                   bool aligned = true);
[[noreturn]] void exit_thread(Thread& t);  // `exit` inside a device function
u64 clock(Thread& t);                      // %clock: grows with every switch of fibers
u32 dynamic_shared_bytes();
[[noreturn]] void assert_failed(const u8* message, const u8* file, const u8* line);
void device_printf(u8* result, const u8* format, const u8* arguments);

// ---- memory: bounds, alignment, initialised bits, races, counters in one call -----------------------------------------
// Each returns the host address of the bytes; READ functions check, WRITE functions also mark the bytes as initialised.
enum Kind : u32 {
    READ = 0,
    WRITE = 1,
    STRONG = 2,     // atomics, volatile, relaxed and stronger: they do not race with each other
    READ_ONLY = 4,  // ld.global.nc: must not meet any write of this launch
    ACQUIRE = 8,    // later accesses of the thread come after what was released at this address
    RELEASE = 16,
    ATOMIC = 32,  // read-modify-write
    SYNC = 128,  // may signal or await another thread: strong loads and stores, atomics on integers
    POLL = 256,  // may be what a loop waits for: the others must get their turn
};
u8* shared_at(Thread& t, u32 address, u32 bytes, u32 align);     // bounds and alignment only
u8* shared_access(Thread& t, u32 address, u32 bytes, u32 kind);  // align = bytes (at most 16)
u8* global_access(Thread& t, u64 address, u32 bytes, u32 kind);
u8* generic_access(Thread& t, u64 address, u32 bytes, u32 kind);
u8* local_access(Thread& t, u64 address, u32 bytes);
u8* const_access(Thread& t, u64 address, u32 bytes);
void fence(Thread& t);  // membar, fence.acq_rel: a later strong write releases what came before
u64 to_shared_address(Thread& t, u64 generic);  // cvta.to.shared
bool is_shared(Thread& t, u64 generic);
bool is_global(Thread& t, u64 generic);
bool is_local(Thread& t, u64 generic);
bool is_const(Thread& t, u64 generic);
struct LocalRange {  // the lifetime of one .local variable
    Thread& t;
    u64 low, high;
    LocalRange(Thread& thread, u8* bytes, u32 size)
        : t(thread), low(t.local_low), high(t.local_high) {
        t.local_low = (u64)bytes < low || low == high ? (u64)bytes : low;
        t.local_high = (u64)bytes + size > high ? (u64)bytes + size : high;
    }
    ~LocalRange() { t.local_low = low, t.local_high = high; }
};
// Bounds check of global bytes without recording an access (used for asynchronous copies: check now, touch later).
u8* global_at(Thread& t, u64 address, u32 bytes, u32 align, u32 kind);

// ---- race detector hooks ----------------------------------------------------------------------------------------------
// A sync object (barrier, mbarrier) owns a vector clock: release(clock) by whoever arrives, acquire(clock) by whoever leaves.
struct Clock {  // zero-initialise; freed with the blocks that run together
    u32* time;
    u32 proxy;  // which asynchronous engine's entry its complete_tx accesses use
};
void release(Thread& t, Clock& clock);
void acquire(Thread& t, Clock& clock);
void clock_reset(Clock& clock);
// Accesses made on behalf of `t`, recorded without touching data (bulk copies, wgmma operands). Any length and alignment.
void race_shared(Thread& t, u32 address, u32 bytes, u32 kind);
void race_global(Thread& t, u64 address, u32 bytes, u32 kind);
// An asynchronous write or read of shared memory: from begin to end it is unordered with everything, even its own thread.
// end() makes it an access of thread `t` at its current time (so it is ordered with whoever synchronises with t after it), or,
// when `clock` is given, an access that is ordered before every acquire of that clock (mbarrier complete_tx).
void async_begin(Thread& t, u32 address, u32 bytes, u32 kind);
void async_end(Thread& t, u32 address, u32 bytes, u32 kind, Clock* clock = nullptr);
void mark_initialised(Thread& t, u32 address, u32 bytes, bool value = true);
void check_initialised(Thread& t, u32 address, u32 bytes);

// ---- cp.async (async.cpp) ---------------------------------------------------------------------------------------------
void cp_async(Thread& t, u32 dst, u64 src, u32 size, u32 bytes);
void cp_async_commit(Thread& t);
void cp_async_wait(Thread& t, u32 keep);  // wait_group keep
void cp_async_deliver(
    Thread& t, u64 before_seq);  // complete every copy of t with seq < before_seq (mbarrier.arrive)

// ---- counters: cheap when off -----------------------------------------------------------------------------------------
extern bool counting;
// One warp instruction at the current site; call once per warp (from a leader) for collectives.
void count_warp(Thread& t, u32 warp_instructions = 1);
// One lane's part of a warp instruction executed lane by lane; grouped by (site, warp, n-th execution by the lane).
void count_lane(Thread& t);
// Shared wavefronts and global sectors from explicit addresses of a whole warp instruction (leader of ldmatrix, ...).
void count_shared_phase(Thread& t, const u32* addresses, u32 lanes, u32 bytes_per_lane);

}  // namespace emu
