"""mbarrier handshakes: threads pass values through shared memory, ordered by nothing but the
barrier under test."""

from __future__ import annotations

import numpy as np

from .form import Case, Form, Output, blank

THREADS = 128

BASIC = """
static __device__ __forceinline__ bool test_parity(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}
static __device__ __forceinline__ bool test_state(u32 barrier, u64 state) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "l"(state) : "memory");
    return done;
}
static __device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
"""
TRY = """
static __device__ __forceinline__ bool try_parity(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}
"""  # sm_90


def _rotate_case(rounds: int, rng: np.random.Generator) -> Case:
    """Every round thread i adds what thread i + 1 (cyclically) held after the round before, times
    3."""
    start = rng.integers(0, 2**32, THREADS, np.uint32)
    value = start.copy()
    for _ in range(rounds):
        value = value * np.uint32(5) + np.roll(value, -1) * np.uint32(3)
    return Case([start, blank(THREADS, np.uint32)], [value])


def _rotate(name: str, group: str, arrive: str, count: int, wait: str, rounds: int = 5) -> Form:
    """`arrive` signals barrier %1 (and may set `state`); `wait` is true when the phase that ends
    the round is over."""
    return Form(
        name=name,
        group=group,
        parameters="const u32* start, u32* out",
        block=THREADS,
        shared=2 * THREADS * 4 + 16,
        functions=(BASIC, TRY) if group == "sm_90a" else (BASIC,),
        body=f"""
    const u32 barrier = shared_address(smem) + {2 * THREADS * 4};
    u32* slots = (u32*)smem;
    if (thread == 0) init_barrier(barrier, {count});
    __syncthreads();
    u32 value = start[thread];
    for (u32 round = 0; round < {rounds}; ++round) {{
        slots[(round & 1) * {THREADS} + thread] = value;
        u64 state = 0; (void)state;
        {arrive}
        while (!({wait})) {{}}
        value = value * 5 + slots[(round & 1) * {THREADS} + ((thread + 1) & {THREADS - 1})] * 3;
    }}
    out[thread] = value;""",
        make=lambda rng: _rotate_case(rounds, rng),
    )


_ARRIVE = (
    'asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(barrier) : "memory");'
)
_SINK = 'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");'
# Every thread of an even warp arrives once, of an odd warp three times at once: 64 + 3 * 64.
_COUNTED = """asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;"
            :: "r"(barrier), "r"(thread & 32 ? 3 : 1) : "memory");"""
_RELEASE = """asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 %0, [%1];"
            : "=l"(state) : "r"(barrier) : "memory");"""


def _pending_case(rng: np.random.Generator) -> Case:
    """init 9; arrive.noComplete 2, 3 and 1 report 9, 7 and 4 pending before them."""
    return Case([blank(4, np.uint32)], [np.array([9, 7, 4, 0], np.uint32)])


PENDING = Form(
    name="mbarrier_pending_count",
    group="sm_80",
    parameters="u32* out",
    shared=8,
    functions=(BASIC,),
    body="""
    const u32 barrier = shared_address(smem);
    if (lane == 0) {
        init_barrier(barrier, 9);
        u64 s0, s1, s2;
        asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 2;" : "=l"(s0) : "r"(barrier) : "memory");
        asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 3;" : "=l"(s1) : "r"(barrier) : "memory");
        asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 1;" : "=l"(s2) : "r"(barrier) : "memory");
        asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(out[0]) : "l"(s0));
        asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(out[1]) : "l"(s1));
        asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(out[2]) : "l"(s2));
        out[3] = test_state(barrier, s2);
        asm volatile("mbarrier.inval.shared.b64 [%0];" :: "r"(barrier) : "memory");
    }""",
    make=_pending_case,
)


def _parity_case(rng: np.random.Generator) -> Case:
    """A fresh barrier: parity 1 counts as over, parity 0 does not; after one phase it is the other
    way round."""
    return Case([blank(4, np.uint32)], [np.array([0, 1, 1, 0], np.uint32)])


PARITY = Form(
    name="mbarrier_parity",
    group="sm_80",
    parameters="u32* out",
    shared=8,
    functions=(BASIC,),
    body=f"""
    const u32 barrier = shared_address(smem);
    if (lane == 0) {{
        init_barrier(barrier, 1);
        out[0] = test_parity(barrier, 0); out[1] = test_parity(barrier, 1);
        u64 state; {_ARRIVE}
        out[2] = test_parity(barrier, 0); out[3] = test_parity(barrier, 1);
    }}""",
    make=_parity_case,
)


def _drop_case(rng: np.random.Generator) -> Case:
    """Half of the threads leave after the first phase; the others go on with the smaller count."""
    start = rng.integers(0, 2**32, THREADS, np.uint32)
    once = start + np.roll(start, 64)
    return Case(
        [start, blank(THREADS, np.uint32)], [np.where(np.arange(THREADS) < 64, start, once)]
    )


