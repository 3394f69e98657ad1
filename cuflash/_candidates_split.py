"""Few queries, many keys: the portable forward with the keys of a row shared out to several blocks.

A generated token's query meets a whole cache of keys; one block per head would leave most of a GPU
idle. Every block walks a part of the keys and writes that part's output in float32 with its lse;
the merge kernel then weighs the parts (Flash-Decoding). Which parts there are depends on the number
of heads, batch entries and multiprocessors: the last bits of a result may differ from those of the
same rows in another batch or on another GPU, never from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuflash import _candidates, _launch_merge, _params, _tuning
from cuflash._candidates import ITEM_BYTES
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

# What tests compile beside the plain variants.
_ALL_OPTIONS = Variant("general", mask="dense", bias=True, sinks=True, dropout=True)


class SplitForward:
    """Portable forward over parts of the keys, and their merge."""

    name = "forward_split"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "forward":
            return [f"does not compute {problem.direction}"]
        reasons = _candidates.common_refusals(problem, arch)
        if problem.dtype not in ("float16", "bfloat16"):
            reasons.append(f"{problem.dtype}: partial results are merged for 16-bit elements only")
        if problem.packed is not None:
            reasons.append("packed sequences are balanced by their work tables")
        if problem.len_k < 2 * MIN_KEYS:
            reasons.append(f"{problem.len_k} keys are too few to share out ({2 * MIN_KEYS})")
        if not reasons and problem.len_q > FEW_ROWS:
            blocks = self._blocks(problem, arch)
            if blocks > FEW_BLOCKS:
                reasons.append(f"{blocks} blocks of rows fill the GPU ({FEW_BLOCKS})")
        return reasons

    def _blocks(self, problem: Problem, arch: str) -> int:
        """Blocks of a launch that splits nothing."""
        tile = tile_of(arch, _dims(problem), problem.len_q, variant_of(problem))
        heads = _candidates.total_heads(problem, problem.heads)
        return heads * _candidates.tiles_of(problem, tile.block_q)

    def specialization(
        self, arch: str, element: str, dims: tuple[int, int], variant: Variant, len_q: int
    ) -> Specialization:
        """The kernel for one (element, dims, variant), for few rows or more."""
        tile = tile_of(arch, dims, len_q, variant)
        shared = _tuning.forward_shared_bytes(tile, *dims)
        prefix = f"split{tile.block_q}"
        return _candidates.specialize(
            "forward", arch, element, dims, variant, tile, shared, prefix, SPLIT=True
        )

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        for element in _candidates.elements(arch):
            if ITEM_BYTES[element] != 2:
                continue
            for dims in _candidates.DIM_PAIRS:
                for len_q in (1, FEW_ROWS + 1):
                    for variant in (Variant("linear"), Variant("shaped"), _ALL_OPTIONS):
                        yield self.specialization(arch, element, dims, variant, len_q)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        element = _candidates.ELEMENTS[problem.dtype]
        dims, variant = _dims(problem), variant_of(problem)
        spec = self.specialization(arch, element, dims, variant, problem.len_q)
        tiles = _candidates.tiles_of(problem, spec.constant("BLOCK_Q"))
        heads = _candidates.total_heads(problem, problem.heads)
        resident = max(1, limits.shared_memory // max(1, spec.constant("SHARED_BYTES")))
        wanted = -(-limits.sm_count * min(resident, 4) // (tiles * heads))
        most = min(_params.MERGE_MAX_PARTS, problem.len_k // MIN_KEYS)
        splits = max(2, min(wanted, most))
        schedule = Schedule(
            tiles=tiles * splits,
            heads_per_section=_candidates.heads_per_section(problem, limits),
            longest_last=problem.right is not None and problem.left is None,
            splits=splits,
        )
        parts = _candidates.launch(spec, heads, schedule, problem, "queries")
        rows = int(np.prod(problem.batch, dtype=np.int64)) * problem.heads * problem.len_q
        scratch = (
            Scratch("part_out", (splits, rows, problem.head_dim_v), "float32"),
            Scratch("part_lse", (splits, rows), "float32"),
        )
        merge = merge_launch(arch, element, rows)
        return Plan(self.name, (parts, merge), scratch)


def _dims(problem: Problem) -> tuple[int, int]:
    return _candidates.dim_pair(problem.head_dim, problem.head_dim_v)


def tile_of(arch: str, dims: tuple[int, int], len_q: int, variant: Variant) -> _tuning.Tile:
    """The tile for so many rows."""
    if len_q <= FEW_ROWS:
        return _tuning.forward_few_rows_tile(arch, *dims)
    tile = _candidates.forward_tile("f16", arch, dims, variant)
    assert tile is not None, "16-bit tiles fit every architecture"
    return tile


def merge_launch(arch: str, element: str, rows: int) -> Launch:
    """The launch that merges the parts of so many rows."""
    spec = _launch_merge.specialization(arch, element)
    warps = spec.constant("WARPS")
    return Launch(spec, -(-rows // warps), warps * 32, 0, Schedule(0, 1, False))
