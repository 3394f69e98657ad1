"""`ScoreMod`: a function of the score that a user writes as a C expression, with its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from cuflash import _expression_numpy, _scoremod_checks
from cuflash._errors import shown_dtype
from cuflash._expression import Parsed

# scatter(weights, gradient)
Scatter = Callable[[np.ndarray, np.ndarray], None]


class ScoreMod:
    """A score function for `attention`: a C expression of the score, its place, and parameters.

    The logit of query row i and key j becomes the value of the expression, before bias, ALiBi and
    masks. Its derivatives in s and in the parameter arrays are made automatically.

    Parameters
    ----------
    code : str
        One expression of CUDA C in `s` (the scaled, soft-capped score, a float), the ints `b, h, i, j`
        (flat batch index or sequence, query head, query row, key, all from 0, rows and keys within the
        sequence) and the names in `params`. Operators of C, `c ? x : y`, `(int)x`, `(float)x`; the
        functions abs, ceil, cos, exp, exp2, expm1, fabs, floor, fmax, fmin, log, log10, log1p, log2,
        max, min, pow, rint, round, rsqrt, sigmoid, sin, sqrt, tanh, trunc (also as expf, ...);
        INFINITY, M_PI, true, false.
    params : mapping of str to array or number, optional
        Arrays of up to 4 axes, indexed as in C (`table[h][i - j + n]`; without axes: the name alone), in
        the dtype of q or float32 (float64 with float64), NumPy or CuPy as q is; at most 8. Numbers: an
        int is a C int, a float a C float; at most 8. Arrays are kept, not copied.
    fn : callable, optional
        `fn(s, b, h, i, j, **params)`, the same function for NumPy arrays, which the CPU backend then
        calls for the values. The integers are arrays that broadcast against s. Derivatives come from
        `code`.

    Attributes
    ----------
    code, params, fn
        As given; `params` is read-only.
    arrays, scalars : mapping
        The params that are arrays and those that are numbers, each in the order of their names.
    key : tuple
        All that kernels depend on: code, names, ranks, kinds of numbers. Neither values nor lengths.

    Raises
    ------
    TypeError
        Types of the arguments; a float where C wants an int.
    ValueError
        Not an expression, an unknown name, a param that is not used or whose name is taken, a wrong
        number of indices, more arrays or numbers than kernels take.

    Notes
    -----
    * Floats are float32 on a GPU and for 16-bit and float32 inputs, float64 for float64 inputs, literals
      included: `0.1` and `0.1f` mean the same. Ints have 32 bits.
    * An index outside an array gives NaN, never a fault, and adds nothing to gradients.
    * `min`, `max`, `fmin`, `fmax` ignore a NaN, as in CUDA. Where both arguments are equal the derivative
      is that of the first one; `abs` has derivative 0 at 0, the rounding functions have 0 everywhere.
    * What integers do on division by 0 or beyond 32 bits is as undefined as in C.
    * Derivatives: dual numbers (W. K. Clifford, 1873); Griewank & Walther, "Evaluating Derivatives",
      2nd edition, 2008, chapter 3. A parameter's gradient is exactly reproducible.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 8))
    >>> decay = np.array([0.5, 0.25])
    >>> mod = cuflash.ScoreMod("s - decay[h] * abs(i - j)", {"decay": decay})
    >>> mod
    ScoreMod('s - decay[h] * abs(i - j)', decay=(2,) float64)
    >>> cuflash.attention(q, k, v, score_mod=mod).shape
    (2, 5, 8)
    """

    __slots__ = (
        "__weakref__",
        "_numbers",
        "arrays",
        "code",
        "fn",
        "key",
        "params",
        "parsed",
        "scalars",
    )

    code: str
    params: Mapping[str, Any]
    fn: Callable[..., Any] | None
    arrays: Mapping[str, Any]
    scalars: Mapping[str, int | float]
    parsed: Parsed
    key: tuple[str, tuple[tuple[str, str, int | None], ...]]

    def __init__(
        self,
        code: str,
        params: Mapping[str, Any] | None = None,
        *,
        fn: Callable[..., Any] | None = None,
    ) -> None:
        given, symbols, parsed = _scoremod_checks.checked(code, params, fn)
        names = sorted(symbols)
        for name, value in (
            ("code", code),
            ("params", MappingProxyType(given)),
            ("fn", fn),
            ("arrays", {n: given[n] for n in names if symbols[n].rank is not None}),
            ("scalars", {n: given[n] for n in names if symbols[n].rank is None}),
            ("parsed", parsed),
            ("key", (code, tuple((n, *symbols[n]) for n in names))),
        ):
            frozen = MappingProxyType(value) if isinstance(value, dict) else value
            object.__setattr__(self, name, frozen)

    def __setattr__(self, name: str, value: Any = None) -> NoReturn:
        raise AttributeError(f"a ScoreMod cannot be changed ({name}): make another one")

    __delattr__ = __setattr__

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.code, dict(self.params), self.fn)

    def __repr__(self) -> str:
        parts = [repr(self.code)]
        for name, value in self.params.items():
            is_array = name in self.arrays
            shown = f"{tuple(value.shape)} {shown_dtype(value.dtype)}" if is_array else repr(value)
            parts.append(f"{name}={shown}")
        if self.fn is not None:
            parts.append(f"fn={getattr(self.fn, '__qualname__', self.fn)}")
        return f"ScoreMod({', '.join(parts)})"

    def evaluate(
        self,
        s: np.ndarray,
        b: Any,
        h: Any,
        i: Any,
        j: Any,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """The modified scores.

        Parameters
        ----------
        s : ndarray
            Scores, float32 or float64, which is the precision of the computation.
        b, h, i, j : array_like of int
            Where they are; broadcastable to s.
        arrays : mapping, optional
            NumPy arrays in place of those of `params`.

        Returns
        -------
        ndarray
            Of the shape and dtype of s; new memory.
        """
        arrays = self.arrays if arrays is None else arrays
        if self.fn is not None:
            return self._by_fn(s, (b, h, i, j), arrays)
        with np.errstate(all="ignore"):
            names = {"s": s, "b": b, "h": h, "i": i, "j": j, **self.scalars}
            value, _ = _expression_numpy.Evaluation(names, arrays, s.dtype).of(self.parsed.tree)
            return _full(value, s)

    def derivatives(
        self,
        s: np.ndarray,
        b: Any,
        h: Any,
        i: Any,
        j: Any,
        arrays: Mapping[str, np.ndarray] | None = None,
        wrt: Collection[str] = (),
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Scatter]]:
        """The modified scores, their derivative in s, and how array params get their gradients.

        Parameters
        ----------
        s, b, h, i, j, arrays
            As in `evaluate`.
        wrt : collection of str
            Names of array params.

        Returns
        -------
        values, slope : ndarray
            Of the shape and dtype of s; `slope` may be read-only.
        scatter : dict of callables
            By name: `scatter[name](weights, gradient)` adds weight * derivative, for each pair, to the
            element that the pair read; `weights` of the shape of s, `gradient` float64, C-contiguous,
            of the param's shape. A weight of 0 adds nothing.
        """
        arrays = self.arrays if arrays is None else arrays
        sites = [n for n, name in enumerate(self.parsed.sites) if name in wrt]
        names = {"s": s, "b": b, "h": h, "i": i, "j": j, **self.scalars}
        with np.errstate(all="ignore"):
            run = _expression_numpy.Evaluation(
                names, arrays, s.dtype, [_expression_numpy.SCORE, *sites]
            )
            value, tangents = run.of(self.parsed.tree)
            slope = tangents.get(_expression_numpy.SCORE, s.dtype.type(0))
            values = _full(value, s) if self.fn is None else self._by_fn(s, (b, h, i, j), arrays)

        def scatter_of(name: str) -> Scatter:
            def scatter(weights: np.ndarray, gradient: np.ndarray) -> None:
                with np.errstate(all="ignore"):
                    for site in sites:
                        if self.parsed.sites[site] == name and site in tangents:
                            elements = run.elements[site]
                            _expression_numpy.scatter_add(
                                gradient, elements, tangents[site], weights
                            )

            return scatter

        slope = np.broadcast_to(np.asarray(slope, s.dtype), s.shape)
        return values, slope, {name: scatter_of(name) for name in wrt}

    def _by_fn(
        self, s: np.ndarray, place: tuple[Any, ...], arrays: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        assert self.fn is not None
        wide = {name: arrays[name].astype(s.dtype, copy=False) for name in self.arrays}
        found = np.asarray(self.fn(s, *place, **wide, **self.scalars))
        try:
            return _full(found, s)
        except ValueError:
            raise _scoremod_checks.seen_params(self.params).error(
                ValueError,
                f"fn returned shape {found.shape}, and s has shape {s.shape}.",
                "combine b, h, i, j with s by broadcasting only.",
            ) from None


def _remake(code: str, params: dict[str, Any], fn: Callable[..., Any] | None) -> ScoreMod:
    return ScoreMod(code, params, fn=fn)


def _full(value: Any, s: np.ndarray) -> np.ndarray:
    """`value` as a new array of the shape and dtype of `s`."""
    found = np.asarray(value)
    if found.shape == s.shape and found.dtype == s.dtype and not np.may_share_memory(found, s):
        return found if found.flags.owndata and found.flags.writeable else found.copy()
    full = np.empty_like(s)
    full[...] = np.broadcast_to(found, s.shape)
    return full
