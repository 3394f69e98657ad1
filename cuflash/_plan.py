"""Which kernels run, in which order, with which tiles.

Candidates state why they refuse a Problem (an empty list means they can run); the first that does not refuse makes the Plan. Numbers
live in `_tuning.py`, rules here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cuflash import _tuning
from cuflash._compile import Specialization
from cuflash._device import Device, Limits
from cuflash._errors import UnsupportedError
from cuflash._problem import Problem

ELEMENTS = {"float16": "f16", "bfloat16": "bf16"}

# Compiled head dims. A kernel serves every true head dim up to its own (columns beyond are zero).
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DIM_PAIRS = (*((d, d) for d in HEAD_DIMS), (192, 128))

MAX_GRID = 2**31 - 1
MAX_EXTENT = 2**30  # so that a row index plus a band bound fits 32 bits


@dataclass(frozen=True, slots=True)
class Schedule:
    """How block ids map to (tile, head); see kernels_cu/schedule.cuh."""

    tiles: int
    heads_per_section: int
    longest_last: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch."""

    spec: Specialization
    grid: int
    block: int
    shared_memory: int
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Scratch:
    """Workspace a Plan needs between its launches."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `_launch` runs, in order."""

    candidate: str
    launches: tuple[Launch, ...]
    scratch: tuple[Scratch, ...] = ()


class Candidate(Protocol):
    """One way to serve a Problem."""

    name: str

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """Why this candidate cannot run `problem`; empty when it can."""

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """Launches and workspace."""


def dim_pair(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The compiled (HEAD_DIM, HEAD_DIM_V) that serves true head dims."""
    if 128 < head_dim <= 192 and head_dim_v <= 128:
        return 192, 128
    widest = max(head_dim, head_dim_v)
    bucket = next(d for d in HEAD_DIMS if d >= widest)
    return bucket, bucket


def _common_refusals(problem: Problem, arch: str) -> list[str]:
    reasons = []
    if problem.dtype not in ELEMENTS:
        reasons.append(f"{problem.dtype} is not one of {', '.join(ELEMENTS)}")
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number < 75:
        reasons.append(f"{arch} is older than sm_75")
    if problem.dtype == "bfloat16" and 75 <= number < 80:
        reasons.append(f"bfloat16 needs sm_80 or newer, this is {arch}")
    for name in ("head_dim", "head_dim_v"):
        if getattr(problem, name) > HEAD_DIMS[-1]:
            reasons.append(f"{name} {getattr(problem, name)} > {HEAD_DIMS[-1]}")
    for name in ("len_q", "len_k"):
        if getattr(problem, name) > MAX_EXTENT:
            reasons.append(f"{name} {getattr(problem, name)} > {MAX_EXTENT}")
    if problem.alibi and abs(problem.q_offset) > MAX_EXTENT:
        reasons.append(f"ALiBi with |q_offset| {abs(problem.q_offset)} > {MAX_EXTENT}")
    return reasons


def is_linear(problem: Problem) -> bool:
    """True when the fast variant serves: plain scaled scores, every row on a 16-byte boundary."""
    return (
        problem.softcap is None
        and not problem.alibi
        and float(np.float32(problem.scale)) != 0.0
        and problem.head_dim % 8 == 0
        and problem.head_dim_v % 8 == 0
        and all(operand.aligned for _, operand in problem.operands)
    )


def _specialize(
    kernel: str,
    arch: str,
    element: str,
    dims: tuple[int, int],
    linear: bool,
    tile: _tuning.Tile,
    shared: int,
    variant: str = "",
    **extra: int,
) -> Specialization:
    words = [variant, "linear" if linear else "shaped"]
    return Specialization(
        kernel=kernel,
        arch=arch,
        element=element,
        head_dim=dims[0],
        head_dim_v=dims[1],
        variant="_".join(w for w in words if w),
        types=(("Mask", "mask::Band"), ("Score", f"score::{'Linear' if linear else 'Shaped'}")),
        constants=(
            ("BLOCK_Q", tile.block_q),
            ("BLOCK_K", tile.block_k),
            ("WARPS", tile.warps),
            ("STAGES", tile.stages),
            ("MIN_BLOCKS", tile.min_blocks),
            ("SHARED_BYTES", shared),
            ("Q_IN_REGISTERS", bool(tile.q_in_registers)),
            ("VECTOR_ONLY", linear),
            *extra.items(),
        ),
    )


def heads_per_section(problem: Problem, limits: Limits) -> int:
    """How many query heads to walk together so that their K and V stay in half of the L2 cache."""
    per_kv_head = problem.len_k * (problem.head_dim + problem.head_dim_v) * 2
    group = problem.heads // problem.heads_kv
    total = problem.heads * int(np.prod(problem.batch, dtype=np.int64))
    kv_heads = max(1, limits.l2_bytes // 2 // max(1, per_kv_head))
    return int(max(1, min(total, kv_heads * group)))


def _total_heads(problem: Problem, heads: int) -> int:
    return heads * int(np.prod(problem.batch, dtype=np.int64))


def _check_grid(problem: Problem, grid: int) -> int:
    if grid > MAX_GRID:
        raise UnsupportedError(
            f"this call needs {grid} blocks, more than the {MAX_GRID} of one launch.\n"
            f"  batch {problem.batch}, {problem.heads} heads, {problem.len_q} queries\n"
            "  Way out: split the batch."
        )
    return grid


class Forward:
    """Portable forward: mma.sync, kernels_cu/forward.cuh."""

    name = "forward"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "forward":
            return [f"does not compute {problem.direction}"]
        return _common_refusals(problem, arch)

    def specialization(
        self, arch: str, element: str, dims: tuple[int, int], linear: bool
    ) -> Specialization:
        """The kernel for one (element, dims, variant)."""
        tile = _tuning.forward_tile(arch, *dims)
        shared = _tuning.forward_shared_bytes(tile, *dims)
        return _specialize(self.name, arch, element, dims, linear, tile, shared)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        spec = self.specialization(arch, ELEMENTS[problem.dtype], dims, is_linear(problem))
        tiles = -(-problem.len_q // spec.constant("BLOCK_Q"))
        grid = _check_grid(problem, tiles * _total_heads(problem, problem.heads))
        schedule = Schedule(
            tiles=tiles,
            heads_per_section=heads_per_section(problem, limits),
            # With a right bound and no left one, later rows see more keys.
            longest_last=problem.right is not None and problem.left is None,
        )
        shared = spec.constant("SHARED_BYTES")
        return Plan(
            self.name, (Launch(spec, grid, spec.constant("WARPS") * 32, shared, schedule),)
        )


CANDIDATES: tuple[Candidate, ...] = (Forward(),)


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
    way_out = "float16 or bfloat16" if problem.dtype not in ELEMENTS else "head dims up to 256"
    if problem.dtype == "bfloat16" and problem.head_dim <= 256 and problem.head_dim_v <= 256:
        way_out = "float16"
    return (
        f"no kernel for {what}.\n"
        + "\n".join(rows)
        + f"\n  Nearest supported: {way_out}, or NumPy arrays (CPU backend)."
    )


def all_specializations(arch: str) -> Iterator[Specialization]:
    """Every kernel that planning can choose on `arch`, for the compile matrix and the spill table."""
    elements = ("f16",) if arch == "sm_75" else ("f16", "bf16")
    for candidate in CANDIDATES:
        for element in elements:
            for dims in DIM_PAIRS:
                for linear in (True, False):
                    yield from candidate.specializations(arch, element, dims, linear)
