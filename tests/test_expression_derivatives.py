"""Derivatives of score expressions for NumPy arrays, against finite differences and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuflash._expression import tokenize
from cuflash._scoremod import ScoreMod

T = {"t": np.array([[0.3, -0.7], [1.9, 0.4]]), "u": np.array(0.6), "n": 1, "c": 2.5}
SMOOTH = [
    "s * s * s - 2 / s + c",
    "exp(s) + expf(-s) * exp2(s / 3) + expm1(2 * s)",
    "log(s) - log2(s + 1) * log10(s + 2) + log1p(s)",
    "sqrt(s) * rsqrt(s + 1) - tanh(s) + sigmoid(2 * s)",
    "sin(3 * s) / (2 + cos(s))",
    "pow(s, 3) + pow(2, s) + pow(s, s)",
    "abs(s - 1) + fabs(-s) + min(s, 1) + max(s, 0.5f) * fmin(s, 2) - fmax(1, s)",
    "s > 1 ? s * s : s < 0.5f ? -s : 3 * s",
    "s * t[h][j] + t[h][j] * t[h][j] / (1 + t[0][1] * s)",
    "u * s + u * u",
    "pow(abs(t[h][j]), s) * exp(t[h][n])",
    "(float)(s * u) + float(t[h][0]) * i",
    "s * (int)(t[1][0]) + b",
    "floor(s) * s + round(t[1][0]) * s + !s",
    "+s - -s",
]


@pytest.mark.parametrize("code", SMOOTH)
def test_derivatives_are_slopes(code: str) -> None:
    """In s and in every array, summed over pairs with random weights."""
    rng = np.random.default_rng(len(code))
    used = {token.text for token in tokenize(code)}
    params = {name: x for name, x in T.items() if name in used}
    arrays = {name: x for name, x in params.items() if isinstance(x, np.ndarray)}
    b, h, i, j = (np.arange(n).reshape(shape) for n, shape in EXTENTS)
    s, weights = (rng.uniform(0.2, 2.4, (3, 2, 4, 2)) for _ in "sw")
    mod = ScoreMod(code, params)
    values, slope, scatter = mod.derivatives(s, b, h, i, j, arrays, wrt=tuple(arrays))
    assert np.array_equal(values, mod.evaluate(s, b, h, i, j))

    def moved(ds: float, **changed: np.ndarray) -> np.ndarray:
        return mod.evaluate(s + ds, b, h, i, j, arrays | changed)

    step = 1e-6
    numeric = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=1e-7, atol=1e-7)
    for name, x in arrays.items():
        gradient = np.full(x.shape, 0.5)
        scatter[name](weights, gradient)
        for at in np.ndindex(x.shape):
            way = np.zeros(x.shape)
            way[at] = step
            difference = (moved(0, **{name: x + way}) - moved(0, **{name: x - way})) / (2 * step)
            want = 0.5 + (weights * difference).sum()
            assert gradient[at] == pytest.approx(want, rel=1e-6, abs=1e-7), (name, at)


EXTENTS = [(3, (-1, 1, 1, 1)), (2, (-1, 1, 1)), (4, (-1, 1)), (2, (-1,))]


def slope_of(code: str, s: float, **params: Any) -> float:
    mod = ScoreMod(code, params)
    _, slope, _ = mod.derivatives(np.full((1,), s), 1, 2, 7, 12)
    return float(slope[0])


def test_branches_that_are_not_taken_do_not_poison_derivatives() -> None:
    assert slope_of("s > 0 ? s * log(s) : 2 * s", 0.0) == 2
    assert slope_of("s > 0 ? pow(s, -0.5f) : 1 / (s - 1)", 0.0) == -1
    assert slope_of("s + sqrt(w[0])", 0.5, w=np.zeros(1)) == 1
    assert slope_of("sqrt(0 * s) + s", 3.0) == 1  # 0 * inf
    assert slope_of("max(s, -INFINITY) * 2", 1.5) == 2
    assert slope_of("abs(s)", 0.0) == 0


def test_a_site_whose_derivative_is_infinite_leaves_the_others_alone() -> None:
    w, s = np.array([0.0, 4.0]), np.ones((2, 3))
    mod = ScoreMod("sqrt(w[0]) + w[1] * s + w[j]", {"w": w})
    _, _, scatter = mod.derivatives(s, 0, 0, np.arange(2)[:, None], np.arange(3), wrt=("w",))
    gradient = np.zeros(2)
    scatter["w"](np.ones((2, 3)), gradient)
    assert gradient[0] == np.inf and gradient[1] == 6 + 2  # j = 2 is outside
    gradient[:] = 0
    scatter["w"](np.zeros((2, 3)), gradient)
    assert not gradient.any()  # weights of 0 times inf


def test_scattering_many_and_few_elements_is_the_same() -> None:
    """Dense and sparse ways of adding agree with a plain loop."""
    rng = np.random.default_rng(3)
    for length in (5, 5000):
        at = rng.integers(0, length, 60)
        table, picks = rng.standard_normal(length), at.astype(np.float64)
        mod = ScoreMod("s * table[(int)pick[j]]", {"table": table, "pick": picks})
        s, weights = rng.standard_normal((2, 60)), rng.standard_normal((2, 60))
        _, _, scatter = mod.derivatives(
            s, 0, 0, np.arange(2)[:, None], np.arange(60), wrt=("table",)
        )
        got, want = np.zeros(length), np.zeros(length)
        scatter["table"](weights, got)
        for i, j in np.ndindex(2, 60):
            want[at[j]] += weights[i, j] * s[i, j]
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_results_are_memory_of_their_own() -> None:
    s = np.ones((2, 3))
    for code in ("s", "+s", "1", "w[j]", "b"):
        params = {"w": np.ones(3)} if "w" in code else {}
        mod = ScoreMod(code, params)
        for result in (mod.evaluate(s, 0, 0, 0, np.arange(3)),):
            assert result.shape == s.shape and result.flags.writeable
            result[...] = 7
            assert s.max() == 1
