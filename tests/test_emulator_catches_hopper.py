"""The emulator catches the mistakes one makes with TMA, mbarriers and wgmma: each is planted in a
kernel that is right without it.

On a GPU most of them pass, or fail once in a thousand launches.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.errors import (
    AsyncMisuse,
    DataRace,
    Deadlock,
    Divergence,
    EmulatorError,
    Misaligned,
)
from tests.emulator.module import Module
from tests.emulator.nvrtc import Nvrtc
from tests.emulator.tensormap import tensor_map

SOURCE = Path(__file__).parent / "planted" / "hopper_ring.cu"
BUGS = re.search(r"enum Bug \{(.*?)\}", SOURCE.read_text(), re.S)[1].replace(",", " ").split()
TILES, SHARED = 5, 1024 + 11 * 8192 + 64


@cache
def module(bug: str) -> Module:
    options = ("-std=c++17", "-lineinfo", f"-DBUG={BUGS.index(bug)}")
    return Module(Nvrtc().ptx(SOURCE.read_text(), "compute_90a", options, name=SOURCE.name))


def run(bug: str, seed: int = 0, **checks: bool) -> tuple[np.ndarray, np.ndarray]:
    """(what the kernel computes, what is right)."""
    m = module(bug)
    rng = np.random.default_rng(7)
    q, k, v = (
        m.memory.copy(rng.integers(-3, 4, shape).astype(np.float16))
        for shape in ((128, 64), (64 * TILES, 64), (64 * TILES, 64))
    )
    out = m.memory.empty((128, 64), np.float32)
    maps = [
        tensor_map(x.ctypes.data, "float16", (64, len(x)), (128,), (64, 64), swizzle=128)
        for x in (q, k, v)
    ]
    maps.append(tensor_map(out.ctypes.data, "float32", (64, 128), (256,), (32, 64), swizzle=128))
    m.launch("ring", 1, 384, SHARED, [*maps, np.int32(TILES)], seed=seed, **checks)
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    p = (q64 @ k64.T * 0.125).astype(np.float16).astype(np.float64)  # exact: small integers over 8
    return out, (p @ v64).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_kernel_is_right_without_a_bug(seed: int) -> None:
    out, expected = run("NONE", seed)
    np.testing.assert_array_equal(out, expected)


CAUGHT = {
    "NO_FULL_WAIT": (DataRace, "in flight|unordered"),
    "NO_EMPTY_WAIT": (EmulatorError, "race|pending"),
    "NO_PROXY_FENCE": (AsyncMisuse, "without fence.proxy.async"),
    "FEW_BYTES": (EmulatorError, "race|never written|bytes"),
    "MANY_BYTES": ((Deadlock, Divergence), "8192 bytes are missing"),
    "EARLY_RELEASE": (DataRace, "race"),
    "NO_WGMMA_FENCE": (AsyncMisuse, "wgmma.fence is missing"),
    "NO_INIT_FENCE": (AsyncMisuse, "fence.mbarrier_init"),
    "NO_STORE_WAIT": (AsyncMisuse, "wait_group.read is missing"),
    "EXTRA_ARRIVAL": (EmulatorError, "arrival|race"),
    "WRONG_PARITY": (EmulatorError, "race|in flight"),
    "NO_FINAL_WAIT": (AsyncMisuse, "never waited for"),
    "NO_INIT_BARRIER": (EmulatorError, "no mbarrier was initialised|race"),
    "REGISTERS": ((Deadlock, Divergence), "waits for registers|polling at .*setmaxnreg"),
    "ONE_WARP_SKIPS": (Divergence, "one warpgroup"),
    "BAD_SLAB": (Misaligned, "1024-byte aligned"),
}


@pytest.mark.parametrize("bug", CAUGHT)
def test_reported(bug: str) -> None:
    """The rule that was broken is named, whatever the order of threads."""
    error, words = CAUGHT[bug]
    for seed in (0, 1):
        with pytest.raises(error, match=words) as caught:
            run(bug, seed)
        assert SOURCE.name in str(caught.value)  # and the CUDA line


# Registers are not memory: only the values can show these two.
@pytest.mark.parametrize("bug", ["EARLY_SCORES", "EARLY_P"])
def test_wrong_values(bug: str) -> None:
    out, expected = run(bug)
    assert not np.array_equal(out, expected)


@pytest.mark.parametrize("bug", ["NO_FULL_WAIT", "NO_EMPTY_WAIT", "EARLY_RELEASE", "FEW_BYTES"])
def test_shows_without_any_checker(bug: str) -> None:
    """Asynchrony alone makes these visible: garbage until delivered, multiplication at the wait."""
    try:
        out, expected = run(bug, race=False, uninitialised=False)
    except EmulatorError:
        return
    assert not np.array_equal(out, expected)


def test_every_bug_is_tested() -> None:
    assert set(BUGS) == {"NONE", "EARLY_SCORES", "EARLY_P", *CAUGHT}
