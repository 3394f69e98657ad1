"""Score expressions with their derivatives worked out by hand: what `ScoreMod` must find by itself.

`LIBRARY["relative"].of(case extents)` is a `Twin`: the expression as a user writes it, its
parameters, and the analytic value and derivatives that the oracle uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# (name of the parameter, where its elements are, derivative of the value in them)
Partial = tuple[str, tuple[Any, ...], Any]


@dataclass(frozen=True)
class Twin:
    """A score expression and its calculus.

    Parameters
    ----------
    code
        The expression in CUDA C.
    params
        Arrays and numbers by name.
    value
        `value(s, b, h, i, j, p)` with the parameters as attributes of `p`.
    slope
        Its derivative in s.
    partials
        `partials(s, b, h, i, j, p)`: one entry per place where an array parameter stands.
    """

    code: str
    params: dict[str, Any]
    value_of: Callable[..., Any]
    slope_of: Callable[..., Any]
    partials_of: Callable[..., list[Partial]]

    def value(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        """The modified score."""
        return self.value_of(s, b, h, i, j, _Names(self.params))

    def derivatives(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> tuple[Any, list[Partial]]:
        """Derivative in s, and in the array parameters at every place where one stands."""
        names = _Names(self.params)
        return self.slope_of(s, b, h, i, j, names), self.partials_of(s, b, h, i, j, names)

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters that have gradients."""
        return {name: x for name, x in self.params.items() if isinstance(x, np.ndarray)}

    def having(self, **params: Any) -> Twin:
        """The same expression with some parameters replaced."""
        return replace(self, params={**self.params, **params})

    def in_dtype(self, dtype: Any) -> Twin:
        """The same with arrays of another dtype."""
        return self.having(**{name: x.astype(dtype) for name, x in self.arrays().items()})

    def fn(self, s: Any, b: Any, h: Any, i: Any, j: Any, **params: Any) -> Any:
        """The meaning for NumPy arrays, as a user would write it."""
        return self.value_of(s, b, h, i, j, _Names(params))


class _Names:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


@dataclass(frozen=True)
class Expression:
    """An entry of the library.

    `arrays` names the axes of its array parameters by b, h, i, j and r (differences i - j); the
    number "len_k" stands for itself.
    """

    code: str
    value: Callable[..., Any]
    slope: Callable[..., Any]
    partials: Callable[..., list[Partial]] = lambda *_: []
    arrays: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def of(
        self, batch: int, heads: int, len_q: int, len_k: int, *, dtype: Any = np.float32, seed: int
    ) -> Twin:
        """With random parameters between 0.1 and 0.6 for these extents."""
        rng = np.random.default_rng([seed, len(self.code)])
        extents = {"b": batch, "h": heads, "i": len_q, "j": len_k, "r": len_q + len_k}
        params = {
            name: (0.1 + 0.5 * rng.random([extents[a] for a in axes])).astype(dtype)
            for name, axes in self.arrays.items()
        }
        numbers = {n: len_k if x == "len_k" else x for n, x in self.numbers.items()}
        return Twin(self.code, {**params, **numbers}, self.value, self.slope, self.partials)


def _ones(s: Any, *_: Any) -> Any:
    return np.ones_like(s)


LIBRARY: dict[str, Expression] = {
    # No parameter at all, and every integer.
    "plain": Expression(
        "s * 0.5f + (i - j) * 0.01f + h * 0.25f - b * 0.125f",
        lambda s, b, h, i, j, p: s * 0.5 + (i - j) * 0.01 + h * 0.25 - b * 0.125,
        lambda s, b, h, i, j, p: 0.5 * np.ones_like(s),
    ),
    # ALiBi as a user would write it.
    "relative": Expression(
        "s - decay[h] * abs(i - j)",
        lambda s, b, h, i, j, p: s - p.decay[h] * abs(i - j),
        _ones,
        lambda s, b, h, i, j, p: [("decay", (h,), -abs(i - j) + 0 * s)],
        arrays={"decay": "h"},
    ),
    # A table over two axes, and a function of s with a number of its own.
    "table": Expression(
        "cap * tanhf(s / cap) + table[h][i - j + len_k]",
        lambda s, b, h, i, j, p: p.cap * np.tanh(s / p.cap) + p.table[h, i - j + p.len_k],
        lambda s, b, h, i, j, p: 1 - np.tanh(s / p.cap) ** 2,
        lambda s, b, h, i, j, p: [("table", (h, i - j + p.len_k), np.ones_like(s))],
        arrays={"table": "hr"},
        numbers={"cap": 3.0, "len_k": "len_k"},
    ),
    # Two arrays that multiply each other and s.
    "gates": Expression(
        "s * row[i] * key[j] + key[j]",
        lambda s, b, h, i, j, p: s * p.row[i] * p.key[j] + p.key[j],
        lambda s, b, h, i, j, p: p.row[i] * p.key[j] + 0 * s,
        lambda s, b, h, i, j, p: [
            ("row", (i,), s * p.key[j]),
            ("key", (j,), s * p.row[i] + 1),
        ],
        arrays={"row": "i", "key": "j"},
    ),
    # A branch, and one array in two places.
    "branch": Expression(
        "(i + j) % 3 == 0 ? s * gain[b] : s + gain[0] * gain[b]",
        lambda s, b, h, i, j, p: np.where(
            (i + j) % 3 == 0, s * p.gain[b], s + p.gain[0] * p.gain[b]
        ),
        lambda s, b, h, i, j, p: np.where((i + j) % 3 == 0, p.gain[b], 1.0),
        lambda s, b, h, i, j, p: [
            ("gain", (b,), np.where((i + j) % 3 == 0, s, p.gain[0])),
            ("gain", (0,), np.where((i + j) % 3 == 0, 0 * s, p.gain[b])),
        ],
        arrays={"gain": "b"},
    ),
    # Curved in s.
    "curved": Expression(
        "s - bend[h] * s * s / (1 + s * s)",
        lambda s, b, h, i, j, p: s - p.bend[h] * s * s / (1 + s * s),
        lambda s, b, h, i, j, p: 1 - p.bend[h] * 2 * s / (1 + s * s) ** 2,
        lambda s, b, h, i, j, p: [("bend", (h,), -s * s / (1 + s * s))],
        arrays={"bend": "h"},
    ),
}
