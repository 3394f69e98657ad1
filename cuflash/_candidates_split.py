"""Few queries, many keys: the portable forward with the keys of a row shared out to several blocks.

A generated token's query meets a whole cache of keys; one block per head would leave most of a GPU
idle. Every block walks a part of the keys and writes that part's output, unrounded, with its lse;
the merge kernel then weighs the parts (Flash-Decoding). Which parts there are depends on the number
of heads, batch entries and multiprocessors: the last bits of a result may differ from those of the
same rows in another batch or on another GPU, never from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cuflash import _candidates, _candidates_grouped, _dtypes, _launch_merge, _params, _tuning
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._plan_values import Launch, Plan, Schedule, Scratch
from cuflash._problem import Problem
from cuflash._variants import Variant, variant_of

# Parts shorter than this cost more in merging than they gain.
MIN_KEYS = 512
# Up to so many rows a single warp has them all, and reads keys for nobody else.
FEW_ROWS = 16
# With more rows, at most so many blocks without splitting: about half of a large GPU.
FEW_BLOCKS = 64
# Of tiles with the rows of a group, which are small: two for each multiprocessor of a large GPU.
FEW_GROUPS = 256
# Blocks per multiprocessor that keep copies of keys under way.
RESIDENT = 4

# What tests compile beside the plain variants.
_ALL_OPTIONS = Variant("general", mask="dense", bias=True, sinks=True, dropout=True)


class SplitForward:
    """Portable forward over parts of the keys, and their merge."""

    name = "forward_split"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        reasons = _candidates.Forward().refusals(problem, arch)
        if problem.packed is not None:
            reasons.append("packed sequences are balanced by their work tables")
        if problem.len_k < 2 * MIN_KEYS:
            reasons.append(f"{problem.len_k} keys are too few to share out ({2 * MIN_KEYS})")
        if reasons:
            return reasons
        if self._is_grouped(problem, arch):
            tile = _candidates_grouped.tile_of(problem, arch)
            blocks = _candidates.total_heads(problem, problem.heads_kv)
            blocks *= _candidates_grouped.tiles_of(problem, tile)
            if blocks > FEW_GROUPS:
                reasons.append(f"{blocks} blocks of rows of groups fill the GPU ({FEW_GROUPS})")
        elif problem.len_q > FEW_ROWS:
            spec = self._specialization_of(problem, arch)
            blocks = _candidates.total_heads(problem, problem.heads)
            blocks *= _candidates.tiles_of(problem, spec.constant("BLOCK_Q"))
            if blocks > FEW_BLOCKS:
                reasons.append(f"{blocks} blocks of rows fill the GPU ({FEW_BLOCKS})")
        return reasons

    def _is_grouped(self, problem: Problem, arch: str) -> bool:
        return not _candidates_grouped.refusals(problem, arch)

    def _specialization_of(self, problem: Problem, arch: str) -> Specialization:
        element = _candidates.element_of(problem, arch)
        dims = _candidates.dim_pair(problem.head_dim, problem.head_dim_v)
        if self._is_grouped(problem, arch):
            rows = problem.len_q * _candidates_grouped.group_of(problem)
            return _candidates_grouped.specialization(
                arch, element, dims, variant_of(problem), rows, split=True
            )
        return self.specialization(
            arch, element, dims, variant_of(problem), few=problem.len_q <= FEW_ROWS
        )

    def specialization(
        self, arch: str, element: str, dims: tuple[int, int], variant: Variant, *, few: bool
    ) -> Specialization:
        """The kernel for one (element, dims, variant); `few`: for up to FEW_ROWS rows."""
        narrow = _candidates.ITEM_BYTES[element] == 2
        if few and narrow:
            tile = _tuning.forward_few_rows_tile(arch, *dims)
        else:
            tile = _candidates.forward_tile(element, arch, dims, variant)
        prefix = f"split{tile.block_q}"
        return _candidates.forward_specialization(
            arch, element, dims, variant, tile, prefix, split=True
        )

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        for element in _candidates.elements(arch):
            for dims in _candidates.DIM_PAIRS:
                variants = _candidates.listed_variants(element, dims)
                chosen = [v for v in variants if v.plain]
                if len(variants) > len(chosen):
                    chosen.append(_ALL_OPTIONS)
                # Where few rows have no tile of their own, the two are one.
                yield from dict.fromkeys(
                    self.specialization(arch, element, dims, variant, few=few)
                    for few in (True, False)
                    for variant in chosen
                )
        yield from _candidates_grouped.listed(arch, split=True)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        spec = self._specialization_of(problem, arch)
        group = _candidates_grouped.group_of(problem) if _candidates_grouped.is_grouped(spec) else 1
        tiles = -(-problem.len_q * group // spec.constant("BLOCK_Q"))
        heads = _candidates.total_heads(problem, problem.heads) // group
        resident = limits.shared_memory // max(1, spec.constant("SHARED_BYTES"))
        wanted = limits.sm_count * max(1, min(resident, RESIDENT))
        most = min(_params.MERGE_MAX_PARTS, problem.len_k // MIN_KEYS)
        splits = max(2, min(-(-wanted // (tiles * heads)), most))
        schedule = Schedule(
            tiles=tiles * splits,
            heads_per_section=max(1, _candidates.heads_per_section(problem, limits) // group),
            longest_last=problem.right is not None and problem.left is None,
            splits=splits,
        )
        parts = _candidates.launch(spec, heads, schedule, problem, "queries")
        rows = math.prod(problem.batch) * problem.heads * problem.len_q
        dtype = _dtypes.BY_NAME[problem.dtype].lse.name
        scratch = (
            Scratch("part_out", (splits, rows, problem.head_dim_v), dtype),
            Scratch("part_lse", (splits, rows), dtype),
        )
        merge = merge_launch(arch, _candidates.ELEMENTS[problem.dtype], rows)
        return Plan(self.name, (parts, merge), scratch)


def merge_launch(arch: str, element: str, rows: int) -> Launch:
    """The launch that merges the parts of so many rows."""
    spec = _launch_merge.specialization(arch, element)
    warps = spec.constant("WARPS")
    return Launch(spec, -(-rows // warps), warps * 32, 0, Schedule(1, 1, False))
