"""Small kernels that run beside those of a plan: tile maps of a mask, tiles of packed sequences, the last
sums of score parameters' gradients.
"""

from __future__ import annotations

from cuflash._candidates import ELEMENTS, elements
from cuflash._compile import Specialization
from cuflash._problem import Problem

# Warps of a block: of mask_tiles, which shares out the 32 tiles of a word, and of packed_plan.
MAP_WARPS, PACKED_WARPS = 8, 8
SUM_WARPS = 4


def mask_tiles(arch: str, kind: str) -> Specialization:
    """The kernel that makes tile maps of one kind of mask."""
    types = (("Source", f"mask::{kind.capitalize()}"),)
    constants = (("WARPS", MAP_WARPS), ("MIN_BLOCKS", 1))
    return Specialization("mask_tiles", arch, "", 0, 0, kind, types, constants)


def packed_plan(arch: str) -> Specialization:
    """The kernel that turns cumulative lengths into tiles."""
    constants = (("WARPS", PACKED_WARPS), ("MIN_BLOCKS", 1))
    return Specialization("packed_plan", arch, "", 0, 0, "", constants=constants)


def score_sums(arch: str, element: str) -> Specialization:
    """The kernel that ends gradients of score parameters, after those of a plan."""
    constants = (("WARPS", SUM_WARPS), ("MIN_BLOCKS", 1))
    return Specialization("backward_score_sums", arch, element, 0, 0, "", constants=constants)


def side_kernels(problem: Problem, arch: str) -> list[Specialization]:
    """Those that a call needs."""
    found = []
    if problem.packed is not None:
        found.append(packed_plan(arch))
    if problem.mask is not None:
        found.append(mask_tiles(arch, problem.mask.kind))
    if problem.direction == "backward" and set(problem.score_params) & set(problem.wrt):
        found.append(score_sums(arch, ELEMENTS[problem.dtype]))
    return found


def all_side_kernels(arch: str) -> list[Specialization]:
    """Those that any call may need."""
    # That of TF32 inputs is that of float32.
    sums = [score_sums(arch, e) for e in elements(arch) if e != "f32tf32"]
    return [packed_plan(arch), mask_tiles(arch, "dense"), mask_tiles(arch, "blocks"), *sums]
