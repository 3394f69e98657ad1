"""The portable family (mma.sync): which problems it serves and with which launches.

Runs on every architecture from sm_75 on and is the fallback everywhere. A family states why it
refuses a Problem; an empty list means that it can run. Numbers live in `_tuning.py`, rules here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from cuflash import _tuning, _tuning_wide
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._errors import UnsupportedError
from cuflash._plan_values import Launch, Plan, Schedule
from cuflash._problem import Problem
from cuflash._variants import Variant, variant_of

# The element trait of a dtype; float32 has another one for precision="tf32".
ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
TF32 = "f32tf32"
ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4, TF32: 4, "f64": 8}

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


def element_of(problem: Problem, arch: str) -> str:
    """The element trait that computes a Problem. Turing has no TF32: there "tf32" is float32."""
    if problem.precision == "tf32" and arch != "sm_75":
        return TF32
    return ELEMENTS[problem.dtype]


def common_refusals(problem: Problem, arch: str) -> list[str]:
    """What no kernel of the family can do."""
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
    for name in ("total_q", "total_k"):
        if problem.packed is not None and getattr(problem.packed, name) >= 2**31:
            reasons.append(f"{name} {getattr(problem.packed, name)} >= {2**31}")
    if problem.alibi and abs(problem.q_offset) > MAX_EXTENT:
        reasons.append(f"ALiBi with |q_offset| {abs(problem.q_offset)} > {MAX_EXTENT}")
    return reasons


# What tests compile beside the plain variants: every option alone, and all of them together.
OPTION_VARIANTS = (
    Variant("linear", mask="dense"),
    Variant("linear", mask="blocks"),
    Variant("shaped", mask="blocks"),
    Variant("general", bias=True),
    Variant("linear", sinks=True),
    Variant("linear", dropout=True),
    Variant("linear", packed=True),
    Variant("general", mask="dense", bias=True, sinks=True, dropout=True, packed=True),
)


def listed_variants(element: str, dims: tuple[int, int]) -> tuple[Variant, ...]:
    """The variants that tests compile. Of wide formats, which share their source with the others, every
    option alone at one head dim, and at all of them what is most and least.
    """
    plain = Variant("linear"), Variant("shaped")
    if ITEM_BYTES[element] == 2 or dims == (64, 64):
        return (*plain, *OPTION_VARIANTS)
    return (*plain, OPTION_VARIANTS[-1])


@functools.cache
def specialize(
    kernel: str,
    arch: str,
    element: str,
    dims: tuple[int, int],
    variant: Variant,
    tile: _tuning.Tile,
    shared: int,
    prefix: str = "",
    **extra: int,
) -> Specialization:
    """The Specialization of one variant of a kernel; `prefix` stands before the variant's name."""
    return Specialization(
        kernel=kernel,
        arch=arch,
        element=element,
        head_dim=dims[0],
        head_dim_v=dims[1],
        variant="_".join(word for word in (prefix, variant.name) if word),
        types=variant.types,
        constants=(
            ("BLOCK_Q", tile.block_q),
            ("BLOCK_K", tile.block_k),
            ("WARPS", tile.warps),
            ("STAGES", tile.stages),
            ("MIN_BLOCKS", tile.min_blocks),
            ("SHARED_BYTES", shared),
            ("Q_IN_REGISTERS", bool(tile.q_in_registers)),
            *variant.constants,
            *(("SLICE", tile.slice_columns),) * bool(tile.slice_columns),
            *extra.items(),
        ),
        preamble=variant.expression,
    )


def forward_specialization(
    arch: str,
    element: str,
    dims: tuple[int, int],
    variant: Variant,
    tile: _tuning.Tile,
    prefix: str = "",
    *,
    split: bool = False,
) -> Specialization:
    """A kernel of forward.cuh with a given tile."""
    item = ITEM_BYTES[element]
    if item == 2:
        shared = _tuning.forward_shared_bytes(tile, *dims)
    else:
        shared = _tuning_wide.forward_shared_bytes(item, tile, *dims)
    return specialize("forward", arch, element, dims, variant, tile, shared, prefix, SPLIT=split)


