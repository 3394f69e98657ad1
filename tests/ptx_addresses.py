"""Laws of addresses: constant offsets that fit the access, and offsets in global memory of 64 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from cuflash import _compile
from tests.emulator.syntax import SIZES, Address, Instruction, Name
from tests.ptx_flow import Flow, Step, constant


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one lane reads or writes at an address; 0 where the instruction does not say."""
    modifiers = instruction.modifiers
    if instruction.opcode == "cp":
        return (
            instruction.operands[2].value
            if modifiers[:2] in (["async", "ca"], ["async", "cg"])
            else 0
        )
    if instruction.opcode not in ("ld", "st", "red", "atom") or "param" in modifiers:
        return 0
    width = next((int(m[1:]) for m in modifiers if m in ("v2", "v4", "v8")), 1)
    return width * SIZES.get(modifiers[-1], 0)


def offsets(flow: Flow) -> Iterator[str]:
    """Constant offsets that no address aligned to the access can have."""
    for step in flow.steps:
        size = access_bytes(step.instruction)
        for operand in step.instruction.operands if size else ():
            if isinstance(operand, Address) and operand.offset % size:
                yield f"{step}: {operand.offset} is no multiple of {size}"


def _global_address(instruction: Instruction) -> Name | None:
    """The register of an access's address in global memory."""
    if instruction.opcode == "cp":
        place = 1 if "shared" in "".join(instruction.modifiers[:4]) else 0
        if access_bytes(instruction) == 0:
            return None
    elif instruction.opcode in ("ld", "st", "red", "atom") and "global" in instruction.modifiers:
        place = 1 if instruction.opcode in ("ld", "atom") else 0
    else:
        return None
    operand = instruction.operands[place]
    return operand.base if isinstance(operand, Address) and isinstance(operand.base, Name) else None


_PASSES_ON = ("add", "sub", "mov", "cvt", "cvta", "shl", "selp", "min", "max", "mad", "neg")


def wide_products(flow: Flow) -> Iterator[str]:
    """Offsets in global memory of which a part is a product of two run-time numbers, kept in 32 bits."""
    seen: set[int] = set()
    todo = []
    for n, step in enumerate(flow.steps):
        name = _global_address(step.instruction)
        if name is not None:
            todo += flow.sources[n].get(name.text, [])
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        step = flow.steps[n]
        opcode, operands = step.instruction.opcode, step.instruction.operands
        if opcode in ("mul", "mad") and "lo" in step.opcode and step.opcode.endswith("32"):
            free = all(constant(flow, n, x) is None for x in operands[1:3])
            if free and not _undoes(flow, n) and not _is_bounded(step):
                yield f"{step} is part of an address"
        if opcode in _PASSES_ON or (opcode == "mul" and "wide" in step.opcode):
            todo += [w for name in step.reads for w in flow.sources[n][name]]


# Products of two run-time numbers that stay in 32 bits, by a piece of their source line.
_BOUNDED = {
    "schedule.cuh": ("section_heads * tiles", "first_head * tiles"),  # blocks of the grid
    "rows.cuh": ("member(row) * len_q",),  # groups of few queries (_candidates_grouped.py)
    "mask_tiles.cuh": ("* p.group",),  # query heads
    "forward_layout.cuh": ("work.head *=",),
    "sm90_ring.cuh": ("turn * blocks",),  # pieces of work, as many as there would be blocks
    "backward_pairs.cuh": ("* step", "step *="),  # batch entries
}


def _is_bounded(step: Step) -> bool:
    """Whether a product is one of those that are known to be small."""
    at = step.instruction.location
    pieces = _BOUNDED.get(Path(at.file).name, ())
    return any(piece in _lines(Path(at.file).name)[at.line - 1] for piece in pieces)


@functools.cache
def _lines(name: str) -> list[str]:
    return (_compile.ROOT / name).read_text().splitlines()


def _undoes(flow: Flow, n: int) -> bool:
    """Whether a product multiplies a quotient by its divisor again, as remainders are made."""
    first, second = flow.steps[n].instruction.operands[1:3]
    for quotient, divisor in ((first, second), (second, first)):
        if not (isinstance(quotient, Name) and isinstance(divisor, Name)):
            return False
        writers = flow.sources[n][quotient.text]
        divisions = [flow.steps[w].instruction for w in writers]
        if divisions and all(x.opcode == "div" and x.operands[-1] == divisor for x in divisions):
            return True
    return False
