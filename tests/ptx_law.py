"""What an H200 demands of PTX and a lucky launch does not show: laws that are read off the text of a kernel.

The emulator finds what goes wrong on the paths that a launch takes. Here every path counts:

* Steps that a whole warp (or block) takes together stand where no lane can be elsewhere.
* Registers of an asynchronous product are left alone until it is waited for, and fenced before it.
* Everything that a launch is made of stays within the limits of its architecture.
* No offset in global memory is a product of two run-time numbers in 32 bits.
* A block that waits for others knows that they have started: hardware does not promise to start them by number.
"""

from __future__ import annotations

from collections.abc import Iterator

from cuflash._compile import Specialization
from tests.emulator.device import SHARED_MEMORY
from tests.emulator.syntax import Function, Number, PtxModule, Variable
from tests.ptx_addresses import offsets, wide_products
from tests.ptx_flow import Flow, constant
from tests.ptx_products import registers_of_products
from tests.ptx_uniform import WARP, Uniformity

KIB = 1024
# Of one block; without being asked for, of dynamic and static memory together.
_DEFAULT_SHARED = 48 * KIB
_PARAMETER_BYTES = 4096
_REGISTERS = 65536
WARPGROUP = 128
BLOCK = 1024  # threads at most
# Every lane of the warp that the step names must come to it.
_TOGETHER = {
    "bar",
    "barrier",
    "setmaxnreg",
    "shfl",
    "vote",
    "match",
    "redux",
    "elect",
    "activemask",
}


def faults(spec: Specialization, module: PtxModule, *, together: bool = True) -> list[str]:
    """What breaks a law in one kernel, in words; `together`: the first law too, which takes most of the time."""
    (function,) = (f for f in module.functions if f.is_entry)
    flow = Flow(function)
    found = [
        *(converged(flow, has_roles(spec)) if together else ()),
        *registers_of_products(flow),
        *limits(spec, module, function),
        *named_barriers(flow),
        *register_hand_over(flow, function),
        *announced_bytes(flow),
        *offsets(flow),
        *wide_products(flow),
        *read_only_loads(spec, flow),
        *waits_for_blocks(flow),
    ]
    return [f"{spec.arch} {spec.name}: {text}" for text in found]


# ---- together


def has_roles(spec: Specialization) -> bool:
    """Whether warpgroups of a kernel come to the barriers that they share each in code of its own
    (backward_sm90_divided.cuh), which named barriers allow; the emulator counts who comes.
    """
    return spec.kernel == "backward_sm90" and spec.constant("BLOCK_K") == 64


def company(flow: Flow, n: int, roles: bool = False) -> int:
    """How many neighbouring threads take step `n` as one; 1 where each is on its own."""
    step = flow.steps[n]
    opcode = step.instruction.opcode
    if opcode in ("wgmma", "setmaxnreg"):
        return WARPGROUP
    if opcode in ("bar", "barrier") and "warp" not in step.opcode:
        number, *count = barrier_of(flow, n)
        if number is None or takes_turns(flow, count) or (roles and count):
            return WARPGROUP
        return (count[0] if count else BLOCK) or WARPGROUP
    together = opcode in _TOGETHER or "aligned" in step.instruction.modifiers
    return WARP if together else 1


def takes_turns(flow: Flow, count: list[int | None]) -> bool:
    """Whether at barriers of so many threads some only arrive, for others to go on."""
    return bool(count) and any(
        step.opcode == "bar.arrive" and barrier_of(flow, n)[1:] == count
        for n, step in enumerate(flow.steps)
    )


def barrier_of(flow: Flow, n: int) -> list[int | None]:
    """Number of a barrier and, where given, its threads; None for what is not the same everywhere."""
    step = flow.steps[n]
    operands = step.instruction.operands
    if "red" in step.instruction.modifiers:
        operands = operands[1:-1]
    return [constant(flow, n, x) for x in operands]


def converged(flow: Flow, roles: bool = False) -> Iterator[str]:
    """Steps for many threads that depend on a branch which those threads may take differently."""
    meetings: dict[int, set[int]] = {}
    for n in range(len(flow)):
        meetings.setdefault(company(flow, n, roles), set()).add(n)
    meetings.pop(1, None)
    for threads, steps in sorted(meetings.items()):
        reported: set[int] = set()
        for branch, region in Uniformity(flow, threads).branches.items():
            for n in sorted(steps & region - reported):
                reported.add(n)
                who = "lanes" if threads == WARP else f"{threads} threads"
                yield f"{flow.steps[n]} depends on {flow.steps[branch]}, where {who} may part"


# ---- limits


