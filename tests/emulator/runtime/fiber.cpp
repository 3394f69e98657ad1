// fiber.cpp - CUDA threads as fibers: switching, scheduling, errors, and the launch loop over blocks.
#include "hopper.h"
#include "state.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {
Thread* current;
Launch launch;
const Request* request;
bool counting;
std::vector<Fiber*> fibers;
std::vector<Block*> blocks;
u32 run_id, switches_since_progress;

namespace {
Result* result;
std::vector<Fiber*> ready;  // ring buffer
size_t ready_head, ready_count;
u32 alive;
u64 random_state, switches;
std::vector<char*> stacks;  // kept between launches
std::vector<Fiber> fiber_pool;

u32 random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (u32)(random_state >> 20);
}
}  // namespace

// ---- switching ----------------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* to);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size emu_switch,.-emu_switch
.section .note.GNU-stack,"",@progbits
.text
)");
static void* main_context;
static void entry();
static void prepare(Fiber& f) {
    void** sp = (void**)(f.stack + STACK);
    *--sp = nullptr;  // keeps the stack 16-byte aligned at entry()
    *--sp = (void*)entry;
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.stack_pointer = sp;
}
static void switch_to(Fiber* from, Fiber* to) {
    current = to;
    ++switches;
    emu_switch(from ? &from->stack_pointer : &main_context, to ? to->stack_pointer : main_context);
}
#else
static ucontext_t main_ucontext;
static std::vector<ucontext_t> contexts;
static void entry();
static void prepare(Fiber& f) {
    if (contexts.size() < fibers.size()) contexts.resize(fibers.size());
    ucontext_t& c = contexts[f.slot];
    getcontext(&c);
    c.uc_stack.ss_sp = f.stack, c.uc_stack.ss_size = STACK, c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
static void switch_to(Fiber* from, Fiber* to) {
    current = to;
    ++switches;
    swapcontext(from ? &contexts[from->slot] : &main_ucontext,
                to ? &contexts[to->slot] : &main_ucontext);
}
#endif

// ---- errors -------------------------------------------------------------------------------------------------------------
static const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}
const char* where(u32 site) {
    static char buffers[4][300];
    static int turn;
    char* out = buffers[turn++ & 3];
    if (site >= request->nsites) return "?";
    const Site& s = request->sites[site];
    if (s.line == s.outer_line)
        snprintf(out, 300, "%s:%u, %s", base_name(s.file), s.line, s.opcode);
    else
        snprintf(out, 300, "%s:%u (inlined at line %u), %s", base_name(s.file), s.line,
                 s.outer_line, s.opcode);
    return out;
}
const char* thread_name(u32 slot) {
    static char buffers[4][100];
    static int turn;
    char* out = buffers[turn++ & 3];
    const Fiber& f = *fibers[slot];
    snprintf(out, 100, "block (%u,%u,%u) thread (%u,%u,%u) [warp %u lane %u]", f.ctaid.x, f.ctaid.y,
             f.ctaid.z, f.tid.x, f.tid.y, f.tid.z, f.warp, f.lane);
    return out;
}
void set_error(Error kind, u32 site, const char* text) {
    result->error = kind;
    result->site = site;
    snprintf(result->message, sizeof result->message, "%s", text);
}
void end_launch() {
    switch_to(static_cast<Fiber*>(current), nullptr);
    abort();
}
[[noreturn]] static void fail_with(const Fiber& f, Error kind, const char* format,
                                   va_list arguments) {
    char text[4000], full[6000];
    vsnprintf(text, sizeof text, format, arguments);
    snprintf(full, sizeof full, "%s\n  at %s\n  by %s", text, where(f.site), thread_name(f.slot));
    set_error(kind, f.site, full);
    end_launch();
    abort();
}
void fail(Error kind, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(*static_cast<Fiber*>(current), kind, format, arguments);
}
void fail_for(const Thread& t, Error kind, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(static_cast<const Fiber&>(t), kind, format, arguments);
}

