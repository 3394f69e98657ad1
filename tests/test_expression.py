"""C's expressions as `ScoreMod` reads them, against Python that follows C's rules by hand."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuflash._expression import Fault, Number
from cuflash._expression_parser import parse
from cuflash._scoremod import ScoreMod

PLACE = {"b": 1, "h": 2, "i": 7, "j": 12, "n": -5}
S = 0.75


def value(code: str, s: float = S, *, dtype: Any = np.float64, **params: Any) -> Any:
    """A ScoreMod at one place."""
    found = ScoreMod(code, params).evaluate(np.full((1,), s, dtype), *(PLACE[n] for n in "bhij"))
    assert found.dtype == dtype and found.shape == (1,)
    return found[0]


# ---- random expressions, built together with their values


class Made(NamedTuple):
    """Text, binding strength of its outermost operator, C type ("int", "unsigned" or "float"), value."""

    text: str
    strength: int
    kind: str
    value: Any


def wrapped(x: int, kind: str) -> int:
    """32 bits of an integer."""
    x &= 0xFFFFFFFF
    return x - 2**32 if kind == "int" and x >= 2**31 else x


def converted(x: Made, kind: str) -> Any:
    if kind == "float":
        return float(x.value)
    return wrapped(int(x.value), kind)


def common(a: Made, b: Made) -> str:
    kinds = (a.kind, b.kind)
    return "float" if "float" in kinds else "unsigned" if "unsigned" in kinds else "int"


def inside(x: Made, least: int) -> str:
    """The text as an operand that binds at least so strongly."""
    return x.text if x.strength >= least else f"({x.text})"


STRENGTHS = {"||": 1, "&&": 2, "|": 3, "^": 4, "&": 5, "==": 6, "!=": 6, "<": 7, "<=": 7, ">": 7}
STRENGTHS |= {">=": 7, "<<": 8, ">>": 8, "+": 9, "-": 9, "*": 10, "/": 10, "%": 10}
COMPARE = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def binary(sign: str, a: Made, b: Made) -> Made | None:
    """a sign b; None where C leaves it undefined."""
    level = STRENGTHS[sign]
    text = f"{inside(a, level)} {sign} {inside(b, level + 1)}"
    kind = common(a, b)
    if sign in ("&&", "||"):
        truth = (bool(a.value), bool(b.value))
        return Made(text, level, "int", int(all(truth) if sign == "&&" else any(truth)))
    x, y = converted(a, kind), converted(b, kind)
    if sign in COMPARE:
        return Made(text, level, "int", int(COMPARE[sign](x, y)))
    if sign in ("<<", ">>"):
        if "float" in (a.kind, b.kind) or not 0 <= b.value < 31 or a.value < 0:
            return None
        shifted = a.value << b.value if sign == "<<" else a.value >> b.value
        return Made(text, level, a.kind, wrapped(shifted, a.kind))
    if sign in ("|", "&", "^", "%") and kind == "float":
        return None
    if sign in ("/", "%") and y == 0:
        return None
    if kind == "float":
        result = {"+": x + y, "-": x - y, "*": x * y}[sign] if sign in "+-*" else x / y
        return Made(text, level, kind, result)
    result = {
        "+": lambda: x + y,
        "-": lambda: x - y,
        "*": lambda: x * y,
        "/": lambda: truncated(x, y),
        "%": lambda: x - y * truncated(x, y),
        "|": lambda: x | y,
        "&": lambda: x & y,
        "^": lambda: x ^ y,
    }[sign]()
    return Made(text, level, kind, wrapped(result, kind))


def unary(sign: str, x: Made) -> Made | None:
    text = f"{sign}{inside(x, 11)}" if x.text[0] not in "+-" else f"{sign}({x.text})"
    if sign == "!":
        return Made(text, 11, "int", int(not x.value))
    if sign == "~":
        return None if x.kind == "float" else Made(text, 11, x.kind, wrapped(~x.value, x.kind))
    result = -x.value if sign == "-" else x.value
    return Made(text, 11, x.kind, result if x.kind == "float" else wrapped(result, x.kind))


def cast(kind: str, x: Made) -> Made | None:
    if x.kind == "float" and kind != "float":
        low = 0 if kind == "unsigned" else -(2**31)
        if not (math.isfinite(x.value) and low <= math.trunc(x.value) < low + 2**32):
            return None
    return Made(f"({kind}){inside(x, 11)}", 11, kind, converted(x, kind))


def conditional(c: Made, a: Made, b: Made) -> Made:
    kind = common(a, b)
    text = f"{inside(c, 1)} ? {inside(a, 0)} : {inside(b, 0)}"
    return Made(text, 0, kind, converted(a if c.value else b, kind))


def call(name: str, a: Made, b: Made) -> Made:
    if name == "abs":
        size = abs(a.value) if a.kind == "float" else wrapped(abs(a.value), a.kind)
        return Made(f"abs({a.text})", 12, a.kind, size)
    kind = common(a, b) if name in ("min", "max") else "float"
    x, y = converted(a, kind), converted(b, kind)
    return Made(f"{name}({a.text}, {b.text})", 12, kind, min(x, y) if "min" in name else max(x, y))


LEAVES = st.one_of(
    st.sampled_from([Made(n, 12, "int", x) for n, x in PLACE.items()]),
    st.just(Made("s", 12, "float", S)),
    st.integers(0, 2**31 - 1).map(lambda n: Made(str(n), 12, "int", n)),
    st.integers(0, 9).map(lambda n: Made(hex(n), 12, "int", n)),
    st.integers(0, 2**32 - 1).map(lambda n: Made(f"{n}u", 12, "unsigned", n)),
    st.integers(0, 99).map(lambda n: Made(f"{n / 8}f", 12, "float", n / 8)),
    st.sampled_from([Made(".5", 12, "float", 0.5), Made("2e1", 12, "float", 20.0)]),
)


@st.composite
def expressions(draw: Any, depth: int = 4) -> Made:
    """A leaf, or smaller expressions combined; what C leaves undefined becomes its first part."""
    how = draw(st.sampled_from(["leaf", "binary", "binary", "unary", "cast", "call", "choice"]))
    if depth == 0 or how == "leaf":
        return draw(LEAVES)
    a = draw(expressions(depth - 1))
    if how == "unary":
        return unary(draw(st.sampled_from("+-!~")), a) or a
    if how == "cast":
        return cast(draw(st.sampled_from(["int", "unsigned", "float"])), a) or a
    b = draw(expressions(depth - 1))
    if how == "binary":
        return binary(draw(st.sampled_from(sorted(STRENGTHS))), a, b) or a
    if how == "call":
        return call(draw(st.sampled_from(["abs", "min", "max", "fmin", "fmax"])), a, b)
    return conditional(a, b, draw(expressions(depth - 1)))


@settings(max_examples=400, deadline=None)
@given(expressions())
def test_random_expressions_have_the_values_of_c(made: Made) -> None:
    params = {"n": PLACE["n"]} if re.search(r"\bn\b", made.text) else {}
    want = float(made.value)
    got = value(made.text, **params)
    assert got == want or (math.isnan(want) and np.isnan(got)), made.text
    # Spaces and comments change nothing.
    spread = made.text.replace(" ", " /* ? : */\n\t")
    assert np.array_equal(value(spread, **params), got, equal_nan=True)


# ---- what random expressions do not reach


# (code, value) at b = 1, h = 2, i = 7, s = 0.75
VALUES = [
    ("-7 / 2", -3),
    ("-7 % 3", -1),
    ("7 % -3", 1),
    ("2147483647 + 1", -(2**31)),
    ("0u - 1", 2**32 - 1),
    ("-1 < 0u", 0),
    ("-1 >> 1", -1),
    ("0x80000000 / 2", 2**30),
    ("0x7fffffff / 2", 2**30 - 1),
    ("017", 15),
    ("1 << 2 + 1", 8),
    ("1 | 2 == 2", 1),
    ("1 ? 2 : 0 ? 3 : 4", 2),
    ("0 ? 2 : 0 ? 3 : 4", 4),
    ("!0 + !5", 1),
    ("~0", -1),
    ("- -3", 3),
    ("(int)-2.7", -2),
    ("(int)2.7f", 2),
    ("int(s * 10)", 7),
    ("(int)(1e30f)", 2**31 - 1),
    ("(int)(-INFINITY)", -(2**31)),
    ("(int)(INFINITY - INFINITY)", 0),
    ("(unsigned)-3.5", 0),
    ("(unsigned)-3", 2**32 - 3),
    ("1 / 2 * 2.0", 0),
    ("1 / 2.0 * 2", 1),
    ("true + true", 2),
    ("true ? false : 1", 0),
    ("round(2.5) + round(-2.5f)", 0),
    ("round(2.5)", 3),
    ("roundf(0.49999997f)", 0),
    ("rint(2.5)", 2),
    ("trunc(-2.5) + floor(-2.5) + ceil(-2.5)", -7),
    ("min(3, 2.5)", 2.5),
    ("max(-1, 1u)", 2**32 - 1),
    ("fmin(INFINITY - INFINITY, 4)", 4),
    ("max(4, INFINITY - INFINITY)", 4),
    ("pow(2, 10)", 1024),
    ("pow(i, 2) + powf(2.f, -1.f)", 49.5),
    ("rsqrt(16) + sqrtf(9)", 3.25),
    ("exp2(3) + log2(8) + log10(1000)", 14),
    ("expm1(0) + log1p(0) + sigmoid(0) + sin(0) + cos(0) + tanh(0)", 1.5),
    ("sigmoid(-1000) + sigmoid(1000)", 1),
    ("sin(M_PI / 2)", 1),
    ("fabsf(-s) + abs(-s) + abs(-3)", 4.5),
    ("1.f + .5 + 5e-1f + 1E0", 3),
]


@pytest.mark.parametrize(("code", "want"), VALUES)
def test_values(code: str, want: float) -> None:
    assert value(code) == pytest.approx(want, abs=1e-15, rel=1e-15)


def test_parameters_are_indexed_as_in_c() -> None:
    table = np.arange(24.0).reshape(2, 3, 4)
    assert value("t[b][h][0] - t[0][h][n]", t=table, n=3) == 20 - 11
    assert value("t[b][(int)(s * 2)][b]", t=table[:, ::-1]) == table[1, 1, 1]
    assert value("t * 2 + u[0]", t=np.array(1.5), u=np.ones(1, np.float16)) == 4
    for index in ("-1", "2", "i", "0u - 1", "2147483647"):
        assert np.isnan(value(f"t[{index}]", t=np.ones(2))), index
        assert value(f"b == 1 ? 3 : t[{index}]", t=np.ones(2)) == 3
    assert np.isnan(value("t[0][0]", t=np.ones((0, 3))))


def test_literals() -> None:
    for text, kind, number in (
        ("12", "int", 12),
        ("0x1F", "int", 31),
        ("1.", "float", 1.0),
        ("1.5e-3F", "float", 0.0015),
        ("4294967295U", "unsigned", 2**32 - 1),
    ):
        tree = parse(text, {}).tree
        assert isinstance(tree, Number) and (tree.kind, tree.value) == (kind, number)
    for text in (
        "1f",
        "08",
        "1.5u",
        "1l",
        "0b1",
        "1e",
        "1.2.3",
        "0x",
        "1'0",
        "1e39",
        "4294967296u",
    ):
        with pytest.raises(Fault) as raised:
            parse(text, {})
        assert raised.value.at in (0, 1)


def test_float32_stays_float32() -> None:
    """Every step is rounded to float32, literals and parameters, too."""
    one, tenth = np.float32(1), np.float32(0.1)
    got = value("(s + 0.1) * w[0] / 3 - x", 1.0, dtype=np.float32, w=np.array([0.1]), x=0.7)
    assert got == (one + tenth) * tenth / np.float32(3) - np.float32(0.7)
    assert value("16777217 + 0 * s", 1.0, dtype=np.float32) == 16777216
