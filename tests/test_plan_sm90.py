"""When the Hopper kernels run, how their work is dealt out, and what they say when they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuflash import _candidates_sm90, _plan, _tuning_sm90
from cuflash._device import Limits
from cuflash._problem import Operand, Packed, Problem
from tests.test_plan import problem

H200 = Limits(sm_count=132, shared_memory=227 * 1024, l2_bytes=60 * 2**20)
FORWARD = _candidates_sm90.ForwardSm90()


def call(**changes: Any) -> Problem:
    base = {"head_dim": 128, "head_dim_v": 128, "len_q": 4096, "len_k": 4096}
    return problem(**(base | changes))


@pytest.mark.parametrize("dims", _tuning_sm90.FORWARD)
@pytest.mark.parametrize("kind", ["plain", "options", "general"])
def test_tiles_fit_shared_memory_and_registers(dims: tuple[int, int], kind: str) -> None:
    options = {} if kind == "plain" else {kind: True}
    tile = _tuning_sm90.forward_tile(*dims, **options)
    assert _tuning_sm90.forward_shared_bytes(tile, *dims) <= H200.shared_memory
    copying, multiplying = tile.registers
    assert 128 * (copying + tile.groups * multiplying) <= 65536
    # Scores, weights and output, and what a loop needs besides.
    assert tile.block_k // 2 + tile.block_k // 4 + dims[1] // 2 + 24 <= multiplying


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192, 16384])
def test_causal_work_comes_out_even(dim: int, length: int) -> None:
    """The sweep of the papers: 2048 columns of heads, 16384 rows of sequences."""
    batch, heads = 16384 // length, 2048 // dim
    given = {"batch": (batch,), "heads": heads, "heads_kv": heads, "right": 0, "left": None}
    p = call(**given, len_q=length, len_k=length, head_dim=dim, head_dim_v=dim, q_offset=0)
    (launch,) = FORWARD.plan(p, "sm_90a", H200).launches
    costs = _candidates_sm90.tile_costs(p, launch.spec)
    assert launch.schedule.longest_last and launch.grid == H200.sm_count
    ideal = costs.sum() * batch * heads / H200.sm_count
    section = launch.schedule.heads_per_section
    last = _candidates_sm90.last_end(costs, batch * heads, section, H200.sm_count)
    assert last <= 1.03 * ideal + 1  # a tile of keys is what a block's share consists of


def test_tiles_are_dealt_out_to_and_fro() -> None:
    """Three blocks, costs 5 4 3 2 1: 5, then 1 and 2 in the second turn, ..."""
    costs = np.array([5, 4, 3, 2, 1])
    # block 0: 5; block 1: 4 and 1; block 2: 3 and 2.
    assert _candidates_sm90.last_end(costs, 1, 1, 3) == 5
    # Two heads together: 5 5 4 | 4 3 3 reversed | 2 2 1 | 1: 5 + 3 + 2, 5 + 3 + 2, 4 + 4 + 1 + 1.
    assert _candidates_sm90.last_end(costs, 2, 2, 3) == 10


def test_costs_count_the_tiles_that_rows_see() -> None:
    p = call(right=0, left=None, len_q=300, len_k=500, q_offset=200)
    spec = FORWARD.plan(p, "sm_90a", H200).launches[0].spec
    assert (spec.constant("BLOCK_Q"), spec.constant("BLOCK_K")) == (128, 128)
    # The last rows of three tiles see 328, 456 and 500 keys.
    assert list(_candidates_sm90.tile_costs(p, spec)) == [1 + 4, 1 + 4, 1 + 3]


def odd(p: Problem, **changes: Any) -> Problem:
    """The same call with another layout of k."""
    k = Operand((2, 4, 4096, 128), (4 * 4096 * 256, 4096 * 256, 256, 2), True)
    return replace(p, operands=(("k", replace(k, **changes)),))


@pytest.mark.parametrize(
    ("p", "arch", "reason"),
    [
        (call(), "sm_90", "needs sm_90a, this is sm_90"),
        (call(), "sm_120", "needs sm_90a"),
        (call(dtype="float32"), "sm_90a", "float32 is not one of"),
        (call(head_dim=100, head_dim_v=100), "sm_90a", "head_dim 100: rows are not whole 16-byte"),
        (odd(call(), aligned=False), "sm_90a", "k: rows do not begin on 16-byte boundaries"),
        (odd(call(), strides=(0, 256, 0, 2)), "sm_90a", "k: strides (0, 256, 0, 2) bytes"),
        (odd(call(), strides=(0, -256, 256, 2)), "sm_90a", "k: strides (0, -256, 256, 2) bytes"),
        (call(head_dim=320), "sm_90a", "head_dim 320 > 256"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_refusals_say_why(p: Problem, arch: str, reason: str) -> None:
    (found,) = [text for text in FORWARD.refusals(p, arch) if reason in text]
    assert found
    plans = [c.name for c in _plan.CANDIDATES if not c.refusals(p, arch)]
    assert "forward_sm90" not in plans
    assert "forward" in plans or p.head_dim > 256


def test_what_is_broadcast_or_packed_is_served() -> None:
    shared = odd(call(), shape=(1, 1, 4096, 128), strides=(0, 0, 256, 2))
    packed = call(packed=Packed(9000, 9000, True), batch=(7,))
    for p in (call(), shared, packed, call(head_dim=8, head_dim_v=256)):
        assert FORWARD.refusals(p, "sm_90a") == []
