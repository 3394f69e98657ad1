"""Hopper's backward kernel in the emulator, against float64: head dims, groups, mask edges, scores, memory layouts, in
three schedules, of which one takes turns (`deterministic=True`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.cases import Case, answer, check
from tests.machines import Emulator, normal, same_bits

ARCH = "sm_90a"
# Tiles have 128 keys and 64 queries, or 128 queries at head dims up to 64; above 128 64 of both.
BASE = Case(batch=(), heads=1, heads_kv=1)
HEAD_DIMS = {
    24: replace(BASE, len_q=130, len_k=150, causal=True),
    40: replace(BASE, len_q=129, len_k=257, causal=True),
    64: replace(BASE, heads=3, len_q=257, len_k=200, causal=True),
    80: replace(BASE, len_q=127, len_k=290, window=(64, 65)),
    96: replace(BASE, heads=3, len_q=65, len_k=128, causal=True),
    104: replace(BASE, len_q=140, len_k=77, window=(65, 1)),
    128: replace(BASE, heads=3, len_q=129, len_k=260, causal=True),
}
HEAD_DIMS = {d: replace(case, head_dim=d) for d, case in HEAD_DIMS.items()}
VALUE_DIMS = [
    replace(BASE, head_dim=64, head_dim_v=128, heads=3, len_q=65, len_k=70, causal=True),
    replace(BASE, head_dim=128, head_dim_v=40, len_q=130, len_k=65),
]
SHAPED = [
    replace(HEAD_DIMS[64], heads=1, softcap=3.0),
    replace(HEAD_DIMS[96], softcap=20.0, scale=-0.3),
    replace(HEAD_DIMS[128], alibi="H", heads=2),
    replace(HEAD_DIMS[128], scale=0.0, heads=1),
]
PLACES = [
    replace(HEAD_DIMS[64], scale=-0.125, heads=1),
    replace(HEAD_DIMS[64], q_offset=-130, window=(50, 20), causal=False, heads=1),
    replace(HEAD_DIMS[128], q_offset=1000, causal=True, heads=1),
    replace(
        BASE, head_dim=64, len_q=33, len_k=140, batch=(2, 3), heads=4, heads_kv=2, layout="LHD"
    ),
    replace(BASE, head_dim=128, len_q=33, len_k=140, batch=(2, 3), heads=2, broadcast_kv=True),
    replace(BASE, head_dim=128, len_q=1, len_k=1),
    replace(BASE, head_dim=128, len_q=1, len_k=300, heads=4),
    replace(BASE, head_dim=64, len_q=300, len_k=1),
    replace(BASE, head_dim=128, len_q=140, len_k=190, magnitude=20.0),
]
FLOAT16 = [*HEAD_DIMS.values(), *VALUE_DIMS, *SHAPED, *PLACES]
BFLOAT16 = [replace(HEAD_DIMS[d], dtype="bfloat16") for d in (96, 64, 128)]
# Each warpgroup sums one of the gradients. Ten seconds of compiling for each: one here, the others with --thorough.
DIVIDED = [
    replace(BASE, head_dim=256, heads=2, len_q=130, len_k=150, causal=True),
    replace(BASE, head_dim=200, len_q=140, len_k=70, window=(64, 20), dtype="bfloat16"),
    replace(BASE, head_dim=192, head_dim_v=128, heads=3, len_q=70, len_k=140, causal=True),
    replace(BASE, head_dim=160, len_q=65, len_k=200, scale=-0.1),
    replace(BASE, head_dim=136, head_dim_v=40, heads=2, alibi="H", softcap=5.0, causal=True),
]


def kernels(machine: Emulator) -> list[str]:
    """What ran, in order."""
    return [name for name, *_ in machine.device.launches]


def hopper_kernels(machine: Emulator) -> list[str]:
    return [name for name in kernels(machine) if name.startswith("backward_sm90_")]


def thorough(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=str(case), marks=pytest.mark.thorough) for case in cases]


@pytest.mark.parametrize(
    "case", [*FLOAT16, BFLOAT16[0], *thorough(BFLOAT16[1:] + DIVIDED)], ids=str
)
def test_gradients_pass_rule_t_in_three_schedules(case: Case) -> None:
    for seed, deterministic in ((0, True), (1, False), (2, False)):
        with Emulator(ARCH, seed=seed) as machine:
            check(machine, case, deterministic=deterministic, dlse=seed == 0)
        (name,) = hopper_kernels(machine)
        if not case.alibi:
            assert ("turns" if deterministic else "accumulate") in name
        # Slopes take their sums from the portable pass over the rows, which leaves dQ, too.
        assert any(n.startswith("backward_dq_") for n in kernels(machine)) == bool(case.alibi)


OPTION = Case(batch=(), heads=3, heads_kv=1, len_q=70, len_k=150, head_dim=64)
# Each option once; each with another head dim, ten seconds of compiling apiece, with --thorough.
OPTION_CASES = [
    replace(OPTION, mask="dense", batch=(2,)),
    replace(OPTION, mask="keys", head_dim=128, causal=True),
    replace(OPTION, mask="blocks_partial", block=(32, 48), heads=1, len_q=300),
    replace(OPTION, bias="Hqk"),
    replace(OPTION, dropout=0.5, batch=(2,)),
]
MORE_OPTION_CASES = [
    replace(OPTION, mask="blocks", block=(32, 48), head_dim=128, window=(60, 20)),
    replace(OPTION, mask="tiles", head_dim=96, block=(32, 48), softcap=5.0),
    replace(OPTION, bias="1k", bias_dtype="float32", bias_inf=True, head_dim=128),
    replace(OPTION, dropout=0.1, head_dim=128, causal=True),
    replace(OPTION, sinks="own", head_dim=96),
    replace(OPTION, mask="dense", head_dim=256, bias="Hqk"),
    replace(OPTION, dropout=0.3, head_dim=192, causal=True),
    replace(OPTION, score_mod="table", causal=True),
    replace(OPTION, score_mod="gates", head_dim=128),
    replace(OPTION, score_mod="curved", head_dim=16, mask="blocks", block=(32, 48)),
    replace(OPTION, score_mod="branch", bias="1k", head_dim=128, dropout=0.2),
]


@pytest.mark.parametrize(
    "case",
    [*OPTION_CASES, *thorough(MORE_OPTION_CASES)],
    ids=str,
)
def test_options_pass_rule_t_in_two_schedules(case: Case) -> None:
    for seed, deterministic in ((0, True), (1, False)):
        with Emulator(ARCH, seed=seed) as machine:
            check(machine, case, deterministic=deterministic, dlse=seed == 0)
        (name,) = hopper_kernels(machine)
        # Whose turn it is, only a band tells: with a mask dQ has a pass of its own.
        passes = [n for n in kernels(machine) if n.startswith("backward_dq_")]
        assert len(passes) == (deterministic and case.mask is not None)
        assert passes or ("turns" if deterministic else "accumulate") in name


def test_head_dims_above_128_pass_rule_t_in_three_schedules() -> None:
    for seed in (0, 1, 2):
        with Emulator(ARCH, seed=seed) as machine:
            check(machine, DIVIDED[0], dlse=seed == 0)
        assert hopper_kernels(machine) == ["backward_sm90_f16_d256_accumulate_linear"]


def test_a_score_expression_passes_rule_t_in_three_schedules() -> None:
    case = replace(OPTION, score_mod="relative", head_dim=96, causal=True)
    for seed in (0, 1, 2):
        with Emulator(ARCH, seed=seed) as machine:
            check(machine, case)
        assert "accumulate_general_mod" in hopper_kernels(machine)[0]


@pytest.mark.parametrize(
    "case", [HEAD_DIMS[64], HEAD_DIMS[128], SHAPED[1], *thorough(DIVIDED[:1])], ids=str
)
def test_turns_give_the_same_bits_in_every_schedule(case: Case) -> None:
    data, options = answer(case).data, case.options()
    runs = []
    for seed in (0, 5, 11):
        with Emulator(ARCH, seed=seed) as machine:
            out, lse = machine.attention(data.q, data.k, data.v, **options, return_lse=True)
            arrays = (data.dout, data.q, data.k, data.v, out, lse)
            grads = machine.backward(*arrays, dlse=data.dlse, deterministic=True, **options)
            runs.append((grads.q, grads.k, grads.v))
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "dout", "k", "v"])
@pytest.mark.parametrize("dim", [64, 128, pytest.param(256, marks=pytest.mark.thorough)])
def test_nan_and_inf_reach_the_pairs_that_see_them_and_no_others(
    dim: int, name: str, bad: float
) -> None:
    """One bad element in the middle of a tile that the diagonal cuts: 0 * NaN must not be formed."""
    rng, row = np.random.default_rng(dim), 37
    arrays = {n: normal(rng, 2, 150, dim) for n in ("q", "dout")}
    arrays |= {n: normal(rng, 1, 150, dim) for n in "kv"}
    spoiled = {n: x.copy() for n, x in arrays.items()}
    spoiled[name][0, row, 5] = bad
    run: dict[str, Any] = {"causal": True, "deterministic": True}
    with Emulator(ARCH, seed=1) as machine:
        _, clean = machine.vjp(**arrays, **run)
        _, grads = machine.vjp(**spoiled, **run)
        assert len(hopper_kernels(machine)) == 2
    with Emulator("sm_90", seed=1) as machine:  # the portable family
        _, portable = machine.vjp(**spoiled, **run)
    if name in ("q", "dout"):
        rows = np.arange(150) != row
        same = [(0, "q", rows), (1, "q", slice(None)), (0, "k", slice(row + 1, None))]
        same.append((0, "v", slice(row + 1, None)))
    else:
        same = [(head, "q", slice(None, row)) for head in (0, 1)]
    for head, gradient, kept in same:
        a, b = (getattr(g, gradient)[head, kept] for g in (grads, clean))
        assert np.isfinite(a.astype(float)).all() and same_bits(a, b), (gradient, head)
    for gradient in "qkv":
        a, b = (getattr(g, gradient).astype(float) for g in (grads, portable))
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), gradient
    assert not all(np.isfinite(getattr(grads, n).astype(float)).all() for n in "qkv")


def test_rows_inside_wider_ones_and_gradients_of_any_strides() -> None:
    """Columns past the head dim are another array's, NaN here; gradients go to rows of 71 elements."""
    rng = np.random.default_rng(5)
    made = {
        n: np.full((1, 150, 64), np.nan, np.float16)[:, :, :60] for n in ("q", "k", "v", "dout")
    }
    for x in made.values():
        x[...] = normal(rng, *x.shape)
    buffers = {n: np.full((1, 150, 71), np.nan, np.float16)[:, :, :60] for n in ("dq", "dk", "dv")}
    q, k, v, dout = made.values()
    for deterministic in (True, False):
        run: dict[str, Any] = {"causal": True, "deterministic": deterministic}
        with Emulator(ARCH, seed=2) as machine:
            out, lse = machine.attention(q, k, v, causal=True, return_lse=True)
            cuflash.attention_backward(dout, q, k, v, out, lse, **run, **buffers)
            assert hopper_kernels(machine)
        exact = oracle.exact(q, k, v, dout, causal=True)
        honest = oracle.low_precision(q, k, v, dout, causal=True)
        got = {n: buffers["d" + n] for n in "qkv"}
        oracle.check_all("strides", exact, honest, q.dtype, grads=got)
        assert all(np.isnan(x.base[:, :, 60:].astype(float)).all() for x in buffers.values())


