// state.h - what the runtime's own files share: fibers, the blocks that run together, the launch request and result.
#pragma once
#include "emu.h"

#include <vector>

namespace emu {
constexpr u32 WARP = 32;
constexpr u32 PROXIES =
    64;  // vector-clock entries of asynchronous engines (one per mbarrier, round robin)
constexpr size_t STACK = 1 << 20;  // per fiber; only touched pages exist
constexpr u32 ASYNC = 64;          // Kind bit: begun, not yet ended

struct Fiber : Thread {
    void* stack_pointer;
    char* stack;
    const char* waiting;  // what it is parked at, "exited" or "ready"
    bool done;
    u32* time;        // vector clock, `clocks()` entries
    u32* fence_time;  // what the last fence covered; null when there was none
    u32* executions;  // per site, when counting
};

// Launch order of Python: see module.py, which mirrors this struct.
struct Request {
    u32 grid[3], block[3], cluster[3];
    u32 static_shared, shared_bytes, seed, race, uninitialised, counters, nsites;
    u32 pad;
    const Site* sites;
    void (*kernel)(Thread&, u8*);
    u8* params;
    u64 params_bytes;
    const u64* ranges;  // nranges x (first byte, end, read-only flag), sorted, not overlapping
    u64 nranges;
    u64* counts;  // nsites x COLUMNS, added to
};
struct Result {
    s32 error;
    u32 site;
    u64 switches;
    char message[8192];
};
enum Column {
    EXECUTED,
    WAVEFRONTS,
    IDEAL_WAVEFRONTS,
    SECTORS,
    SHARED_BYTES,
    GLOBAL_BYTES,
    LANES,
    COLUMNS
};

extern const Request* request;
extern std::vector<Fiber*> fibers;  // those that run together, by slot
extern std::vector<Block*> blocks;  // likewise, by rank
extern u32 run_id;                  // 1, 2, ...: which set of blocks runs now
extern u32 switches_since_progress;
inline Fiber& fiber(Thread& t) { return static_cast<Fiber&>(t); }
inline u32 clocks() { return (u32)fibers.size() + PROXIES; }
Block& block_of(Thread& t, u32 address, const char* what);
const char* thread_name(u32 slot);  // "block (1,0,0) thread (5,0,0)"

void barriers_begin(u32 blocks_together);
void warps_begin();
void memory_launch_begin();
void barriers_thread_exit(Fiber& t);
void race_launch_begin();
void race_launch_end();
void race_run_begin();  // clocks and shared shadows of the blocks that begin now
void race_run_end();
void warp_clocks(Fiber** lanes, u32 mask);  // bar.warp.sync
void counters_launch_begin();
void counters_launch_end();
void counters_run_begin();
void counters_run_end();
void count_shared(Thread& t, u32 address, u32 bytes);
void count_global(Thread& t, u64 address, u32 bytes, bool part_of_copy = false);
// Race check and record of one shared or global access; address already checked.
void race_shared_access(Fiber& t, Block& b, u32 offset, u32 bytes, u32 kind);
void race_global_access(Fiber& t, u32 range, u64 offset, u64 address, u32 bytes, u32 kind);
void synchronise(Fiber& t, u64 address, u32 kind);  // strong accesses: pass clocks on
void end_launch();  // leave the running fiber for the launcher; never returns
void set_error(Error kind, u32 site, const char* text);
extern void (*const block_end_hook)(Block&)
    __attribute__((weak));  // hopper: checks and frees Block::hopper
}  // namespace emu