// ---- scheduler ----------------------------------------------------------------------------------------------------------
static Fiber* next_ready() {
    if (!ready_count) return nullptr;
    size_t n = ready.size();
    if (request->seed) {
        size_t i = (ready_head + random_number() % ready_count) % n;
        std::swap(ready[i], ready[ready_head]);
    }
    Fiber* f = ready[ready_head];
    ready_head = ready_head + 1 == n ? 0 : ready_head + 1;
    --ready_count;
    return f;
}
static void push_ready(Fiber* f) {
    size_t i = ready_head + ready_count++;
    ready[i >= ready.size() ? i - ready.size() : i] = f;
}
// Where every thread is, lines grouped; *divergent: some warp is split between different places.
static std::string report_waiting(bool* divergent) {
    std::vector<std::pair<std::string, std::string>> groups;
    std::vector<std::vector<u32>> members;
    *divergent = false;
    for (Fiber* f : fibers) {
        std::string place = f->done ? "exited" : std::string(f->waiting) + " at " + where(f->site);
        size_t i = 0;
        while (i < groups.size() && groups[i].first != place) ++i;
        if (i == groups.size()) groups.push_back({place, ""}), members.push_back({});
        members[i].push_back(f->slot);
        Fiber* first = fibers[f->slot - f->lane];
        if (f->done != first->done ||
            (!f->done && (f->site != first->site || f->waiting != first->waiting)))
            *divergent = true;
    }
    std::string text;
    for (size_t i = 0; i < groups.size(); ++i) {
        text += "\n  " + groups[i].first + ": threads";
        const auto& m = members[i];
        for (size_t k = 0, shown = 0; k < m.size() && shown < 12; ++shown) {
            size_t end = k;
            while (end + 1 < m.size() && m[end + 1] == m[end] + 1) ++end;
            text += " " + std::to_string(m[k]) + (end > k ? "-" + std::to_string(m[end]) : "");
            k = end + 1;
            if (shown == 11 && k < m.size()) text += " ...";
        }
    }
    return text;
}
static void deadlock(const char* how) {
    bool divergent;
    std::string places = report_waiting(&divergent);
    Fiber& f = *static_cast<Fiber*>(current);
    char head[300];
    snprintf(head, sizeof head, "%s in block (%u,%u,%u): %s",
             divergent ? "a warp is divided and can never go on" : "deadlock", f.ctaid.x, f.ctaid.y,
             f.ctaid.z, how);
    set_error(divergent ? DIVERGENCE : DEADLOCK, f.site, (head + places).c_str());
    end_launch();
}
void park(Thread& t, const char* why) {
    Fiber& me = fiber(t);
    me.waiting = why;
    Fiber* n = next_ready();
    if (n == &me) {
        me.waiting = "ready";
        return;
    }
    if (!n) deadlock("every thread waits");
    switch_to(&me, n);
    me.waiting = "ready";
}
void wake(Thread& t) {
    push_ready(&fiber(t));
    switches_since_progress = 0;
}
void progress() { switches_since_progress = 0; }
void yield(Thread& t) {
    if (++switches_since_progress > 200000 + 200 * fibers.size()) {
        fiber(t).waiting = "polling";
        for (Fiber* f : fibers)
            if (!f->done && !strcmp(f->waiting, "ready")) f->waiting = "polling";
        deadlock("threads poll for something that never changes");
    }
    push_ready(&fiber(t));
    park(t, "polling");
}
// Called after many backward branches without a switch: lets the others run, and ends loops that never end.
void refuel(Thread& t) {
    t.fuel = 1 << 16;
    if (++t.refuels > 20000) fail(DEADLOCK, "more than 10^9 loop iterations by one thread");
    yield(t);
}
u64 clock(Thread&) { return switches * 16; }
u32 dynamic_shared_bytes() { return request->shared_bytes - request->static_shared; }

void assert_failed(const u8* message, const u8* file, const u8* line) {
    const char *m = *(const char* const*)message, *f = *(const char* const*)file;
    fail(TRAP, "assertion failed: %s (%s:%u)", m, f, *(const u32*)line);
}

static void finish(Fiber& me) {
    if (me.block->hopper) hopper_thread_exit(me);
    me.done = true;
    me.waiting = "exited";
    --me.block->alive;
    --alive;
    switches_since_progress = 0;
    if (me.ncopies) {
        me.site = me.copies[0].site;
        fail(ASYNC_MISUSE, "a thread ends while %u of its cp.async copies are in flight",
             me.ncopies);
    }
    barriers_thread_exit(me);
    Fiber* n = next_ready();
    if (!n && alive) deadlock("every remaining thread waits");
    switch_to(&me, n);
}
void exit_thread(Thread& t) {
    finish(fiber(t));
    abort();
}
static void entry() {
    Fiber& me = *static_cast<Fiber*>(current);
    request->kernel(me, request->params);
    exit_thread(me);
}