def limits(spec: Specialization, module: PtxModule, function: Function) -> Iterator[str]:
    """Threads, shared memory and parameters beyond what the architecture has."""
    threads = function.directives["maxntid"][0]
    if threads != WARP * spec.constant("WARPS") or threads > 1024:
        yield f"is compiled for {threads} threads, launched with {spec.constant('WARPS')} warps"
    static = sum(x.size for x in _shared(module, function) if not x.extern)
    dynamic = dict(spec.constants).get("SHARED_BYTES", 0)
    most = SHARED_MEMORY[spec.arch]
    if static + dynamic > most:
        yield f"{static} + {dynamic} bytes of shared memory, {spec.arch} has {most}"
    # What is launched asks for its dynamic memory where that exceeds the default.
    if dynamic <= _DEFAULT_SHARED < static + dynamic:
        yield f"{static} + {dynamic} bytes of shared memory are not asked for"
    if sum(x.size for x in function.params) > _PARAMETER_BYTES:
        yield f"{sum(x.size for x in function.params)} bytes of parameters"
    if spec.kernel.endswith("_sm90") and any(x.align % 64 for x in function.params):
        yield "tensor maps among the parameters are not on 64-byte boundaries"


def _shared(module: PtxModule, function: Function) -> Iterator[Variable]:
    for x in (*module.variables, *function.body):
        if isinstance(x, Variable) and x.space == "shared":
            yield x


def named_barriers(flow: Flow) -> Iterator[str]:
    """Numbers of barriers past 15, and counts that are no whole warps."""
    for n, step in enumerate(flow.steps):
        if step.instruction.opcode not in ("bar", "barrier") or "warp" in step.opcode:
            continue
        number, *count = barrier_of(flow, n)
        if number is not None and not 0 <= number < 16:
            yield f"{step}: there are barriers 0 to 15"
        if count and count[0] is not None and (count[0] % WARP or count[0] <= 0):
            yield f"{step}: {count[0]} threads are no whole warps"


def register_hand_over(flow: Flow, function: Function) -> Iterator[str]:
    """setmaxnreg: steps of 8 from 24 to 256, and no more in all than the block started with."""
    asked = [step for step in flow.steps if step.instruction.opcode == "setmaxnreg"]
    if not asked:
        return
    numbers = []
    for step in asked:
        (operand,) = step.instruction.operands
        assert isinstance(operand, Number)
        numbers.append(operand.value)
        if operand.value % 8 or not 24 <= operand.value <= 256:
            yield f"{step}: not one of 24, 32, ..., 256"
    groups = function.directives["maxntid"][0] // WARPGROUP
    started = _REGISTERS // (groups * WARPGROUP) // 8 * 8
    # One warpgroup gives, all others take.
    given = [n for n, step in zip(numbers, asked, strict=True) if "dec" in step.opcode]
    taken = [n for n, step in zip(numbers, asked, strict=True) if "inc" in step.opcode]
    if len(given) != 1 or len(taken) != 1:
        yield f"{len(given)} steps give registers, {len(taken)} take them"
    elif given[0] > started or taken[0] < started:
        yield f"starts with {started} registers, gives down to {given[0]}, takes up to {taken[0]}"
    elif given[0] + (groups - 1) * taken[0] > groups * started:
        yield f"{given[0]} and {groups - 1} times {taken[0]} registers, of {groups * started}"


def announced_bytes(flow: Flow) -> Iterator[str]:
    """Bytes that a barrier is told to wait for: whole copies of 16, and no more than it can count."""
    for n, step in enumerate(flow.steps):
        if step.opcode.startswith("mbarrier.arrive.expect_tx"):
            count = constant(flow, n, step.instruction.operands[-1])
            if count is not None and (count % 16 or not 0 < count < 2**20):
                yield f"{step}: {count} bytes"


# ---- other threads


def read_only_loads(spec: Specialization, flow: Flow) -> Iterator[str]:
    """Loads that promise that nobody writes there: only parameters of a score expression are such."""
    if not spec.preamble:
        for step in flow.steps:
            if "nc" in step.instruction.modifiers:
                yield f"{step}: may be written while the kernel runs"


def waits_for_blocks(flow: Flow) -> Iterator[str]:
    """Waiting for another block, while which block this is comes from the grid and not from a counter.

    A number that is drawn when a block starts tells that all smaller ones have been drawn by blocks that run.
    """
    polls = [n for n, step in enumerate(flow.steps) if "acquire" in step.instruction.modifiers]
    waits = [n for n in polls if any(n in flow.region(b) for b in flow.branches())]
    if not waits:
        return
    if not any(step.instruction.opcode == "atom" for step in flow.steps):
        yield f"{flow.steps[waits[0]]} waits for blocks that may not have started"
    for step in flow.steps:
        if any(name.startswith("%ctaid") for name in step.reads):
            yield f"{step}: blocks that wait for each other are numbered in the order in which they start"
