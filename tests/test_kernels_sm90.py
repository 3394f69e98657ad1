"""The forward kernel of warpgroups, in the emulator, against float64: head dims, groups, mask edges, scores,
in three schedules. Gradients of these calls are those of the portable kernels, tested beside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import packed
from tests.cases import OPTIONS, Case, answer, check, covering
from tests.machines import Emulator, Numpy, same_bits
from tests.packed import Packed

ARCH = "sm_90a"
# Tiles have 128 or 192 rows and 64, 96 or 128 keys; an emulated GPU has four multiprocessors, so more than
# four tiles make blocks take several.
BASE = Case(batch=(), heads=1, heads_kv=1)
HEAD_DIMS = {
    8: replace(BASE, heads=3, len_q=65, len_k=130, causal=True),
    32: replace(BASE, heads=8, len_q=64, len_k=64),
    40: replace(BASE, len_q=193, len_k=129, causal=True),
    64: replace(BASE, heads=3, len_q=390, len_k=400, causal=True),
    80: replace(BASE, len_q=127, len_k=290, window=(64, 65)),
    96: replace(BASE, heads=7, len_q=129, len_k=257, causal=True),
    128: replace(BASE, heads=6, heads_kv=2, len_q=257, len_k=385, causal=True),
    160: replace(BASE, len_q=130, len_k=291, window=(0, 64)),
    192: replace(BASE, heads=8, len_q=17, len_k=290),  # fewer rows, and the heads share tiles
    256: replace(BASE, len_q=130, len_k=257, causal=True),
}
HEAD_DIMS = {d: replace(case, head_dim=d) for d, case in HEAD_DIMS.items()}
VALUE_DIMS = [
    replace(BASE, head_dim=64, head_dim_v=128, heads=3, len_q=65, len_k=170, causal=True),
    replace(BASE, head_dim=128, head_dim_v=64, len_q=130, len_k=265),
    replace(BASE, head_dim=192, head_dim_v=128, len_q=166, len_k=330, causal=True),
    replace(BASE, head_dim=8, head_dim_v=256, len_q=20, len_k=165, causal=True),
]
SHAPED = [
    replace(HEAD_DIMS[64], softcap=3.0),
    replace(HEAD_DIMS[96], softcap=20.0, alibi="H", scale=-0.3),
    replace(HEAD_DIMS[128], alibi="H", scale=0.0),
    replace(HEAD_DIMS[192], alibi="H", causal=True),
    replace(HEAD_DIMS[256], softcap=5.0, window=(40, 3)),
]
PLACES = [
    replace(HEAD_DIMS[64], scale=-0.125),
    replace(HEAD_DIMS[64], batch=(2, 3), broadcast_kv=True, len_q=70, layout="LHD"),
    replace(HEAD_DIMS[128], q_offset=-130, window=(50, 20), causal=False),
    replace(HEAD_DIMS[128], heads=2, heads_kv=2, len_q=1, len_k=1),
    replace(HEAD_DIMS[128], batch=(5,), heads=3, heads_kv=1, len_q=20, len_k=150),
    replace(HEAD_DIMS[64], magnitude=20.0),
]
FLOAT16 = [*HEAD_DIMS.values(), *VALUE_DIMS, *SHAPED, *PLACES]
BFLOAT16 = [
    replace(c, dtype="bfloat16")
    for c in (HEAD_DIMS[64], HEAD_DIMS[96], HEAD_DIMS[128], VALUE_DIMS[2], HEAD_DIMS[256])
]


def kernels(machine: Any) -> list[str]:
    """Names of what an emulated device has launched."""
    return [name for name, *_ in machine.device.launches]


@pytest.mark.parametrize("case", FLOAT16 + BFLOAT16, ids=str)
def test_passes_rule_t_in_three_schedules(case: Case) -> None:
    for seed in (0, 1, 2):
        with Emulator(ARCH, seed=seed) as machine:
            check(machine, case, gradients=False)
        (name,) = kernels(machine)
        assert name.startswith("forward_sm90_")


COVERING = covering(
    dtype=("float16", "bfloat16"),
    lengths=[(1, 1), (1, 130), (192, 128), (193, 257), (33, 129), (17, 5), (129, 385)],
    dims=[(64, 64), (128, 128), (40, 64)],
    heads=[(2, 2), (6, 2), (7, 1)],
    batch=[(2,), (), (1, 2)],
)


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_pairs_of_options_pass_rule_t(case: Case) -> None:
    """Every pair of values of any two options."""
    with Emulator(ARCH, seed=case.seed) as machine:
        check(machine, case, gradients=False)


def places(name: str, x: np.ndarray) -> np.ndarray:
    """The same numbers elsewhere in memory: rows apart, heads broadcast, rows backwards, columns apart."""
    if name == "apart":
        room = np.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 24), np.nan, x.dtype)
        view = room[..., 2:-1, 16:-8]
    elif name == "broadcast":
        return np.broadcast_to(x[:, :1].copy(), x.shape)
    elif name == "backwards":
        view = np.empty_like(x)[..., ::-1, :]
    else:
        view = np.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2]
    view[...] = x
    return view


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("apart", "forward_sm90_f16_d64_linear"),
        ("broadcast", "forward_sm90_f16_d64_linear"),
        ("backwards", "forward_f16_d64_linear"),
        ("columns", "forward_f16_d64_shaped"),
    ],
)
def test_any_strides(name: str, kernel: str) -> None:
    """What the copy engine cannot step along goes to the portable kernel; results are the same numbers."""
    case = Case(batch=(2,), heads=4, heads_kv=4, len_q=70, len_k=200, causal=True)
    q, k, v = (
        places(name, x) for x in (answer(case).data.q, answer(case).data.k, answer(case).data.v)
    )
    out = places("apart", np.zeros_like(q)) if name == "apart" else None
    with Emulator(ARCH) as machine:
        got = machine.attention(q, k, v, causal=True, out=out)
        assert kernels(machine) == [kernel]
        plain = machine.attention(*map(np.ascontiguousarray, (q, k, v)), causal=True)
    if name in ("apart", "broadcast"):
        assert same_bits(np.ascontiguousarray(got), plain)
    assert np.allclose(got.astype("f4"), plain.astype("f4"), atol=2e-3)
    if out is not None:
        assert got is out and np.isnan(out.base).sum() == out.base.size - out.size


def test_infinities_and_nans_reach_the_pairs_that_see_them() -> None:
    """Beside finite rows in the same tiles, and behind packed sequences."""
    case = Case(batch=(), heads=2, heads_kv=1, len_q=300, len_k=300, head_dim=128)
    data = answer(case).data
    v = data.v.copy()
    v[0, 130, 3], v[0, 131, 5], v[0, 290, 7] = np.nan, np.inf, -np.inf
    for options in ({"causal": True}, {"window": (40, 30)}):
        exact = Numpy().attention(*(x.astype("f8") for x in (data.q, data.k, v)), **options)
        for seed in (0, 1):
            with Emulator(ARCH, seed=seed) as machine:
                out = machine.attention(data.q, data.k, v, **options)
            assert np.array_equal(np.isfinite(out), np.isfinite(exact))
            assert np.allclose(out.astype("f8"), exact, atol=4e-3, equal_nan=True)
    ends = np.array([0, 140, 300], np.int32)
    with Emulator(ARCH) as machine:
        out = machine.varlen(data.q, data.k, v, ends, ends)
        assert kernels(machine)[-1].startswith("forward_sm90_")
    finite = np.isfinite(out)
    # The first sequence ends inside a tile whose other rows are the second one's.
    assert not finite[:, :140, [3, 5]].any() and not finite[:, 140:, 7].any()
    assert finite[:, :140, 7].all() and finite[:, 140:, [3, 5]].all()


OPTION = Case(batch=(2,), heads=3, heads_kv=1, len_q=150, len_k=301, head_dim=64)
OPTION_CASES = [
    *(replace(c, len_q=150, len_k=301) for c in OPTIONS if c.score_mod in (None, "gates")),
    replace(OPTION, head_dim=128, mask="blocks_partial", block=(32, 48), causal=True),
    replace(OPTION, head_dim=256, mask="blocks_partial", block=(32, 48), window=(100, 20)),
    replace(OPTION, head_dim=192, bias="Hqk"),
]


@pytest.mark.parametrize("case", OPTION_CASES, ids=str)
def test_each_option_alone_passes_rule_t_in_two_schedules(case: Case) -> None:
    for seed in (0, 1):
        with Emulator(ARCH, seed=seed) as machine:
            check(machine, case, gradients=False)
        assert kernels(machine)[-1].startswith("forward_sm90_")


LENGTHS = ((5, 0, 230, 1, 0, 140), (0, 7, 329, 0, 0, 266))
PLAIN = Case(batch=(), heads=2, heads_kv=1, head_dim=64)
PACKED = [
    Packed(*LENGTHS, replace(PLAIN, causal=True), tail_q=37, tail_k=5),
    Packed(*LENGTHS, replace(PLAIN, window=(20, 3), layout="LHD"), longer=None, index="int64"),
    Packed(*LENGTHS, replace(PLAIN, head_dim=128, causal=True), tail_q=3),
    Packed(
        *LENGTHS,
        replace(PLAIN, bias="1H1k", mask="keys", sinks="own", dropout=0.17, score_mod="table"),
        tail_q=3,
        longer=9,
    ),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_pass_rule_t_in_three_schedules(case: Packed) -> None:
    for seed in (0, 1, 2):
        with Emulator(ARCH, seed=seed) as machine:
            packed.check(machine, case, gradients=False)
        assert kernels(machine)[-1].startswith("forward_sm90_")


@pytest.mark.parametrize("case", [HEAD_DIMS[64], HEAD_DIMS[128], SHAPED[0]], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(case: Case) -> None:
    data, options = answer(case).data, case.options()
    runs = []
    for seed in (0, 5, 11):
        with Emulator(ARCH, seed=seed) as machine:
            runs.append(machine.attention(data.q, data.k, data.v, **options, return_lse=True))
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))
