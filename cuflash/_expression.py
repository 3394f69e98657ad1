"""The language of score expressions: C's expressions over integers and floats, as a small typed tree.

The kernels compile the user's own text; the tree serves the checks, which name the place in the text,
and the NumPy meaning with its derivatives (`_expression_numpy`). Here: names, words and nodes of the
tree; `_expression_parser` makes it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

INT, UNSIGNED, FLOAT = "int", "unsigned", "float"
# What the place of a score is called: batch, query head, query row, key.
VARIABLES = {"s": FLOAT, "b": INT, "h": INT, "i": INT, "j": INT}
CONSTANTS: dict[str, tuple[str, float]] = {
    "INFINITY": (FLOAT, float("inf")),
    "M_PI": (FLOAT, 3.141592653589793),
    "true": (INT, 1),
    "false": (INT, 0),
}
TYPES = (INT, UNSIGNED, FLOAT)
# Functions of floats, and the number of their arguments.
FLOAT_FUNCTIONS = {
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt"), 1),
    **dict.fromkeys(("tanh", "sin", "cos", "sigmoid", "fabs", "floor", "ceil", "round"), 1),
    **dict.fromkeys(("trunc", "rint"), 1),
    **dict.fromkeys(("pow", "fmin", "fmax"), 2),
}
# Functions whose result is of the common type of their arguments.
COMMON_FUNCTIONS = {"abs": 1, "min": 2, "max": 2}
FUNCTIONS = FLOAT_FUNCTIONS | COMMON_FUNCTIONS
# CUDA's names for float: expf means exp, which is of floats here anyway.
ALIASES = {f"{name}f": name for name in FLOAT_FUNCTIONS if name != "sigmoid"}
BUILT_INS = {*VARIABLES, *CONSTANTS, *TYPES, *FUNCTIONS, *ALIASES}

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[\w.]*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<sign>\|\||&&|<<=?|>>=?|[<>=!]=|\+\+|--|->|[-+*/%&|^]=|[-+*/%<>!~^&|?:()\[\],=.;{}])
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_INTEGER = re.compile(r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9]\d*)([uU]?)")
_REAL = re.compile(r"((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)([fF]?)", re.ASCII)


class Fault(Exception):
    """What is wrong with an expression, and where.

    Parameters
    ----------
    kind : type
        ValueError or TypeError.
    at : int
        Offset in the text.
    sentence, way_out : str
    """

    def __init__(self, kind: type[Exception], at: int, sentence: str, way_out: str) -> None:
        super().__init__(sentence)
        self.kind, self.at, self.sentence, self.way_out = kind, at, sentence, way_out


class Token(NamedTuple):
    """A word of the text; `what` is "space", "number", "name", "sign" or "end"."""

    what: str
    text: str
    at: int


class Symbol(NamedTuple):
    """A parameter: a scalar of a kind, or an array (always of floats) with `rank` axes."""

    kind: str
    rank: int | None = None


# ---- the tree: `kind` is the C type of the value


@dataclass(frozen=True, slots=True)
class Node:
    kind: str
    at: int
    height: int


@dataclass(frozen=True, slots=True)
class Number(Node):
    value: float


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A variable or a scalar parameter."""

    name: str


@dataclass(frozen=True, slots=True)
class Element(Node):
    """An element of an array parameter; `site` counts the uses of all arrays, in the text's order."""

    name: str
    indices: tuple[Node, ...]
    site: int


@dataclass(frozen=True, slots=True)
class Unary(Node):
    sign: str
    x: Node


@dataclass(frozen=True, slots=True)
class Binary(Node):
    sign: str
    a: Node
    b: Node


@dataclass(frozen=True, slots=True)
class Conditional(Node):
    condition: Node
    a: Node
    b: Node


@dataclass(frozen=True, slots=True)
class Call(Node):
    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Cast(Node):
    """Conversion of `x` to `kind`."""

    x: Node


class Parsed(NamedTuple):
    """An expression: its words, its tree, and for each use of an array the array's name."""

    tokens: tuple[Token, ...]
    tree: Node
    sites: tuple[str, ...]


def tokenize(code: str) -> tuple[Token, ...]:
    """All words of a text, spaces and comments included, and an "end".

    Raises
    ------
    Fault
        A character that C expressions do not have.
    """
    tokens, at = [], 0
    while at < len(code):
        found = _TOKEN.match(code, at)
        if found is None:
            raise Fault(
                ValueError,
                at,
                f"code has the character {code[at]!r}, which C expressions do not have.",
                "numbers, names, the operators of C, parentheses and brackets.",
            )
        tokens.append(Token(str(found.lastgroup), found.group(), at))
        at = found.end()
    return (*tokens, Token("end", "", len(code.rstrip())))


def number_of(token: Token) -> tuple[str, float]:
    """Kind and value of a literal.

    Raises
    ------
    Fault
        Not a number of C, or too large for 32 bits.
    """
    integer, real = _INTEGER.fullmatch(token.text), _REAL.fullmatch(token.text)
    if integer is not None:
        text, suffix = integer.groups()
        digits = text.lower()
        base = 16 if digits.startswith("0x") else 8 if digits[0] == "0" else 10
        value = int(digits, base)
        kind = INT if not suffix and value < 2**31 else UNSIGNED
        # Decimal literals without suffix are never unsigned in C.
        if value < 2**32 and (kind == INT or suffix or base != 10):
            return kind, value
        raise Fault(
            ValueError, token.at, f"code has the integer {token.text}, and int ends at {2**31 - 1}.",
            f"a u after it, up to {2**32 - 1}, or a decimal point for a float.",
        )  # fmt: skip
    if real is not None:
        number = float(real.group(1))
        try:
            struct.pack("<f", number)
        except OverflowError:
            raise Fault(
                ValueError, token.at, f"code has the number {token.text}, and float ends at 3.4e38.",
                "INFINITY, or a smaller number.",
            ) from None  # fmt: skip
        return FLOAT, number
    raise Fault(
        ValueError,
        token.at,
        f"code has {token.text!r}, which is no number of C.",
        "1, 0x1f, 1u, 1.5, 1.5f or 2e-3.",
    )


def promoted(a: str, b: str) -> str:
    """C's usual arithmetic conversions."""
    return FLOAT if FLOAT in (a, b) else UNSIGNED if UNSIGNED in (a, b) else INT