DROP = Form(
    name="mbarrier_arrive_drop",
    group="sm_80",
    parameters="const u32* start, u32* out",
    block=THREADS,
    shared=THREADS * 4 + 16,
    functions=(BASIC,),
    body=f"""
    const u32 barrier = shared_address(smem) + {THREADS * 4};
    u32* slots = (u32*)smem;
    if (thread == 0) init_barrier(barrier, {THREADS});
    __syncthreads();
    slots[thread] = start[thread];
    u64 state;
    if (thread < 64) {{
        asm volatile("mbarrier.arrive_drop.shared.b64 %0, [%1];" : "=l"(state) : "r"(barrier) : "memory");
        out[thread] = start[thread];
        return;
    }}
    {_ARRIVE}
    while (!test_state(barrier, state)) {{}}
    out[thread] = start[thread] + slots[thread - 64];
    {_ARRIVE}
    while (!test_state(barrier, state)) {{}}""",
    make=_drop_case,
)


def _copy_case(rng: np.random.Generator) -> Case:
    source = rng.integers(0, 2**32, (2, THREADS, 4), np.uint32)
    return Case([source, blank((2, THREADS, 4), np.uint32)], [np.roll(source, -1, axis=1)])


def _copy(noinc: bool) -> Form:
    """cp.async completes on an mbarrier; each thread reads what its neighbour copied, in two
    phases.

    Without .noinc the arrival adds to the pending count first, so the threads' own arrivals
    complete the phase.
    """
    arrive = (
        'asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(barrier) : "memory");'
        if noinc
        else 'asm volatile("cp.async.mbarrier.arrive.shared.b64 [%0];" :: "r"(barrier) : "memory"); u64 state; '
        + _ARRIVE
    )
    return Form(
        name=f"cp_async_mbarrier_arrive{'_noinc' if noinc else ''}",
        group="sm_80",
        parameters="const uint4* source, uint4* out",
        block=THREADS,
        shared=2 * THREADS * 16 + 16,
        functions=(BASIC,),
        body=f"""
    const u32 barrier = shared_address(smem) + {2 * THREADS * 16};
    if (thread == 0) init_barrier(barrier, {THREADS});
    __syncthreads();
    for (u32 phase = 0; phase < 2; ++phase) {{
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
            :: "r"(shared_address(smem) + (phase * {THREADS} + thread) * 16),
               "l"(__cvta_generic_to_global(source + phase * {THREADS} + thread)) : "memory");
        {arrive}
        while (!test_parity(barrier, phase)) {{}}
        out[phase * {THREADS} + thread] = ((const uint4*)smem)[phase * {THREADS} + ((thread + 1) & {THREADS - 1})];
    }}""",
        make=_copy_case,
    )


def _transaction_case(rng: np.random.Generator) -> Case:
    """A phase ends when both the arrivals and the bytes are complete, whichever comes last."""
    return Case([blank(4, np.uint32)], [np.array([0, 0, 1, 1], np.uint32)])


TRANSACTION = Form(
    name="mbarrier_expect_complete_tx",
    group="sm_90a",
    parameters="u32* out",
    shared=8,
    functions=(BASIC, TRY),
    body="""
    const u32 b = shared_address(smem);
    if (lane == 0) {
        init_barrier(b, 1);
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], 64;" :: "r"(b) : "memory");
        out[0] = test_parity(b, 0);
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory");
        out[1] = test_parity(b, 0);
        asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 64;" :: "r"(b) : "memory");
        out[2] = test_parity(b, 0);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 32;" :: "r"(b) : "memory");
        asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 32;" :: "r"(b) : "memory");
        out[3] = test_parity(b, 1);
    }""",
    make=_transaction_case,
)


def _turns_case(rng: np.random.Generator) -> Case:
    """Warp n, as the n-th, makes 5 x + n of x."""
    start = rng.integers(0, 2**32, 1, np.uint32)
    value = start.copy()
    for warp in range(THREADS // 32):
        value = value * np.uint32(5) + np.uint32(warp)
    done = np.array([THREADS // 32], np.uint32)
    return Case([Output(np.zeros(1, np.uint32)), Output(start)], [done, value])


TURNS = Form(
    name="turns_by_a_counter_in_global_memory",
    group="sm_90a",
    parameters="u32* counter, u32* value",
    block=THREADS,
    body="""
    if (thread % 32 == 0) {
        const u64 at = __cvta_generic_to_global(counter);
        u32 turn;
        do
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(at) : "memory");
        while (turn != thread / 32);
        *value = *value * 5 + turn;
        asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(at), "r"(turn + 1) : "memory");
    }""",
    make=_turns_case,
)

FORMS = [
    TRANSACTION,
    TURNS,
    _rotate(
        "mbarrier_arrive_test_wait_parity",
        "sm_80",
        _ARRIVE,
        THREADS,
        "test_parity(barrier, round & 1)",
    ),
    _rotate(
        "mbarrier_arrive_test_wait_state", "sm_80", _ARRIVE, THREADS, "test_state(barrier, state)"
    ),
    _rotate(
        "mbarrier_arrive_sink_try_wait_parity",
        "sm_90a",
        _SINK,
        THREADS,
        "try_parity(barrier, round & 1)",
    ),
    _rotate("mbarrier_arrive_count", "sm_90a", _COUNTED, 256, "try_parity(barrier, round & 1)"),
    _rotate(
        "mbarrier_arrive_release_cta", "sm_90a", _RELEASE, THREADS, "test_state(barrier, state)"
    ),
    PENDING,
    PARITY,
    DROP,
    _copy(noinc=True),
    _copy(noinc=False),
]
