"""What Hopper's backward kernel is made of: machine instructions, and exact counts of its work in the emulator."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.cases import Case, answer
from tests.machines import Emulator
from tests.test_disassembly import count, opcodes, specialization

SQUARE = Case(batch=(), heads=1, heads_kv=1, len_q=256, len_k=256)


@pytest.mark.parametrize(("element", "dim"), [("f16", 64), ("bf16", 96), ("f16", 128)])
def test_machine_instructions(element: str, dim: int) -> None:
    """Five products by warpgroups, loads and reductions by the copy engine, and nothing in local memory."""
    kernel = ("sm_90a", "backward_sm90", element, dim, "accumulate_linear")
    found = opcodes(*kernel)
    tile, slabs = specialization(*kernel).constant("BLOCK_Q"), -(-dim // 64)
    steps = {"s and dp": 2 * dim // 16, "dv and dk": 2 * tile // 16, "dq": 128 // 16}
    assert count(found, r"HGMMA\.") == sum(steps.values()), found
    # Q, dO, K and V, a slab of 64 columns at a time.
    assert count(found, r"UTMALDG\.5D") == 4 * slabs, found
    assert count(found, r"UBLKRED") == 1, found
    assert count(found, r"STSM\.16\.M88\.4") == tile // 16, found
    assert count(found, r"STG\.E(\.EF)?\.128") > 0, found
    assert count(found, r"USETMAXREG") == 2, found
    assert count(found, r"(LDL|STL|HMMA|LDSM)\b") == 0, found


@functools.cache
def backward_counts(case: Case) -> Any:
    """Counters of the Hopper kernel of one backward."""
    data = answer(case).data
    with Emulator("sm_90a", seed=0) as machine:
        machine.device.count = True
        copies = map(machine.device.memory.copy, (data.q, data.k, data.v, data.dout))
        q, k, v, dout = copies
        options = case.options()
        out, lse = machine.attention(q, k, v, return_lse=True, **options)
        machine.backward(dout, q, k, v, out, lse, **options)
        return next(c for n, _, c in machine.device.launches if n.startswith("backward_sm90"))


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_shared_memory_has_no_bank_conflicts(dim: int) -> None:
    """dS on its way to the products of dQ, dQ on its way out, statistics, gradients: the fewest wavefronts."""
    counters = backward_counts(replace(SQUARE, head_dim=dim))
    conflicts = {at: n.bank_conflicts for at, n in counters.lines.items() if n.bank_conflicts}
    assert not conflicts
    instructions: Counter[str] = Counter()
    for name, times in counters.instructions.items():
        instructions[name.partition(".sync")[0]] += times
    assert instructions["stmatrix"] == 2 * 256 // 16 * 8  # two key tiles, eight warps
    reductions = [n for name, n in counters.instructions.items() if "cp.reduce" in name]
    assert reductions == [2 * 256 // (128 if dim == 64 else 64)]


def test_work_follows_the_visible_tiles() -> None:
    """Of 4 x 2 tiles of 64 queries and 128 keys, a causal call of 256 visits 4 and 2."""
    full = backward_counts(replace(SQUARE, head_dim=128))
    causal = backward_counts(replace(SQUARE, head_dim=128, causal=True))
    products = [
        sum(n for name, n in counters.instructions.items() if name.startswith("wgmma.mma_async"))
        for counters in (full, causal)
    ]
    assert products[1] * 8 == products[0] * 6
