"""Planning of float32 and float64: no call of the contract is refused, whatever the GPU."""

from __future__ import annotations

import itertools

import pytest

from cuflash import _plan
from cuflash._problem import MaskFacts, Packed, Problem
from tests.test_plan import ARCHS, SHARED, FakeDevice, backward, problem

DTYPES = ("float32", "float64")
EVERYTHING = ("q", "k", "v", "bias", "alibi_slopes", "sinks", "w")
# Enough of an expression for planning; what it says is `tests/test_scoremod.py`'s matter.
MOD = {"expression": "// w\n", "score_params": ("w",)}
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True},
    "scale 0": {"scale": 0.0},
    "dense mask": {"mask": MaskFacts("dense", (1, 300, 400))},
    "block mask": {"mask": MaskFacts("blocks", (), (128, 128))},
    "bias": {"bias": (8, 300, 400)},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.5},
    "score_mod": MOD,
    "packed": {"packed": Packed(600, 800, True)},
    "tf32": {"precision": "tf32"},
}
ALL = {name: value for changes in OPTIONS.values() for name, value in changes.items()}
OPTIONS["all"] = {**ALL, "scale": 0.3, "precision": "ieee"}


def calls(dtype: str, dims: tuple[int, int], changes: dict) -> list[Problem]:
    """Forward, and backward for everything that has a gradient."""
    given = (
        {"q", "k", "v"} | ({"bias", "sinks"} & set(changes)) | {*changes.get("score_params", ())}
    )
    given |= {"alibi_slopes"} if changes.get("alibi") else set()
    common = {"dtype": dtype, "head_dim": dims[0], "head_dim_v": dims[1], **changes}
    wrt = tuple(name for name in EVERYTHING if name in given)
    found = [problem(**common)]
    for deterministic in (False, True):
        found.append(backward(**common, wrt=wrt, deterministic=deterministic))
    return [*found, *(backward(**common, wrt=(name,)) for name in wrt)]


def check(call: Problem, arch: str) -> None:
    reasons = _plan.refusals(call, arch)
    assert not all(reasons.values()), reasons
    for launch in _plan.plan(call, FakeDevice(arch)).launches:
        assert launch.shared_memory <= SHARED[arch], launch.spec.name
        assert launch.block <= 1024 and launch.grid >= 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_head_dims_are_refused(dtype: str, arch: str) -> None:
    sizes = range(1, 257)
    for dims in {*zip(sizes, sizes, strict=True), *itertools.product(sizes, (1, 128, 129, 256))}:
        for call in (problem, backward):
            check(call(dtype=dtype, head_dim=dims[0], head_dim_v=dims[1]), arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("option", "dtype"),
    [(o, d) for o in OPTIONS for d in DTYPES if (o, d) != ("tf32", "float64")],
)
def test_no_option_is_refused(option: str, dtype: str, arch: str) -> None:
    edges = (1, 64, 96, 128, 129, 192, 256)
    for dims in itertools.product(edges, repeat=2):
        for call in calls(dtype, dims, OPTIONS[option]):
            check(call, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_planned_is_compiled_by_tests(arch: str) -> None:
    """Every head dim, both plain scores, every precision."""
    listed = set(_plan.all_specializations(arch))
    for dtype, precision in (("float32", "ieee"), ("float32", "tf32"), ("float64", "ieee")):
        for dims in itertools.product((1, 40, 64, 96, 111, 128, 160, 256), repeat=2):
            for scale in (0.1, 0.0):
                changes = {"scale": scale, "precision": precision}
                for call in calls(dtype, dims, changes):
                    for launch in _plan.plan(call, FakeDevice(arch)).launches:
                        assert launch.spec in listed, launch.spec.name


def test_a_refusal_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHARED, "sm_75", 60 << 10)
    with pytest.raises(AssertionError, match="f64_d256"):
        check(problem(dtype="float64", head_dim=256, head_dim_v=256), "sm_75")
