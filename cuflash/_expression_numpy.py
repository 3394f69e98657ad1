"""What a score expression means for NumPy arrays: its values, and its derivatives by dual numbers.

A value travels with its tangents, one for each variable that it depends on (Griewank & Walther,
"Evaluating Derivatives", 2nd edition, 2008, chapter 3: the forward mode); what does not depend on a
variable has no tangent in it. Integers have C's 32 bits and wrap around; floats have one precision,
literals and parameters included.

A tangent of 0 stays 0 whatever it is multiplied by, as in kernels_cu/dual.cuh: the derivative of
`c ? x : sqrt(x)` at 0 must not be 0 * inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cuflash._expression import (
    FLOAT,
    INT,
    UNSIGNED,
    Binary,
    Call,
    Cast,
    Conditional,
    Element,
    Name,
    Node,
    Number,
    Unary,
    promoted,
)

SCORE = "s"  # the variable of that name; sites of arrays are variables, too, named by their numbers
_INTEGERS: dict[str, Any] = {INT: np.int32, UNSIGNED: np.uint32}
_LN_2, _LN_10 = math.log(2), math.log(10)
# bincount over a range of elements beats ufunc.at, unless the range is mostly empty.
_SPARSE = 4


class Dual(NamedTuple):
    """A value and its derivatives; variables that are missing have derivative 0."""

    value: Any
    tangents: dict[Hashable, Any]


def _rounded(x: Any) -> Any:
    """C's round: halves away from zero."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.copysign(1, x), 0).astype(whole.dtype)


# name: (value of x, slope from x and the value); slope None: 0 wherever there is one.
_FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any] | None]] = {
    "exp": (np.exp, lambda x, y: y),
    "exp2": (np.exp2, lambda x, y: y * _LN_2),
    "expm1": (np.expm1, lambda x, y: np.exp(x)),
    "log": (np.log, lambda x, y: 1 / x),
    "log2": (np.log2, lambda x, y: 1 / (x * _LN_2)),
    "log10": (np.log10, lambda x, y: 1 / (x * _LN_10)),
    "log1p": (np.log1p, lambda x, y: 1 / (1 + x)),
    "sqrt": (np.sqrt, lambda x, y: 0.5 / y),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda x, y: -0.5 * y / x),
    "tanh": (np.tanh, lambda x, y: 1 - y * y),
    "sin": (np.sin, lambda x, y: np.cos(x)),
    "cos": (np.cos, lambda x, y: -np.sin(x)),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), lambda x, y: y * (1 - y)),
    "fabs": (np.abs, lambda x, y: np.sign(x)),
    "floor": (np.floor, None),
    "ceil": (np.ceil, None),
    "round": (_rounded, None),
    "trunc": (np.trunc, None),
    "rint": (np.rint, None),
}


