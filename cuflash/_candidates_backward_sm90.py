"""Hopper's backward: wgmma, TMA and mbarriers for dK, dV and dQ in one walk (kernels_cu/backward_sm90.cuh).

What comes before and after (delta, the last rounding of dQ, gradients of slopes and sinks) are the portable
family's kernels. dQ is gathered by bulk reductions; with `deterministic=True` blocks take turns, so that no
second pass is needed. Whatever is refused here runs on the portable family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cuflash._candidates import (
    common_refusals,
    dim_pair,
    element_of,
    listed_variants,
    specialize,
)
from cuflash._candidates_backward import Backward, BackwardKernels
from cuflash._candidates_sm90 import MAX_STRIDE
from cuflash._compile import Specialization
from cuflash._launch_maps import BATCH_AXES
from cuflash._problem import Problem
from cuflash._tuning import Tile
from cuflash._variants import Variant, variant_of
from cuflash._views import merge_axes

ARCH = "sm_90a"
KERNEL = "backward_sm90"
ELEMENTS = ("f16", "bf16")
# Two warpgroups of 64 keys and one that feeds them. The accumulators of a warpgroup (dK and dV: 64 x head dim
# each, above 128 one of them; S^T and dP^T: 64 x BLOCK_Q) take at most 192 registers per thread with any tile.
# 2026-11-21, chosen.
# Head dims up to 32: half of every row of shared memory is zeros, but products have only the columns there are. 1280
# cycles of tensor cores per tile of 128 x 128; the portable kernel's mma.sync take 2560, and twice the instructions.
TILES = {
    (32, 32): Tile(128, 128, 12, stages=2),
    (64, 64): Tile(128, 128, 12, stages=2),
    (96, 96): Tile(64, 128, 12, stages=2),
    (128, 128): Tile(64, 128, 12, stages=2),
    # Each warpgroup sums one of the gradients, of the same 64 keys (kernels_cu/backward_sm90_divided.cuh).
    (192, 128): Tile(64, 64, 12, stages=2),
    (192, 192): Tile(64, 64, 12, stages=2),
    (256, 256): Tile(64, 64, 12, stages=2),
}
LOADED = ("q", "k", "v", "dout")  # by tensor maps


def shared_bytes(tile: Tile, dims: tuple[int, int], accumulate: bool) -> int:
    """Dynamic shared memory: see Layout in kernels_cu/backward_sm90_layout.cuh."""
    row = sum(-(-dim // 64) * 64 * 2 for dim in dims)  # bytes, of K and V or of Q and dO
    queries = tile.stages * tile.block_q * (row + 8)
    together = 64 if tile.block_k == 64 else dims[0]  # columns of dQ
    gathered = 2 * tile.block_k * tile.block_q * 2 + tile.block_q * together * 4
    barriers, work, alignment = (4 + 4 * tile.stages) * 8, 80, 1024
    rest = barriers + work + alignment
    return tile.block_k * row + queries + (gathered if accumulate else 0) + rest


class BackwardSm90(Backward):
    """Backward on Hopper: wgmma + TMA, kernels_cu/backward_sm90*.cuh."""

    name = KERNEL

    def refusals(self, problem: Problem, arch: str) -> list[str]:
        """See Candidate."""
        if problem.direction != "backward":
            return [f"does not compute {problem.direction}"]
        if arch != ARCH:
            return [f"needs {ARCH}, this is {arch}"]
        reasons = common_refusals(problem, arch)
        if element_of(problem, arch) not in ELEMENTS:
            reasons.append(f"{problem.dtype} is not one of float16, bfloat16")
        if not {"k", "v"} & set(problem.wrt):
            reasons.append("neither the gradient of k nor of v is wanted")
        return reasons + _refused_memory(problem)

    def kernels(self, problem: Problem, arch: str) -> BackwardKernels:
        """The portable family's, with this one's kernel for keys, which gathers dQ where nothing asks for a
        pass over the rows.
        """
        dims = dim_pair(problem.head_dim, problem.head_dim_v)
        found = super().kernels(problem, arch)
        gathers = "q" in problem.wrt and "alibi_slopes" not in problem.wrt
        # Whose turn it is follows from a band alone.
        gathers = gathers and not (problem.deterministic and problem.mask is not None)
        element, variant = element_of(problem, arch), variant_of(problem).without_sinks()
        turns = gathers and problem.deterministic
        found = replace(found, dkdv=self.key_kernel(element, dims, variant, gathers, turns))
        if not gathers:
            return found
        convert = self.specialization(
            "backward_convert", arch, element, dims, variant, permuted=True
        )
        return replace(found, dq=None, convert=convert)

    def key_kernel(
        self, element: str, dims: tuple[int, int], variant: Variant, gathers: bool, turns: bool
    ) -> Specialization:
        """The Hopper kernel; `gathers`: dQ too, `turns`: in a fixed order."""
        tile = TILES[dims]
        shared = shared_bytes(tile, dims, gathers)
        prefix = "turns" if turns else "accumulate" if gathers else ""
        extra = {"ACCUMULATE_DQ": gathers, "TURNS": turns}
        return specialize(KERNEL, ARCH, element, dims, variant, tile, shared, prefix, **extra)

    def specializations(self, arch: str) -> Iterator[Specialization]:
        """See Candidate."""
        if arch != ARCH:
            return
        for element in ELEMENTS:
            for dims in TILES:
                yield from self._listed(element, dims)

    def _listed(self, element: str, dims: tuple[int, int]) -> Iterator[Specialization]:
        """Every variant of one size that tests compile."""
        variants = [v.without_sinks() for v in listed_variants(element, dims)]
        converts: dict[Specialization, None] = {}  # variants share them
        for variant in dict.fromkeys(variants):
            for gathers, turns in ((True, False), (True, True), (False, False)):
                if not (turns and variant.mask):
                    yield self.key_kernel(element, dims, variant, gathers, turns)
            of_dims = ("backward_convert", ARCH, element, dims, variant)
            converts[self.specialization(*of_dims, permuted=True)] = None
        yield from converts


def _refused_memory(problem: Problem) -> list[str]:
    """What the copy engine cannot read."""
    reasons = []
    # Operand strides are 0 where an array is broadcast, and of missing axes.
    steps = {name: operand.strides[:-3] for name, operand in problem.operands}
    steps = {name: (0,) * (len(problem.batch) - len(s)) + s for name, s in steps.items()}
    axes = len(merge_axes(problem.batch, steps)[0])
    if axes > BATCH_AXES:
        reasons.append(f"{axes} separate batch axes, tensor maps have room for {BATCH_AXES}")
    # More axes than maps have, and another array (a mask, lse) that keeps them apart: all are copied.
    copies = sum(extent > 1 for extent in problem.batch) > BATCH_AXES
    if copies and (problem.head_dim % 8 or problem.head_dim_v % 8):
        reasons.append("copies, which this many batch axes may need, would not have 16-byte rows")
    for name, operand in problem.operands:
        if name not in LOADED:
            continue
        if not operand.aligned:
            reasons.append(f"rows of {name} do not begin on 16-byte boundaries")
        elif operand.shape[-2] > 1 and operand.strides[-2] == 0:
            reasons.append(f"rows of {name} are all the same one")
        elif any(not 0 <= step < MAX_STRIDE for step in operand.strides):
            reasons.append(f"strides of {name}: {operand.strides} bytes, not positive")
    return reasons
