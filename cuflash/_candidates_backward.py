"""The portable family's backward: which kernels a gradient takes, in which order, with which workspace.

Deterministic: dK and dV per key tile, dQ in a pass of its own. Otherwise dQ is gathered by float32
reductions during the first pass, which saves forming the scores a second time. Gradients of a bias,
of slopes, sinks and score parameters never depend on the order of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cuflash import _dtypes, _tuning, _tuning_wide
from cuflash._candidates import (
    DIM_PAIRS,
    ITEM_BYTES,
    check_grid,
    common_refusals,
    dim_pair,
    element_of,
    elements,
    heads_per_section,
    launch,
    listed_variants,
    longest,
    specialize,
    tiles_of,
    total_heads,
)
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._plan_values import Launch, PairWork, Plan, Schedule, Scratch
from cuflash._problem import Problem
from cuflash._variants import Variant, variant_of

# Kernels that pass over rows: they know no mask and no score.
ROW_KERNELS = ("backward_prepare", "backward_convert", "backward_slopes", "backward_sinks")
# Partial sums of a bias gradient over pairs: at most so many times its own size.
MAX_PAIR_SPLITS = 8
MAX_SPLITS = 256


@dataclass(frozen=True, slots=True)
class BackwardKernels:
    """The kernels of one backward pass; None where it needs none."""

    prepare: Specialization
    dkdv: Specialization | None
    dq: Specialization | None
    convert: Specialization | None
    slopes: Specialization | None
    sinks: Specialization | None
    bias: Specialization | None
    score: Specialization | None


class Backward:
    """Portable backward: mma.sync, kernels_cu/backward_*.cuh."""

    name = "backward"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "backward":
            return [f"does not compute {problem.direction}"]
        return common_refusals(problem, arch)

    def specialization(
        self,
        kernel: str,
        arch: str,
        element: str,
        dims: tuple[int, int],
        variant: Variant,
        accumulate: bool = False,
        permuted: bool = False,
    ) -> Specialization:
        """One of the backward kernels; `accumulate`: dkdv also gathers dQ, `permuted`: as Hopper's does."""
        row = f"{kernel}_accumulate" if accumulate else kernel
        if kernel in ROW_KERNELS:
            score = "linear" if variant.score == "linear" else "shaped"
            variant = Variant(score, packed=variant.packed)
        roomy = variant.score == "general" or (variant.score == "shaped" and not variant.plain)
        packed = variant.packed
        tile, shared = tile_of(row, arch, element, dims, options=roomy, packed=packed)
        if kernel == "backward_convert":
            prefix = "permuted" if permuted else ""
            extra = {"DQ_PERMUTED": permuted}
            return specialize(kernel, arch, element, dims, variant, tile, shared, prefix, **extra)
        if kernel != "backward_dkdv":
            return specialize(kernel, arch, element, dims, variant, tile, shared)
        prefix = "accumulate" if accumulate else ""
        return specialize(
            kernel, arch, element, dims, variant, tile, shared, prefix, ACCUMULATE_DQ=accumulate
        )

    def kernels(self, problem: Problem, arch: str) -> BackwardKernels:
        """What computes the gradients in `wrt`."""
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        variant = variant_of(problem).without_sinks()
        wrt = problem.wrt

        def kernel(
            name: str, wanted: bool, accumulate: bool = False, variant: Variant = variant
        ) -> Specialization | None:
            if not wanted:
                return None
            element = element_of(problem, arch)
            return self.specialization(name, arch, element, dims, variant, accumulate)

        keys = "k" in wrt or "v" in wrt
        slopes = "alibi_slopes" in wrt
        # Slope partials come from the dQ pass; without dK and dV there is nothing to share with.
        fused = "q" in wrt and keys and not problem.deterministic and not slopes
        fused = fused and gathers(arch, dims, variant, element_of(problem, arch))
        prepare = kernel("backward_prepare", True)
        assert prepare is not None
        return BackwardKernels(
            prepare=prepare,
            dkdv=kernel("backward_dkdv", keys, fused),
            dq=kernel("backward_dq", ("q" in wrt or slopes) and not fused),
            convert=kernel("backward_convert", fused),
            slopes=kernel("backward_slopes", slopes),
            sinks=kernel("backward_sinks", "sinks" in wrt),
            bias=kernel("backward_bias", "bias" in wrt),
            score=self.score_kernel(problem, arch, dims, variant),
        )

    def score_kernel(
        self, problem: Problem, arch: str, dims: tuple[int, int], variant: Variant
    ) -> Specialization | None:
        """What sums gradients of score parameters; which of them is part of the kernel."""
        wanted = sum(1 << n for n, name in enumerate(problem.score_params) if name in problem.wrt)
        if not wanted:
            return None
        kernel, element = "backward_score", element_of(problem, arch)
        tile, shared = tile_of(kernel, arch, element, dims)
        prefix = f"of{wanted}"
        return specialize(kernel, arch, element, dims, variant, tile, shared, prefix, WANTED=wanted)

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        found: dict[Specialization, None] = {}  # variants share the kernels that pass over rows
        for element in elements(arch):
            for dims in DIM_PAIRS:
                for variant in listed_variants(element, dims):
                    kernels = self._variant_kernels(arch, element, dims, variant.without_sinks())
                    found |= dict.fromkeys(kernels)
        yield from found

    def _variant_kernels(
        self, arch: str, element: str, dims: tuple[int, int], variant: Variant
    ) -> Iterator[Specialization]:
        """Every kernel of one variant."""
        names = ["backward_prepare", "backward_dq"]
        names += ["backward_convert"] if ITEM_BYTES[element] == 2 else []
        # Slopes only occur with a score that has them.
        names += ["backward_slopes", "backward_sinks"] if variant.score != "linear" else []
        names += ["backward_bias"] if variant.bias else []
        for name in names:
            yield self.specialization(name, arch, element, dims, variant)
        for accumulate in (False, True) if gathers(arch, dims, variant, element) else (False,):
            yield self.specialization("backward_dkdv", arch, element, dims, variant, accumulate)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        return _Planner(problem, self.kernels(problem, arch), limits).plan(self.name)


