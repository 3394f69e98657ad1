"""Reads PTX text into instructions, because everything else needs operands and source lines, not text.

The grammar is the subset that NVRTC and nvcc write plus whatever inline assembly adds: nested scopes with registers and
labels of their own, several statements on one line, vectors, pairs (`%r1|%p1`), and addresses with coordinates.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .errors import Unsupported
from .syntax import (
    SIZES,
    Address,
    BranchTargets,
    CloseScope,
    Function,
    Group,
    Instruction,
    Label,
    Location,
    Name,
    Not,
    Number,
    OpenScope,
    Operand,
    Pair,
    PtxModule,
    Registers,
    Statement,
    Variable,
    Vector,
)

_INTEGER = re.compile(r"(-?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|(\d+))U?$")
_NAME = re.compile(r"[%$_a-zA-Z][\w$.]*$")


def parse_integer(text: str) -> int | None:
    """The value of a PTX integer literal, or None when `text` is not one."""
    m = _INTEGER.match(text)
    if not m:
        return None
    if m[2]:
        value = int(m[2], 16)
    elif m[3]:
        value = int(m[3], 2)
    else:
        value = int(m[4], 8) if len(m[4]) > 1 and m[4][0] == "0" else int(m[4])
    return -value if m[1] else value


def split_operands(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    if not any(c in text for c in "{[("):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


@lru_cache(maxsize=200_000)
def parse_operand(text: str) -> Operand:
    """One operand from its text.

    Raises
    ------
    Unsupported
        The text is no operand the emulator knows.
    """
    if "|" in text:
        first, second = text.split("|")
        return Pair(parse_operand(first.strip()), parse_operand(second.strip()))
    if _NAME.match(text):
        return Name(text)
    if text[0] == "!":
        return Not(Name(text[1:].strip()))
    if text[0] == "{":
        return Vector(tuple(parse_operand(p) for p in split_operands(text[1:-1])))
    if text[0] == "(":
        return Group(tuple(parse_operand(p) for p in split_operands(text[1:-1])))
    if text[0] == "[":
        return _parse_address(text)
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return Number(int(text[2:], 16), "f32")
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return Number(int(text[2:], 16), "f64")
    value = parse_integer(text)
    if value is not None:
        return Number(value)
    m = re.match(
        r"([%$\w.]+)\s*\+\s*(-?\w+)$", text
    )  # variable + constant, as in mov.u64 %rd1, table+16
    if m and parse_integer(m[2]) is not None:
        return Address(Name(m[1]), parse_integer(m[2]) or 0)
    raise Unsupported(f"PTX operand {text!r}")


def _parse_address(text: str) -> Address:
    parts = split_operands(text[1:-1])
    m = re.match(r"([%$\w.]+?)\s*(?:([+-])\s*(-?\w+))?$", parts[0])
    if not m:
        raise Unsupported(f"PTX address {text!r}")
    offset = parse_integer(m[3]) if m[3] else 0
    if offset is None:
        raise Unsupported(f"PTX address {text!r}")
    base = parse_operand(m[1])
    return Address(
        base, -offset if m[2] == "-" else offset, tuple(parse_operand(p) for p in parts[1:])
    )


# --------------------------------------------------------------------------------------------------------------- parser
_STATEMENT = re.compile(
    r"\s*(?:(?P<loc>\.(?:loc|file)\b[^\n]*)|(?P<open>\{)|(?P<close>\})"
    r"|(?P<targets>[$\w]+)\s*:\s*\.branchtargets\b(?P<list>[^;]*);"
    r"|(?P<label>[$\w%.]+)\s*:(?!:)|(?P<body>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);|;)"
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
_HEADER = re.compile(
    r"\.(entry|func)\b\s*(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?([^{;]*)([{;])", re.S
)
_DIRECTIVES = re.compile(
    r"\.(maxntid|reqntid|minnctapersm|maxnreg|reqnctapercluster|maxclusterrank|explicitcluster)"
    r"\b\s*([\d,\s]*)"
)
_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+|\.visible\s+|\.weak\s+|\.common\s+)*\.(?P<space>shared|local|const|global|param)\b\s*"
    r"(?P<align1>\.align\s+\d+\s+)?(?:\.v(?P<v>\d)\s+)?\.(?P<type>[busf]\w*|pred)\s+(?:\.ptr\b\s*(?:\.\w+\s*)*?(?:\.align\s+\d+\s*)?)?"
    r"(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)


def parse_variable(text: str) -> Variable | None:
    """A variable declaration without its semicolon, or None when `text` declares none."""
    m = _VARIABLE.match(text.strip())
    if not m:
        return None
    size = SIZES[m["type"]] * int(m["v"] or 1)
    align = int(m["align1"].split()[1]) if m["align1"] else size
    for dim in re.findall(r"\[(\d*)\]", m["dims"]):
        size *= int(dim or 0)
    initial = _parse_initial(m["init"], m["type"], size) if m["init"] else None
    return Variable(
        m["space"],
        m["name"],
        size,
        align,
        m["type"],
        ".extern" in (text.split(m["name"])[0]),
        initial,
    )


def _parse_initial(text: str, element_type: str, size: int) -> bytes:
    width = SIZES[element_type]
    out = bytearray()
    for part in split_operands(text.strip().removeprefix("{").removesuffix("}")):
        operand = parse_operand(part)
        if not isinstance(operand, Number):
            raise Unsupported(f"initial value {part!r} of a PTX variable")
        out += (operand.value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(out.ljust(size, b"\0"))


class _Locations:
    """Follows .file and .loc; knows the kernel line of code that was inlined from elsewhere."""

    def __init__(self, text: str) -> None:
        self.files = {int(n): name for n, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        self.outer: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self.cache: dict[str, Location] = {}
        self.now = Location("?", 0, 0)

    def see(self, text: str) -> None:
        m = _LOC.match(text)
        if not m:
            return
        here = (int(m[1]), int(m[2]), int(m[3]))
        seen = here
        if m[4]:
            self.outer[here] = seen = (int(m[4]), int(m[5]), int(m[6]))
            for _ in range(16):  # the call itself may stand in an inlined function
                if seen not in self.outer or self.outer[seen] == seen:
                    break
                seen = self.outer[seen]
        self.now = Location(self.files.get(here[0], "?"), here[1], seen[1])


def parse(text: str) -> PtxModule:
    """Parse a whole PTX file.

    Parameters
    ----------
    text : str
        PTX as NVRTC returns it.

    Returns
    -------
    PtxModule

    Raises
    ------
    Unsupported
        A statement is not understood.
    """
    text = text.rstrip("\0")
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text)
    target = re.search(r"\.target\s+(\w+)", text)
    locations = _Locations(text)
    functions, outside, end = [], [], 0
    for m in _HEADER.finditer(text):
        if m.start() < end:
            continue
        outside.append(
            re.sub(r"\.(visible|weak|extern)\s*$", "", text[end : m.start()])
        )  # the function's own
        function = _header(m)
        end = m.end()
        if m[6] == "{":
            function.body, end = _body(text, m.end(), locations)
        else:
            function.is_declaration = True
        functions.append(function)
    outside.append(text[end:])
    return PtxModule(target[1] if target else "?", functions, _module_variables("".join(outside)))


def _module_variables(text: str) -> list[Variable]:
    out = []
    text = re.sub(r"(?m)^\s*\.(version|target|address_size|file|loc)\b[^\n]*$", "", text)
    for statement in re.split(r";", text):
        statement = re.sub(r"\.(visible|weak)\b(?=\s*$)", "", statement).strip()
        if not statement or (
            statement.startswith((".pragma", ".visible", ".weak")) and "." not in statement[1:]
        ):
            continue
        variable = parse_variable(statement)
        if variable is None:
            raise Unsupported(f"PTX statement {statement[:80]!r}")
        out.append(variable)
    return out


def _header(m: re.Match[str]) -> Function:
    def declared(group: str | None) -> list[Variable]:
        out = []
        for part in split_operands((group or "()")[1:-1]):
            variable = parse_variable(part)
            if variable is None:
                raise Unsupported(f"PTX parameter {part!r}")
            out.append(variable)
        return out

    directives = {
        name: tuple(int(x) for x in re.findall(r"\d+", numbers))
        for name, numbers in _DIRECTIVES.findall(m[5])
    }
    return Function(m[3], m[1] == "entry", declared(m[4]), declared(m[2]), directives)


def _body(text: str, start: int, locations: _Locations) -> tuple[list[Statement], int]:
    out: list[Statement] = []
    depth, position = 1, start
    match = _STATEMENT.match
    while True:
        m = match(text, position)
        if m is None:
            raise Unsupported(f"PTX near {text[position : position + 80]!r}")
        position = m.end()
        kind = m.lastgroup
        if kind == "body":
            _statement(m["body"].strip(), locations.now, out)
        elif kind == "loc":
            locations.see(m["loc"])
        elif kind == "label":
            out.append(Label(m["label"]))
        elif kind == "open":
            depth += 1
            out.append(OpenScope())
        elif kind == "close":
            depth -= 1
            if depth == 0:
                return out, position
            out.append(CloseScope())
        elif kind == "list":
            out.append(BranchTargets(m["targets"], [x.strip() for x in m["list"].split(",")]))


def _statement(text: str, location: Location, out: list[Statement]) -> None:
    if text[0] == ".":
        if text.startswith(".reg"):
            out.append(_registers(text))
        elif not text.startswith(".pragma"):
            variable = parse_variable(text)
            if variable is None:
                raise Unsupported(f"PTX statement {text[:80]!r}")
            out.append(variable)
        return
    guard: Name | Not | None = None
    original = text
    if text[0] == "@":
        predicate, text = text[1:].split(None, 1)
        guard = Not(Name(predicate[1:])) if predicate[0] == "!" else Name(predicate)
    opcode, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    if "\t" in opcode or "\n" in opcode:
        opcode, rest = text.split(None, 1)
    base, *modifiers = opcode.split(".")
    operands = tuple(parse_operand(p) for p in split_operands(" ".join(rest.split())))
    out.append(Instruction(base, modifiers, operands, guard, location, original))


def _registers(text: str) -> Registers:
    m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
    if not m or m[1] not in SIZES:
        raise Unsupported(f"PTX statement {text[:80]!r}")
    names: list[str] = []
    for part in m[2].split(","):
        part = part.strip()
        counted = re.match(r"([%$\w]+)<(\d+)>$", part)
        names += [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [part]
    return Registers(m[1], names)
