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
from dataclasses import dataclass, field

from .batch import MatrixBatch
from .errors import Unsupported
from .syntax import (
    Address,
    BranchTargets,
    CloseScope,
    Function,
    Instruction,
    Label,
    Location,
    Name,
    Not,
    Number,
    OpenScope,
    Operand,
    Registers,
    Statement,
    Variable,
    Vector,
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


@dataclass
class Scope:
    """Names visible inside one `{ }`."""

    registers: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # PTX name -> (C name, C type)
    variables: dict[str, str] = field(
        default_factory=dict
    )  # PTX name -> C expression of its address
    labels: dict[str, str] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """A static instruction that the runtime can name: index in the table = position in the list."""

    opcode: str
    location: Location


class Emitter:
    """Writes the C++ body of one function; emitters of instructions get it as `e`."""

    def __init__(
        self,
        function: Function,
        module_scope: Scope,
        sites: list[Site],
        functions: dict[str, Function],
    ) -> None:
        self.function = function
        self.sites = sites
        self.functions = functions
        self.scopes = [module_scope]
        self.declarations: list[str] = []
        self.lines: list[str] = []
        self.batch = MatrixBatch(function)
        self.local_bytes = 0
        self._names = 0
        self._passed: set[str] = (
            set()
        )  # C labels that already stand in the code: a branch there is a backward branch
        self._now: Instruction | None = None
        self._site: int | None = None

    # ---- for instruction emitters
    def line(self, text: str) -> None:
        """Add one line of C++ (it stands inside the instruction's own block and guard)."""
        self.lines.append("    " + text)

    def site(self) -> int:
        """Tell the runtime where it is: call before emitting any runtime call. Returns the site's index."""
        if self._site is None:
            self._site = self.site_index()
            self.lines.append(f"    t.site = {self._site};")
        return self._site

    def site_index(self) -> int:
        """A new site for the current instruction, without telling the runtime."""
        assert self._now is not None
        self.sites.append(Site(self._now.full_opcode, self._now.location))
        return len(self.sites) - 1

    def count(self) -> None:
        """Count one lane's execution of the current instruction (grouped into warp instructions by the runtime)."""
        self.site()
        self.line("emu::count_lane(t);")

    def fail(self, why: str) -> Unsupported:
        """An exception that names the current instruction (`raise e.fail("...")`)."""
        assert self._now is not None
        return Unsupported(f"{self._now.full_opcode}: {why} (in `{self._now.text}`)")

    def vector(self, operand: Operand) -> list[Operand]:
        """Elements of `{...}`; a single operand counts as a vector of one."""
        return list(operand.elements) if isinstance(operand, Vector) else [operand]

    def register_name(self, operand: Operand) -> str | None:
        """C name of a register operand; None for anything else."""
        found = self._register(operand.text) if isinstance(operand, Name) else None
        return found[0] if found else None

    def register_type(self, operand: Operand) -> str | None:
        """C type of a register operand; None for anything else."""
        if isinstance(operand, Name):
            found = self._register(operand.text)
            return found[1] if found else None
        return None

    def read(self, operand: Operand, ptx_type: str) -> str:
        """C expression of the operand as a value of the PTX type (bits kept; wider registers truncated)."""
        want = C_TYPES[ptx_type]
        if isinstance(operand, Name):
            found = self._register(operand.text)
            if found:
                return self._convert(found[0], found[1], want)
            return self._convert(*self._special_or_symbol(operand.text), want)
        if isinstance(operand, Number):
            return self._immediate(operand, want)
        if isinstance(operand, Not):
            return f"(u8)!{self.read(operand.operand, 'pred')}"
        if isinstance(operand, Address):  # variable + offset used as a value
            return f"({want})({self._symbol_address(operand.base)} + {operand.offset})"
        raise self.fail(f"operand {operand} cannot be read as {ptx_type}")

    def write(self, operand: Operand, ptx_type: str, expression: str) -> None:
        """Assign an expression of the PTX type to the register (sign- or zero-extended if the register is wider)."""
        if isinstance(operand, Name) and operand.text == "_":
            self.line(f"(void)({expression});")
            return
        found = self._register(operand.text) if isinstance(operand, Name) else None
        if not found:
            raise self.fail(f"{operand} is not a register")
        name, register = found
        have = C_TYPES[ptx_type]
        if have == register:
            self.line(f"{name} = {expression};")
        elif register in ("float", "double") or have in ("float", "double"):
            if C_SIZES[have] != C_SIZES[register]:
                raise self.fail(f"{ptx_type} result in a register of type {register}")
            self.line(f"{name} = __builtin_bit_cast({register}, ({have})({expression}));")
        else:
            self.line(f"{name} = ({register})({have})({expression});")

    def address(self, operand: Operand, space: str) -> str:
        """C expression of an address: u32 for shared, u64 for all others."""
        if not isinstance(operand, Address):
            raise self.fail(f"expected an address, not {operand}")
        width = "u32" if space == "shared" else "u64"
        base = operand.base
        if isinstance(base, Name) and not self._register(base.text):
            text = f"({width})({self._symbol_address(base)})"
        else:
            text = f"({width})({self.read(base, 'b64' if self.register_type(base) in ('u64', 's64') else 'b32')})"
        if operand.offset:
            text = (
                f"({text} + ({width}){operand.offset}ll)"
                if operand.offset < 0
                else f"({text} + {operand.offset}u)"
            )
        return text

    def jump(self, label: str) -> None:
        """Go to a C label; a backward branch may be an endless loop, so others get their turn."""
        if label in self._passed:
            self.site()
            self.line("if (!--t.fuel) emu::refuel(t);")
        self.line(f"goto {label};")

    def label(self, operand: Operand) -> str:
        """C label of a branch target."""
        if isinstance(operand, Name):
            for scope in reversed(self.scopes):
                if operand.text in scope.labels:
                    return scope.labels[operand.text]
        raise self.fail(f"unknown label {operand}")

    def branch_targets(self, operand: Operand) -> list[str]:
        """C labels of a `.branchtargets` list."""
        if isinstance(operand, Name):
            for scope in reversed(self.scopes):
                if operand.text in scope.targets:
                    return [self.label(Name(x)) for x in scope.targets[operand.text]]
        raise self.fail(f"unknown branch targets {operand}")

    def parameter(self, operand: Operand) -> str:
        """C expression (`u8*`) of a .param variable with an optional offset."""
        base, offset = (
            (operand.base, operand.offset) if isinstance(operand, Address) else (operand, 0)
        )
        return f"((u8*)({self._symbol_address(base)}) + {offset})"

    # ---- names
    def _register(self, name: str) -> tuple[str, str] | None:
        for scope in reversed(self.scopes):
            if name in scope.registers:
                return scope.registers[name]
        return None

    def _symbol_address(self, operand: Operand) -> str:
        if isinstance(operand, Name):
            for scope in reversed(self.scopes):
                if operand.text in scope.variables:
                    return scope.variables[operand.text]
        raise self.fail(f"unknown name {operand}")

    def _special_or_symbol(self, name: str) -> tuple[str, str]:
        if name in SPECIAL:
            return SPECIAL[name], "u64" if name in (
                "%clock64",
                "%globaltimer",
                "%gridid",
            ) else "u32"
        if name.startswith("%"):
            raise self.fail(f"unknown register {name}")
        return f"(u64)({self._symbol_address(Name(name))})", "u64"

    def _convert(self, expression: str, have: str, want: str) -> str:
        if have == want:
            return expression
        have_float, want_float = have in ("float", "double"), want in ("float", "double")
        if not have_float and not want_float:
            return f"({want}){expression}"
        if have_float and not want_float:
            return f"({want})__builtin_bit_cast({BITS[C_SIZES[have]]}, {expression})"
        if have_float:
            raise self.fail(f"{expression} is {have}, the instruction wants {want}")
        return f"__builtin_bit_cast({want}, ({BITS[C_SIZES[want]]}){expression})"

    def _immediate(self, number: Number, want: str) -> str:
        if want in ("float", "double"):
            bits = number.value
            if number.kind == "int":  # a bit pattern, as in mov.b32 with a float register
                bits &= (1 << 8 * C_SIZES[want]) - 1
            elif (number.kind == "f32") != (want == "float"):
                raise self.fail("immediate of the wrong float type")
            literal = f"0x{bits:x}u" if want == "float" else f"(u64)0x{bits:x}ull"
            return f"__builtin_bit_cast({want}, {literal})"
        bits = number.value & ((1 << 64) - 1)
        return f"({want})0x{bits:x}ull" if bits > 0x7FFFFFFF else f"({want}){bits}"

    # ---- statements
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
