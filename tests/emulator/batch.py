"""Bookkeeping of matrix instructions that wait to be executed together (see codegen_matrix.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .syntax import SIZES, Function, Instruction, Name, Operand, names_in

if TYPE_CHECKING:
    from .codegen import Emitter

# Instructions that neither touch shared memory nor meet other threads: they may pass a waiting batch.
_HARMLESS = frozenset(
    [
        "add",
        "sub",
        "addc",
        "subc",
        "mul",
        "mul24",
        "mad",
        "mad24",
        "madc",
        "fma",
        "div",
        "rem",
        "min",
        "max",
        "neg",
        "abs",
        "copysign",
        "testp",
        "and",
        "or",
        "xor",
        "not",
        "cnot",
        "lop3",
        "shl",
        "shr",
        "shf",
        "bfe",
        "bfi",
        "prmt",
        "popc",
        "clz",
        "brev",
        "bfind",
        "bmsk",
        "sad",
        "setp",
        "set",
        "selp",
        "slct",
        "mov",
        "cvt",
        "cvta",
        "ex2",
        "lg2",
        "rcp",
        "rsqrt",
        "sqrt",
        "sin",
        "cos",
        "tanh",
        "ld",
        "createpolicy",
    ]
)
_STRONG = {"volatile", "relaxed", "acquire", "mmio"}


class MatrixBatch:
    """The waiting matrix instructions of one function, and the registers that live in its array `M`."""

    def __init__(self, function: Function) -> None:
        self.names = {
            name
            for i in function.body
            if isinstance(i, Instruction)
            and i.opcode in ("mma", "ldmatrix")
            and "f64" not in i.modifiers
            for operand in i.operands
            for name in names_in(operand)
        }
        self.slots: dict[str, int] = {}  # C name of a register -> index in M
        self.size = 0
        self._rows: list[str] = []
        self._inputs: set[int] = set()
        self._outputs: set[int] = set()

    def place(self, ptx_type: str, c_type: str) -> str | None:
        """A place in M for a register that matrix instructions use; its C name, or None if its type does not fit."""
        if SIZES[ptx_type] != 4:
            return None
        name = f"M.{'f' if c_type == 'float' else 'u'}[{self.size}]"
        self.slots[name] = self.size
        self.size += 1
        return name

    def input(self, e: Emitter, operand: Operand, ptx_type: str) -> int:
        """Index in M of an operand; anything but a register in M is copied there first."""
        slot = self._slot(e, operand)
        if slot is None:
            slot = self.size
            self.size += 1
            e.line(f"M.u[{slot}] = {e.read(operand, ptx_type)};")
        self._inputs.add(slot)
        return slot

    def output(self, e: Emitter, operand: Operand) -> int:
        """Index in M of a result register."""
        slot = self._slot(e, operand)
        if slot is None:
            raise e.fail(f"result {operand} is no 32-bit register")
        self._outputs.add(slot)
        return slot

    def add(
        self, e: Emitter, kind: str, row: dict, *, count: int = 0, trans: int = 0, k: int = 0
    ) -> None:
        """Queue the current instruction."""
        numbers = [f"{{{', '.join(map(str, row.get(x, ())))}}}" for x in "dabc"]
        head = f"emu::{kind}, {count}, {trans}, {k}, {e.site_index()}, {row.get('offset', 0)}"
        self._rows.append(f"{{{head}, {', '.join(numbers)}}}")

    def before(self, e: Emitter, i: Instruction) -> None:
        """Called before every other instruction: execute the batch if the instruction could notice."""
        if not self._rows:
            return
        passes = i.opcode in _HARMLESS and not _STRONG.intersection(i.modifiers)
        if passes:
            operands = (*i.operands, *((i.guard,) if i.guard else ()))
            touched = {self._slot(e, Name(n)) for x in operands for n in names_in(x)}
            written = (
                {self._slot(e, Name(n)) for n in names_in(i.operands[0])} if i.operands else set()
            )
            passes = not (touched & self._outputs or written & self._inputs)
        if not passes:
            self.flush(e)

    def flush(self, e: Emitter) -> None:
        """Emit the waiting instructions."""
        if not self._rows:
            return
        table = f"static const emu::MatrixOp ops[] = {{{', '.join(self._rows)}}};"
        e.lines.append(f"  {{ {table} emu::matrix_batch(t, M.u, ops, {len(self._rows)}); }}")
        self._rows.clear()
        self._inputs.clear()
        self._outputs.clear()

    def declaration(self) -> list[str]:
        """The array M."""
        return [f"  union {{ u32 u[{self.size}]; float f[{self.size}]; }} M;"] if self.size else []

    def _slot(self, e: Emitter, operand: Operand) -> int | None:
        name = e.register_name(operand)
        return self.slots.get(name) if name else None
