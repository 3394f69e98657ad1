"""Few queries: the query heads that share k and v as rows of one tile, for every option that forward has."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.case import Case, check
from tests.machines import Emulator, normal, same_bits

BASE = Case(batch=(2,), heads_kv=2, len_k=150, head_dim=64)
LONG = replace(BASE, batch=(), len_k=1100)


def case(group: int, len_q: int, base: Case = BASE, **options: Any) -> Case:
    """A case of `group` query heads per head of k and v."""
    return replace(base, heads=2 * group, len_q=len_q, **options)


# Tiles of 16, 32 and 64 rows, and several of 64; groups that no tile is a multiple of.
CASES = {
    "causal": case(3, 5, causal=True),
    "window": case(7, 2, window=(40, 3), q_offset=60),
    "two-warps": case(2, 16, causal=True, layout="LHD"),
    "above": case(8, 33, causal=True, q_offset=-7),
    "alibi": case(8, 16, alibi="BH", causal=True, head_dim=37),
    "alibi-softcap": case(7, 33, alibi="H", softcap=3.0, window=(50, 0), scale=-0.2),
    "mask": case(3, 33, mask="tiles", block=(16, 64)),
    "mask-of-keys": case(8, 16, mask="keys", causal=True),
    "blocks": case(7, 33, mask="blocks", block=(16, 48)),
    "bias": case(3, 33, bias="BHqk", sinks="own", alibi="H"),
    "bias-float": case(8, 16, bias="1H1k", bias_dtype="float32", sinks="own", q_offset=-3),
    "dropout": case(8, 5, dropout=0.3),
    "score": case(7, 16, score_mod="table", causal=True),
    "one": case(8, 1, window=(100, 0)),
    "split": case(8, 2, LONG, causal=True, q_offset=1080),
    "split-all": case(
        3, 33, LONG, mask="dense", bias="Hqk", sinks="own", dropout=0.2, alibi="BH", causal=True
    ),
    "bfloat16": case(7, 1, LONG, dtype="bfloat16", head_dim=128, sinks="float32"),
    "float32": case(3, 33, dtype="float32", sinks="own", alibi="H", causal=True),
    "float64": case(7, 2, LONG, dtype="float64", head_dim=40, window=(900, 0)),
}
# On the others of these architectures, what differs: copies of rows, and tiles of 64 rows for any number of them.
# The rest, whose kernels take a second or two each to compile, with --thorough.
PLACES = {
    "sm_80": [name for name in CASES if name not in ("two-warps", "bfloat16", "float64")],
    "sm_75": ["above", "one"],
    "sm_90": ["split"],
}


def on_every_place() -> list[Any]:
    return [
        pytest.param(
            *(arch, name),
            marks=[] if name in PLACES[arch] else pytest.mark.thorough,
            id=f"{arch}-{name}",
        )
        for arch in PLACES
        for name in CASES
        if arch != "sm_75" or name != "bfloat16"
    ]


@pytest.mark.parametrize(("arch", "name"), on_every_place())
def test_groups_pass_rule_t_in_two_schedules(arch: str, name: str) -> None:
    for seed in (0, 1):
        with Emulator(arch, seed=seed) as machine:
            check(machine, CASES[name], gradients=False)
            launched = [launch for launch, _, _ in machine.device.launches]
            assert any("_grouped" in launch for launch in launched), launched


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (70, 5), "q_offset": 31},
    "alibi": {"alibi": "BH", "causal": True},
    "sinks": {"sinks": "own", "causal": True},
    "bias": {"bias": "Hqk"},
    "mask": {"mask": "dense", "causal": True},
    "blocks": {"mask": "blocks_partial", "block": (16, 32)},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", [BASE, LONG], ids=["whole", "split"])
def test_every_group_and_length(arch: str, option: str, base: Case) -> None:
    with Emulator(arch, seed=2) as machine:
        for group, len_q in itertools.product((2, 3, 7, 8), (1, 2, 5, 16, 33)):
            check(machine, case(group, len_q, base, **OPTIONS[option]), gradients=False)


# ---- work


def work(heads_kv: int) -> tuple[int, int]:
    """Sectors that 8 heads of 4 queries touch in memory, and their matrix instructions."""
    rng = np.random.default_rng(0)
    k = np.broadcast_to(normal(rng, 1, 1, 4096, 64), (1, heads_kv, 4096, 64))
    with Emulator("sm_80", seed=0) as machine:
        machine.device.count = True
        machine.attention(normal(rng, 1, 8, 4, 64), k, k)
        _, _, counters = machine.device.launches[0]
    return counters.sectors, counters.count("mma")


def test_keys_are_read_once_for_a_group() -> None:
    """Against heads that have k and v of their own: the same memory, which they do not know."""
    (sectors, products), (sectors_alone, products_alone) = work(1), work(8)
    keys = 2 * 4096 * 64 * 2 // 32  # sectors of k and v
    assert keys < sectors < 1.3 * keys  # the others: q, and parts of out
    assert sectors_alone > 8 * keys
    # 32 rows in 2 warps of 16, not 4 rows in each of 8.
    assert products_alone == 4 * products


# ---- meaning


def arrays(heads: int, heads_kv: int, len_q: int, len_k: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    q = normal(rng, 1, heads, len_q, 64)
    return q, normal(rng, 1, heads_kv, len_k, 64), normal(rng, 1, heads_kv, len_k, 64)


LENGTHS = [
    pytest.param(130, id="whole"),
    pytest.param(1030, id="split", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("len_k", LENGTHS)
def test_results_in_any_memory(len_k: int) -> None:
    q, k, v = arrays(16, 2, 5, len_k)
    shared = np.broadcast_to(q[:, :1], q.shape)
    with Emulator("sm_80") as machine:
        plain = machine.attention(q, k, v, causal=True)
        # An `out` whose columns are not contiguous is computed beside.
        base = np.full((1, 16, 5, 128), 7, np.float16)
        machine.attention(q, k, v, causal=True, out=base[..., ::2])
        # Rows off 16-byte boundaries are stored element by element.
        odd = np.full((1, 16, 5, 65), 7, np.float16)
        machine.attention(q, k, v, causal=True, out=odd[..., 1:])
        swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
        long = machine.attention(*swapped, causal=True, layout="LHD")
        backwards = machine.attention(q[:, :, ::-1], k, v, causal=True)
        same_q = machine.attention(shared, k, v)
    assert same_bits(np.ascontiguousarray(long.swapaxes(1, 2)), plain)
    assert np.all(base[..., 1::2] == 7)
    assert np.all(odd[..., 0] == 7)
    for got, options, given in (
        (base[..., ::2], {"causal": True}, q),
        (odd[..., 1:], {"causal": True}, q),
        (backwards, {"causal": True}, q[:, :, ::-1]),
        (same_q, {}, shared),
    ):
        exact = oracle.exact(given, k, v, **options)
        honest = oracle.low_precision(given, k, v, **options)
        oracle.check_all("memory", exact, honest, q.dtype, out=got)


@pytest.mark.parametrize("len_k", LENGTHS)
def test_nan_stays_with_the_heads_that_see_it(len_k: int) -> None:
    """Rows of one tile see different keys: an infinity in a hidden one must not reach them."""
    q, k, v = arrays(7, 1, 5, len_k)
    mask = np.ones((7, 5, len_k), bool)
    mask[1, 2, 77] = mask[3, :, 77] = False
    with Emulator("sm_80") as machine:
        clean = machine.attention(q, k, v, mask=mask)
        v[..., 77, 5] = np.nan
        got = machine.attention(q, k, v, mask=mask)
    sees = mask[None, :, :, 77]
    assert np.isnan(got[..., 5][sees]).all()
    assert same_bits(got[~sees], clean[~sees])
    assert same_bits(np.delete(got, 5, -1), np.delete(clean, 5, -1))


def test_dropout_keeps_what_dropout_mask_says() -> None:
    """Which weights are dropped is a function of the place, whatever tile has it: exact in the zeros."""
    q, k = np.zeros((1, 16, 5, 64), np.float16), np.zeros((1, 2, 64, 64), np.float16)
    v = np.broadcast_to(np.eye(64, dtype=np.float16), (1, 2, 64, 64))
    with Emulator("sm_80") as machine:
        out = machine.attention(q, k, v, dropout_p=0.5, seed=11)
    assert np.array_equal(out > 0, cuflash.dropout_mask(11, 0.5, (1, 16, 5, 64)))


def test_explain_says_how_rows_are_made() -> None:
    k = np.empty((4, 2, 600, 64), np.float16)
    with Emulator("sm_90a"):
        told = cuflash.explain(np.empty((4, 16, 5, 64), np.float16), k, k)
        assert told.plan.candidate == "forward_grouped"
        assert "rows of a tile: those of the 8 heads of a group" in told.text
        assert told.plan.launches[0].grid == 4 * 2
        # 40 rows: four warps of 16.
        assert told.plan.launches[0].spec.constant("BLOCK_Q") == 64
        reasons = {
            17: "enough for warpgroups",
            65: "enough for tiles of one head",
        }
        for len_q, reason in reasons.items():
            told = cuflash.explain(np.empty((4, 16, len_q, 64), np.float16), k, k)
            assert any(reason in text for text in told.refusals["forward_grouped"])
            assert told.plan.candidate == "forward_sm90"
        told = cuflash.explain(np.empty((4, 2, 5, 64), np.float16), k, k)
        assert any("of its own" in text for text in told.refusals["forward_grouped"])


def test_no_kernel_of_few_warps_is_chosen_for_more_walks() -> None:
    """66 rows of two heads fill two tiles of 64: no fewer walks over the keys than a tile for each head."""
    k = np.empty((1, 2, 600, 64), np.float16)
    with Emulator("sm_80"):
        told = cuflash.explain(np.empty((1, 4, 33, 64), np.float16), k, k)
        assert told.plan.candidate == "forward"
        assert any("no fewer than 2" in text for text in told.refusals["forward_grouped"])