// ---- launch -------------------------------------------------------------------------------------------------------------
static void make_fibers(u32 count) {
    while (stacks.size() < count) {
        char* s = (char*)mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (s == MAP_FAILED) {
            fprintf(stderr, "cuflash emulator: no memory for fiber stacks\n");
            abort();
        }
        mprotect(s, 4096, PROT_NONE);
        stacks.push_back(s + 4096);
    }
    fiber_pool.assign(count, Fiber{});
    fibers.resize(count);
    ready.assign(count, nullptr);
    for (u32 i = 0; i < count; ++i) {
        fibers[i] = &fiber_pool[i];
        fibers[i]->stack = stacks[i];
    }
}
static void begin_block(Block& b, u32 rank, const u32* first, const u32* in_cluster) {
    const Request& r = *request;
    b.rank = rank;
    b.ctaid = {first[0] + rank % in_cluster[0], first[1] + rank / in_cluster[0] % in_cluster[1],
               first[2] + rank / (in_cluster[0] * in_cluster[1])};
    b.linear = b.ctaid.x + r.grid[0] * (b.ctaid.y + r.grid[1] * b.ctaid.z);
    b.alive = b.nthreads;
    b.hopper = nullptr;
    memset(b.shared, 0xff, r.shared_bytes);
    memset(b.initialised, 0, (r.shared_bytes + 15) / 16 * 2);
    for (u32 i = 0; i < b.nthreads; ++i) {
        Fiber& f = *fibers[rank * b.nthreads + i];
        f.tid = {i % r.block[0], i / r.block[0] % r.block[1], i / (r.block[0] * r.block[1])};
        f.ctaid = b.ctaid;
        f.ntid = {r.block[0], r.block[1], r.block[2]};
        f.nctaid = {r.grid[0], r.grid[1], r.grid[2]};
        f.lane = i % WARP, f.warp = i / WARP, f.index = i, f.slot = rank * b.nthreads + i,
        f.site = 0;
        f.block = &b;
        f.ncopies = f.copy_group = 0, f.copy_seq = 0;
        f.local_low = f.local_high = 0;
        f.fuel = 1 << 16, f.refuels = 0;
        f.done = false, f.waiting = "ready";
        b.threads[i] = &f;
        prepare(f);
        push_ready(&f);
    }
}
static void run_together(const u32* first) {
    const Request& r = *request;
    ++run_id;
    ready_head = ready_count = 0;
    alive = (u32)fibers.size();
    switches_since_progress = 0;
    barriers_begin((u32)blocks.size());
    warps_begin();
    race_run_begin();
    counters_run_begin();
    for (u32 k = 0; k < blocks.size(); ++k) begin_block(*blocks[k], k, first, r.cluster);
    switch_to(nullptr, next_ready());
    counters_run_end();
    race_run_end();
    if (&block_end_hook && block_end_hook)
        for (Block* b : blocks) block_end_hook(*b);
}
extern "C" int emu_launch(const Request* r, Result* out) {
    request = r, result = out;
    out->error = OK, out->message[0] = 0, out->site = 0;
    counting = r->counters;
    launch = {{r->grid[0], r->grid[1], r->grid[2]},
              {r->block[0], r->block[1], r->block[2]},
              {r->cluster[0], r->cluster[1], r->cluster[2]},
              r->static_shared,
              r->shared_bytes,
              r->seed,
              r->race,
              r->uninitialised,
              r->counters,
              r->sites,
              r->nsites};
    switches = 0, run_id = 0;
    random_state = (r->seed * 0x9E3779B97F4A7C15ull + 0x1234567) | 1;
    u32 threads = r->block[0] * r->block[1] * r->block[2],
        together = r->cluster[0] * r->cluster[1] * r->cluster[2];
    make_fibers(threads * together);
    std::vector<Block> storage(together);
    std::vector<Thread*> pointers((size_t)threads * together);
    std::vector<u16> initialised((size_t)(r->shared_bytes / 16 + 1) * together);
    size_t window = (r->shared_bytes + 1024 + 127) / 128 * 128;
    u8* shared = (u8*)aligned_alloc(1024, (window * together + 1023) / 1024 * 1024);
    blocks.clear();
    for (u32 k = 0; k < together; ++k) {
        Block& b = storage[k];
        b.nthreads = threads, b.nwarps = (threads + WARP - 1) / WARP,
        b.shared_bytes = r->shared_bytes;
        b.shared = shared + k * window,
        b.initialised = initialised.data() + (size_t)(r->shared_bytes / 16 + 1) * k;
        b.threads = pointers.data() + (size_t)threads * k;
        blocks.push_back(&b);
    }
    memory_launch_begin();
    race_launch_begin();
    counters_launch_begin();
    u32 at[3];
    for (at[2] = 0; at[2] < r->grid[2] && !out->error; at[2] += r->cluster[2])
        for (at[1] = 0; at[1] < r->grid[1] && !out->error; at[1] += r->cluster[1])
            for (at[0] = 0; at[0] < r->grid[0] && !out->error; at[0] += r->cluster[0])
                run_together(at);
    counters_launch_end();
    race_launch_end();
    for (Fiber* f : fibers) free(f->copies);
    free(shared);
    current = nullptr;
    out->switches = switches;
    return out->error;
}
}  // namespace emu
