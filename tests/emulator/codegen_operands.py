"""Operands of PTX as C expressions: registers, immediates, addresses, labels, and the scopes their names live in."""

from __future__ import annotations

from dataclasses import dataclass, field

from .batch import MatrixBatch
from .errors import Unsupported
from .syntax import Address, Function, Instruction, Location, Name, Not, Number, Operand, Vector
from .table import BITS, C_SIZES, C_TYPES, SPECIAL


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


class Operands:
    """What the emitters of instructions ask of `e`: lines of code, operands as C expressions, names."""

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
