"""What must be true of a ScoreMod's code and params; every error names the place in the user's text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from cuflash import _dtypes
from cuflash._arrays import adopt
from cuflash._errors import Seen, kind_of, shown_dtype
from cuflash._expression import BUILT_INS, FLOAT, INT, Fault, Parsed, Symbol
from cuflash._expression_parser import parse
from cuflash._params import MAX_SCORE_ARRAYS, MAX_SCORE_AXES, MAX_SCORE_SCALARS

# Prefix of what the generated source calls its own (`_scoremod_source`).
OWN_PREFIX = "score_mod_"
# Words that CUDA C++ does not let a program declare.
_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    alignas alignof and_eq asm auto bitand bitor bool case catch char char16_t char32_t compl const
    const_cast constexpr decltype default delete do double dynamic_cast enum explicit export extern
    friend goto inline int16_t long mutable namespace new noexcept not_eq nullptr operator or_eq
    private protected public register reinterpret_cast short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw typedef typeid typename typeof union
    using virtual void volatile wchar_t xor xor_eq DEV DEV_METHOD NULL
    break continue class else for if return try while
        """,
    )
)


def checked(code: Any, params: Any, fn: Any) -> tuple[dict[str, Any], dict[str, Symbol], Parsed]:
    """Params with arrays adopted, what the expression may do with each, and the parsed expression.

    Raises
    ------
    TypeError, ValueError
        See `ScoreMod`.
    """
    _check_code(code)
    given = _check_params(params)
    seen = seen_params(given)
    symbols = {name: _symbol(name, given, seen) for name in given}
    _check_counts(symbols, seen)
    if fn is not None and not callable(fn):
        raise seen.error(
            TypeError, f"fn is {kind_of(fn)}, not a function.", "fn(s, b, h, i, j, **params)."
        )
    try:
        parsed = parse(code, symbols)
    except Fault as fault:
        _refuse(code, fault, seen)
    used = {token.text for token in parsed.tokens if token.what == "name"}
    for name in given:
        if name not in used:
            raise seen.error(
                ValueError,
                f"params has {name!r}, which code does not use: {_line_at(code, 0)[0]}",
                f"drop {name!r} from params.",
            )
    return given, symbols, parsed


def _check_code(code: Any) -> None:
    way_out = 'a C expression, such as "s - decay[h] * abs(i - j)".'
    if not isinstance(code, str):
        raise Seen({}).error(TypeError, f"code is {kind_of(code)}, not a str.", way_out)
    if not code.strip():
        raise Seen({}).error(ValueError, "code is empty, and must be one expression.", way_out)


def _check_params(params: Any) -> dict[str, Any]:
    """Params as a dict of adopted arrays and Python numbers."""
    if params is None:
        return {}
    way_out = '{"decay": decay}.'
    if not isinstance(params, Mapping):
        sentence = f"params is {kind_of(params)}, not a dict of names and values."
        raise Seen({}).error(TypeError, sentence, way_out)
    found = {}
    for name, value in params.items():
        if not isinstance(name, str):
            sentence = f"params has {kind_of(name)} as a name, not a str."
            raise Seen({}).error(TypeError, sentence, way_out)
        _check_name(name, Seen({}, {"params": list(params)}))
        found[name] = _value(name, value)
    return found


def _check_name(name: str, seen: Seen) -> None:
    why = None
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        why = "is no name in C"
    elif name in BUILT_INS:
        why = "means something else in every score expression"
    elif name in _WORDS:
        why = "is a word of CUDA C++"
    elif "__" in name or re.match("_[A-Z]", name) or name.startswith(OWN_PREFIX):
        why = "is reserved: it begins with score_mod_ or an underscore and a capital, or has two underscores"
    if why is not None:
        raise seen.error(
            ValueError, f"params has {name!r}, which {why}.", "another name, such as decay."
        )


def _value(name: str, value: Any) -> Any:
    """A Python number, or the array as NumPy or CuPy."""
    seen = Seen({}, {name: value})
    way_out = f"numpy.asarray({name}), or a Python number."
    if isinstance(value, (bool, np.bool_)):
        sentence = f"params[{name!r}] is {kind_of(value)}, neither an array nor a number."
        raise seen.error(TypeError, sentence, f"int({name}).")
    if isinstance(value, (int, np.integer)):
        if not -(2**31) <= value < 2**31:
            raise seen.error(
                ValueError,
                f"params[{name!r}] is {value}, and a C int holds -2**31 to 2**31 - 1.",
                f"float({name}).",
            )
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, np.generic) and value.dtype in _dtypes.BY_NUMPY:
        return float(value)  # bfloat16
    if isinstance(value, (str, bytes, list, tuple, complex, np.generic)) or value is None:
        sentence = f"params[{name!r}] is {kind_of(value)}, neither an array nor a number."
        raise seen.error(TypeError, sentence, way_out)
    ((array,), _) = adopt([f"params[{name!r}]"], [value], 1, lambda: {})
    return array


def _symbol(name: str, given: Mapping[str, Any], seen: Seen) -> Symbol:
    """What an expression may do with a parameter; arrays have dtypes of kernels."""
    value = given[name]
    if isinstance(value, (int, float)):
        return Symbol(INT if isinstance(value, int) else FLOAT)
    if value.dtype not in _dtypes.BY_NUMPY:
        raise seen.error(
            TypeError,
            f"params[{name!r}] is {shown_dtype(value.dtype)}, not one of {_dtypes.NAMES}.",
            f"{name}.astype(numpy.float32).",
        )
    if value.ndim > MAX_SCORE_AXES:
        raise seen.error(
            ValueError,
            f"params[{name!r}] has {value.ndim} axes, and kernels index at most {MAX_SCORE_AXES}.",
            "reshape it, and compute the index: table[b * heads + h][i][j].",
        )
    return Symbol(FLOAT, value.ndim)


def _check_counts(symbols: Mapping[str, Symbol], seen: Seen) -> None:
    arrays = sum(symbol.rank is not None for symbol in symbols.values())
    for what, count, most in (
        ("arrays", arrays, MAX_SCORE_ARRAYS),
        ("numbers", len(symbols) - arrays, MAX_SCORE_SCALARS),
    ):
        if count > most:
            raise seen.error(
                ValueError,
                f"params has {count} {what}, and kernels take at most {most}.",
                "put several into one array, with one more index.",
            )


def seen_params(params: Mapping[str, Any]) -> Seen:
    """Params for messages."""
    arrays = {n: x for n, x in params.items() if hasattr(x, "shape")}
    return Seen(arrays, {n: x for n, x in params.items() if n not in arrays})


def _line_at(code: str, at: int) -> tuple[str, int, int]:
    """The line around an offset, its number from 1, and the offset in it."""
    start = code.rfind("\n", 0, at) + 1
    line = code[start:].split("\n", 1)[0]
    return line.replace("\t", " ").rstrip("\r"), code.count("\n", 0, at) + 1, at - start


def _refuse(code: str, fault: Fault, seen: Seen) -> NoReturn:
    """Raises what the parser found, with a caret under the place."""
    line, number, column = _line_at(code, fault.at)
    sentence = fault.sentence
    if "\n" in code.strip():
        sentence = f"{sentence.rstrip('.')} (line {number})."
    marked = f"{sentence}\n  {line}\n  {' ' * column}^"
    raise seen.error(fault.kind, marked, fault.way_out) from None
