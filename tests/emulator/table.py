"""The table of instruction emitters, the modifiers they take, and how PTX types and special registers read in C."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import Unsupported
from .syntax import SIZES, Instruction

if TYPE_CHECKING:
    from .codegen import Emitter

# PTX type -> C type of a value of that type. Half precision travels as bits (u16, u32 for pairs).
C_TYPES = {
    "pred": "u8",
    "b8": "u8",
    "u8": "u8",
    "s8": "s8",
    "b16": "u16",
    "u16": "u16",
    "s16": "s16",
    "f16": "u16",
    "bf16": "u16",
    "b32": "u32",
    "u32": "u32",
    "s32": "s32",
    "f32": "float",
    "f16x2": "u32",
    "bf16x2": "u32",
    "tf32": "u32",
    "b64": "u64",
    "u64": "u64",
    "s64": "s64",
    "f64": "double",
    "f32x2": "u64",
    "b128": "u128",
}
# PTX type -> C type of the register variable (signedness belongs to instructions, not to registers).
REGISTER_TYPES = {
    **C_TYPES,
    "s8": "u8",
    "s16": "u16",
    "s32": "u32",
    "s64": "u64",
}
C_SIZES = {
    "u8": 1,
    "s8": 1,
    "u16": 2,
    "s16": 2,
    "u32": 4,
    "s32": 4,
    "float": 4,
    "u64": 8,
    "s64": 8,
    "double": 8,
    "u128": 16,
}
BITS = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "u128"}

SPECIAL = {
    **{
        f"%{ptx}.{c}": f"t.{field}.{c}"
        for c in "xyz"
        for ptx, field in (
            ("tid", "tid"),
            ("ctaid", "ctaid"),
            ("ntid", "ntid"),
            ("nctaid", "nctaid"),
        )
    },
    "%laneid": "t.lane",
    "%warpid": "t.warp",
    "%nwarpid": "t.block->nwarps",
    "WARP_SZ": "32u",
    "%lanemask_eq": "(1u << t.lane)",
    "%lanemask_lt": "((1u << t.lane) - 1u)",
    "%lanemask_gt": "~((2u << t.lane) - 1u)",
    "%lanemask_le": "((2u << t.lane) - 1u)",
    "%lanemask_ge": "~((1u << t.lane) - 1u)",
    "%clock": "(u32)emu::clock(t)",
    "%clock64": "emu::clock(t)",
    "%globaltimer": "emu::clock(t)",
    "%globaltimer_lo": "(u32)emu::clock(t)",
    "%smid": "(t.block->linear % 132u)",
    "%nsmid": "132u",
    "%gridid": "1ull",
    "%dynamic_smem_size": "emu::dynamic_shared_bytes()",
    "%total_smem_size": "t.block->shared_bytes",
}

Emit = Callable[["Emitter", Instruction, "Modifiers"], None]
EMITTERS: dict[str, Emit] = {}


def emits(*opcodes: str) -> Callable[[Emit], Emit]:
    """Register the emitter of every instruction whose dotted opcode begins with one of `opcodes`."""

    def register(function: Emit) -> Emit:
        for opcode in opcodes:
            if opcode in EMITTERS:
                raise ValueError(f"two emitters for {opcode}")
            EMITTERS[opcode] = function
        return function

    return register


def find_emitter(i: Instruction) -> tuple[Emit, int]:
    """The emitter of the longest registered prefix, and how many modifiers that prefix takes."""
    for taken in range(len(i.modifiers), -1, -1):
        emit = EMITTERS.get(".".join([i.opcode, *i.modifiers[:taken]]))
        if emit is not None:
            return emit, taken
    raise Unsupported(f"PTX instruction {i.full_opcode} (in `{i.text}`)")


class Modifiers:
    """The dotted modifiers of one instruction after its registered prefix; each must be taken exactly once."""

    def __init__(self, instruction: Instruction, taken: int = 0) -> None:
        self.left = list(instruction.modifiers[taken:])
        self._text = instruction.full_opcode

    def flag(self, *names: str) -> bool:
        """Take every modifier among `names`; True if there was one."""
        found = [x for x in self.left if x in names]
        for x in found:
            self.left.remove(x)
        return bool(found)

    def one_of(self, *names: str, default: str | None = None) -> str:
        """Take the first modifier that is among `names`.

        Raises
        ------
        Unsupported
            There is none and no default.
        """
        for x in self.left:
            if x in names:
                self.left.remove(x)
                return x
        if default is None:
            raise Unsupported(f"{self._text}: expected one of {', '.join(names)}")
        return default

    def match(self, pattern: str, default: str | None = None) -> str:
        """Take the first modifier that fully matches the regular expression."""
        for x in self.left:
            if re.fullmatch(pattern, x):
                self.left.remove(x)
                return x
        if default is None:
            raise Unsupported(f"{self._text}: expected a modifier like {pattern}")
        return default

    def type(self) -> str:
        """Take the last modifier, which must be a PTX type."""
        if not self.left or self.left[-1] not in SIZES:
            raise Unsupported(f"{self._text}: expected a type at the end")
        return self.left.pop()
