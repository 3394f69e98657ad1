"""What parsed PTX consists of, as plain data shared by the parser and the code generator."""

from __future__ import annotations

from dataclasses import dataclass, field


# ------------------------------------------------------------------------------------------------------------- operands
@dataclass(frozen=True, slots=True)
class Name:
    """A register, a special register, a variable or a label; the code generator resolves which."""

    text: str


@dataclass(frozen=True, slots=True)
class Number:
    """An immediate. `kind` is "int", "f32" or "f64"; for floats `value` holds the bits."""

    value: int
    kind: str = "int"


@dataclass(frozen=True, slots=True)
class Not:
    """`!%p1`."""

    operand: Name


@dataclass(frozen=True, slots=True)
class Pair:
    """`%r1|%p1`: a value and the predicate that goes with it."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Vector:
    """`{%r1, %r2}`."""

    elements: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """`[base+offset]`, or `[base, {x, y}]` with the coordinates in `extra`."""

    base: Operand
    offset: int = 0
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """`(a, b)`: parameter list of a call."""

    elements: tuple[Operand, ...]


Operand = Name | Number | Not | Pair | Vector | Address | Group


def names_in(operand: Operand) -> list[str]:
    """Every name that an operand mentions."""
    if isinstance(operand, Name):
        return [operand.text]
    if isinstance(operand, Not):
        return [operand.operand.text]
    if isinstance(operand, Pair):
        return names_in(operand.first) + names_in(operand.second)
    if isinstance(operand, (Vector, Group)):
        return [n for x in operand.elements for n in names_in(x)]
    if isinstance(operand, Address):
        return names_in(operand.base) + [n for x in operand.extra for n in names_in(x)]
    return []


# ----------------------------------------------------------------------------------------------------------- statements
@dataclass(frozen=True, slots=True)
class Location:
    """CUDA source line of an instruction; `outer_line` is the line in the kernel itself after inlining."""

    file: str
    line: int
    outer_line: int


@dataclass(slots=True)
class Instruction:
    """One PTX instruction. `modifiers` are the dotted parts after the base opcode, in order."""

    opcode: str
    modifiers: list[str]
    operands: tuple[Operand, ...]
    guard: Name | Not | None
    location: Location
    text: str

    @property
    def full_opcode(self) -> str:
        return ".".join([self.opcode, *self.modifiers])


@dataclass(slots=True)
class Label:
    name: str


@dataclass(slots=True)
class Registers:
    """`.reg .b32 %r<5>;` gives type b32 and names %r0 .. %r4."""

    type: str
    names: list[str]


@dataclass(slots=True)
class Variable:
    """A variable in `space` (shared, local, const, global, param); size in bytes, 0 for `[]`."""

    space: str
    name: str
    size: int
    align: int
    type: str
    extern: bool = False
    initial: bytes | None = None


@dataclass(slots=True)
class OpenScope:
    pass


@dataclass(slots=True)
class CloseScope:
    pass


@dataclass(slots=True)
class BranchTargets:
    """`ts: .branchtargets L1, L2;`"""

    name: str
    labels: list[str]


Statement = Instruction | Label | Registers | Variable | OpenScope | CloseScope | BranchTargets


@dataclass(slots=True)
class Function:
    """An .entry (kernel) or .func."""

    name: str
    is_entry: bool
    params: list[Variable]
    returns: list[Variable]
    directives: dict[str, tuple[int, ...]]
    body: list[Statement] = field(default_factory=list)
    is_declaration: bool = False


@dataclass(slots=True)
class PtxModule:
    target: str
    functions: list[Function]
    variables: list[Variable]

    def instructions(self):
        """Every instruction of every function."""
        for function in self.functions:
            yield from (s for s in function.body if isinstance(s, Instruction))


SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4)
SIZES |= dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8) | {"b128": 16}
