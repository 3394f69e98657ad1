"""Kernels whose operands come in slices, because whole tiles exceed shared memory: the plans that need
them, and their results by rule T with every option.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuflash import _candidates, _tuning_wide
from tests import packed
from tests.case import Case, check
from tests.machines import Emulator, normal, same_bits
from tests.packed import Packed
from tests.test_kernels_wide import errors

PLACES = [
    ("sm_86", "float64", (256, 256)),
    ("sm_75", "float64", (256, 200)),
    ("sm_75", "float64", (180, 128)),
    ("sm_75", "float32", (256, 256)),
]


def test_these_places_need_slices() -> None:
    for arch, dtype, dims in PLACES:
        item, dims = np.dtype(dtype).itemsize, _candidates.dim_pair(*dims)
        for kernel in ("backward_dq", "backward_dkdv", "backward_bias", "backward_score"):
            assert _tuning_wide.backward_tile(item, kernel, arch, *dims).slice_columns, kernel
    dims = _candidates.dim_pair(BASE.head_dim, BASE.head_dim)
    assert _tuning_wide.forward_tile(8, "sm_86", *dims).slice_columns


@pytest.mark.parametrize(("arch", "dtype", "dims"), PLACES, ids=str)
def test_slices_are_as_exact_as_the_plain_formula(
    arch: str, dtype: str, dims: tuple[int, int]
) -> None:
    ours, honest, _ = errors(arch, dtype, dims, causal=True)
    for name, error in ours.items():
        assert error <= 2.5 * honest[name], name


BASE = Case(dtype="float64", batch=(), heads=2, heads_kv=1, len_q=70, len_k=90, head_dim=200)
KINDS = [
    replace(BASE, heads=3, causal=True, scale=-0.05),
    replace(BASE, softcap=3.0, alibi="H"),
    replace(BASE, mask="blocks_partial", block=(32, 48), sinks="float32"),
    replace(BASE, bias="Hqk", window=(64, 20), dropout=0.3),
    replace(BASE, score_mod="relative", mask="tiles"),
    replace(BASE, head_dim=193, head_dim_v=30, bias="Hqk"),
]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_each_option_passes_rule_t(case: Case) -> None:
    with Emulator("sm_86", seed=1) as machine:
        check(machine, case, deterministic=True)


def test_packed_sequences_pass_rule_t() -> None:
    case = replace(BASE, causal=True)
    lengths = (5, 0, 80, 1, 0, 40), (0, 7, 90, 0, 0, 66)
    with Emulator("sm_86", seed=1) as machine:
        packed.check(machine, Packed(*lengths, case, tail_q=37, tail_k=5), deterministic=True)


def test_what_nobody_may_see_does_not_matter() -> None:
    """NaN in keys that only some rows see, and in rows that only some keys see."""
    rng = np.random.default_rng(3)
    q, k, v, dout = (normal(rng, 1, 40, 256, dtype="float64") for _ in range(4))
    rows, keys = np.arange(40)[:, None], np.arange(40)
    mask = (rows < 20) == (keys < 20)
    with Emulator("sm_86", seed=2) as machine:
        out, grads = machine.vjp(q, k, v, dout, mask=mask)
        for x in (q, k, v, dout):
            x[:, 25] = np.nan
        again, again_grads = machine.vjp(q, k, v, dout, mask=mask)
    for name, a, b in (
        ("out", out, again),
        *((n, getattr(grads, n), getattr(again_grads, n)) for n in "qkv"),
    ):
        assert same_bits(a[:, :20], b[:, :20]), name
        assert np.isnan(b[:, 25]).all() and np.isnan(b[:, 20:]).any(-1).all(), name