class Evaluation:
    """One pass over the tree.

    Parameters
    ----------
    names : mapping
        Variables and scalar parameters: s, b, h, i, j broadcastable.
    arrays : mapping
        Array parameters.
    real : dtype
        float32 or float64, in which floats are computed.
    wrt : collection
        SCORE and numbers of sites to differentiate in.
    """

    def __init__(
        self,
        names: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        real: np.dtype,
        wrt: Collection[Hashable] = (),
    ) -> None:
        self.names, self.arrays, self.real, self.wrt = names, arrays, real, frozenset(wrt)
        self.one = real.type(1)
        # Site -> flat index of the element it read, -1 for one outside the array.
        self.elements: dict[Hashable, np.ndarray] = {}

    def of(self, node: Node) -> Dual:
        """Value and tangents of a node."""
        return self._METHODS[type(node)](self, node)

    # ---- leaves

    def _number(self, node: Number) -> Dual:
        return Dual(self._dtype(node.kind).type(node.value), {})

    def _name(self, node: Name) -> Dual:
        value = np.asarray(self.names[node.name]).astype(self._dtype(node.kind), copy=False)
        return Dual(value, {SCORE: self.one} if node.name == SCORE and SCORE in self.wrt else {})

    def _element(self, node: Element) -> Dual:
        array = self.arrays[node.name]
        inside, at, flat = np.True_, [], np.zeros((), np.int64)
        for child, extent in zip(node.indices, array.shape, strict=True):
            index = np.asarray(self.of(child).value).astype(np.int64)
            within = (index >= 0) & (index < extent)
            inside = inside & within
            at.append(np.where(within, index, 0))
            flat = flat * extent + at[-1]
        shape = np.broadcast_shapes(*(x.shape for x in at))
        nan = self.real.type(np.nan)
        found = array[tuple(at)].astype(self.real) if array.size else np.full(shape, nan)
        value = found if np.all(inside) else np.where(inside, found, nan)
        if node.site not in self.wrt:
            return Dual(value, {})
        self.elements[node.site] = np.where(inside, flat, -1)
        return Dual(value, {node.site: self.one})

    # ---- operators

    def _unary(self, node: Unary) -> Dual:
        value, tangents = self.of(node.x)
        if node.sign == "!":
            return Dual((value == 0).astype(np.int32), {})
        if node.sign == "~":
            return Dual(np.invert(value), {})
        if node.sign == "+":
            return Dual(value, tangents)
        return Dual(np.negative(value), {v: -t for v, t in tangents.items()})

    def _binary(self, node: Binary) -> Dual:
        a, b = self.of(node.a), self.of(node.b)
        sign = node.sign
        if sign in ("&&", "||"):
            truth = np.logical_and if sign == "&&" else np.logical_or
            return Dual(truth(a.value != 0, b.value != 0).astype(np.int32), {})
        if sign in ("<<", ">>"):
            shift = np.left_shift if sign == "<<" else np.right_shift
            return Dual(shift(a.value, np.asarray(b.value).astype(a.value.dtype)), {})
        kind = node.kind if sign not in _COMPARISONS else promoted(node.a.kind, node.b.kind)
        a, b = self._as(a, kind), self._as(b, kind)
        if sign in _COMPARISONS:
            return Dual(_COMPARISONS[sign](a.value, b.value).astype(np.int32), {})
        if kind != FLOAT:
            return Dual(_INTEGER_OPERATORS[sign](a.value, b.value), {})
        if sign in "+-":
            value = a.value + b.value if sign == "+" else a.value - b.value
            factor = self.one if sign == "+" else -self.one
            return Dual(value, self._sum((self.one, a), (factor, b)))
        if sign == "*":
            return Dual(a.value * b.value, self._sum((b.value, a), (a.value, b)))
        value = a.value / b.value
        inverse = 1 / b.value if a.tangents or b.tangents else None
        return Dual(value, self._sum((inverse, a), (-value, self._scaled(inverse, b))))

    def _conditional(self, node: Conditional) -> Dual:
        where = self.of(node.condition).value != 0
        return self._chosen(
            where, self._as(self.of(node.a), node.kind), self._as(self.of(node.b), node.kind)
        )

    def _cast(self, node: Cast) -> Dual:
        return self._as(self.of(node.x), node.kind)

    # ---- functions

    def _call(self, node: Call) -> Dual:
        a, *rest = (self._as(self.of(x), node.kind) for x in node.arguments)
        name = node.function
        if name in _FUNCTIONS or (name == "abs" and node.kind == FLOAT):
            value_of, slope_of = _FUNCTIONS["fabs" if name == "abs" else name]
            value = value_of(a.value)
            if slope_of is None or not a.tangents:
                return Dual(value, {})
            return Dual(value, self._sum((slope_of(a.value, value), a)))
        if name == "abs":
            return Dual(a.value if node.kind == UNSIGNED else np.abs(a.value), {})
        if name == "pow":
            return self._power(a, rest[0])
        first = a.value <= rest[0].value if name.endswith("min") else a.value >= rest[0].value
        # A NaN gives way to the other argument, as CUDA's min and max have it.
        return self._chosen(first | (rest[0].value != rest[0].value), a, rest[0])

    def _power(self, x: Dual, y: Dual) -> Dual:
        value, terms = np.power(x.value, y.value), []
        if x.tangents:
            slope = np.where(y.value == 0, y.value, y.value * np.power(x.value, y.value - 1))
            terms.append((slope, x))
        if y.tangents:
            terms.append((np.where(x.value == 0, x.value, value * np.log(x.value)), y))
        return Dual(value, self._sum(*terms))

    # ---- dual arithmetic

    def _dtype(self, kind: str) -> np.dtype:
        return self.real if kind == FLOAT else np.dtype(_INTEGERS[kind])

    def _as(self, x: Dual, kind: str) -> Dual:
        """Converted to another kind, as C does; integers have no tangents."""
        value, dtype = np.asarray(x.value), self._dtype(kind)
        if value.dtype == dtype:
            return x
        if kind == FLOAT or value.dtype.kind != "f":
            return Dual(value.astype(dtype), x.tangents)
        # Towards zero; the device's conversion stops at the ends of the range, and makes 0 of NaN.
        ends = np.iinfo(dtype)
        whole = np.clip(np.trunc(value.astype(np.float64)), ends.min, ends.max)
        return Dual(np.nan_to_num(whole, nan=0).astype(dtype), {})

    def _times(self, factor: Any, tangent: Any) -> Any:
        if tangent is self.one:
            return factor
        return np.where(tangent == 0, tangent, factor * tangent)

    def _scaled(self, factor: Any, x: Dual) -> Dual:
        return Dual(x.value, {v: self._times(factor, t) for v, t in x.tangents.items()})

    def _sum(self, *terms: tuple[Any, Dual]) -> dict[Hashable, Any]:
        """Tangents of a sum of factor * x, factors held fixed."""
        total: dict[Hashable, Any] = {}
        for factor, x in terms:
            for variable, tangent in x.tangents.items():
                part = self._times(factor, tangent)
                total[variable] = total[variable] + part if variable in total else part
        return total

    def _chosen(self, where: Any, a: Dual, b: Dual) -> Dual:
        zero = self.real.type(0)
        tangents = {
            v: np.where(where, a.tangents.get(v, zero), b.tangents.get(v, zero))
            for v in {**a.tangents, **b.tangents}
        }
        return Dual(np.where(where, a.value, b.value), tangents)

    _METHODS: Mapping[type, Callable[..., Dual]] = {
        Number: _number,
        Name: _name,
        Element: _element,
        Unary: _unary,
        Binary: _binary,
        Conditional: _conditional,
        Cast: _cast,
        Call: _call,
    }


