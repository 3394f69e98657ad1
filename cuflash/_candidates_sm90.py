"""The family of warpgroups (TMA, wgmma): Hopper only, 16-bit elements, arrays that TMA can read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuflash import _candidates, _tuning_sm90
from cuflash._candidates import OPTION_VARIANTS, Variant
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._launch_maps import BATCH_AXES, MAX_STRIDE
from cuflash._plan_values import Launch, Plan, Schedule
from cuflash._problem import Problem
from cuflash._variants import variant_of
from cuflash._views import merge_axes

ARCH = "sm_90a"
ELEMENTS = ("float16", "bfloat16")
# Blocks that walk the keys of one head at a time, at least: four tiles of queries per tile of keys read
# from memory are work enough to hide it.
_BLOCKS_PER_HEAD = 4
# Where planning stops to look for the best order.
_MOST_TILES, _MOST_SECTIONS = 200_000, 24


def dim_pair(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The compiled (HEAD_DIM, HEAD_DIM_V) that serves true head dims."""
    dims = _candidates.dim_pair(head_dim, head_dim_v)
    return (64, 64) if dims == (32, 32) else dims


def memory_refusals(problem: Problem) -> list[str]:
    """Why TMA cannot read or write the arrays of a call."""
    reasons = []
    for name in ("head_dim", "head_dim_v"):
        if getattr(problem, name) % 8:
            reasons.append(f"{name} {getattr(problem, name)}: rows are not whole 16-byte pieces")
    # Operand strides are 0 where an array is broadcast. Results follow q.
    steps = {name: operand.strides[:-3] for name, operand in problem.operands}
    steps = {name: (0,) * (len(problem.batch) - len(s)) + s for name, s in steps.items()}
    axes = len(merge_axes(problem.batch, steps)[0])
    if axes > BATCH_AXES:
        reasons.append(f"{axes} separate batch axes, tensor maps have room for {BATCH_AXES}")
    for name, operand in problem.operands:
        rows = operand.shape[-2] > 1 and operand.strides[-2] == 0
        if not operand.aligned:
            reasons.append(f"{name}: rows do not begin on 16-byte boundaries")
        elif rows or any(not 0 <= step < MAX_STRIDE for step in operand.strides):
            reasons.append(
                f"{name}: strides {operand.strides} bytes, tensor maps want positive ones"
            )
    return reasons


def grows(problem: Problem) -> bool:
    """Whether later rows see more keys: with a right bound and no left one."""
    return problem.right is not None and problem.left is None


def heads_per_section(problem: Problem, spec: Specialization, limits: Limits) -> int:
    """How many query heads to walk together.

    Equal tiles: those whose K and V share the L2 cache. Tiles that grow with their row are dealt out
    longest first, to and fro (`work_number` in sm90_ring.cuh), and how even that comes out depends on
    how the sections' ends fall: the smallest section whose blocks end together within a hundredth of
    the best one. Blocks of a head walk the same keys at the same time, so as long as a few of them run
    at once the cache serves them whatever a section holds.
    """
    fitting = _candidates.heads_per_section(problem, limits)
    if not grows(problem) or problem.packed is not None:
        return fitting
    total = _candidates.total_heads(problem, problem.heads)
    group = problem.heads // problem.heads_kv
    costs = tile_costs(problem, spec)
    if total * len(costs) > _MOST_TILES:
        return fitting
    most = min(total, max(fitting, limits.sm_count // _BLOCKS_PER_HEAD * group))
    steps = range(group, most + 1, group * max(1, most // group // _MOST_SECTIONS))
    lasts = {n: last_end(costs, total, n, limits.sm_count) for n in {*steps, most}}
    good = min(lasts.values()) * 1.01
    return min(n for n, last in lasts.items() if last <= good)


def tile_costs(problem: Problem, spec: Specialization) -> np.ndarray:
    """Key tiles that each tile of queries walks, longest first; one more for its beginning and end."""
    block_q, block_k = spec.constant("BLOCK_Q"), spec.constant("BLOCK_K")
    assert problem.right is not None
    ends = np.minimum(np.arange(block_q, problem.len_q + block_q, block_q), problem.len_q)
    keys = np.clip(ends + problem.q_offset + problem.right, 0, problem.len_k)
    return 1 + -(-keys[::-1] // block_k)


def last_end(costs: np.ndarray, heads: int, section: int, blocks: int) -> int:
    """When the last block is done, if tiles are dealt out as kernels do it."""
    whole, rest = divmod(heads, section)
    order = np.concatenate((np.tile(np.repeat(costs, section), whole), np.repeat(costs, rest)))
    turns = np.zeros((-(-len(order) // blocks), blocks), np.int64)
    turns.reshape(-1)[: len(order)] = order
    turns[1::2] = turns[1::2, ::-1]
    return int(turns.sum(axis=0).max())


class ForwardSm90:
    """Forward by warpgroups: kernels_cu/forward_sm90.cuh."""

    name = "forward_sm90"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "forward":
            return [f"does not compute {problem.direction}"]
        reasons = []
        if arch != ARCH:
            reasons.append(f"needs {ARCH}, this is {arch}")
        if problem.dtype not in ELEMENTS:
            reasons.append(f"{problem.dtype} is not one of {', '.join(ELEMENTS)}")
        return reasons or _candidates.common_refusals(problem, arch) + memory_refusals(problem)

    def specialization(
        self, arch: str, element: str, dims: tuple[int, int], variant: Variant
    ) -> Specialization:
        """The kernel for one (element, dims, variant)."""
        tile = _tuning_sm90.forward_tile(
            *dims, options=not variant.plain, general=variant.score == "general"
        )
        copying, multiplying = tile.registers
        return Specialization(
            kernel=self.name,
            arch=arch,
            element=element,
            head_dim=dims[0],
            head_dim_v=dims[1],
            variant=variant.name,
            types=variant.types,
            constants=(
                ("BLOCK_Q", tile.block_q),
                ("BLOCK_K", tile.block_k),
                ("WARPS", 4 * (tile.groups + 1)),
                ("STAGES", tile.stages),
                ("MIN_BLOCKS", 1),
                ("SHARED_BYTES", _tuning_sm90.forward_shared_bytes(tile, *dims)),
                ("COPY_REGISTERS", copying),
                ("REGISTERS", multiplying),
                ("TAKE_TURNS", tile.turns),
                ("OUT_APART", _tuning_sm90.forward_out_apart(tile, *dims)),
                *variant.constants,
            ),
            preamble=variant.expression,
        )

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        if arch != ARCH:
            return
        for element in ("f16", "bf16"):
            for dims in _tuning_sm90.FORWARD:
                for variant in (Variant("linear"), Variant("shaped"), *OPTION_VARIANTS):
                    yield self.specialization(arch, element, dims, variant)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        element = _candidates.ELEMENTS[problem.dtype]
        spec = self.specialization(arch, element, dims, variant_of(problem))
        schedule = Schedule(
            tiles=_candidates.tiles_of(problem, spec.constant("BLOCK_Q")),
            heads_per_section=heads_per_section(problem, spec, limits),
            longest_last=grows(problem),
        )
        heads = _candidates.total_heads(problem, problem.heads)
        # Blocks stay: one per multiprocessor.
        grid = min(_candidates.check_grid(problem, schedule.tiles * heads), limits.sm_count)
        threads, shared = spec.constant("WARPS") * 32, spec.constant("SHARED_BYTES")
        return Plan(self.name, (Launch(spec, grid, threads, shared, schedule, "queries"),))
