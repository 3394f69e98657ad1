"""Small broken kernels, one per rule of mbarriers, bulk copies, wgmma, setmaxnreg and clusters.

`test_emulator_catches_hopper.py` plants bugs in a whole kernel; here each rule stands alone, and
all kernels are one module.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.emulator.errors import (
    AsyncMisuse,
    DataRace,
    Deadlock,
    Divergence,
    EmulatorError,
    Misaligned,
    OutOfBounds,
    Uninitialised,
)
from tests.emulator.module import Module
from tests.emulator.nvrtc import Nvrtc
from tests.instructions.bulk import FORMS as BULK_FORMS
from tests.instructions.form import PRELUDE, Form, unit_source
from tests.instructions.launch import OPTIONS, EmulatorRunner
from tests.instructions.wgmma import FORMS as WGMMA_FORMS

FUNCTIONS = """
#define PTX(text, ...) asm volatile(text :: __VA_ARGS__ : "memory")
static __device__ __forceinline__ void init(u32 b, u32 n) { PTX("mbarrier.init.shared.b64 [%0], %1;", "r"(b), "r"(n)); }
static __device__ __forceinline__ void publish() { PTX("fence.mbarrier_init.release.cluster;", "r"(0)); }
static __device__ __forceinline__ void arrive(u32 b, u32 n) {
    PTX("mbarrier.arrive.shared::cta.b64 _, [%0], %1;", "r"(b), "r"(n));
}
static __device__ __forceinline__ void expect(u32 b, u32 n) {
    PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", "r"(b), "r"(n));
}
static __device__ __forceinline__ bool done(u32 b, u32 parity) {
    u32 r;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(r) : "r"(b), "r"(parity) : "memory");
    return r;
}
static __device__ __forceinline__ void load(u32 to, const void* from, u32 bytes, u32 b) {
    PTX("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];",
        "r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(b));
}
"""
# name -> (error, words in its message, statements of one thread; `b` and `b2` are barriers, `data`
# 1 KiB of shared memory)
ONE_THREAD = {
    "arrive_without_init": (AsyncMisuse, "no mbarrier was initialised", "arrive(b, 1);"),
    "init_of_zero": (AsyncMisuse, "not in 1", "init(b, 0);"),
    "init_twice": (AsyncMisuse, "in use", "init(b, 1); init(b, 1);"),
    "misaligned_barrier": (Misaligned, "not a multiple of 8", "init(b + 4, 1);"),
    "too_many_arrivals": (AsyncMisuse, "only 2 of 2", "init(b, 2); arrive(b, 3);"),
    "use_after_inval": (
        AsyncMisuse,
        "no mbarrier was initialised",
        'init(b, 1); PTX("mbarrier.inval.shared.b64 [%0];", "r"(b)); arrive(b, 1);',
    ),
    "no_complete_completes": (
        AsyncMisuse,
        "completes the phase",
        "init(b, 2); u64 s;"
        'asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 2;" : "=l"(s) : "r"(b) : "memory");',
    ),
    "too_many_bytes": (AsyncMisuse, "more than the 2", "init(b, 2); expect(b, 1048576);"),
    "overwritten": (
        AsyncMisuse,
        "overwritten",
        "init(b, 1); *(volatile u32*)(smem + 1024) = 7; arrive(b, 1);",
    ),
    "endless_wait": (Deadlock, "1 of 1 arrivals", "init(b, 1); while (!done(b, 0)) {}"),
    "barrier_never_published": (
        AsyncMisuse,
        "fence.mbarrier_init",
        "init(b, 1); expect(b, 64);load(data, in, 64, b);",
    ),
    "load_never_waited_for": (
        AsyncMisuse,
        "nobody waited for",
        "init(b, 1); publish(); expect(b, 64); load(data, in, 64, b);",
    ),
    "read_before_the_wait": (
        (DataRace, Uninitialised),
        "in flight|not been waited for",
        "init(b, 1); publish(); expect(b, 64); load(data, in, 64, b); out[0] = *(volatile u32*)smem;",
    ),
    "one_try_is_no_wait": (
        (DataRace, Uninitialised),
        "in flight|not been waited for",
        "init(b, 1); init(b2, 1); publish(); expect(b, 128); load(data, in, 64, b); load(data + 64, in, 64, b);"
        "done(b, 0); out[0] = *(volatile u32*)(smem + 64);",
    ),
    "bytes_left_over": (
        AsyncMisuse,
        "expected 64 more bytes",
        "init(b, 1); publish();"
        'PTX("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;", "r"(b), "r"(64));',
    ),
    "size_not_16": (Misaligned, "multiple of 16", "init(b, 1); publish(); load(data, in, 24, b);"),
    "source_not_16": (
        Misaligned,
        "16-byte aligned",
        "init(b, 1); publish(); load(data, (const u8*)in + 8, 64, b);",
    ),
    "source_too_short": (
        OutOfBounds,
        "outside every allocation",
        "init(b, 1); publish();load(data, in + 248, 64, b);",
    ),
    "target_too_long": (
        OutOfBounds,
        "outside the",
        "init(b, 1); publish(); load(data + 1024, in, 512, b);",
    ),
    "load_over_unfenced_stores": (
        AsyncMisuse,
        "overwrites shared offset 0",
        "init(b, 1); publish(); *(volatile u32*)smem = 1; load(data, in, 64, b);",
    ),
    "store_of_unwritten_memory": (
        Uninitialised,
        "never written",
        'PTX("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 64;", "l"(out), "r"(data));',
    ),
    "no_tensor_map": (
        AsyncMisuse,
        "no tensor map",
        "init(b, 1); publish(); expect(b, 64);"
        'PTX("cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes'
        ' [%0], [%1, {%2}], [%3];",'
        ' "r"(data), "l"(in), "r"(0), "r"(b));',
    ),
}
# the same for a warp or a warpgroup: (error, words, threads, statements of every thread)
MANY_THREADS = {
    "registers_up_by_dec": (
        AsyncMisuse,
        "has 40 registers",
        128,
        'asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");',
    ),
    "init_seen_without_barrier": (
        EmulatorError,
        "race|no mbarrier",
        64,
        "if (threadIdx.x == 32) init(b, 64); arrive(b, 1);",
    ),
    "half_a_warpgroup": (
        Divergence,
        "complete warpgroup|one warpgroup",
        64,
        'float d[4] = {}; asm volatile("wgmma.fence.sync.aligned;");'
        'asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"'
        ': "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(0ull), "l"(0ull));',
    ),
}
RIGHT = """
    init(b, 1); publish(); expect(b, 64); load(data, in, 64, b);
    while (!done(b, 0)) {}
    out[0] = *(volatile u32*)(smem + 60);"""


def _kernel(name: str, statements: str, threads: int) -> str:
    guard = "if (threadIdx.x == 0) " if threads == 1 else ""
    return (
        f'extern "C" __global__ void __launch_bounds__(128, 1) {name}(const u32* in, u32* out) {{\n'
        "    const u32 data = shared_address(smem), b = data + 1024, b2 = b + 8; (void)data; (void)b; (void)b2;\n"
        f"    {guard}{{ {statements} }}\n}}\n"
    )


@cache
def module() -> Module:
    kernels = {name: (statements, 1) for name, (_, _, statements) in ONE_THREAD.items()}
    kernels |= {name: (statements, n) for name, (_, _, n, statements) in MANY_THREADS.items()}
    kernels |= {"right": (RIGHT, 1)}
    text = PRELUDE + FUNCTIONS + "".join(_kernel(name, *k) for name, k in kernels.items())
    return Module(Nvrtc().ptx(text, "compute_90a", OPTIONS, name="rules.cu"))


def launch(name: str, threads: int) -> tuple[np.ndarray, np.ndarray]:
    m = module()
    data = m.memory.copy(np.arange(256, dtype=np.uint32))
    out = m.memory.empty(16, np.uint32)
    m.launch(name, 1, threads, 1024 + 16, [data, out])
    return data, out


def test_the_right_order_passes() -> None:
    data, out = launch("right", 32)
    assert out[0] == data[15]


@pytest.mark.parametrize("name", ONE_THREAD)
def test_rule(name: str) -> None:
    error, words, _ = ONE_THREAD[name]
    with pytest.raises(error, match=words):
        launch(name, 1)


@pytest.mark.parametrize("name", MANY_THREADS)
def test_rule_of_many_threads(name: str) -> None:
    error, words, threads, _ = MANY_THREADS[name]
    with pytest.raises(error, match=words):
        launch(name, threads)


# ---- fences between the proxies
def _without_proxy_fence(form: Form) -> str:
    text = unit_source([form])
    fence = 'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");'
    assert text.count(fence) == 1
    return text.replace(fence, "")


@pytest.mark.parametrize(
    "name", ["wgmma_ss_n8", "wgmma_rs_n8", "tma_store_2d_inside", "bulk_store"]
)
def test_ordinary_stores_must_be_fenced_before_the_async_proxy_reads(name: str) -> None:
    form = {f.name: f for f in [*WGMMA_FORMS, *BULK_FORMS]}[name]
    runner = EmulatorRunner([form])
    case = form.case()
    runner.run(form, case)  # with the fence
    bare = EmulatorRunner([form], ptx={form.group: _compile(_without_proxy_fence(form))})
    with pytest.raises(AsyncMisuse, match=r"without fence\.proxy\.async"):
        bare.run(form, case)


@pytest.mark.parametrize(
    "write",
    [
        'PTX("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};", "r"(data + (lane & 7) * 16), "r"(lane));',
        'PTX("cp.async.ca.shared.global [%0], [%1], 4;", "r"(data + lane * 4), "l"(in + lane));'
        'PTX("cp.async.wait_all;", "r"(0));',
        "((volatile u32*)smem)[lane] = lane;",
    ],
    ids=["stmatrix", "cp.async", "st"],
)
@pytest.mark.parametrize("fenced", [True, False])
def test_every_kind_of_ordinary_write_counts(write: str, fenced: bool) -> None:
    fence = 'PTX("fence.proxy.async.shared::cta;", "r"(0));' if fenced else ""
    store = (
        'PTX("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;", "l"(out), "r"(data));'
    )
    wait = 'PTX("cp.async.bulk.commit_group;", "r"(0)); PTX("cp.async.bulk.wait_group 0;", "r"(0));'
    body = f"const u32 lane = threadIdx.x; {write} {fence} __syncwarp(); if (lane == 0) {{ {store} {wait} }}"
    m = Module(_compile(PRELUDE + FUNCTIONS + _kernel("kernel", body, 32)))
    arguments = [m.memory.copy(np.arange(32, dtype=np.uint32)), m.memory.empty(32, np.uint32)]
    if fenced:
        m.launch("kernel", 1, 32, 1040, arguments)
        assert (arguments[1] != 0xFFFFFFFF).all()
        return
    with pytest.raises(AsyncMisuse, match=r"without fence\.proxy\.async"):
        m.launch("kernel", 1, 32, 1040, arguments)


def _compile(text: str) -> str:
    return Nvrtc().ptx(text, "compute_90a", OPTIONS, name="fences.cu")


# ---- elect, clusters
def test_elected_lane_depends_on_the_seed_but_not_on_the_call() -> None:
    body = """
    u32 leader;
    asm volatile("{ .reg .pred p; elect.sync %0|p, 0xffffffff; }" : "=r"(leader));
    u32 again;
    asm volatile("{ .reg .pred p; elect.sync %0|p, 0xffffffff; }" : "=r"(again));
    out[threadIdx.x] = leader * 64 + again;"""
    m = Module(_compile(PRELUDE + _kernel("kernel", body, 32)))
    seen = set()
    for seed in range(4):
        out = m.memory.empty(32, np.uint32)
        m.launch("kernel", 1, 32, 1040, [out, out], seed=seed)
        assert (out == out[0]).all() and out[0] // 64 == out[0] % 64
        seen.add(int(out[0]) // 64)
    assert len(seen) == 4 and 0 in seen


CLUSTER_RULES = {
    # what block 0 put into its memory is read by block 1 without a barrier between
    "remote_read_unordered": (
        (DataRace, Uninitialised),
        "race|never written",
        "if (r == 0) smem[threadIdx.x] = 1; else out[threadIdx.x] = remote(data, 0); ARRIVE; WAIT;",
    ),
    "arrive_twice": (AsyncMisuse, "arrive twice", "ARRIVE; ARRIVE;"),
    "wait_only": (AsyncMisuse, "without barrier.cluster.arrive", "WAIT;"),
    "no_such_rank": (AsyncMisuse, "rank 2 in a cluster of 2", "out[0] = remote(data, 2);"),
    "memory_of_an_ended_block": (
        AsyncMisuse,
        "threads have all ended",
        "if (r == 0) return; for (int i = 0; i < 100000; ++i) out[1] = remote(data, 0) * 0 + i;",
    ),
    "barrier_of_nobody": (
        (Deadlock, Divergence),
        "barrier.cluster",
        "if (r == 0) { ARRIVE; WAIT; } else if (threadIdx.x == 0) { init(b, 1); while (!done(b, 0)) {} }",
    ),
}
CLUSTER_FUNCTIONS = """
#define ARRIVE asm volatile("barrier.cluster.arrive.aligned;" ::: "memory")
#define WAIT asm volatile("barrier.cluster.wait.aligned;" ::: "memory")
static __device__ __forceinline__ u32 remote(u32 address, u32 rank) {
    u32 mapped, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(mapped) : "memory");
    return value;
}
"""


@cache
def cluster_module() -> Module:
    rank = 'u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));'
    kernels = [_kernel(n, f"{rank} {body}", 32) for n, (_, _, body) in CLUSTER_RULES.items()]
    return Module(_compile(PRELUDE + FUNCTIONS + CLUSTER_FUNCTIONS + "".join(kernels)))


@pytest.mark.parametrize("name", CLUSTER_RULES)
def test_rule_of_clusters(name: str) -> None:
    error, words, _ = CLUSTER_RULES[name]
    m = cluster_module()
    out = m.memory.empty(32, np.uint32)
    with pytest.raises(error, match=words):
        m.launch(name, 2, 32, 1040, [out, out], cluster=2)