def test_explain_counts_the_workspace_of_turns() -> None:
    q = np.ones((2, 70, 64), np.float16)
    with Emulator(ARCH):
        text = cuflash.explain(q, q, q, backward=True, deterministic=True).text
    assert "workspace dq_turns (7,) uint32" in text


REFUSED = {
    "float32": "float32 is not one of float16, bfloat16",
    "odd rows": "rows of k do not begin on 16-byte boundaries",
    "one row": "rows of k are all the same one",
    "axes": "3 separate batch axes, tensor maps have room for 2",
    "wrt": "neither the gradient of k nor of v is wanted",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named_and_runs_on_the_portable_family(what: str) -> None:
    dim = 64
    dtype = np.float32 if what == "float32" else np.float16
    q, k, v = (np.ones((2, 20, dim), dtype) for _ in range(3))
    options: dict[str, Any] = {}
    if what == "odd rows":
        k = np.ones((2, 20, dim + 1), dtype)[:, :, :dim]
    elif what == "one row":
        k = np.broadcast_to(k[:, :1], k.shape)
    elif what == "axes":
        q, k, v = (np.ones((3, 5, 4, 2, 20, dim), dtype)[::2, ::2, ::2] for _ in range(3))
    elif what == "wrt":
        options["wrt"] = ("q",)
    with Emulator(ARCH):
        found = cuflash.explain(q, k, v, backward=True, **options)
    assert found.refusals["backward_sm90"] == [REFUSED[what]]
    assert found.plan.candidate == "backward" and REFUSED[what] in found.text
