"""Mistakes planted in Hopper's backward kernel, one wait or fence left out at a time: the emulator must catch each.

On a GPU most of them would pass most of the time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cuflash import _compile, _prepare
from cuflash._device import use_device
from tests.emulator.device import EmulatedDevice, EmulatedKernel
from tests.emulator.errors import AsyncMisuse, DataRace, EmulatorError, Uninitialised
from tests.emulator.module import Module
from tests.emulator.nvrtc import Nvrtc
from tests.machines import Numpy, normal

CONSUMER, FEED = "backward_sm90.cuh", "backward_sm90_feed.cuh"
# What is left out: (file, text that occurs there once, what stands there instead, error, its words).
MISTAKES = {
    "q full": (
        CONSUMER,
        "if (part == 0) mbarrier_wait(layout.q_full(visit.stage()), visit.parity());",
        "",
        DataRace,
        "in flight|unordered",
    ),
    "dout full": (
        CONSUMER,
        "if (part == 0) mbarrier_wait(layout.dout_full(visit.stage()), visit.parity());",
        "",
        DataRace,
        "in flight|unordered",
    ),
    "keys full": (
        "backward_sm90_scores.cuh",
        "mbarrier_wait(layout.keys_full(), 0);",
        "",
        Uninitialised,
        "has not been waited for",
    ),
    "q empty": (
        FEED,
        "mbarrier_wait(layout.q_empty(visit.stage()), visit.parity() ^ 1);",
        "",
        EmulatorError,
        "race|pending|arrival",
    ),
    "dout empty": (
        FEED,
        "mbarrier_wait(layout.dout_empty(visit.stage()), visit.parity() ^ 1);",
        "",
        EmulatorError,
        "race|pending|arrival",
    ),
    "dq full": (
        FEED,
        "mbarrier_wait(layout.dq_full(), visit.dq_parity());",
        "",
        EmulatorError,
        "race|never written|without fence.proxy.async",
    ),
    "dq empty": (
        CONSUMER,
        "mbarrier_wait(layout.dq_empty(), visit.dq_parity() ^ 1);",
        "",
        EmulatorError,
        "race|wait_group.read",
    ),
    "dq read": (
        FEED,
        "bulk_wait_read<0>();\n        mbarrier_arrive(layout.dq_empty());",
        "mbarrier_arrive(layout.dq_empty());",
        EmulatorError,
        "race|wait_group.read",
    ),
    "barrier of ds": (
        CONSUMER,
        "named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);\n            wgmma_fence();",
        "wgmma_fence();",
        EmulatorError,
        "race|never written|without fence.proxy.async",
    ),
    "fence of ds": (
        "backward_sm90_products.cuh",
        "a[k]);\n        fence_proxy_async();",
        "a[k]);",
        AsyncMisuse,
        "without fence.proxy.async",
    ),
    "fence of dq": (
        CONSUMER,
        "fence_proxy_async();\n        arrive(layout.dq_full());",
        "arrive(layout.dq_full());",
        AsyncMisuse,
        "without fence.proxy.async",
    ),
    "fence of repairs": (
        "backward_sm90_results.cuh",
        "fence_proxy_async();\n        repaired |=",
        "repaired |=",
        AsyncMisuse,
        "without fence.proxy.async",
    ),
    "early release of q": (
        CONSUMER,
        "wgmma_wait<0>();\n        wgmma_pin(dv);",
        "arrive(layout.q_empty(visit.stage()));\n        wgmma_wait<0>();\n        wgmma_pin(dv);",
        EmulatorError,
        "race|arrival",
    ),
    "barriers unfenced": (
        "backward_sm90_layout.cuh",
        "fence_mbarrier_init();",
        "",
        AsyncMisuse,
        "fence.mbarrier_init",
    ),
}
# The same of head dims above 128.
DIVIDED = "backward_sm90_divided.cuh"
DIVIDED_MISTAKES = {
    "divided: dq full": (
        FEED,
        "mbarrier_wait(layout.dq_full(), visit.dq_parity(SLABS, slab));",
        "",
        EmulatorError,
        "race|never written|without fence.proxy.async",
    ),
    "divided: dq empty": (
        DIVIDED,
        "mbarrier_wait(layout.dq_empty(), visit.dq_parity(TileK::SLABS, slab) ^ 1);",
        "",
        EmulatorError,
        "race|wait_group.read",
    ),
    "divided: dq read": (
        FEED,
        "bulk_wait_read<0>();\n            __syncwarp();",
        "__syncwarp();",
        EmulatorError,
        "race|wait_group.read",
    ),
    "divided: barrier of ds": (
        DIVIDED,
        "if constexpr (C::ACCUMULATE_DQ) named_barrier_sync(CONSUMER_BARRIER, CONSUMERS);",
        "",
        EmulatorError,
        "race|never written|without fence.proxy.async",
    ),
    "divided: fence of dq": (
        DIVIDED,
        "fence_proxy_async();\n            arrive(layout.dq_full());",
        "arrive(layout.dq_full());",
        AsyncMisuse,
        "without fence.proxy.async",
    ),
    "divided: early release of dout": (
        DIVIDED,
        "wgmma_wait<0>();\n        wgmma_pin(gradient);",
        "arrive(layout.dout_empty(visit.stage()));\n        wgmma_wait<0>();\n        wgmma_pin(gradient);",
        EmulatorError,
        "race|arrival",
    ),
}


class PlantedDevice(EmulatedDevice):
    """Runs one kernel from a folder of sources of its own."""

    def __init__(self, sources: Path, seed: int) -> None:
        super().__init__("sm_90a", seed=seed)
        self._sources = sources

    def load(self, spec: _compile.Specialization) -> EmulatedKernel:
        kernel = super().load(spec) if spec.kernel != "backward_sm90" else None
        if kernel is not None:
            return kernel
        kernel = object.__new__(EmulatedKernel)
        kernel._device, kernel._spec = self, spec
        kernel._module = module(spec, self._sources)
        return kernel


@functools.cache
def module(spec: _compile.Specialization, sources: Path) -> Module:
    options = (*_compile.OPTIONS, f"-I{sources}")
    name = f"{spec.name}.cu"
    return Module(Nvrtc().ptx(_compile.source(spec), "compute_90a", options, name=name))


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Path]:
    """A copy of the kernels to plant mistakes in."""
    folder = tmp_path / "kernels_cu"
    shutil.copytree(_compile.ROOT, folder)
    yield folder
    _prepare.forget()


def plant(sources: Path, mistake: str) -> tuple[type[Exception], str]:
    """Put a mistake into the sources; what must be raised."""
    file, text, instead, error, words = (MISTAKES | DIVIDED_MISTAKES)[mistake]
    path = sources / file
    before = path.read_text()
    assert before.count(text) == 1, (
        f"{file} has changed: {text!r} occurs {before.count(text)} times"
    )
    path.write_text(before.replace(text, instead))
    return error, words


def gradients(sources: Path, seed: int, bad: bool = False, dim: int = 128) -> list[np.ndarray]:
    """Three tiles of queries see a tile of keys and a bit: every buffer comes round. `bad`: with NaN in some rows."""
    import cuflash

    rng = np.random.default_rng(3)
    q, dout = (normal(rng, 1, 250, dim) for _ in range(2))
    k, v = (normal(rng, 1, 140, dim) for _ in range(2))
    if bad:
        dout[0, [115, 120, 126, 150], 3] = np.nan
    # Where there is no dQ, no other fence follows that of repairs.
    wrt = ("k", "v") if bad else ("q", "k", "v")
    out, lse = Numpy().attention(q, k, v, causal=True, return_lse=True)
    with use_device(PlantedDevice(sources, seed)):
        grads = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, wrt=wrt)
    return [getattr(grads, name) for name in wrt]


def test_the_kernel_is_right_without_a_mistake(sources: Path) -> None:
    """Sources of a folder of their own give the same bits."""
    for seed in (0, 1):
        a, b = gradients(sources, seed), gradients(_compile.ROOT, seed)
        for x, y in zip(a, b, strict=True):
            assert np.isfinite(x.astype(float)).all() and np.array_equal(x, y)


@pytest.mark.parametrize(
    "mistake",
    [*MISTAKES, *[pytest.param(name, marks=pytest.mark.thorough) for name in DIVIDED_MISTAKES]],
)
def test_a_planted_mistake_is_caught(sources: Path, mistake: str) -> None:
    error, words = plant(sources, mistake)
    dim = 256 if mistake in DIVIDED_MISTAKES else 128
    caught = None
    for seed in (0, 1, 2):
        try:
            gradients(sources, seed, bad="repairs" in mistake, dim=dim)
        except EmulatorError as raised:
            caught = raised
            break
    assert caught is not None, "nobody noticed"
    with pytest.raises(error, match=words):
        raise caught
