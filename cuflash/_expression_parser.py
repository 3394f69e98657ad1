"""From the text of a score expression to its typed tree: recursive descent over C's expressions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from cuflash._expression import (
    ALIASES,
    COMMON_FUNCTIONS,
    CONSTANTS,
    FLOAT,
    FUNCTIONS,
    INT,
    TYPES,
    VARIABLES,
    Binary,
    Call,
    Cast,
    Conditional,
    Element,
    Fault,
    Name,
    Node,
    Number,
    Parsed,
    Symbol,
    Token,
    Unary,
    number_of,
    promoted,
    tokenize,
)

# Binding strength of C's binary operators.
_STRENGTH = {
    **{"||": 1, "&&": 2, "|": 3, "^": 4, "&": 5, "==": 6, "!=": 6},
    **{"<": 7, "<=": 7, ">": 7, ">=": 7, "<<": 8, ">>": 8},
    **{"+": 9, "-": 9, "*": 10, "/": 10, "%": 10},
}
_OF_INTEGERS = {"%", "<<", ">>", "&", "|", "^"}
_GIVES_BOOL = {"||", "&&", "==", "!=", "<", "<=", ">", ">="}
# Python's stack is finite: a tree has at most this height, and at most so many parentheses inside
# one another.
_MAX_HEIGHT, _MAX_DEPTH = 200, 24


def parse(code: str, symbols: Mapping[str, Symbol]) -> Parsed:
    """The typed tree of a C expression.

    Parameters
    ----------
    code : str
    symbols : mapping
        Parameters by name.

    Raises
    ------
    Fault
    """
    tokens = tokenize(code)
    parser = _Parser([t for t in tokens if t.what != "space"], symbols)
    tree = parser.expression()
    parser.end()
    return Parsed(tokens, tree, tuple(parser.sites))


class _Parser:
    """Recursive descent; precedence climbing for binary operators."""

    def __init__(self, tokens: list[Token], symbols: Mapping[str, Symbol]) -> None:
        self.tokens, self.symbols = tokens, symbols
        self.place, self.depth = 0, 0
        self.sites: list[str] = []

    @property
    def token(self) -> Token:
        return self.tokens[self.place]

    def take(self, *texts: str) -> Token | None:
        """The next token if it is one of these signs or names."""
        token = self.token
        if token.what not in ("sign", "name") or token.text not in texts:
            return None
        self.place += 1
        return token

    def need(self, text: str, after: str) -> None:
        if self.take(text) is None:
            self.unexpected(f"{text!r} must follow {after}")

    def unexpected(self, wanted: str) -> None:
        token = self.token
        found = f"goes on with {token.text!r}" if token.text else "ends"
        raise Fault(
            ValueError, token.at, f"code {found} where {wanted}.", "one C expression, such as s * 0.5f."
        )  # fmt: skip

    def end(self) -> None:
        token = self.token
        if token.what == "end":
            return
        if token.text in ("=", ";", ",", "{", "++", "--") or token.text[-1:] == "=":
            raise Fault(
                ValueError,
                token.at,
                f"code has {token.text!r}, and must be one expression.",
                "a value without assignments, statements or commas: a condition is c ? x : y.",
            )
        self.unexpected("the expression is complete")

    def height(self, at: int, *children: Node) -> int:
        height = 1 + max((child.height for child in children), default=0)
        if height > _MAX_HEIGHT:
            raise Fault(
                ValueError,
                at,
                f"code is a tree of more than {_MAX_HEIGHT} levels.",
                "a shorter expression; a parameter array can hold what it computes.",
            )
        return height

    def deeper(self, part: Callable[[], Node]) -> Node:
        """A part inside parentheses, brackets, ? : or behind a sign."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Fault(
                ValueError,
                self.token.at,
                f"code nests deeper than {_MAX_DEPTH} levels.",
                "fewer parentheses.",
            )
        node = part()
        self.depth -= 1
        return node

    def expression(self) -> Node:
        choices: list[tuple[Token, Node, Node]] = []
        node = self.binary(1)
        while (token := self.take("?")) is not None:
            choices.append((token, node, self.deeper(self.expression)))
            self.need(":", "the first value of ? :")
            node = self.binary(1)
        for token, condition, a in reversed(choices):
            height = self.height(token.at, condition, a, node)
            kind = promoted(a.kind, node.kind)
            node = Conditional(kind, token.at, height, condition, a, node)
        return node

    def binary(self, least: int) -> Node:
        a = self.unary()
        while True:
            strength = _STRENGTH.get(self.token.text, 0) if self.token.what == "sign" else 0
            if strength < max(least, 1):
                return a
            token = self.token
            self.place += 1
            b = self.binary(strength + 1)
            a = self.joined(token, a, b)

    def joined(self, token: Token, a: Node, b: Node) -> Node:
        sign = token.text
        if sign in _OF_INTEGERS:
            for side, x in (("left", a), ("right", b)):
                self.integer(x, token.at, f"the {side} side of {sign}")
        kind = promoted(a.kind, b.kind)
        if sign in ("<<", ">>"):
            kind = a.kind
        if sign in _GIVES_BOOL:
            kind = INT
        return Binary(kind, token.at, self.height(token.at, a, b), sign, a, b)

    def integer(self, node: Node, at: int, what: str) -> None:
        if node.kind == FLOAT:
            raise Fault(
                TypeError,
                at,
                f"code has a float as {what}, which must be an int.",
                "(int)x, or an int parameter.",
            )

    def unary(self) -> Node:
        token = self.take("-", "+", "!", "~")
        if token is None:
            return self.postfix()
        x = self.deeper(self.unary)
        if token.text == "~":
            self.integer(x, token.at, "the operand of ~")
        kind = INT if token.text == "!" else x.kind
        return Unary(kind, token.at, self.height(token.at, x), token.text, x)

    def postfix(self) -> Node:
        token = self.token
        node = self.primary()
        if (bracket := self.take("[")) is not None:
            what = f"{token.text!r}, which is a number" if token.what == "name" else "a value"
            raise Fault(
                TypeError,
                bracket.at,
                f"code indexes {what}.",
                "brackets follow the name of an array parameter.",
            )
        return node

    def primary(self) -> Node:
        token = self.token
        if token.what == "number":
            self.place += 1
            kind, value = number_of(token)
            return Number(kind, token.at, 1, value)
        if self.take("(") is not None:
            return self.parenthesis(token)
        if token.what != "name":
            self.unexpected("a value must follow" if self.place else "a value must stand")
        self.place += 1
        return self.named(token)

    def parenthesis(self, token: Token) -> Node:
        kind = self.take(*TYPES)
        if kind is not None and self.take(")") is not None:
            x = self.deeper(self.unary)
            return Cast(kind.text, token.at, self.height(token.at, x), x)
        if kind is not None:
            self.place -= 1
        node = self.deeper(self.expression)
        self.need(")", "what '(' began")
        return node

    def named(self, token: Token) -> Node:
        name = token.text
        if name in VARIABLES:
            return Name(VARIABLES[name], token.at, 1, name)
        if name in CONSTANTS:
            kind, value = CONSTANTS[name]
            return Number(kind, token.at, 1, value)
        symbol = self.symbols.get(name)
        if symbol is not None:
            if symbol.rank is not None:
                return self.element(token, symbol.rank)
            return Name(symbol.kind, token.at, 1, name)
        if name in TYPES or name in FUNCTIONS or name in ALIASES:
            return self.call(token)
        raise self.unknown(token)

    def unknown(self, token: Token) -> Fault:
        names = [*VARIABLES, *self.symbols, *FUNCTIONS, *ALIASES, *CONSTANTS, *TYPES]
        close = difflib.get_close_matches(token.text, names, 1, 0.7)
        mine = ", ".join([*VARIABLES, *self.symbols])
        return Fault(
            ValueError,
            token.at,
            f"code uses {token.text!r}, which is neither a parameter nor a name of the language.",
            (f"did you mean {close[0]!r}? " if close else "")
            + f"Names are {mine}; functions {', '.join(sorted(FUNCTIONS))}.",
        )

    def element(self, token: Token, rank: int) -> Node:
        site = len(self.sites)
        self.sites.append(token.text)
        indices: list[Node] = []
        while (bracket := self.take("[")) is not None:
            index = self.deeper(self.expression)
            if self.token.text == ",":
                raise Fault(
                    ValueError, self.token.at, f"code indexes {token.text!r} with a comma.",
                    f"as in C, one pair of brackets for each axis: {token.text}" + "[i]" * rank + ".",
                )  # fmt: skip
            self.need("]", "an index")
            self.integer(index, bracket.at, f"index {len(indices)} of {token.text!r}")
            indices.append(index)
        if len(indices) != rank:
            raise Fault(
                ValueError,
                token.at,
                f"code gives {token.text!r} {_count(len(indices), 'index', 'indices')}, "
                f"and it has {_count(rank, 'axis', 'axes')}.",
                f"{token.text}{'[i]' * rank}, with an int in each pair of brackets.",
            )
        height = self.height(token.at, *indices)
        return Element(FLOAT, token.at, height, token.text, tuple(indices), site)

    def call(self, token: Token) -> Node:
        function = ALIASES.get(token.text, token.text)
        self.need("(", f"{token.text!r}")
        arguments: list[Node] = []
        while self.token.text != ")" or arguments:
            arguments.append(self.deeper(self.expression))
            if self.take(",") is None:
                break
        self.need(")", f"the arguments of {token.text!r}")
        wanted = FUNCTIONS.get(function, 1)
        if len(arguments) != wanted:
            raise Fault(
                ValueError,
                token.at,
                f"code gives {token.text!r} {_count(len(arguments), 'argument')}, "
                f"and it takes {wanted}.",
                f"{token.text}({', '.join('xy'[:wanted])}).",
            )
        height = self.height(token.at, *arguments)
        if function in TYPES:
            return Cast(function, token.at, height, arguments[0])
        kind = FLOAT
        if function in COMMON_FUNCTIONS:
            kind = promoted(arguments[0].kind, arguments[-1].kind)
        return Call(kind, token.at, height, function, tuple(arguments))


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
