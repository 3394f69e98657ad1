"""Which kernels run: the first candidate that does not refuse makes the Plan."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

from cuflash import (
    _candidates,
    _candidates_backward,
    _candidates_backward_sm90,
    _candidates_grouped,
    _candidates_sm90,
    _candidates_split,
)
from cuflash._compile import Specialization
from cuflash._device import Device, Limits
from cuflash._errors import UnsupportedError
from cuflash._plan_values import Launch, Plan, Schedule, Scratch
from cuflash._problem import Problem

__all__ = [
    "CANDIDATES",
    "Launch",
    "Plan",
    "Schedule",
    "Scratch",
    "all_specializations",
    "plan",
    "refusals",
]


class Candidate(Protocol):
    """One way to serve a Problem."""

    name: str

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """Why this candidate cannot run `problem`; empty when it can."""

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """Launches and workspace."""

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """Every kernel this candidate can choose on `arch`."""


CANDIDATES: tuple[Candidate, ...] = (
    _candidates_split.SplitForward(),
    _candidates_grouped.GroupedForward(),
    _candidates_sm90.ForwardSm90(),
    _candidates.Forward(),
    _candidates_backward_sm90.BackwardSm90(),
    _candidates_backward.Backward(),
)


def refusals(problem: Problem, arch: str) -> dict[str, list[str]]:
    """Every candidate's reasons, in order of preference."""
    return {candidate.name: candidate.refusals(problem, arch) for candidate in CANDIDATES}


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, arch: str, limits: Limits) -> Plan:
    for candidate in CANDIDATES:
        if not candidate.refusals(problem, arch):
            return candidate.plan(problem, arch, limits)
    raise UnsupportedError(describe_refusals(problem, arch))


def plan(problem: Problem, device: Device) -> Plan:
    """The Plan of a Problem on a device.

    Raises
    ------
    UnsupportedError
        No candidate runs it; says what each one misses and what is nearest.
    """
    return _plan(problem, device.arch, device.limits)


def describe_refusals(problem: Problem, arch: str) -> str:
    """The message of an UnsupportedError: the call, every candidate's reasons, the way out."""
    what = " · ".join(
        (problem.direction, problem.dtype, f"head_dim {problem.head_dim}", arch)
        if problem.head_dim == problem.head_dim_v
        else (
            problem.direction,
            problem.dtype,
            f"head_dim {problem.head_dim} head_dim_v {problem.head_dim_v}",
            arch,
        )
    )
    rows = [
        f"  {name:<12} {reason}"
        for name, reasons in refusals(problem, arch).items()
        for reason in reasons
        if not reason.startswith("does not compute")
    ]
    way_out = "head dims up to 256"
    if problem.dtype == "bfloat16" and max(problem.head_dim, problem.head_dim_v) <= 256:
        way_out = "float16"
    return (
        f"no kernel for {what}.\n"
        + "\n".join(rows)
        + f"\n  Nearest supported: {way_out}, or NumPy arrays (CPU backend)."
    )


def all_specializations(arch: str) -> Iterator[Specialization]:
    """Every kernel that planning can choose on `arch`, for the compile matrix and the spill table."""
    for candidate in CANDIDATES:
        yield from candidate.specializations(arch)