def _quotient(a: Any, b: Any) -> Any:
    """C's division of integers, towards zero."""
    return np.floor_divide(a - np.fmod(a, b), b)


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_INTEGER_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": _quotient,
    "%": np.fmod,
    "&": np.bitwise_and,
    "|": np.bitwise_or,
    "^": np.bitwise_xor,
}


def scatter_add(
    gradient: np.ndarray, elements: np.ndarray, tangent: Any, weights: np.ndarray
) -> None:
    """gradient[element] += weight * tangent, for every pair.

    Parameters
    ----------
    gradient : ndarray of float64
        C-contiguous; changed in place.
    elements : ndarray of int
        Flat indices, broadcastable to `weights`; -1 for none.
    tangent : array_like
        Derivatives, broadcastable to `weights`.
    weights : ndarray
        A weight of 0 adds nothing, whatever its derivative is.
    """
    wide = weights.astype(np.float64)
    terms = np.where(wide == 0, 0.0, wide * tangent)
    elements = elements.reshape((1,) * (terms.ndim - elements.ndim) + elements.shape)
    # Pairs that share an element because it does not depend on an axis are summed first.
    shared = tuple(a for a, n in enumerate(elements.shape) if n == 1)
    terms = terms.sum(axis=shared, keepdims=True)
    valid = elements >= 0
    at, terms = elements[valid], terms[valid]
    if at.size == 0:
        return
    flat, first = gradient.reshape(-1), int(at.min())
    span = int(at.max()) + 1 - first
    if span > _SPARSE * at.size:
        np.add.at(flat, at, terms)
    else:
        flat[first : first + span] += np.bincount(at - first, terms, span)
