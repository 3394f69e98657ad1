"""The family of warpgroups (TMA, wgmma): Hopper only, 16-bit elements, arrays that TMA can read."""

from __future__ import annotations

from collections.abc import Iterator

from cuflash import _candidates, _tuning_sm90
from cuflash._candidates import OPTION_VARIANTS, Variant
from cuflash._compile import Specialization
from cuflash._device import Limits
from cuflash._launch_maps import BATCH_AXES
from cuflash._plan_values import Launch, Plan, Schedule
from cuflash._problem import Problem
from cuflash._variants import variant_of
from cuflash._views import merge_axes

ARCH = "sm_90a"
ELEMENTS = ("float16", "bfloat16")
MAX_STRIDE = 2**40  # bytes


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
            heads_per_section=_candidates.heads_per_section(problem, limits),
            longest_last=problem.right is not None and problem.left is None,
        )
        heads = _candidates.total_heads(problem, problem.heads)
        # Blocks stay: one per multiprocessor.
        grid = min(_candidates.check_grid(problem, schedule.tiles * heads), limits.sm_count)
        threads, shared = spec.constant("WARPS") * 32, spec.constant("SHARED_BYTES")
        return Plan(self.name, (Launch(spec, grid, threads, shared, schedule, "queries"),))
