// counters.cpp - exact counts by static instruction: warp instructions, shared wavefronts, global sectors.
//
// Lanes run one after the other, so the lanes' parts of one warp instruction are put together by "the n-th execution of this
// instruction by the lane". That is what the hardware executes whenever the warp is converged there, which it is
// in code without divergent loops.
#include "state.h"

#include <algorithm>
#include <deque>

namespace emu {
namespace {
enum Stream { LANE_ONLY, SHARED, GLOBAL, GLOBAL_PART_OF_COPY, STREAMS };
struct Group {
    u32 lanes, bytes;
    Stream stream;
    u64 address[WARP];
};
struct Pending {
    u32 first;  // execution number of groups[0]
    std::deque<Group> groups;
};
std::vector<Pending> pending;  // [warp of the run][site][copy part or not]
std::vector<u32> executions;   // [thread][site][likewise]

u64* row(u32 site) { return request->counts + (u64)site * COLUMNS; }

// Shared memory: 32 banks of 4 bytes. A request of 4 bytes per lane is one phase, of 8 bytes two (half warps), of 16 bytes four
// (quarter warps); a phase takes as many wavefronts as the busiest bank has distinct words.
u32 phase_wavefronts(const u64* address, u32 lanes, u32 first, u32 last, u32 bytes) {
    u64 words[32][WARP];
    u32 count[32] = {}, worst = 0;
    for (u32 i = first; i < last; ++i) {
        if (!(lanes >> i & 1)) continue;
        for (u64 w = address[i] / 4; w <= (address[i] + bytes - 1) / 4; ++w) {
            u32 bank = (u32)(w & 31), k = 0;
            while (k < count[bank] && words[bank][k] != w) ++k;
            if (k == count[bank]) words[bank][count[bank]++] = w;
            worst = std::max(worst, count[bank]);
        }
    }
    return worst;
}
void add_shared(u32 site, const u64* address, u32 lanes, u32 bytes) {
    u32 phases = bytes <= 4 ? 1 : bytes / 4, width = WARP / phases;
    for (u32 p = 0; p < phases; ++p) {
        u32 waves = phase_wavefronts(address, lanes, p * width, (p + 1) * width, bytes);
        row(site)[WAVEFRONTS] += waves;
        row(site)[IDEAL_WAVEFRONTS] += waves != 0;
    }
    row(site)[SHARED_BYTES] += (u64)bytes * __builtin_popcount(lanes);
}
void add_global(u32 site, const u64* address, u32 lanes, u32 bytes) {
    u64 sectors[WARP * 2];
    u32 n = 0;
    for (u32 i = 0; i < WARP; ++i) {
        if (!(lanes >> i & 1)) continue;
        for (u64 s = address[i] / 32; s <= (address[i] + bytes - 1) / 32; ++s) sectors[n++] = s;
    }
    std::sort(sectors, sectors + n);
    row(site)[SECTORS] += std::unique(sectors, sectors + n) - sectors;
    row(site)[GLOBAL_BYTES] += (u64)bytes * __builtin_popcount(lanes);
}
void finish(u32 site, const Group& g) {
    if (!g.lanes) return;
    if (g.stream != GLOBAL_PART_OF_COPY) {
        row(site)[EXECUTED] += 1;
        row(site)[LANES] += __builtin_popcount(g.lanes);
    }
    if (g.stream == SHARED) add_shared(site, g.address, g.lanes, g.bytes);
    if (g.stream >= GLOBAL) add_global(site, g.address, g.lanes, g.bytes);
}
void count(Thread& t, u64 address, u32 bytes, Stream stream) {
    bool part = stream == GLOBAL_PART_OF_COPY;
    u32 warp = t.block->rank * t.block->nwarps + t.warp;
    Pending& p = pending[((size_t)warp * request->nsites + t.site) * 2 + part];
    u32 n = executions[((size_t)t.slot * request->nsites + t.site) * 2 + part]++;
    while (p.first + p.groups.size() <= n) p.groups.push_back(Group{});
    Group& g = p.groups[n - p.first];
    g.lanes |= 1u << t.lane, g.bytes = bytes, g.stream = stream;
    g.address[t.lane] = address;
    while (!p.groups.empty() && p.groups.front().lanes == ~0u) {
        finish(t.site, p.groups.front());
        p.groups.pop_front(), ++p.first;
    }
}
}  // namespace

void count_lane(Thread& t) {
    if (counting) count(t, 0, 0, LANE_ONLY);
}
void count_shared(Thread& t, u32 address, u32 bytes) { count(t, address, bytes, SHARED); }
void count_global(Thread& t, u64 address, u32 bytes, bool part_of_copy) {
    count(t, address, bytes, part_of_copy ? GLOBAL_PART_OF_COPY : GLOBAL);
}
void count_warp(Thread& t, u32 n) {
    if (!counting) return;
    row(t.site)[EXECUTED] += n;
    row(t.site)[LANES] += WARP * n;
}
void count_shared_phase(Thread& t, const u32* addresses, u32 lanes, u32 bytes) {
    u64 wide[WARP] = {};
    std::copy(addresses, addresses + lanes, wide);
    add_shared(t.site, wide, lanes == WARP ? ~0u : (1u << lanes) - 1, bytes);
}
void counters_launch_begin() {
    pending.clear();
    executions.clear();
}
void counters_run_begin() {
    if (!counting) return;
    pending.assign((size_t)blocks.size() * blocks[0]->nwarps * request->nsites * 2, Pending{});
    executions.assign(fibers.size() * request->nsites * 2, 0);
}
void counters_run_end() {
    if (!counting) return;
    for (size_t i = 0; i < pending.size(); ++i)
        for (const Group& g : pending[i].groups) finish((u32)(i / 2 % request->nsites), g);
}
void counters_launch_end() {
    pending.clear();
    executions.clear();
}
}  // namespace emu
