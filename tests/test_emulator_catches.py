"""Mistakes planted in a small attention kernel: the emulator must catch each, and must not accuse the
kernel without them.

This is what makes a green test run without a GPU worth something. Each mistake is one that a GPU may
survive in silence.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import (
    AsyncMisuse,
    DataRace,
    Deadlock,
    Divergence,
    LaunchError,
    Misaligned,
    Module,
    Nvrtc,
    OutOfBounds,
    Uninitialised,
)

KERNELS = Path(__file__).parent / "emulator" / "kernels"
SOURCE = (KERNELS / "attention.cu").read_text()
SHARED_BYTES = 5 * 8192
PARAMS = np.dtype(
    [(n, "u8") for n in ("q", "k", "v", "o", "lse")]
    + [("len_q", "i4"), ("len_k", "i4"), ("causal", "i4"), ("scale_log2", "f4")],
    align=True,
)


@cache
def nvrtc() -> Nvrtc:
    return Nvrtc()


@cache
def attention_module(plant: str = "") -> Module:
    options = (f"-DPLANT_{plant}",) if plant else ()
    return Module(nvrtc().ptx(SOURCE, "compute_80", options, "attention.cu"))


def attention_error(
    module: Module, *, shared_memory: int = SHARED_BYTES, causal: bool = False, **launch
) -> float:
    """Largest difference from float64 over one head of 100 queries and 200 keys (both tails ragged, four key tiles)."""
    len_q, len_k = 100, 200
    rng = np.random.default_rng(7)
    memory = module.memory
    q, k, v = (
        memory.copy(rng.standard_normal((n, 64)).astype(np.float16)) for n in (len_q, len_k, len_k)
    )
    o, lse = memory.empty((len_q, 64), np.float16), memory.empty(len_q, np.float32)
    p = np.zeros((), PARAMS)
    for name, array in (("q", q), ("k", k), ("v", v), ("o", o), ("lse", lse)):
        p[name] = array.ctypes.data
    p["len_q"], p["len_k"], p["causal"], p["scale_log2"] = len_q, len_k, causal, np.log2(np.e) / 8
    module.launch("attention", (2, 1), 128, shared_memory, p[()], **launch)
    s = q.astype(np.float64) @ k.astype(np.float64).T / 8
    if causal:
        s[np.arange(len_k) > np.arange(len_q)[:, None] + len_k - len_q] = -np.inf
    e = np.exp(s - s.max(axis=1, keepdims=True))
    expected = e / e.sum(axis=1, keepdims=True) @ v.astype(np.float64)
    error = np.abs(o - expected).max()
    return float("inf") if np.isnan(error) else float(error)


# ---- the kernel as it should be
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_kernel_without_mistakes_passes(seed: int, causal: bool) -> None:
    # half an ulp of fp16 at 2 is 1e-3; P and O are rounded once each
    assert attention_error(attention_module(), seed=seed, causal=causal) < 2e-3


def test_counts_of_the_kernel_are_exact() -> None:
    module = attention_module()
    counts = module_counts(module)
    tiles, warps = 2 * 4, 4  # two blocks, four key tiles each
    assert counts.count("mma") == tiles * warps * 64
    assert counts.count("ex2") == tiles * warps * (2 + 32)
    assert counts.count("ldmatrix") == tiles * warps * 32 + 2 * warps * 4
    assert counts.count("cp.async.cg") == warps * (4 * 2 + 2 * 2 * 4 * 4)
    assert counts.bank_conflicts == 0
    # one row of Q, K, V and O is four sectors; no row is fetched in parts
    assert counts.sectors == 4 * (100 + 2 * 2 * 200 + 100) + lse_sectors(100)


def lse_sectors(rows: int) -> int:
    """A warp stores 8 rows of the LSE at a time: one sector, since the array is 256-byte aligned."""
    return -(-rows // 8)


def module_counts(module: Module):
    memory = module.memory
    rng = np.random.default_rng(7)
    q, k, v = (
        memory.copy(rng.standard_normal((n, 64)).astype(np.float16)) for n in (100, 200, 200)
    )
    o, lse = memory.empty((100, 64), np.float16), memory.empty(100, np.float32)
    p = np.zeros((), PARAMS)
    for name, array in (("q", q), ("k", k), ("v", v), ("o", o), ("lse", lse)):
        p[name] = array.ctypes.data
    p["len_q"], p["len_k"], p["scale_log2"] = 100, 200, np.log2(np.e) / 8
    return module.launch("attention", (2, 1), 128, SHARED_BYTES, p[()], counters=True)


# ---- planted mistakes
@pytest.mark.parametrize(
    ("plant", "error", "message"),
    [
        ("NO_WAIT", DataRace, r"in flight.*cp\.async"),
        ("WAIT_ONE_LESS", DataRace, r"in flight.*cp\.async"),
        ("NO_BARRIER_1", DataRace, r"shared byte.*cp\.async.*ldmatrix"),
        ("NO_BARRIER_2", DataRace, r"shared byte.*cp\.async.*ldmatrix"),
        ("NO_SYNCWARP", DataRace, r"shared byte.*write.*st\.shared.*ld\.shared"),
        ("DIVERGENT_BARRIER", Divergence, r"barrier 0.*threads 39"),
        ("SHARED_OVERRUN", OutOfBounds, r"shared offset 4\d{4}, outside the 40960 bytes"),
        (
            "GLOBAL_OVERRUN",
            OutOfBounds,
            r"read of 16 bytes.*past the end of an allocation of 25600 bytes",
        ),
        ("NO_ZERO_FILL", Uninitialised, r"never written.*ldmatrix"),
    ],
)
def test_caught_by_a_check(plant: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}") as caught:
        attention_error(attention_module(plant))
    assert "attention.cu:" in str(caught.value)  # the CUDA line, not the generated code's


@pytest.mark.parametrize("plant", ["NO_WAIT", "WAIT_ONE_LESS", "NO_BARRIER_1", "NO_BARRIER_2"])
def test_asynchronous_mistakes_show_without_the_race_detector(plant: str) -> None:
    with pytest.raises(Uninitialised):
        attention_error(attention_module(plant), race=False)


@pytest.mark.parametrize(
    "plant", ["NO_WAIT", "WAIT_ONE_LESS", "NO_BARRIER_1", "NO_BARRIER_2", "NO_SYNCWARP"]
)
def test_asynchronous_mistakes_show_in_the_values_alone(plant: str) -> None:
    assert attention_error(attention_module(plant), race=False, uninitialised=False) > 0.1


@pytest.mark.parametrize("plant", ["OUTPUT_ONLY_SUM", "SWAPPED_PACK"])
def test_inline_assembly_mistakes_change_the_values(plant: str) -> None:
    """The compiler accepts "=f" for "+f", and swapped operands, in silence."""
    assert attention_error(attention_module(plant)) > 0.1


def test_race_report_names_both_lines() -> None:
    def lines_of(assembly: str) -> set[int]:
        """Line numbers of an asm statement; the compiler records one of them."""
        start = SOURCE.index(assembly)
        first, last = (SOURCE[:end].count("\n") + 1 for end in (start, SOURCE.index(");", start)))
        return set(range(first, last + 1))

    with pytest.raises(DataRace) as caught:
        attention_error(attention_module("NO_BARRIER_1"))
    named = {
        int(n) for n in re.findall(r"attention\.cu:(\d+) \(inlined at line", str(caught.value))
    }
    assert len(named) == 2
    for assembly in ("cp.async.cg.shared.global", "ldmatrix.sync.aligned.m8n8.x4.shared"):
        assert named & lines_of(assembly)


def test_shared_memory_of_the_launch_is_what_counts() -> None:
    with pytest.raises(OutOfBounds, match="outside the 32768 bytes"):
        attention_error(attention_module(), shared_memory=4 * 8192)


# ---- tiny kernels, one mistake each
TINY = (KERNELS / "tiny.cu").read_text()


@cache
def tiny(*defines: str) -> Module:
    return Module(nvrtc().ptx(TINY, "compute_80", tuple(f"-D{d}" for d in defines), "tiny.cu"))


def floats(n: int) -> np.ndarray:
    return np.zeros(n, np.float32)


@pytest.mark.parametrize("define", ["NOTHING", "SHUFFLE"])
def test_neighbour_without_barrier_races(define: str) -> None:
    with pytest.raises(DataRace, match="shared byte"):
        tiny(define).launch("neighbour", 1, 64, 0, [floats(64)], uninitialised=False)


def test_neighbour_with_barrier() -> None:
    x = floats(64)
    tiny("BARRIER").launch("neighbour", 1, 64, 0, [x], seed=5)
    np.testing.assert_array_equal(x, np.arange(64) ^ 1)


def test_neighbouring_bytes_do_not_race() -> None:
    x = np.zeros(64, np.uint8)
    tiny("BARRIER").launch("bytes_apart", 1, 64, 0, [x])
    np.testing.assert_array_equal(x, np.arange(64))


def test_blocks_race_on_global_memory() -> None:
    with pytest.raises(DataRace, match="global byte"):
        tiny("NOTHING").launch("blocks_add", 2, 1, 0, [floats(1)])
    with pytest.raises(DataRace, match="global byte"):
        tiny("NOTHING").launch("blocks_add", 1, 2, 0, [floats(1)])


def test_atomics_do_not_race() -> None:
    x = floats(1)
    tiny("ATOMIC").launch("blocks_add", 5, 40, 0, [x])
    assert x[0] == 200


def test_last_block_pattern_needs_its_fence() -> None:
    out = floats(1)
    tiny("NOTHING").launch("last_block", 6, 1, 0, [floats(6), np.zeros(1, np.uint32), out])
    assert out[0] == 15
    with pytest.raises(DataRace, match="global byte"):
        tiny("NO_FENCE").launch(
            "last_block", 6, 1, 0, [floats(6), np.zeros(1, np.uint32), floats(1)]
        )


def test_read_only_loads_must_not_meet_writes() -> None:
    x = floats(33)
    tiny("NOTHING").launch("read_only", 1, 32, 0, [x, floats(32)])
    with pytest.raises(DataRace, match="ld\\.global\\.nc"):
        tiny("NOTHING").launch("read_only", 1, 32, 0, [x[:32], x[1:]])


def test_misaligned() -> None:
    module = tiny("NOTHING")
    with pytest.raises(Misaligned, match="not a multiple of 16"):
        module.launch("unaligned", 1, 1, 0, [module.memory.empty(8, np.float32)])


def test_copy_in_flight_at_exit() -> None:
    module = tiny("NOTHING")
    with pytest.raises(AsyncMisuse, match="in flight"):
        module.launch("leaves_copy", 1, 1, 0, [module.memory.copy(floats(4))])


def test_barriers_that_never_fill_are_deadlocks() -> None:
    with pytest.raises(Deadlock, match=r"(?s)named barrier.*threads 0-63"):
        tiny("NOTHING").launch("crossed", 1, 64, 0, [np.zeros(64, np.int32)])
    with pytest.raises(Deadlock, match="waits for 96 threads, the block has 64"):
        tiny("NOTHING").launch("named", 1, 64, 0, [np.zeros(64, np.int32)])
    x = np.zeros(96, np.int32)
    tiny("NOTHING").launch("named", 1, 96, 0, [x])
    assert x.all()


@pytest.mark.parametrize("kernel", ["half_warp_barrier", "half_warp_shuffle"])
def test_part_of_a_warp(kernel: str) -> None:
    with pytest.raises(Divergence):
        tiny("NOTHING").launch(kernel, 1, 64, 0, [np.zeros(64, np.int32)])


def test_endless_polling_is_a_deadlock() -> None:
    with pytest.raises(Deadlock, match="poll"):
        tiny("NOTHING").launch("spin", 1, 32, 0, [np.zeros(1, np.int32)])


def test_local_array_overrun() -> None:
    x = np.arange(20, dtype=np.int32)
    tiny("NOTHING").launch("local_overrun", 1, 1, 0, [x, np.int32(8)])
    with pytest.raises(OutOfBounds, match="local"):
        tiny("NOTHING").launch("local_overrun", 1, 1, 0, [x, np.int32(9)])


def test_bank_conflicts_and_sectors_are_counted() -> None:
    module = tiny("NOTHING")
    arrays = [module.memory.copy(floats(n)) for n in (32, 256)]
    counts = module.launch("conflict", 1, 32, 0, arrays, counters=True)
    assert (counts.wavefronts, counts.ideal_wavefronts, counts.bank_conflicts) == (64, 2, 62)
    assert counts.sectors == 4 + 32  # a coalesced load, and a store that touches every sector
    assert counts.global_bytes == 2 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 1, "block": 129}, "at most 128 threads"),
        ({"grid": 0, "block": 128}, "grid"),
        ({"grid": (1, 65536), "block": 128}, "grid"),
        ({"grid": 1, "block": 128, "shared_memory": 232449}, "shared memory"),
        (
            {"grid": 1, "block": 128, "params": [np.float32(1)]},
            "parameter 0 of attention has 56 bytes, 4 were given",
        ),
        ({"grid": 1, "block": 128, "params": []}, "takes 1 parameters"),
    ],
)
def test_impossible_launches(arguments: dict, message: str) -> None:
    arguments = {"params": np.zeros((), PARAMS)[()], **arguments}
    with pytest.raises(LaunchError, match=message):
        attention_module().launch("attention", **arguments)
