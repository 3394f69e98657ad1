"""Few queries against many keys: keys shared out to blocks, parts merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _candidates_split as split
from cuflash._device import Limits
from tests.case import Case
from tests.cases import check
from tests.machines import Emulator, normal, same_bits

# Two parts at least; 1100 and 2050 end inside a tile, 1024 does not.
ONE = Case(batch=(2,), heads=4, heads_kv=2, len_q=1, len_k=1100, head_dim=64)
FEW = Case(batch=(), heads=2, heads_kv=1, len_q=5, len_k=2050, head_dim=72, head_dim_v=40)
MANY = Case(batch=(), heads=1, heads_kv=1, len_q=70, len_k=1500, head_dim=128)
CASES = {
    "one": ONE,
    "one-causal": replace(ONE, causal=True, heads=6),
    "one-window": replace(ONE, window=(600, 0)),
    "one-softcap": replace(ONE, softcap=5.0, len_k=1024),
    "one-bfloat16": replace(ONE, dtype="bfloat16", head_dim=96, head_dim_v=33),
    "few": replace(FEW, causal=True),
    # The first rows see no key of the second part, some none at all.
    "few-above": replace(FEW, causal=True, q_offset=-2),
    "few-window": replace(FEW, window=(300, 5), scale=-0.2),
    "few-options": replace(FEW, bias="1Hqk", sinks="own", dropout=0.2, mask="dense", alibi="H"),
    "few-blocks": replace(FEW, mask="blocks", causal=True, len_q=16),
    "many": replace(MANY, causal=True),
    "many-sinks": replace(MANY, sinks="float32", window=(700, 0)),
    "wide": replace(ONE, head_dim=256, heads=2),
    "float32": replace(FEW, dtype="float32", sinks="own", causal=True),
    "float64": replace(ONE, dtype="float64", head_dim=40, window=(900, 0)),
    "float64-wide": replace(ONE, dtype="float64", head_dim=250, heads=2),
}
PLACES = {
    "sm_80": CASES,
    "sm_75": {name: CASES[name] for name in ("one", "few-window", "many")},
    "sm_90a": {name: CASES[name] for name in ("one", "wide")},
}


def names_of(machine: Any) -> list[str]:
    return [name for name, _, _ in machine.device.launches]


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, id=f"{arch}-{name}")
        for arch, cases in PLACES.items()
        for name, case in cases.items()
    ],
)
def test_forward_passes_rule_t_in_two_schedules(arch: str, case: Case) -> None:
    for seed in (0, 1):
        with Emulator(arch, seed=seed) as machine:
            check(machine, case, gradients=False)
            launched = names_of(machine)
            assert any("_split" in name for name in launched), launched
            assert any(name.startswith("merge_") for name in launched), launched


def test_gradients_of_merged_results() -> None:
    with Emulator("sm_80") as machine:
        check(machine, CASES["few"])


def test_the_same_bits_in_every_run() -> None:
    given = arrays(4, 2, 9, 1500)
    results = []
    for seed in (0, 1, 2):
        with Emulator("sm_80", seed=seed) as machine:
            results.append(machine.attention(*given, causal=True, return_lse=True))
    for out, lse in results[1:]:
        assert same_bits(out, results[0][0])
        assert same_bits(lse, results[0][1])


def arrays(heads: int, heads_kv: int, len_q: int, len_k: int, dim: int = 64) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    q = normal(rng, 1, heads, len_q, dim)
    return q, normal(rng, 1, heads_kv, len_k, dim), normal(rng, 1, heads_kv, len_k, dim)


def test_heads_of_a_group_are_rows_of_one_tile() -> None:
    q, k, v = arrays(8, 2, 1, 1024)
    with Emulator("sm_80") as machine:
        out, lse = machine.attention(q, k, v, return_lse=True)
        ((_, grid, _), _) = machine.device.launches
        assert grid == 2 * 2  # heads of k and v, parts
        whole = machine.attention(q, np.repeat(k, 4, 1), np.repeat(v, 4, 1))
    assert np.abs(out.astype(np.float32) - whole).max() <= 2e-3
    assert out.shape == (1, 8, 1, 64)
    assert lse.shape == (1, 8, 1)


@pytest.mark.parametrize("order", ["HLD", "LHD", "strided"])
def test_results_in_any_memory(order: str) -> None:
    q, k, v = arrays(4, 2, 3, 1030)
    with Emulator("sm_80") as machine:
        plain = machine.attention(q, k, v)
        one = machine.attention(q[:, :, 2:], k, v)
        if order == "LHD":
            swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
            got = machine.attention(*swapped, layout="LHD").swapaxes(1, 2)
            got_one = machine.attention(swapped[0][:, 2:], *swapped[1:], layout="LHD")
            got_one = got_one.swapaxes(1, 2)
        else:
            base = np.full((1, 4, 3, 128), 7, np.float16)
            out = base[..., ::2] if order == "strided" else base[..., :64]
            got = machine.attention(q, k, v, out=out)
            assert np.all(base[..., 1::2] == 7 if order == "strided" else base[..., 64:] == 7)
            out = base[:, :, 2:, ::2] if order == "strided" else base[:, :, 2:, :64]
            got_one = machine.attention(q[:, :, 2:], k, v, out=out)
        assert same_bits(np.ascontiguousarray(got), plain)
        assert same_bits(np.ascontiguousarray(got_one), one)


def test_nan_stays_with_the_rows_that_see_it() -> None:
    q, k, v = arrays(1, 1, 3, 2048)
    with Emulator("sm_80") as machine:
        clean = machine.attention(q, k, v, causal=True, q_offset=2044)
        k[..., 2047, :] = np.nan  # seen by nobody: rows sit at 2044, 2045, 2046
        v[..., 2047, :] = np.inf
        hidden = machine.attention(q, k, v, causal=True, q_offset=2044)
        v[..., 2046, 7] = np.nan  # seen by the last row alone
        seen, lse = machine.attention(q, k, v, causal=True, q_offset=2044, return_lse=True)
    assert same_bits(hidden, clean)
    assert same_bits(seen[..., :2, :], clean[..., :2, :])
    assert np.isnan(seen[..., 2, 7])
    assert np.isfinite(np.delete(seen[..., 2, :], 7, -1)).all()
    assert np.isfinite(lse).all()


def test_rows_without_keys() -> None:
    q, k, v = arrays(2, 2, 4, 1024)
    sinks = np.array([0.5, -1.0], np.float32)
    with Emulator("sm_80") as machine:
        out, lse = machine.attention(q, k, v, causal=True, q_offset=-2, return_lse=True)
        infinite = np.array([np.inf, -np.inf], np.float32)
        drowned, drowned_lse = machine.attention(q, k, v, sinks=infinite, return_lse=True)
        whole, whole_lse = machine.attention(q, k, v, return_lse=True)
        _, with_sink = machine.attention(
            q, k, v, causal=True, q_offset=-2, sinks=sinks, return_lse=True
        )
    assert np.all(out[..., :2, :] == 0)
    assert np.all(lse[..., :2] == -np.inf)
    assert np.allclose(with_sink[0, :, :2], sinks[:, None])
    # inf - inf is NaN, also when the sink is in one part and the keys in another; -inf is nothing.
    assert np.isnan(drowned[0, 0]).all()
    assert np.isnan(drowned_lse[0, 0]).all()
    assert same_bits(drowned[0, 1], whole[0, 1])
    assert same_bits(drowned_lse[0, 1], whole_lse[0, 1])


def test_blocks_fill_the_gpu_whatever_the_batch() -> None:
    candidate = split.SplitForward()
    limits = Limits(sm_count=132, shared_memory=227 * 1024, l2_bytes=50 << 20)
    k = np.empty((2, 8, 131072, 128), np.float16)
    with Emulator("sm_90a"):
        told = cuflash.explain(np.empty((2, 32, 2, 128), np.float16), k, k)
        problem = told.problem
        assert candidate.refusals(problem, "sm_90a") == []
        parts, merge = candidate.plan(problem, "sm_90a", limits).launches
        assert parts.grid == problem.heads_kv * 2 * parts.schedule.splits
        assert parts.grid >= 132
        assert merge.grid * 4 >= 2 * problem.heads
        # Enough rows by themselves.
        told = cuflash.explain(np.empty((2, 32, 1024, 128), np.float16), k, k)
        assert any("fill" in text for text in told.refusals["forward_split"])
        # Keys for one block.
        few = k[:, :, :900]
        told = cuflash.explain(np.empty((2, 32, 1, 128), np.float16), few, few)
        assert any("too few" in text for text in told.refusals["forward_split"])
