"""The kernels' masks, biases, sinks, dropout and score functions in the emulator, against float64.

Kernels are compiled per combination of options, seconds each, so cases share head dim 64 (its
kernels serve 40 too) and a handful of combinations; lengths, groups, shapes and probabilities are
run-time values and vary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import packed
from tests.case import Case, answer, check
from tests.cases import OPTIONS, covering_variants
from tests.machines import Emulator
from tests.packed import Packed

BASE = Case(batch=(), heads=2, heads_kv=1, len_q=70, len_k=137, head_dim=64)
# One of each kind of kernel, for the dtypes and architectures that share its source.
KINDS = [
    replace(BASE, mask="tiles", causal=True),
    replace(BASE, mask="blocks_partial", block=(32, 48)),
    replace(BASE, bias="Hqk", window=(64, 20)),
    replace(BASE, sinks="float32", causal=True, q_offset=-20),
    replace(BASE, dropout=0.3),
]
PLACES = {
    "sm_80": [
        *(case for case in OPTIONS if case.score_mod in (None, "gates", "curved")),
        *(replace(case, dtype="bfloat16") for case in (KINDS[0], KINDS[2])),
        replace(KINDS[0], head_dim=40, len_q=129, dropout=0.5),
        replace(KINDS[1], head_dim=128, len_q=65, len_k=130, causal=True),
    ],
    "sm_75": [KINDS[1], KINDS[2]],
    "sm_90": [KINDS[1], KINDS[4]],
}


def on_every_place() -> list[Any]:
    return [
        pytest.param(arch, case, id=f"{arch}-{case}")
        for arch, suite in PLACES.items()
        for case in suite
    ]


@pytest.mark.parametrize(("arch", "case"), on_every_place())
def test_each_option_alone_passes_rule_t_in_two_schedules(arch: str, case: Case) -> None:
    for seed, deterministic in ((0, True), (1, False)):
        with Emulator(arch, seed=seed) as machine:
            check(machine, case, deterministic=deterministic, dlse=seed == 0)


COVERING = covering_variants(
    dtype=("float16",),
    dims=[(64, 64), (40, 64), (64, 33)],
    lengths=[(1, 1), (1, 130), (64, 64), (65, 33), (33, 129), (17, 5), (66, 131)],
    batch=[(2,), (), (1, 2)],
)


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_pairs_of_options_pass_rule_t(case: Case) -> None:
    """Every pair of values of any two options, in two schedules, reproducible and not."""
    for seed in (case.seed, case.seed + 1):
        with Emulator("sm_80", seed=seed) as machine:
            check(machine, case, deterministic=seed % 2 == 0, dlse=seed % 3 == 0)


LENGTHS = ((5, 0, 130, 1, 0, 40), (0, 7, 129, 0, 0, 66))
PACKED = [
    Packed(*LENGTHS, replace(BASE, causal=True), tail_q=37, tail_k=5),
    Packed(*LENGTHS, replace(BASE, window=(20, 3), layout="LHD"), longer=None, index="int64"),
    Packed(
        *LENGTHS,
        replace(BASE, bias="1H1k", mask="keys", sinks="own", dropout=0.17, score_mod="table"),
        tail_q=3,
        longer=9,
    ),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_pass_rule_t_in_two_schedules(case: Packed) -> None:
    for seed, deterministic in ((0, True), (1, False)):
        with Emulator("sm_80", seed=seed) as machine:
            packed.check(machine, case, deterministic=deterministic, dlse=seed == 0)


# ---- work follows what is visible

LENGTH, BLOCK = 512, 128
BLOCKS = LENGTH // BLOCK


def patterns() -> dict[str, np.ndarray]:
    """Blocks of a quarter, a half, and all of the matrix; rows and columns of different lengths."""
    rng = np.random.default_rng(1)
    ranks = rng.permutation(BLOCKS * BLOCKS).reshape(BLOCKS, BLOCKS)
    return {
        "1": np.ones((BLOCKS, BLOCKS), bool),
        "1/2": ranks < 8,
        "1/4": ranks < 4,
        "one column": np.arange(BLOCKS) == np.array([[2]] * BLOCKS),
        "one row": (np.arange(BLOCKS) == 1)[:, None] & np.ones(BLOCKS, bool),
        "none": np.zeros((BLOCKS, BLOCKS), bool),
    }


def products(mask: Any, deterministic: bool) -> dict[str, int]:
    """Matrix instructions of every kernel of a forward and a backward pass."""
    data = answer(replace(BASE, heads=1, len_q=LENGTH, len_k=LENGTH)).data
    with Emulator("sm_80", seed=0) as machine:
        machine.device.count = True
        out, lse = machine.attention(data.q, data.k, data.v, mask=mask, return_lse=True)
        arrays = (data.dout, data.q, data.k, data.v, out, lse)
        machine.backward(*arrays, mask=mask, deterministic=deterministic)
        counts: dict[str, int] = {}
        for name, _, counters in machine.device.launches:
            counts[name] = counts.get(name, 0) + counters.count("mma")
    return {name: n for name, n in counts.items() if n}


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
@pytest.mark.parametrize("kind", ["blocks", "dense"])
def test_work_follows_density(kind: str, deterministic: bool) -> None:
    """An absent block costs nothing, in forward, dQ and dK/dV alike; nor do tiles of False."""

    def made(blocks: np.ndarray) -> Any:
        if kind == "blocks":
            return cuflash.BlockMask.from_blocks(blocks, block_size=BLOCK, shape=(LENGTH, LENGTH))
        return np.kron(blocks, np.ones((BLOCK, BLOCK), bool))

    counts = {name: products(made(blocks), deterministic) for name, blocks in patterns().items()}
    full = counts["1"]
    assert any(name.startswith("forward") for name in full)
    assert any(name.startswith("backward_dkdv") for name in full)
    assert len(full) == (3 if deterministic else 2), full
    for name, blocks in patterns().items():
        for kernel, all_of_them in full.items():
            visited = counts[name].get(kernel, 0)
            assert visited * blocks.size == all_of_them * int(blocks.sum()), (name, kernel)


def test_partial_blocks_cost_what_their_tiles_cost() -> None:
    """Blocks of 128 whose visible elements lie in one tile; and a band that cuts blocks away."""
    dense = np.zeros((LENGTH, LENGTH), bool)
    dense[:128, :64] = dense[200, 70] = dense[400:, 300:310] = True
    mask = cuflash.BlockMask.from_dense(dense, block_size=BLOCK)
    full = products(cuflash.BlockMask.from_dense(dense | True, block_size=BLOCK), True)
    assert mask.density < 0.04
    # Four query tiles of 128 by eight key tiles of 64: three of them hold something.
    got = products(mask, True)
    for kernel, all_of_them in full.items():
        assert got[kernel] <= all_of_them * 6 // 32, kernel
    forward = next(name for name in full if name.startswith("forward"))
    assert got[forward] * 32 == full[forward] * 3
