"""Hopper's backward kernel on packed sequences, in the emulator: tiles reach over a sequence's end into the rows and
keys of the next one, which must neither be seen nor touched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash._device import use_device
from tests import packed
from tests.case import Case
from tests.machines import Emulator, Numpy, same_bits
from tests.packed import Packed
from tests.test_kernels_backward_sm90_planted import PlantedDevice
from tests.test_kernels_backward_sm90_planted import sources as sources

ARCH = "sm_90a"
BASE = Case(heads=2, heads_kv=1, head_dim=64)
# Sequences without rows, without keys and without both, at the ends and inside; tiles are 128 x 128 here.
EMPTY = (5, 0, 130, 1, 0, 0), (0, 7, 129, 0, 0, 3)
LONG = (70, 150, 33, 129), (200, 90, 140, 1)
CASES = [
    Packed(*EMPTY, replace(BASE, causal=True), tail_q=3, tail_k=9),
    Packed(*EMPTY[::-1], BASE, longer=None),
    Packed(*LONG, replace(BASE, window=(20, 30), layout="LHD"), longer=40, index="int64"),
]
TURNS = Packed((70, 150, 33), (200, 90, 140), replace(BASE, causal=True, q_offset=3, heads=2))
# Other kernels, some ten seconds of compiling apiece.
MORE = [
    Packed(*LONG, replace(BASE, head_dim=128, causal=True), tail_q=1),
    Packed(*LONG, replace(BASE, head_dim=96, dtype="bfloat16", window=(64, 0))),
    Packed(*LONG, replace(BASE, head_dim=24, causal=True)),
    Packed(*LONG, replace(BASE, head_dim=256, causal=True), tail_q=1),
    Packed(*LONG, replace(BASE, softcap=3.0, alibi="H", causal=True)),
    Packed(*LONG, replace(BASE, mask="dense", bias="BHqk", dropout=0.3)),
    Packed(*LONG, replace(BASE, mask="blocks_partial", block=(32, 48), head_dim=128)),
    Packed(*LONG, replace(BASE, score_mod="table", causal=True)),
]


def hopper(machine: Emulator) -> str:
    (name,) = {n for n, *_ in machine.device.launches if n.startswith("backward_sm90_")}
    return name


@pytest.mark.parametrize(
    "case",
    [*CASES, *[pytest.param(c, id=str(c), marks=pytest.mark.thorough) for c in MORE]],
    ids=str,
)
def test_gradients_pass_rule_t_in_three_schedules(case: Packed) -> None:
    for seed, deterministic in ((0, True), (1, False), (2, False)):
        with Emulator(ARCH, seed=seed) as machine:
            packed.check(machine, case, deterministic=deterministic, dlse=seed == 0)
            assert hopper(machine).endswith("packed")


def gradients(case: Packed, seed: int = 0, spoil: Any = lambda arrays: None) -> list[np.ndarray]:
    """Of q, k and v; deterministic."""
    arrays = packed.arrays(case, packed.answer(case).data)
    spoil(arrays)
    q, k, v, dout = (arrays[n] for n in ("q", "k", "v", "dout"))
    cu = case.cu_seqlens()
    options = case.options() | {"causal": case.case.causal, "q_offset": case.case.q_offset}
    with Emulator(ARCH, seed=seed) as machine:
        out, lse = machine.varlen(q, k, v, *cu, return_lse=True, **options)
        run = {"deterministic": True, **options}
        grads = machine.varlen_backward(dout, q, k, v, out, lse, *cu, **run)
        assert "turns" in hopper(machine)
    return list(grads[:3])


def test_turns_give_the_same_bits_in_every_schedule() -> None:
    with Emulator(ARCH, seed=0) as machine:
        _, _, found = packed.check(machine, TURNS, dlse=False, deterministic=True)
    for seed in (5, 11):
        assert all(map(same_bits, found[:3], gradients(TURNS, seed)))


# Without a mask only the ends of sequences hide anything.
NEIGHBOURS = Packed((40, 50, 130), (33, 70, 140), BASE)


def spoiled(bad: float) -> tuple[Any, slice, slice]:
    """What fills one sequence with `bad`, and where its rows and keys are."""
    _, _, _, at_q, at_k = list(NEIGHBOURS.sequences())[1]

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        for name in ("q", "k", "v", "dout"):
            arrays[name][:, at_k if name in "kv" else at_q] = bad

    return spoil, at_q, at_k


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_a_neighbour_holds_never_matters(bad: float) -> None:
    """All of one sequence is bad; the others, before and behind it, keep their bits."""
    spoil, at_q, at_k = spoiled(bad)
    clean, dirty = gradients(NEIGHBOURS), gradients(NEIGHBOURS, spoil=spoil)
    for n, (a, b) in enumerate(zip(clean, dirty, strict=True)):
        own = np.r_[at_q if n == 0 else at_k]
        others = np.delete(a, own, 1)
        assert np.isfinite(others.astype(float)).all()
        assert same_bits(others, np.delete(b, own, 1)), n
        assert not np.isfinite(b[:, own].astype(float)).any(), n


# Without any of these lines rows of the next sequence get into the sums: (file, text, what stands there instead).
MISTAKES = {
    "foreign rows": ("backward_sm90_block.cuh", "(C::PACKED && ends_in(tile))", "false"),
    "foreign keys": (
        "backward_sm90_results.cuh",
        "st_shared_v4(layout.k() + i * 16, make_uint4(0, 0, 0, 0));",
        "",
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows_in_the_numbers(sources: Path, mistake: str) -> None:
    file, text, instead = MISTAKES[mistake]
    before = (sources / file).read_text()
    assert before.count(text) == 1, f"{file} has changed"
    (sources / file).write_text(before.replace(text, instead))
    arrays = packed.arrays(NEIGHBOURS, packed.answer(NEIGHBOURS).data)
    spoil, at_q, at_k = spoiled(np.nan)
    spoil(arrays)
    q, k, v, dout = (arrays[n] for n in ("q", "k", "v", "dout"))
    cu, run = NEIGHBOURS.cu_seqlens(), NEIGHBOURS.options()
    out, lse = Numpy().varlen(q, k, v, *cu, return_lse=True, **run)
    with use_device(PlantedDevice(sources, 0)):
        grads = cuflash.attention_varlen_backward(dout, q, k, v, out, lse, *cu, **run)
    others = [np.delete(grads.q, np.r_[at_q], 1)]
    others += [np.delete(x, np.r_[at_k], 1) for x in (grads.k, grads.v)]
    assert not all(np.isfinite(x.astype(float)).all() for x in others)
