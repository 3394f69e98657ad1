"""The portable family (mma.sync): which problems it serves and with which launches.

Runs on every architecture from sm_75 on and is the fallback everywhere. A family states why it
refuses a Problem; an empty list means that it can run. Numbers live in `_tuning.py`, rules here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuflash import _tuning
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._errors import UnsupportedError
from cuflash._plan_values import Launch, Plan, Schedule, Scratch
from cuflash._problem import Problem

ELEMENTS = {"float16": "f16", "bfloat16": "bf16"}

# Compiled head dims. A kernel serves every true head dim up to its own (columns beyond are zero).
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DIM_PAIRS = (*((d, d) for d in HEAD_DIMS), (192, 128))

MAX_GRID = 2**31 - 1
MAX_EXTENT = 2**30 - 2  # so that a row index plus a band bound plus one fits 32 bits


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


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _check_grid(problem: Problem, grid: int) -> int:
    if grid > MAX_GRID:
        raise UnsupportedError(
            f"this call needs {grid} blocks, more than the {MAX_GRID} of one launch.\n"
            f"  batch {problem.batch}, {problem.heads} heads, {problem.len_q} queries\n"
            "  Way out: split the batch."
        )
    return grid


def _elements(arch: str) -> tuple[str, ...]:
    return ("f16",) if arch == "sm_75" else ("f16", "bf16")


def _launch(spec: Specialization, heads: int, schedule: Schedule, problem: Problem) -> Launch:
    """A launch of one block per (head, tile)."""
    grid = _check_grid(problem, schedule.tiles * heads)
    return Launch(spec, grid, spec.constant("WARPS") * 32, spec.constant("SHARED_BYTES"), schedule)


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

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        for element in _elements(arch):
            for dims in DIM_PAIRS:
                for linear in (True, False):
                    yield self.specialization(arch, element, dims, linear)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        spec = self.specialization(arch, ELEMENTS[problem.dtype], dims, is_linear(problem))
        schedule = Schedule(
            tiles=_tiles(problem.len_q, spec.constant("BLOCK_Q")),
            heads_per_section=heads_per_section(problem, limits),
            # With a right bound and no left one, later rows see more keys.
            longest_last=problem.right is not None and problem.left is None,
        )
        heads = _total_heads(problem, problem.heads)
        return Plan(self.name, (_launch(spec, heads, schedule, problem),))


@dataclass(frozen=True, slots=True)
class BackwardKernels:
    """The kernels of one backward pass; None where it needs none."""

    prepare: Specialization
    dkdv: Specialization | None
    dq: Specialization | None
    convert: Specialization | None
    slopes: Specialization | None


class Backward:
    """Portable backward: mma.sync, kernels_cu/backward_*.cuh.

    Deterministic: dK and dV per key tile, dQ in a pass of its own. Otherwise dQ is gathered by
    float32 reductions during the first pass, which saves forming the scores a second time.
    """

    name = "backward"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "backward":
            return [f"does not compute {problem.direction}"]
        return _common_refusals(problem, arch)

    def specialization(
        self,
        kernel: str,
        arch: str,
        element: str,
        dims: tuple[int, int],
        linear: bool,
        accumulate: bool = False,
    ) -> Specialization:
        """One of the backward kernels; `accumulate`: dkdv also gathers dQ."""
        row = f"{kernel}_accumulate" if accumulate else kernel
        tile = _tuning.backward_tile(row, arch, *dims)
        shared = _tuning.backward_shared_bytes(row, tile, *dims)
        if kernel != "backward_dkdv":
            return _specialize(kernel, arch, element, dims, linear, tile, shared)
        variant = "accumulate" if accumulate else ""
        return _specialize(
            kernel, arch, element, dims, linear, tile, shared, variant, ACCUMULATE_DQ=accumulate
        )

    def kernels(
        self,
        arch: str,
        element: str,
        dims: tuple[int, int],
        linear: bool,
        wrt: tuple[str, ...],
        deterministic: bool,
    ) -> BackwardKernels:
        """What computes the gradients in `wrt`."""

        def kernel(name: str, accumulate: bool = False) -> Specialization:
            return self.specialization(name, arch, element, dims, linear, accumulate)

        keys = "k" in wrt or "v" in wrt
        slopes = "alibi_slopes" in wrt
        # Slope partials come from the dQ pass; without dK and dV there is nothing to share with.
        fused = "q" in wrt and keys and not deterministic and not slopes
        fused = fused and _tuning.accumulates(arch, *dims, linear)
        own_dq = ("q" in wrt or slopes) and not fused
        return BackwardKernels(
            prepare=kernel("backward_prepare"),
            dkdv=kernel("backward_dkdv", fused) if keys else None,
            dq=kernel("backward_dq") if own_dq else None,
            convert=kernel("backward_convert") if fused else None,
            slopes=kernel("backward_slopes") if slopes else None,
        )

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        for element in _elements(arch):
            for dims in DIM_PAIRS:
                for linear in (True, False):
                    for name in ("backward_prepare", "backward_dq", "backward_convert"):
                        yield self.specialization(name, arch, element, dims, linear)
                    both = _tuning.accumulates(arch, *dims, linear)
                    for accumulate in (False, True) if both else (False,):
                        yield self.specialization(
                            "backward_dkdv", arch, element, dims, linear, accumulate
                        )
                # Slopes only occur with the shaped score.
                yield self.specialization("backward_slopes", arch, element, dims, False)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        kernels = self.kernels(
            arch,
            ELEMENTS[problem.dtype],
            dims,
            is_linear(problem),
            problem.wrt,
            problem.deterministic,
        )
        heads = _total_heads(problem, problem.heads)
        heads_kv = _total_heads(problem, problem.heads_kv)
        section = heads_per_section(problem, limits)
        group = problem.heads // problem.heads_kv
        later_rows_longer = problem.right is not None and problem.left is None
        # Seen from the keys the band is mirrored: early keys are seen by most rows under a right bound.
        later_keys_longer = problem.left is not None and problem.right is None

        def by_query(spec: Specialization, per_section: int = 1) -> Launch:
            tiles = _tiles(problem.len_q, spec.constant("BLOCK_Q"))
            schedule = Schedule(tiles, per_section, later_rows_longer)
            return _launch(spec, heads, schedule, problem)

        launches = [by_query(kernels.prepare)]
        scratch = [
            Scratch(name, (heads, problem.len_q), "float32") for name in ("lse_log2", "delta")
        ]
        if kernels.convert:
            scratch.append(Scratch("dq_accum", (heads, problem.len_q, dims[0]), "float32"))
        if kernels.dkdv:
            tiles = _tiles(problem.len_k, kernels.dkdv.constant("BLOCK_K"))
            schedule = Schedule(tiles, max(1, section // group), later_keys_longer)
            launches.append(_launch(kernels.dkdv, heads_kv, schedule, problem))
        if kernels.dq:
            launches.append(by_query(kernels.dq, section))
        if kernels.convert:
            launches.append(by_query(kernels.convert))
        if kernels.slopes and kernels.dq:
            tiles = launches[-1].schedule.tiles  # of backward_dq, whose partials these are
            scratch.append(Scratch("slope_partial", (heads, tiles), "float32"))
            launches.append(
                Launch(
                    kernels.slopes,
                    _check_grid(problem, heads),
                    kernels.slopes.constant("WARPS") * 32,
                    0,
                    Schedule(tiles, 1, False),
                )
            )
        return Plan(self.name, tuple(launches), tuple(scratch))
