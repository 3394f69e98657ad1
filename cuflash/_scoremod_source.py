"""The CUDA side of a ScoreMod: its expression as a struct that kernels call, on dual numbers.

The user's text stands on lines of its own after `#line 1 "score_mod"`, so that the compiler's messages
name the user's lines. It is the text as given but for a few words: real literals get the suffix of the
type in which scores are kept (f, or none for double), expf becomes exp, float becomes the number type of
the evaluation, constants become their values and comments spaces. The source depends on `ScoreMod.key`
and on that type alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from cuflash._dtypes import FLOAT32
from cuflash._expression import ALIASES, FLOAT, Symbol, Token, number_of
from cuflash._expression_parser import parse
from cuflash._scoremod import ScoreMod
from cuflash._scoremod_checks import OWN_PREFIX

_NUMBER = f"{OWN_PREFIX}Number"
_CONSTANTS = {"INFINITY": "{real}(::positive_infinity())", "M_PI": "{real}(3.14159265358979324)"}
_PLACE = "int b, int h, int i, int j"


def source(score_mod: ScoreMod, real: np.dtype = FLOAT32) -> str:
    """The text that goes before Config: `ScoreExpression<Element>`.

    Parameters
    ----------
    score_mod : ScoreMod
    real : dtype
        float32 or float64, in which kernels evaluate it: that of lse.

    Returns
    -------
    str
        Includes score_mod.cuh. Equal for equal `score_mod.key` and `real`. Array n of the kernels' params is the
        n-th of `score_mod.arrays`, scalar n the n-th of `score_mod.scalars`.
    """
    return _source(score_mod.key, "double" if real.itemsize == 8 else "float")


@functools.lru_cache(maxsize=256)
def _source(key: tuple[str, tuple[tuple[str, str, int | None], ...]], real: str) -> str:
    """The same, from a ScoreMod's key and the C type."""
    code, params = key
    symbols = {name: Symbol(kind, rank) for name, kind, rank in params}
    parsed = parse(code, symbols)
    arrays = {name: symbol.rank for name, symbol in symbols.items() if symbol.rank is not None}
    scalars = [(name, symbol.kind) for name, symbol in symbols.items() if symbol.rank is None]
    number = {name: n for n, name in enumerate(arrays)}
    views = [_declared(name, name, number, arrays, _NUMBER, -1) for name in arrays]
    numbers = [
        f"const auto {name} = expression::{_scalar(kind, real)}(*this->options, {n});"
        for n, (name, kind) in enumerate(scalars)
    ]
    sites = [
        _declared(f"{OWN_PREFIX}{n}", name, number, arrays, _NUMBER, n)
        for n, name in enumerate(parsed.sites)
    ]
    owners = ", ".join(str(number[name]) for name in parsed.sites) or "0"
    return (
        '#include "score_mod.cuh"\n'
        "namespace expression {\n"
        f"template <class {OWN_PREFIX}Element> struct Score : Functions<{real}> {{\n"
        f"    using Real = {real};\n"
        "    static constexpr bool CHANGES = true;\n"
        f"    static constexpr int SITES = {len(parsed.sites)};\n"
        "    // Which array stands at a site, a place in the text.\n"
        "    __device__ static constexpr int array_of(int site) {\n"
        f"        constexpr int owners[] = {{{owners}}};\n"
        "        return owners[site];\n"
        "    }\n"
        "    const OptionPointers* options;  // pointers, so that a score can be assigned\n"
        "    const ScoreModParams* values;\n"
        "    template <class Params> DEV_METHOD explicit Score(const Params& p)\n"
        "        : options(&p.options), values(&p.values.score) {}\n"
        f"    DEV_METHOD Real value(Real s, {_PLACE}) const {{\n"
        "        return at(Dual<0, Real>(s), b, h, i, j).value;\n"
        "    }\n"
        f"    DEV_METHOD typename PairOf<Real>::Type with_derivative(Real s, {_PLACE}) const {{\n"
        "        const Dual<1, Real> x = at(Dual<1, Real>::variable(s, 0), b, h, i, j);\n"
        "        return {x.value, x.tangent[0]};\n"
        "    }\n"
        f"    template <class {_NUMBER}>\n"
        f"    DEV_METHOD {_NUMBER} at({_NUMBER} s, {_PLACE}) const {{\n"
        f"{_body([*views, *numbers], parsed.tokens, (), real)}"
        "    }\n"
        f"    template <class {_NUMBER}, class {OWN_PREFIX}Sites>\n"
        f"    DEV_METHOD {_NUMBER} at_sites({_NUMBER} s, {_PLACE}, {OWN_PREFIX}Sites& "
        f"{OWN_PREFIX}sites) const {{\n"
        f"{_body([*sites, *numbers], parsed.tokens, parsed.sites, real)}"
        "    }\n"
        "};\n"
        "}  // namespace expression\n"
        "template <class Element> using ScoreExpression = expression::Score<Element>;\n"
    )


def _declared(
    variable: str, name: str, number: dict[str, int], rank: dict[str, int], value: str, site: int
) -> str:
    """A local variable that reads array `name`: as reals, or as what stands at a site."""
    function, where = f"array<{OWN_PREFIX}Element, {rank[name]}>", ""
    if site >= 0:
        function = f"site<{value}, {OWN_PREFIX}Element, {rank[name]}, {site}>"
        where = f", {OWN_PREFIX}sites"
    return (
        f"const auto {variable} = expression::{function}"
        f"(*this->options, *this->values, {number[name]}{where});"
    )


def _scalar(kind: str, real: str) -> str:
    """The function that reads a scalar parameter."""
    return f"real_scalar<{real}>" if kind == FLOAT else f"{kind}_scalar"


def _body(
    declarations: Sequence[str], tokens: Sequence[Token], sites: Sequence[str], real: str
) -> str:
    lines = "".join(f"        {line}\n" for line in declarations)
    return (
        f"{lines}        return {_NUMBER}(\n"
        '#line 1 "score_mod"\n'
        f"{_text(tokens, sites, real)}\n"
        '#line 1 "score_mod, generated"\n'
        "        );\n"
    )


def _text(tokens: Sequence[Token], sites: Sequence[str], real: str) -> str:
    """The user's text for the compiler; `sites`: arrays by their uses, replaced by those in turn."""
    words, uses = [], 0
    for token in tokens:
        text = token.text
        if token.what == "space":
            text = "".join(c if c == "\n" else " " for c in text)
        elif token.what == "number":
            text = _literal(token, real)
        elif text == FLOAT:
            text = _NUMBER
        elif text in _CONSTANTS:
            text = _CONSTANTS[text].format(real=real)
        elif text in ALIASES:
            text = ALIASES[text].ljust(len(text))
        elif uses < len(sites) and token.what == "name" and text == sites[uses]:
            text = f"{OWN_PREFIX}{uses}"
            uses += 1
        words.append(text)
    return "".join(words)


def _literal(token: Token, real: str) -> str:
    kind, _ = number_of(token)
    if kind != FLOAT:
        return token.text
    return token.text.rstrip("fF") + ("" if real == "double" else "f")
