"""Few queries and several query heads per head of k and v: the heads of a group as rows of one tile.

The heads of a group read the same keys. With a tile for each head those keys are read once per head, for
tiles that are mostly empty rows. Here row r of a tile is query `r // group` of the group's head
`r % group`, so that every key is read once for all of them. Order matters: query after query keeps the
queries of one tile close together, and with them the keys that causal rows see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cuflash import _candidates, _tuning
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._plan_values import Plan, Schedule
from cuflash._problem import Problem
from cuflash._variants import Variant, variant_of

# With more queries the heads' own tiles are full enough.
MOST_QUERIES = 64
# With more, tiles of warpgroups (sm_90a) are: their products are twice as fast.
MOST_QUERIES_SM90 = 16

# What tests compile beside the plain variants.
_ALL_OPTIONS = Variant("general", mask="dense", bias=True, sinks=True, dropout=True, grouped=True)


def group_of(problem: Problem) -> int:
    """Query heads of a head of k and v."""
    return problem.heads // max(1, problem.heads_kv)


def is_grouped(spec: Specialization) -> bool:
    """Whether a kernel's tiles have rows of all heads of a group."""
    return bool(dict(spec.constants).get("GROUPED", False))


def tile_for(
    element: str, arch: str, dims: tuple[int, int], variant: Variant, rows: int
) -> _tuning.Tile:
    """The tile for so many rows of a group: of wide elements the only one there is."""
    if _candidates.ITEM_BYTES[element] == 2:
        return _tuning.forward_few_rows_tile(arch, *dims, rows)
    return _candidates.forward_tile(element, arch, dims, variant)


def tile_of(problem: Problem, arch: str) -> _tuning.Tile:
    """The tile for the rows of a Problem's groups."""
    element = _candidates.element_of(problem, arch)
    dims = _candidates.dim_pair(problem.head_dim, problem.head_dim_v)
    rows = problem.len_q * group_of(problem)
    return tile_for(element, arch, dims, variant_of(problem), rows)


def tiles_of(problem: Problem, tile: _tuning.Tile) -> int:
    """Tiles of one head of k and v."""
    return -(-problem.len_q * group_of(problem) // tile.block_q)


def refusals(problem: Problem, arch: str) -> list[str]:
    """Why the heads of a group are no rows of one tile; for Problems that Forward does not refuse."""
    group = group_of(problem)
    if problem.packed is not None:
        return ["packed sequences have tiles of one head"]
    if group < 2:
        return ["every query head has k and v of its own"]
    if problem.len_q > MOST_QUERIES:
        return [f"{problem.len_q} queries are enough for tiles of one head ({MOST_QUERIES})"]
    element = _candidates.element_of(problem, arch)
    dims = _candidates.dim_pair(problem.head_dim, problem.head_dim_v)
    alone = _candidates.forward_tile(element, arch, dims, variant_of(problem))
    tile = tile_of(problem, arch)
    if tile.slice_columns:
        return ["tiles of slices have rows of one head"]
    walks, before = tiles_of(problem, tile), group * -(-problem.len_q // alone.block_q)
    if walks >= before:
        return [f"{walks} tiles of a group are no fewer than {before} of its heads"]
    return []


def specialization(
    arch: str,
    element: str,
    dims: tuple[int, int],
    variant: Variant,
    rows: int,
    *,
    split: bool = False,
) -> Specialization:
    """The kernel for so many rows of a group."""
    tile = tile_for(element, arch, dims, variant, rows)
    prefix = f"{'split' if split else 'rows'}{tile.block_q}"
    grouped = replace(variant, grouped=True)
    return _candidates.forward_specialization(
        arch, element, dims, grouped, tile, prefix, split=split
    )


def listed(arch: str, *, split: bool) -> Iterator[Specialization]:
    """The kernels that tests compile: the linear score with every tile, of others the largest."""
    linear = Variant("linear")
    for element in _candidates.elements(arch):
        for dims in _candidates.DIM_PAIRS:
            if _candidates.forward_tile(element, arch, dims, linear).slice_columns:
                continue
            found = {(linear, rows) for rows in (16, 32, 64)} if split else {(linear, 64)}
            if _candidates.ITEM_BYTES[element] == 2 or dims == (64, 64):
                found.add((_ALL_OPTIONS if split else Variant("shaped"), 64))
            specs = (
                specialization(arch, element, dims, variant, rows, split=split)
                for variant, rows in sorted(found, key=str)
            )
            yield from dict.fromkeys(specs)


class GroupedForward:
    """Portable forward of the heads of a group as rows of a tile."""

    name = "forward_grouped"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        reasons = _candidates.Forward().refusals(problem, arch) or refusals(problem, arch)
        warpgroups = arch == "sm_90a" and _dtype_is_narrow(problem)
        if not reasons and warpgroups and problem.len_q > MOST_QUERIES_SM90:
            reasons.append(
                f"{problem.len_q} queries are enough for warpgroups ({MOST_QUERIES_SM90})"
            )
        return reasons

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        return listed(arch, split=False)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        element = _candidates.element_of(problem, arch)
        dims = _candidates.dim_pair(problem.head_dim, problem.head_dim_v)
        group = group_of(problem)
        spec = specialization(arch, element, dims, variant_of(problem), problem.len_q * group)
        schedule = Schedule(
            tiles=tiles_of(problem, tile_of(problem, arch)),
            heads_per_section=max(1, _candidates.heads_per_section(problem, limits) // group),
            longest_last=problem.right is not None and problem.left is None,
        )
        heads = _candidates.total_heads(problem, problem.heads_kv)
        launch = _candidates.launch(spec, heads, schedule, problem, "queries")
        return Plan(self.name, (launch,))


def _dtype_is_narrow(problem: Problem) -> bool:
    return _candidates.ITEM_BYTES[_candidates.ELEMENTS[problem.dtype]] == 2
