"""Turns parsed PTX into C++, one readable C statement per instruction, because g++ compiles plain typed C fastest.

Registers become typed local variables, labels become goto targets, and anything that touches memory or other threads
becomes a call into the runtime. How to add an instruction::

    @emits("mbarrier")
    def mbarrier(e: Emitter, i: Instruction, m: Modifiers) -> None:
        if m.flag("init"):
            m.flag("shared", "shared::cta"); m.flag("b64")
            e.site()
            e.line(f"emu::mbarrier_init(t, {e.address(i.operands[0], 'shared')}, {e.read(i.operands[1], 'u32')});")

An emitter may be registered for a longer prefix, as in @emits("cp.async.bulk", "fence.proxy"); the
longest registered prefix of an opcode wins, and the prefix is already taken from `m`. Every other
modifier must be taken by the emitter; one that is left is an error naming the instruction, so nothing
is ignored by accident.
"""

from __future__ import annotations

import re

from .codegen_operands import Operands, Scope, Site
from .errors import Unsupported
from .syntax import (
    BranchTargets,
    CloseScope,
    Instruction,
    Label,
    OpenScope,
    Registers,
    Statement,
    Variable,
)
from .table import (
    BITS,
    C_SIZES,
    C_TYPES,
    EMITTERS,
    REGISTER_TYPES,
    SPECIAL,
    Modifiers,
    emits,
    find_emitter,
)


class Emitter(Operands):
    """Writes the C++ body of one function; emitters of instructions get it as `e`."""

    def body(self) -> None:
        """Emit every statement of the function."""
        self.scopes.append(Scope())
        self._collect_labels(0)
        for position, statement in enumerate(self.function.body):
            self._statement(statement, position)
        self.batch.flush(self)
        self.scopes.pop()

    def _statement(self, s: Statement, position: int) -> None:
        scope = self.scopes[-1]
        if isinstance(s, Instruction):
            self._instruction(s)
        elif isinstance(s, Label):
            self.batch.flush(self)
            self._passed.add(scope.labels[s.name])
            self.lines.append(f"  {scope.labels[s.name]}:;")
        elif isinstance(s, Registers):
            self._declare_registers(s)
        elif isinstance(s, Variable):
            self._declare_variable(s)
        elif isinstance(s, OpenScope):
            self.scopes.append(Scope())
            self._collect_labels(position + 1)
        elif isinstance(s, CloseScope):
            self.scopes.pop()

    def _collect_labels(self, start: int) -> None:
        """Labels are visible in their whole scope, also before they stand."""
        depth, scope = 0, self.scopes[-1]
        for s in self.function.body[start:]:
            if isinstance(s, OpenScope):
                depth += 1
            elif isinstance(s, CloseScope):
                depth -= 1
                if depth < 0:
                    return
            elif depth == 0 and isinstance(s, Label):
                scope.labels[s.name] = self._unique("L_" + s.name)
            elif depth == 0 and isinstance(s, BranchTargets):
                scope.targets[s.name] = s.labels

    def _unique(self, name: str) -> str:
        self._names += 1
        return f"{re.sub(r'[^A-Za-z0-9]', '_', name)}_{self._names}"

    def _declare_registers(self, s: Registers) -> None:
        c_type = REGISTER_TYPES[s.type]
        depth = len(self.scopes) - 2
        names = []
        for ptx in s.names:
            clean = re.sub(r"[^A-Za-z0-9]", "_", ptx.lstrip("%"))
            place = self.batch.place(s.type, c_type) if ptx in self.batch.names else None
            name = place or (f"r_{clean}" if depth == 0 else self._unique(f"a_{clean}"))
            self.scopes[-1].registers[ptx] = (name, c_type)
            if not place:
                names.append(name)
        for i in range(0, len(names), 16):
            self.declarations.append(f"  {c_type} {', '.join(names[i : i + 16])};")

    def _declare_variable(self, v: Variable) -> None:
        if v.space == "shared":  # placed by the module; its address is already known there
            return
        if v.space not in ("local", "param"):
            raise Unsupported(f"variable {v.name} in space {v.space} inside a function")
        name = self._unique(("local_" if v.space == "local" else "param_") + v.name)
        size = max(v.size, 1)
        if v.space == "local":
            self.declarations.append(f"  alignas({v.align}) u8 {name}[{size}];")
            self.declarations.append(f"  emu::LocalRange range_{name}(t, {name}, {size});")
        else:
            self.declarations.append(f"  alignas(16) u8 {name}[{size}];")
        self.scopes[-1].variables[v.name] = name

    def _instruction(self, i: Instruction) -> None:
        emit, taken = find_emitter(i)
        self._now, self._site = i, None
        modifiers = Modifiers(i, taken)
        is_matrix = i.opcode in ("mma", "ldmatrix")
        if is_matrix and i.guard:
            self.batch.flush(self)
        elif not is_matrix:
            self.batch.before(self, i)
        start = len(self.lines)
        emit(self, i, modifiers)
        if is_matrix and i.guard:
            self.batch.flush(self)  # under the guard, alone
        if modifiers.left:
            raise self.fail(f"modifier .{modifiers.left[0]} is not known here")
        body = [x.strip() for x in self.lines[start:]]
        guard = f"if ({self.read(i.guard, 'pred')}) " if i.guard else ""
        comment = f"  // {i.location.line}: {' '.join(i.text.split())}".rstrip("\\")
        del self.lines[start:]
        if len(body) == 1 and not body[0].startswith(("#", "//")) and _is_simple(body[0]):
            self.lines.append(f"  {guard}{body[0]}{comment}")
        elif body:
            self.lines.append(f"  {guard}{{ {' '.join(body)} }}{comment}")


def _is_simple(text: str) -> bool:
    return text.count(";") == 1 and text.endswith(";") and not re.match(r"[\w:<>*& ]+ \w+ = ", text)


def load_emitters() -> None:
    """Import every module that registers emitters."""
    from . import (  # noqa: F401  (imported for the registrations)
        codegen_bits,
        codegen_compare,
        codegen_control,
        codegen_convert,
        codegen_hopper,
        codegen_matrix,
        codegen_memory,
        codegen_scalar,
        codegen_warp,
    )


__all__ = [
    "BITS",
    "C_SIZES",
    "C_TYPES",
    "EMITTERS",
    "SPECIAL",
    "Emitter",
    "Modifiers",
    "Scope",
    "Site",
    "emits",
    "load_emitters",
]
