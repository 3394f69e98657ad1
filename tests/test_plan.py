"""Planning without a device: every Problem gets a plan that fits, or a reason why not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from cuflash import _plan
from cuflash._device import Limits
from cuflash._errors import UnsupportedError
from cuflash._problem import Problem

KIB = 1024
# CUDA programming guide: shared memory one block may opt in to, per architecture.
SHARED = {
    "sm_75": 64 * KIB,
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90a": 227 * KIB,
    "sm_120": 99 * KIB,
}
ARCHS = tuple(SHARED)


class FakeDevice:
    def __init__(self, arch: str, l2_bytes: int = 50 << 20) -> None:
        self.arch = arch
        self.limits = Limits(sm_count=100, shared_memory=SHARED[arch], l2_bytes=l2_bytes)


def problem(**changes) -> Problem:
    base = Problem(
        *("forward", "float16", (2,), 8, 2, 300, 400, 64, 64, 0.125, 100, None, None),
        wrt=(),
    )
    return replace(base, **changes)


def backward(**changes) -> Problem:
    return problem(**{"direction": "backward", "wrt": ("q", "k", "v"), **changes})


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_fits_the_shared_memory_of_its_architecture(arch: str) -> None:
    """Bug museum N13, for every specialization planning can choose."""
    specs = list(_plan.all_specializations(arch))
    assert len(specs) == len({spec.name for spec in specs}) > 50
    for spec in specs:
        assert spec.constant("SHARED_BYTES") <= SHARED[arch], spec.name
        assert spec.constant("WARPS") * 32 <= 1024, spec.name


def test_plans_only_use_listed_kernels() -> None:
    """What planning chooses is what the compile matrix compiles."""
    for arch in ARCHS:
        listed = set(_plan.all_specializations(arch))
        for dims in itertools.product((1, 8, 40, 64, 96, 111, 128, 160, 256), repeat=2):
            for scale, deterministic in itertools.product((0.1, 0.0), (True, False)):
                common = {"head_dim": dims[0], "head_dim_v": dims[1], "scale": scale}
                calls = [problem(**common), backward(**common, deterministic=deterministic)]
                calls += [
                    backward(**common, wrt=wrt, alibi=True)
                    for wrt in (("alibi_slopes",), ("q",), ("k",), ("q", "k", "v", "alibi_slopes"))
                ]
                for call in calls:
                    for launch in _plan.plan(call, FakeDevice(arch)).launches:
                        assert launch.spec in listed


LENGTHS = (1, 2, 63, 64, 65, 1000, 2**16, 2**22, 2**30 - 2)


@pytest.mark.parametrize("make", [problem, backward], ids=["forward", "backward"])
def test_grids_are_whole_and_positive(make) -> None:
    """Bug museum O7: no length gives a grid of zero blocks or an overflow."""
    for len_q, len_k in itertools.product(LENGTHS, repeat=2):
        plan = _plan.plan(make(len_q=len_q, len_k=len_k), FakeDevice("sm_80", l2_bytes=1 << 20))
        for launch in plan.launches:
            assert 1 <= launch.grid <= 2**31 - 1
            assert launch.schedule.tiles >= 1 and launch.schedule.heads_per_section >= 1
        for scratch in plan.scratch:
            assert all(extent >= 1 for extent in scratch.shape)


def test_batch_times_heads_may_exceed_65535() -> None:
    """Bug museum D7: only grid.x is used, so no axis meets the 65535 limit."""
    plan = _plan.plan(problem(batch=(70000,), heads=1, heads_kv=1, len_q=1), FakeDevice("sm_80"))
    assert plan.launches[0].grid == 70000


def test_a_grid_beyond_the_launch_limit_is_refused_in_words() -> None:
    with pytest.raises(UnsupportedError, match="more than the 2147483647"):
        _plan.plan(problem(batch=(2**20,), heads=2**12, heads_kv=1), FakeDevice("sm_80"))


def test_workspace_is_linear_in_the_length() -> None:
    def elements(length: int) -> int:
        plan = _plan.plan(backward(len_q=length, len_k=length), FakeDevice("sm_80"))
        return sum(math.prod(s.shape) for s in plan.scratch)

    assert elements(1 << 20) <= 1024 * elements(1 << 10) * 1.01


@pytest.mark.parametrize(
    ("changes", "arch", "reason"),
    [
        ({"dtype": "bfloat16"}, "sm_75", "bfloat16 needs sm_80"),
        ({"head_dim": 320}, "sm_90a", "head_dim 320 > 256"),
        ({"head_dim_v": 257}, "sm_80", "head_dim_v 257 > 256"),
        ({"len_k": 2**30}, "sm_80", "len_k 1073741824 > 1073741822"),
        ({"alibi": True, "q_offset": 2**40}, "sm_80", "ALiBi"),
    ],
)
@pytest.mark.parametrize("make", [problem, backward], ids=["forward", "backward"])
def test_refusals_say_what_is_missing_and_what_is_nearest(make, changes, arch, reason) -> None:
    device = FakeDevice(arch)
    with pytest.raises(UnsupportedError) as caught:
        _plan.plan(make(**changes), device)
    message = str(caught.value)
    assert message.startswith("no kernel for ") and reason in message
    assert "Nearest supported" in message and arch in message


def test_the_general_variant_serves_what_the_fast_one_cannot() -> None:
    def variant(**changes) -> str:
        return _plan.plan(problem(**changes), FakeDevice("sm_80")).launches[0].spec.variant

    assert variant() == "linear"
    for changes in ({"softcap": 30.0}, {"alibi": True}, {"scale": 0.0}, {"head_dim": 60}):
        assert variant(**changes) == "shaped"


def test_a_length_never_enters_a_specialization() -> None:
    def variants(*lengths) -> set[str]:
        plans = [
            _plan.plan(
                problem(len_q=q, len_k=k, batch=(b,), q_offset=k - q, **heads), FakeDevice("sm_80")
            )
            for q, k, b in itertools.product(*lengths)
        ]
        return {plan.launches[0].spec.variant for plan in plans}

    heads = {"heads_kv": 8}

    assert variants((1, 64, 999), (1, 77, 1023), (1, 3)) == {"linear"}
    # Two kinds of calls have kernels of their own, each one for all of its lengths.
    assert variants((1, 7, 16), (1024, 5000, 10**6), (1, 300)) == {"split16_linear"}
    assert variants((17, 64, 128), (1024, 5000, 10**6), (1, 3)) == {"split128_linear"}
    assert variants((999, 10**5), (1024, 5000, 10**6), (3, 300)) == {"linear"}
    # With heads in groups of four, another four: up to 16, 32 or more rows of a group, and many queries.
    heads = {"heads_kv": 2}
    assert variants((1, 2, 4), (1, 77, 1023), (1, 3)) == {"rows16_linear_grouped"}
    assert variants((5, 8), (1, 77, 1023), (1, 3)) == {"rows32_linear_grouped"}
    assert variants((9, 33, 48), (1, 77, 1023), (1, 3)) == {"rows64_linear_grouped"}
    assert variants((1, 4), (1024, 5000, 10**6), (1, 3)) == {"split16_linear_grouped"}
    assert variants((65, 999), (1, 77, 1023), (1, 3)) == {"linear"}


def test_deterministic_uses_no_reductions_into_dq() -> None:
    def names(**changes) -> list[str]:
        plan = _plan.plan(backward(**changes), FakeDevice("sm_80"))
        return [launch.spec.kernel for launch in plan.launches]

    assert names(deterministic=True) == ["backward_prepare", "backward_dkdv", "backward_dq"]
    assert names() == ["backward_prepare", "backward_dkdv", "backward_convert"]
    assert names(wrt=("q",)) == ["backward_prepare", "backward_dq"]
    assert names(wrt=("v",)) == ["backward_prepare", "backward_dkdv"]
