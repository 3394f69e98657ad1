"""Mistakes planted in the synchronisation of the Hopper forward kernel do not pass the emulator.

On a GPU most of them would, or fail once in a thousand launches. Each is one line taken out of the shipped
sources.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash import _compile, _prepare
from tests.cases import Case, answer
from tests.emulator import device as emulated
from tests.emulator.errors import AsyncMisuse, DataRace, EmulatorError
from tests.machines import Emulator, Numpy

# Several tiles of queries for one of the four multiprocessors, several tiles of keys, values that are
# looked at and repaired.
CASE = Case(batch=(), heads=5, heads_kv=1, len_q=260, len_k=390, head_dim=128, causal=True)


def arrays() -> tuple[np.ndarray, ...]:
    data = answer(CASE).data
    v = data.v.copy()
    v[0, 300, 5] = np.nan
    return data.q, data.k, v


def run(seed: int, options: dict[str, Any]) -> np.ndarray:
    with Emulator("sm_90a", seed=seed) as machine:
        out = machine.attention(*arrays(), **options)
        assert [name for name, *_ in machine.device.launches] == ["forward_sm90_f16_d128_linear"]
        return out


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """plant(file, text, instead): the kernels from now on are without `text`, whatever its spaces are."""

    def change(name: str, text: str, instead: str = "") -> None:
        folder = tmp_path / "kernels_cu"
        shutil.copytree(_compile.ROOT, folder)
        path = folder / name
        pattern = r"\s+".join(map(re.escape, text.split()))
        changed, count = re.subn(pattern, lambda _: instead, path.read_text())
        assert count == 1, f"{name} has {count} times {text!r}"
        path.write_text(changed)
        monkeypatch.setattr(_compile, "ROOT", folder)
        _compile.digest.cache_clear()
        _prepare.forget()

    monkeypatch.setattr(emulated, "_ptx", {})
    monkeypatch.setattr(emulated, "_modules", {})
    yield change
    monkeypatch.undo()
    _compile.digest.cache_clear()
    _prepare.forget()


def test_right_without_a_mistake() -> None:
    options = CASE.options()
    exact = Numpy().attention(*(x.astype(np.float64) for x in arrays()), **options)
    for seed in (0, 1):
        out = run(seed, options)
        assert np.array_equal(np.isnan(out), np.isnan(exact))
        assert np.isnan(out[:, 170:, 5]).all() and not np.isnan(out[:, :170]).any()
        assert np.allclose(out.astype("f8"), exact, atol=4e-3, equal_nan=True)


RING, FEED, USE = "sm90_ring.cuh", "forward_sm90.cuh", "forward_sm90_consumer.cuh"
ANY = EmulatorError
# What is left out (or put in its place), and what the emulator says.
CAUGHT: dict[str, tuple[tuple[str, ...], type[EmulatorError], str]] = {
    "full wait": (
        (RING, "{ mbarrier_wait(full(n), n / STAGES % 2); }", "{}"),
        *(ANY, "in flight|never written|race"),
    ),
    "empty wait": (
        (RING, "mbarrier_wait(empty(n), n / STAGES % 2 ^ 1);"),
        *(ANY, "race|pending|in flight"),
    ),
    "fence before the store": (
        (USE, "fence_proxy_async(); named_barrier_sync", "named_barrier_sync"),
        *(AsyncMisuse, "without fence.proxy.async"),
    ),
    "fence after a repair": (
        (FEED, "fence_proxy_async(); const bool found", "const bool found"),
        *(AsyncMisuse, "without fence.proxy.async"),
    ),
    "wait for the look at values": (
        (USE, "mbarrier_wait(l.looked(looks), looks / C::STAGES % 2);"),
        *(ANY, "race|never written"),
    ),
    "barrier before the store": (
        (USE, "named_barrier_sync(BARRIER_GROUP + group(), WARPGROUP); if", "if"),
        *(ANY, "race|never written|without fence"),
    ),
    "wait for the store before": (
        (USE, "if (threadIdx.x % WARPGROUP == 0) bulk_wait_read<0>(); named", "named"),
        *(ANY, "wait_group.read|race"),
    ),
    "end of the last store": (
        (USE, "if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();"),
        *(ANY, "wait_group.read is missing"),
    ),
    "wgmma fence": (
        (USE, "take_turn(); wgmma_fence();", "take_turn();"),
        *(AsyncMisuse, "wgmma.fence is missing"),
    ),
    "late release": (
        (
            USE,
            "wgmma_wait<1>(); wgmma_pin(s); l.k.release(k_count++);",
            "l.k.release(k_count++); wgmma_wait<1>(); wgmma_pin(s);",
        ),
        *(DataRace, "race"),
    ),
}


@pytest.mark.parametrize("mistake", CAUGHT)
def test_reported(mistake: str, plant: Any) -> None:
    """The rule that was broken is named, in some order of threads."""
    change, error, words = CAUGHT[mistake]
    plant(*change)

    def in_four_orders() -> None:
        for seed in (0, 1, 2, 3):
            run(seed, CASE.options())

    with pytest.raises(error, match=words):
        in_four_orders()


def test_an_output_that_is_not_rescaled_is_wrong(plant: Any) -> None:
    """Registers are not memory: only the values can show this."""
    case = replace(CASE, magnitude=5.0)
    data, options, exact = answer(case).data, case.options(), answer(case).exact
    plant(USE, "softmax.rescale(o, rise);")
    with Emulator("sm_90a") as machine:
        out = machine.attention(data.q, data.k, data.v, **options)
    assert not np.allclose(out.astype("f8"), exact.out, atol=2e-2)