def heads_per_section(problem: Problem, limits: Limits) -> int:
    """How many query heads to walk together so that their K and V stay in half of the L2 cache."""
    item = ITEM_BYTES[ELEMENTS[problem.dtype]]
    per_kv_head = problem.len_k * (problem.head_dim + problem.head_dim_v) * item
    group = problem.heads // problem.heads_kv
    total = total_heads(problem, problem.heads)
    kv_heads = max(1, limits.l2_bytes // 2 // max(1, per_kv_head))
    return int(max(1, min(total, kv_heads * group)))


def total_heads(problem: Problem, heads: int) -> int:
    """Heads of the whole batch; those of all packed sequences lie in one row of the arrays."""
    if problem.packed is not None:
        return heads
    return heads * math.prod(problem.batch)


def longest(problem: Problem) -> tuple[int, int]:
    """Most queries and keys that a head can have: a bound that the caller gives for packed sequences
    may be anything beyond the rows there are.
    """
    if problem.packed is None:
        return problem.len_q, problem.len_k
    packed = problem.packed
    return min(problem.len_q, packed.total_q), min(problem.len_k, packed.total_k)


def tiles_of(problem: Problem, block: int, by_keys: bool = False) -> int:
    """Tiles of one head; of packed sequences as many as there can be at most."""
    if problem.packed is not None:
        total = problem.packed.total_k if by_keys else problem.packed.total_q
        return total // block + problem.batch[0]
    return -(-(problem.len_k if by_keys else problem.len_q) // block)


def check_grid(problem: Problem, grid: int) -> int:
    """The number of blocks, if one launch can have so many."""
    if grid > MAX_GRID:
        raise UnsupportedError(
            f"this call needs {grid} blocks, more than the {MAX_GRID} of one launch.\n"
            f"  batch {problem.batch}, {problem.heads} heads, {problem.len_q} queries\n"
            "  Way out: split the batch."
        )
    return grid


def elements(arch: str) -> tuple[str, ...]:
    """Number formats that kernels of an architecture come in."""
    return ("f16", "f32", "f64") if arch == "sm_75" else ("f16", "bf16", "f32", TF32, "f64")


def forward_tile(element: str, arch: str, dims: tuple[int, int], variant: Variant) -> _tuning.Tile:
    """The forward tile."""
    item = ITEM_BYTES[element]
    if item == 2:
        general = variant.score == "general"
        return _tuning.forward_tile(arch, *dims, general=general, packed=variant.packed)
    return _tuning_wide.forward_tile(item, arch, *dims)


def launch(
    spec: Specialization, heads: int, schedule: Schedule, problem: Problem, walk: str = ""
) -> Launch:
    """A launch of one block per (head, tile)."""
    grid = check_grid(problem, schedule.tiles * heads)
    threads = spec.constant("WARPS") * 32
    return Launch(spec, grid, threads, spec.constant("SHARED_BYTES"), schedule, walk)


class Forward:
    """Portable forward: mma.sync, kernels_cu/forward.cuh."""

    name = "forward"

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "forward":
            return [f"does not compute {problem.direction}"]
        return common_refusals(problem, arch)

    def specialization(
        self, arch: str, element: str, dims: tuple[int, int], variant: Variant
    ) -> Specialization:
        """The kernel for one (element, dims, variant)."""
        tile = forward_tile(element, arch, dims, variant)
        return forward_specialization(arch, element, dims, variant, tile)

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        for element in elements(arch):
            for dims in DIM_PAIRS:
                for variant in listed_variants(element, dims):
                    yield self.specialization(arch, element, dims, variant)

    def plan(self, problem: Problem, arch: str, limits: Limits) -> Plan:
        """See Candidate."""
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        spec = self.specialization(arch, element_of(problem, arch), dims, variant_of(problem))
        schedule = Schedule(
            tiles=tiles_of(problem, spec.constant("BLOCK_Q")),
            heads_per_section=heads_per_section(problem, limits),
            # With a right bound and no left one, later rows see more keys.
            longest_last=problem.right is not None and problem.left is None,
        )
        heads = total_heads(problem, problem.heads)
        return Plan(self.name, (launch(spec, heads, schedule, problem, "queries"),))
