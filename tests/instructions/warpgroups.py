"""What warpgroups share besides products: named barriers, votes over them, registers handed over."""

from __future__ import annotations

import numpy as np

from .form import Case, Form, blank

THREADS = 256


def _relay_case(rng: np.random.Generator) -> Case:
    start = rng.integers(0, 2**32, 128, np.uint32)
    value = start
    for turn in range(4):
        value = np.roll(value, 1) * np.uint32(3) + np.uint32(turn)
    return Case([start, blank(128, np.uint32)], [value])


# Two halves of a block take turns: who has changed the values arrives where the other waits.
RELAY = Form(
    name="named_barriers_sync_arrive",
    group="sm_75",
    parameters="const u32* start, u32* out",
    block=THREADS,
    shared=2 * 128 * 4,
    body="""
    u32* values = (u32*)smem;  // two buffers
    const u32 half = thread / 128, i = thread % 128;
    if (half == 1) {
        values[i] = start[i];
        asm volatile("bar.arrive %0, %1;" :: "r"(1), "r"(256) : "memory");
    }
    for (u32 turn = half; turn < 4; turn += 2) {
        asm volatile("bar.sync %0, %1;" :: "r"(1 + half), "r"(256) : "memory");
        const u32 x = values[turn % 2 * 128 + (i + 127) % 128];
        values[(turn + 1) % 2 * 128 + i] = x * 3 + turn;
        if (turn < 3) asm volatile("bar.arrive %0, %1;" :: "r"(2 - half), "r"(256) : "memory");
    }
    if (half == 1) {
        asm volatile("bar.sync %0, %1;" :: "r"(3), "r"(128) : "memory");
        out[i] = values[i];
    }""",
    make=_relay_case,
)


def _vote_case(rng: np.random.Generator) -> Case:
    value = rng.integers(0, 50, 128, np.uint32)
    return Case(
        [value, blank(64, np.uint32)], [(np.arange(64)[:, None] == value).any(1).astype(np.uint32)]
    )


# Half of the block asks, number by number, whether any of its threads holds it.
VOTE = Form(
    name="named_barrier_or",
    group="sm_75",
    parameters="const u32* value, u32* out",
    block=THREADS,
    body="""
    if (thread >= 128) return;
    for (u32 number = 0; number < 64; ++number) {
        u32 any;
        asm volatile("{ .reg .pred p, q; setp.eq.u32 p, %1, %2; bar.red.or.pred q, %3, %4, p; selp.u32 %0, 1, 0, q; }"
            : "=r"(any) : "r"(value[thread]), "r"(number), "r"(1), "r"(128) : "memory");
        if (thread == number) out[number] = any;
    }""",
    make=_vote_case,
)


def _registers_case(rng: np.random.Generator) -> Case:
    value = rng.integers(0, 2**32, (2, 128, 64), np.uint32)
    total = value.sum(2, dtype=np.uint32)
    return Case([value, blank((2, 128), np.uint32)], [total])


# One warpgroup gives registers to another that needs them; values live on either side of it stay.
REGISTERS = Form(
    name="setmaxnreg",
    group="sm_90a",
    parameters="const u32* value, u32* out",
    block=THREADS,
    body="""
    const u32 first = value[thread * 64];
    if (thread < 128)
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(40));
    else
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(256));
    u32 sum = first;
    for (u32 i = 1; i < 64; ++i) sum += value[thread * 64 + i];
    out[thread] = sum;""",
    make=_registers_case,
)

FORMS = [RELAY, VOTE, REGISTERS]
