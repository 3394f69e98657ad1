"""Every wrong ScoreMod: which exception, which place in the user's text."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash

A = np.ones(3, np.float32)
T = np.ones((2, 3), np.float32)

# code, params, exception, start of the message, what the caret points at
TEXTS: list[tuple[str, dict[str, Any], type[Exception], str, str]] = [
    ("s - deacy[h]", {"decay": A}, ValueError, "code uses 'deacy', which is neither", "deacy"),
    ("f(s)", {}, ValueError, "code uses 'f', which is neither", "f(s)"),
    ("s + threadIdx.x", {}, ValueError, "code uses 'threadIdx'", "threadIdx"),
    ("(double)s", {}, ValueError, "code uses 'double'", "double"),
    ("s +", {}, ValueError, "code ends where a value must follow", ""),
    ("// nothing", {}, ValueError, "code ends where a value must stand", ""),
    ("(s", {}, ValueError, "code ends where ')' must follow what '(' began", ""),
    ("s)", {}, ValueError, "code goes on with ')' where the expression is complete", ")"),
    ("s s", {}, ValueError, "code goes on with 's' where the expression", "s"),
    ("s * / 2", {}, ValueError, "code goes on with '/' where a value must follow", "/ 2"),
    ("s ? 1", {}, ValueError, "code ends where ':' must follow the first value", ""),
    ("/* s", {}, ValueError, "code goes on with '/' where a value must stand", "/* s"),
    ("exp s", {}, ValueError, "code goes on with 's' where '(' must follow 'exp'", "s"),
    ("exp(s, 1)", {}, ValueError, "code gives 'exp' 2 arguments, and it takes 1", "exp"),
    ("min(s)", {}, ValueError, "code gives 'min' 1 argument, and it takes 2", "min"),
    ("pow()", {}, ValueError, "code gives 'pow' 0 arguments, and it takes 2", "pow"),
    ("exp(s,)", {}, ValueError, "code goes on with ')' where a value", ")"),
    ("s; j", {}, ValueError, "code has ';', and must be one expression", "; j"),
    ("s = 2", {}, ValueError, "code has '=', and must be one", "= 2"),
    ("s += 2", {}, ValueError, "code has '+=', and must be one", "+= 2"),
    ("s++", {}, ValueError, "code has '++', and must be one", "++"),
    ("s, j", {}, ValueError, "code has ',', and must be one", ", j"),
    ("s @ 2", {}, ValueError, "code has the character '@'", "@ 2"),
    ("s + 'x'", {}, ValueError, 'code has the character "\'"', "'x'"),
    ('s + "x"', {}, ValueError, "code has the character '\"'", '"x"'),
    ("s \\ 2", {}, ValueError, "code has the character '\\\\'", "\\ 2"),
    ("s + α", {}, ValueError, "code has the character 'α'", "α"),
    ("1.5.2 * s", {}, ValueError, "code has '1.5.2', which is no number", "1.5.2"),
    ("s + 2w", {}, ValueError, "code has '2w', which is no number", "2w"),
    ("s + 9999999999", {}, ValueError, "code has the integer 9999999999", "9999999999"),
    ("s + 1e39", {}, ValueError, "code has the number 1e39, and float ends at 3.4e38", "1e39"),
    ("w[h][i]", {"w": A}, ValueError, "code gives 'w' 2 indices, and it has 1 axis", "w[h]"),
    ("s + w", {"w": T}, ValueError, "code gives 'w' 0 indices, and it has 2 axes", "w"),
    ("w[h]", {"w": T}, ValueError, "code gives 'w' 1 index, and it has 2 axes", "w[h]"),
    ("w[0]", {"w": np.array(1.0)}, ValueError, "code gives 'w' 1 index, and it has 0", "w[0]"),
    ("w[h, i]", {"w": T}, ValueError, "code indexes 'w' with a comma", ", i]"),
    ("w[h", {"w": A}, ValueError, "code ends where ']' must follow an index", ""),
    ("w[]", {"w": A}, ValueError, "code goes on with ']' where a value must follow", "]"),
    ("w[s]", {"w": A}, TypeError, "code has a float as index 0 of 'w'", "[s]"),
    ("w[h][0.5]", {"w": T}, TypeError, "code has a float as index 1 of 'w'", "[0.5]"),
    ("c[h] + s", {"c": 2.0}, TypeError, "code indexes 'c', which is a number", "[h]"),
    ("s[h]", {}, TypeError, "code indexes 's', which is a number", "[h]"),
    ("(s)[h]", {}, TypeError, "code indexes a value", "[h]"),
    ("s % 2", {}, TypeError, "code has a float as the left side of %", "% 2"),
    ("i % s", {}, TypeError, "code has a float as the right side of %", "% s"),
    ("s << 1", {}, TypeError, "code has a float as the left side of <<", "<< 1"),
    ("i & c", {"c": 1.0}, TypeError, "code has a float as the right side of &", "& c"),
    ("~s", {}, TypeError, "code has a float as the operand of ~", "~s"),
    ("(" * 30 + "s" + ")" * 30, {}, ValueError, "code nests deeper than 24 levels", "(" * 5),
    ("-" + " -" * 40 + "s", {}, ValueError, "code nests deeper than 24 levels", "-"),
    ("+".join("s" * 300), {}, ValueError, "code is a tree of more than 200 levels", "+s"),
    ("1 ? s : " * 300 + "s", {}, ValueError, "code is a tree of more than 200 levels", "? s"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "params", "kind", "start", "place"), TEXTS)
def test_wrong_code(
    code: str, params: dict[str, Any], kind: type[Exception], start: str, place: str
) -> None:
    with pytest.raises(kind) as raised:
        cuflash.ScoreMod(code, params)
    assert type(raised.value) is kind
    sentence, line, caret, *rest = str(raised.value).split("\n")
    assert sentence.startswith(start) and sentence.endswith(".")
    assert line == f"  {code}" and caret.strip() == "^"
    column = caret.index("^") - 2
    assert code[column:].startswith(place) if place else column == len(code)
    assert rest[-1].startswith("  Way out: ")


def test_errors_in_longer_texts_show_the_line() -> None:
    code = "s\n\t+ deacy[h] // the decay\n + 1"
    with pytest.raises(ValueError, match="deacy") as raised:
        cuflash.ScoreMod(code, {"decay": A, "c": 2})
    assert str(raised.value).split("\n")[:4] == [
        "code uses 'deacy', which is neither a parameter nor a name of the language (line 2).",
        "   + deacy[h] // the decay",
        "     ^",
        "  decay  (3,) float32",
    ]
    assert "Way out: did you mean 'decay'?" in str(raised.value)


# arguments, exception, start of the message
ARGUMENTS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "code int": ((3,), TypeError, "code is an int, not a str."),
    "code bytes": ((b"s",), TypeError, "code is a bytes, not a str."),
    "code empty": (("",), ValueError, "code is empty"),
    "code blank": ((" \n\t",), ValueError, "code is empty"),
    "params list": (("s", [A]), TypeError, "params is a list, not a dict"),
    "params array": (("s", A), TypeError, "params is a ndarray, not a dict"),
    "name int": (("s", {3: A}), TypeError, "params has an int as a name, not a str."),
    "name digit": (("s", {"2w": A}), ValueError, "params has '2w', which is no name in C."),
    "name space": (("s", {"a b": A}), ValueError, "params has 'a b', which is no name in C."),
    "name greek": (("s", {"α": A}), ValueError, "params has 'α', which is no name in C."),
    "name s": (("s", {"s": A}), ValueError, "params has 's', which means something else"),
    "name h": (("s", {"h": 1.0}), ValueError, "params has 'h', which means something else"),
    "name function": (("s", {"exp": A}), ValueError, "params has 'exp', which means something"),
    "name alias": (("s", {"expf": A}), ValueError, "params has 'expf', which means something"),
    "name constant": (("s", {"INFINITY": 1.0}), ValueError, "params has 'INFINITY', which means"),
    "name type": (("s", {"float": 1.0}), ValueError, "params has 'float', which means something"),
    "name word": (("s", {"class": A}), ValueError, "params has 'class', which is a word of CUDA"),
    "name double": (("s", {"double": A}), ValueError, "params has 'double', which is a word of"),
    "name macro": (("s", {"DEV": A}), ValueError, "params has 'DEV', which is a word of CUDA"),
    "name ours": (("s", {"score_mod_0": A}), ValueError, "params has 'score_mod_0', which is res"),
    "name reserved": (("s", {"a__b": A}), ValueError, "params has 'a__b', which is reserved"),
    "name _A": (("s", {"_A": A}), ValueError, "params has '_A', which is reserved"),
    "value list": (("s + w[0]", {"w": [1.0]}), TypeError, "params['w'] is a list, neither"),
    "value str": (("s + w", {"w": "1"}), TypeError, "params['w'] is a str, neither an array"),
    "value None": (("s + w", {"w": None}), TypeError, "params['w'] is a NoneType, neither"),
    "value complex": (("s + w", {"w": 1j}), TypeError, "params['w'] is a complex, neither"),
    "value bool": (("s + w", {"w": True}), TypeError, "params['w'] is a bool, neither"),
    "value object": (("s + w", {"w": object()}), TypeError, "params['w'] is an object, not an"),
    "value large": (("s + w", {"w": 2**31}), ValueError, "params['w'] is 2147483648, and a C int"),
    "value small": (("s + w", {"w": -(2**31) - 1}), ValueError, "params['w'] is -2147483649, and"),
    "dtype int": (("w[h]", {"w": A.astype(int)}), TypeError, "params['w'] is int64, not one of"),
    "dtype bool": (("w[h]", {"w": A > 0}), TypeError, "params['w'] is bool, not one of float16"),
    "dtype swapped": (("w[h]", {"w": A.astype(">f4")}), TypeError, "params['w'] is byte-swapped"),
    "axes": (("w[b]", {"w": np.ones((1,) * 5)}), ValueError, "params['w'] has 5 axes, and kernels"),
    "unused": (("s", {"w": A}), ValueError, "params has 'w', which code does not use: s"),
    "unused number": (("s + w[h]", {"w": A, "c": 1}), ValueError, "params has 'c', which code"),
    "nine arrays": (
        ("s", {f"w{n}": A for n in range(9)}),
        ValueError,
        "params has 9 arrays, and kernels take at most 8.",
    ),
    "nine numbers": (
        ("s", {f"c{n}": n for n in range(9)}),
        ValueError,
        "params has 9 numbers, and kernels take at most 8.",
    ),
    "masked": (
        ("w[h]", {"w": np.ma.masked_array(A)}),
        TypeError,
        "params['w'] is a masked array, and its mask would be ignored.",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments(name: str) -> None:
    arguments, kind, start = ARGUMENTS[name]
    with pytest.raises(kind) as raised:
        cuflash.ScoreMod(*arguments)
    assert type(raised.value) is kind and str(raised.value).startswith(start), raised.value
    assert "\n  Way out: " in str(raised.value)


def test_wrong_fn() -> None:
    with pytest.raises(TypeError, match="fn is an int, not a function"):
        cuflash.ScoreMod("s", fn=3)  # type: ignore[arg-type]


def test_what_is_just_allowed() -> None:
    arrays = {f"w{n}": np.ones((1,) * 4, ml_dtypes.bfloat16) for n in range(8)}
    numbers = {"c": -(2**31), "d": 2**31 - 1, "e": float("inf"), "f1": 1e300}
    code = " + ".join([f"{n}[b][b][b][b]" for n in arrays] + list(numbers))
    assert len(cuflash.ScoreMod(code, arrays | numbers).params) == 12
    assert cuflash.ScoreMod("(" * 20 + "s" + ")" * 20).arrays == {}
    long = cuflash.ScoreMod("+".join("s" * 199))
    assert long.evaluate(np.ones(1), 0, 0, 0, 0) == 199
    assert cuflash.ScoreMod("1 ? s : " * 190 + "s").key