def tile_of(
    kernel: str,
    arch: str,
    element: str,
    dims: tuple[int, int],
    *,
    options: bool = False,
    packed: bool = False,
) -> tuple[_tuning.Tile, int]:
    """Tile and shared memory of a kernel.

    `options`: of a general score, or of soft cap or ALiBi with an option.
    """
    item = ITEM_BYTES[element]
    if item == 2:
        tile = _tuning.backward_tile(kernel, arch, *dims, options=options)
        return tile, _tuning.backward_shared_bytes(kernel, tile, *dims)
    wide = _tuning_wide.backward_tile(item, kernel, arch, *dims, packed=packed)
    return wide, _tuning_wide.backward_shared_bytes(item, kernel, wide, *dims, packed=packed)


def gathers(arch: str, dims: tuple[int, int], variant: Variant, element: str) -> bool:
    """Whether a variant's dK/dV kernel can gather dQ on the way."""
    if ITEM_BYTES[element] > 2:  # no room in shared memory, and float32 sums would be seen
        return False
    if variant.score == "general" or variant.dropout or variant.packed:
        return False
    return _tuning.accumulates(arch, *dims, variant.score == "linear")


class _Planner:
    """Puts launches and workspace of one backward pass together."""

    def __init__(self, problem: Problem, kernels: BackwardKernels, limits: Limits) -> None:
        self.problem, self.kernels, self.limits = problem, kernels, limits
        self.heads = total_heads(problem, problem.heads)
        self.section = heads_per_section(problem, limits)
        packed = problem.packed
        self.rows = problem.len_q if packed is None else packed.total_q
        self.launches: list[Launch] = []
        self.scratch: list[Scratch] = []

    def by_query(self, spec: Specialization, per_section: int = 1, walk: str = "rows") -> Launch:
        """A launch over the tiles of queries."""
        problem = self.problem
        later_rows_longer = problem.right is not None and problem.left is None
        tiles = tiles_of(problem, spec.constant("BLOCK_Q"))
        schedule = Schedule(tiles, per_section, later_rows_longer)
        return launch(spec, self.heads, schedule, problem, walk)

    def workspace(self, name: str, *tail: int) -> None:
        """Workspace per head, in the type of lse."""
        dtype = _dtypes.BY_NAME[self.problem.dtype].lse.name
        self.scratch.append(Scratch(name, (self.heads, *tail), dtype))

    def plan(self, name: str) -> Plan:
        """The whole of it."""
        problem, kernels = self.problem, self.kernels
        self.launches.append(self.by_query(kernels.prepare))
        self.workspace("lse_log2", self.rows)
        self.workspace("delta", self.rows)
        if kernels.convert:
            self.workspace("dq_accum", self.rows, kernels.convert.head_dim)
        if kernels.dkdv and dict(kernels.dkdv.constants).get("TURNS"):
            # A counter of blocks, and one per block of backward_prepare, which resets them.
            blocks = self.heads * self.launches[0].schedule.tiles
            self.scratch.append(Scratch("dq_turns", (1 + blocks,), "uint32"))
        if kernels.dkdv:
            # Seen from the keys the band is mirrored: early keys are seen by most rows under a
            # right bound.
            later_keys_longer = problem.left is not None and problem.right is None
            tiles = tiles_of(problem, kernels.dkdv.constant("BLOCK_K"), by_keys=True)
            group = problem.heads // problem.heads_kv
            schedule = Schedule(tiles, max(1, self.section // group), later_keys_longer)
            heads_kv = total_heads(problem, problem.heads_kv)
            self.launches.append(launch(kernels.dkdv, heads_kv, schedule, problem, "keys"))
        if kernels.dq:
            self.launches.append(self.by_query(kernels.dq, self.section, "queries"))
        if kernels.convert:
            self.launches.append(self.by_query(kernels.convert))
        if kernels.slopes and kernels.dq:
            tiles = self.launches[-1].schedule.tiles  # of backward_dq, whose partials these are
            self.workspace("slope_partial", tiles)
            self.per_head(kernels.slopes, tiles)
        if kernels.sinks:
            self.per_head(kernels.sinks, 1)
        if kernels.bias:
            self.bias(kernels.bias)
        if kernels.score:
            self.score(kernels.score)
        return Plan(name, tuple(self.launches), tuple(self.scratch))

    def per_head(self, spec: Specialization, tiles: int) -> None:
        """A launch of one block per head of every batch element or packed sequence."""
        blocks = check_grid(self.problem, self.problem.heads * math.prod(self.problem.batch))
        threads = spec.constant("WARPS") * 32
        self.launches.append(Launch(spec, blocks, threads, 0, Schedule(tiles, 1, False)))

    def bias(self, spec: Specialization) -> None:
        """The launch for a bias's gradient: one block per tile of the bias and share of its sums."""
        problem = self.problem
        assert problem.bias is not None
        full = (*problem.batch, problem.heads, problem.len_q, problem.len_k)
        own = (1,) * (len(full) - len(problem.bias)) + problem.bias
        # Of an axis that the bias has every tile is written, of others those that can hold a pair count.
        extents = [
            whole if extent == whole else reach
            for extent, whole, reach in zip(own[-2:], full[-2:], longest(problem), strict=True)
        ]
        tiles_q, tiles_k = self.pair_tiles(spec, *extents)
        counts = (*full[:-2], tiles_q, tiles_k)
        blocks = shares = 1
        for count, extent, whole in zip(counts, own, full, strict=True):
            if extent == whole:
                blocks *= count
            else:
                shares *= count
        wanted = -(-2 * self.limits.sm_count // max(1, blocks))
        most = MAX_PAIR_SPLITS if own[-2:] == full[-2:] else MAX_SPLITS
        splits = max(1, min(wanted, shares, most))
        self.pairs(spec, blocks * splits, PairWork(splits, tiles_q, tiles_k))

    def score(self, spec: Specialization) -> None:
        """The launch for gradients of score parameters: one block per tile of queries."""
        problem = self.problem
        tiles_q, tiles_k = self.pair_tiles(spec, *longest(problem))
        blocks = tiles_q * problem.heads * math.prod(problem.batch)
        self.pairs(spec, blocks, PairWork(1, tiles_q, tiles_k))

    def pair_tiles(self, spec: Specialization, len_q: int, len_k: int) -> tuple[int, int]:
        """Tiles of queries and of keys."""
        return -(-len_q // spec.constant("BLOCK_Q")), -(-len_k // spec.constant("BLOCK_K"))

    def pairs(self, spec: Specialization, blocks: int, work: PairWork) -> None:
        """A launch over pairs."""
        grid = check_grid(self.problem, blocks)
        threads, shared = spec.constant("WARPS") * 32, spec.constant("SHARED_BYTES")
        schedule = Schedule(work.tiles_q, 1, False)
        self.launches.append(Launch(spec, grid, threads, shared, schedule, "queries", work))
