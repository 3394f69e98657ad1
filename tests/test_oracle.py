"""The yardsticks themselves: gradients by finite differences, edge cases by hand, and that rule T can say no."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import cases, oracle

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (2, 1), "q_offset": 1},
    {"scale": -0.7, "softcap": 1.5},
    {"alibi_slopes": np.array([0.3, 0.1, 0.2, 0.05]), "causal": True},
    {"alibi_slopes": np.array([[0.3, 0.1, 0.2, 0.05]]), "softcap": 2.0, "window": (3, None)},
    {"scale": 0.0},
]


def draw(rng: np.random.Generator, broadcast: bool = False) -> tuple[np.ndarray, ...]:
    """q, k, v, dout, dlse: two batches, four heads on two, five rows, six keys, D != Dv."""
    batch = 1 if broadcast else 2
    shapes = ((2, 4, 5, 3), (batch, 2, 6, 3), (batch, 2, 6, 2), (2, 4, 5, 2), (2, 4, 5))
    return tuple(rng.standard_normal(shape) for shape in shapes)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("broadcast", [False, True], ids=["own", "broadcast"])
def test_gradients_are_slopes(options: dict[str, Any], broadcast: bool) -> None:
    """Every gradient against central differences of `sum(out * dout) + sum(lse * dlse)`."""
    rng = np.random.default_rng(0)
    q, k, v, dout, dlse = draw(rng, broadcast)
    arrays = {"q": q, "k": k, "v": v, **{n: x for n, x in options.items() if n == "alibi_slopes"}}
    rest = {n: x for n, x in options.items() if n != "alibi_slopes"}

    def loss(**moved: np.ndarray) -> float:
        given = {**arrays, **moved}
        out, lse = oracle.forward(**given, **rest)
        return float((out * dout).sum() + np.where(np.isfinite(lse), lse * dlse, 0).sum())

    grads = oracle.backward(dout, **arrays, dlse=dlse, **rest)
    for name, x in arrays.items():
        for _ in range(3):
            way, step = rng.standard_normal(x.shape), 1e-5
            slope = (loss(**{name: x + step * way}) - loss(**{name: x - step * way})) / (2 * step)
            assert slope == pytest.approx(float((grads[name] * way).sum()), rel=1e-6, abs=1e-8), (
                name
            )


def test_visible_draws_the_documented_masks() -> None:
    def drawn(*args: int, **options: Any) -> list[str]:
        return [
            "".join("01"[x] for x in row) for row in oracle.visible(*args, **options).astype(int)
        ]

    assert drawn(2, 5, causal=True) == ["11110", "11111"]
    assert drawn(5, 2, causal=True) == ["00", "00", "00", "10", "11"]
    assert drawn(2, 5, causal=True, q_offset=0) == ["10000", "11000"]
    assert drawn(3, 3, window=(0, 0)) == ["100", "010", "001"]
    assert drawn(4, 4, window=(1, 0)) == ["1000", "1100", "0110", "0011"]
    assert drawn(4, 4, window=(None, 1)) == ["1100", "1110", "1111", "1111"]
    assert drawn(2, 3, causal=True, q_offset=-(2**70)) == ["000", "000"]
    assert drawn(2, 3, window=(2**70, 2**70)) == ["111", "111"]


def test_lse_and_out_by_hand() -> None:
    q, k = np.zeros((1, 2, 3)), np.zeros((1, 4, 3))
    v = np.arange(4.0).reshape(1, 4, 1)
    out, lse = oracle.forward(q, k, v, causal=True, q_offset=-1)
    np.testing.assert_array_equal(out[0, :, 0], [0.0, 0.0])
    np.testing.assert_array_equal(lse[0], [-np.inf, 0.0])
    out, lse = oracle.forward(q, k, v)
    np.testing.assert_allclose(out[0, :, 0], [1.5, 1.5])
    np.testing.assert_allclose(lse[0], np.log([4.0, 4.0]))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_hidden_garbage_reaches_nothing(garbage: float) -> None:
    """Key 5 is seen by the last row only: NaN there must stay there."""
    q, k, v, dout, dlse = draw(np.random.default_rng(1))
    clean = oracle.exact(q, k, v, dout, dlse=dlse, causal=True)
    k[..., 5, :] = garbage
    v[..., 5, :] = garbage
    dirty = oracle.exact(q, k, v, dout, dlse=dlse, causal=True)
    for got, want in (
        (dirty.out, clean.out),
        (dirty.lse, clean.lse),
        (dirty.grads["q"], clean.grads["q"]),
    ):
        np.testing.assert_allclose(got[:, :, :4], want[:, :, :4], rtol=1e-12)
    assert not np.isfinite(dirty.out[:, :, 4]).any()

    q[...], k[...], v[...] = draw(np.random.default_rng(1))[:3]
    dout[:, :, 0], q[:, :, 0] = garbage, garbage
    first = oracle.exact(q, k, v, dout, dlse=dlse, causal=True, q_offset=0).grads
    assert np.isfinite(first["k"][:, :, 1:]).all()
    assert np.isfinite(first["v"][:, :, 1:]).all()
    assert not np.isfinite(first["v"][:, :, 0]).any()


def test_row_without_keys_and_key_without_rows() -> None:
    q, k, v, dout, dlse = draw(np.random.default_rng(2))
    dout[:, :, 0], q[:, :, 0] = np.nan, np.inf  # row 0 sees nothing
    k[:, :, 4:], v[:, :, 4:] = np.nan, np.inf  # keys 4, 5 are seen by nobody
    result = oracle.exact(q, k, v, dout, dlse=dlse, causal=True, q_offset=-1)
    assert (result.out[:, :, 0] == 0).all()
    assert np.isneginf(result.lse[:, :, 0]).all()
    assert (result.grads["q"][:, :, 0] == 0).all()
    for name in ("k", "v"):
        assert np.isfinite(result.grads[name]).all()
        assert (result.grads[name][:, :, 4:] == 0).all()


@pytest.mark.parametrize("case", cases.ZERO, ids=str)
def test_nothing_gives_nothing(case: cases.Case) -> None:
    want = cases.answer(case)
    assert (want.exact.out == 0).all()
    assert np.isneginf(want.exact.lse).all() or case.len_k
    for name, grad in want.exact.grads.items():
        assert grad.shape == getattr(want.data, name).shape
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_low_precision_is_near_and_rounded(dtype: str) -> None:
    """The honest computation is right to a few roundings of its dtype, and its results are numbers of that dtype."""
    case = cases.Case(
        dtype=dtype, heads=4, heads_kv=2, len_q=40, len_k=50, softcap=8.0, alibi="H", causal=True
    )
    want = cases.answer(case)
    step = oracle.eps(case.numpy_dtype)
    for name in ("out", "q", "k", "v"):
        honest, truth = (
            want.honest[name],
            want.exact.out if name == "out" else want.exact.grads[name],
        )
        np.testing.assert_array_equal(honest, honest.astype(case.numpy_dtype).astype(honest.dtype))
        error = np.abs(honest - truth).max()
        assert error < 20 * step * want.exact.gross[name].max(), name
        # In float64 it is the oracle's own formula, and may be equal.
        assert dtype == "float64" or error > 0.02 * step * np.abs(truth).max(), name


def rule(got: np.ndarray, gold: np.ndarray, lp: np.ndarray, dtype: Any = np.float16) -> None:
    oracle.check(got.astype(dtype), gold, lp, oracle.FORWARD, dtype, case="planted")


def test_rule_t_accepts_honest_and_refuses_wrong() -> None:
    rng = np.random.default_rng(3)
    gold = rng.standard_normal((2, 3, 256, 16))
    lp = gold + 2e-3 * rng.standard_normal(gold.shape)
    good = gold + 2e-3 * rng.standard_normal(gold.shape)
    rule(good, gold, lp)
    for where in ((1, 2, 200, 3), (0, 0, 0, 0)):
        bad = good.copy()
        bad[where] += 0.05
        with pytest.raises(AssertionError, match="exceeds") as failure:
            rule(bad, gold, lp)
        assert str(where) in str(failure.value)
        assert "planted" in str(failure.value)
    with pytest.raises(AssertionError, match="mean error"):
        rule(gold + 6e-3 * np.sign(gold), gold, lp)
    with pytest.raises(AssertionError, match="shape"):
        rule(good[:1], gold, lp)
    with pytest.raises(AssertionError, match="dtype"):
        oracle.check(good.astype(np.float32), gold, lp, oracle.FORWARD, np.float16)


def test_rule_t_judges_small_slices_by_their_own_error() -> None:
    """A head whose values and honest error are large does not excuse one whose are small."""
    rng = np.random.default_rng(4)
    gold = rng.standard_normal((1, 2, 256, 16))
    noise = 1e-2 * rng.standard_normal(gold.shape)
    noise[:, 0] *= 100
    noise[:, 1, :128] *= 1e-3
    bad = gold.copy()
    bad[0, 1, 5, 5] += 1.5  # as large as what head 0 may be off, but this is head 1
    with pytest.raises(AssertionError, match="exceeds"):
        rule(bad, gold, gold + noise)


def test_rule_t_asks_for_finiteness_first() -> None:
    gold = np.ones((1, 4, 2))
    for spoilt, value in ((gold.copy(), np.nan), (gold.copy(), np.inf)):
        spoilt[0, 1, 1] = value
        with pytest.raises(AssertionError, match="finite"):
            rule(spoilt, gold, gold)
        with pytest.raises(AssertionError, match="finite"):
            rule(gold, spoilt, gold)
        rule(spoilt, spoilt, gold)


def test_lse_rule() -> None:
    gold = np.array([[0.0, -np.inf, 1e4, np.nan]])

    def off(at: int, value: float) -> np.ndarray:
        x = gold.astype(np.float32)
        x[0, at] = value
        return x

    oracle.check_lse(gold.astype(np.float32), gold, np.float16)
    oracle.check_lse(off(2, 1e4 + 0.09), gold, ml_dtypes.bfloat16)
    for bad in (
        off(0, 2e-5),
        off(1, -1e30),
        off(2, 1e4 + 0.2),
        off(3, 0.0),
        off(0, np.nan),
        off(0, -np.inf),
    ):
        with pytest.raises(AssertionError, match="lse"):
            oracle.check_lse(bad, gold, np.float16)
    with pytest.raises(AssertionError, match="dtype"):
        oracle.check_lse(gold, gold, np.float16)


def test_covering_covers_every_pair() -> None:
    factors = {"a": [1, 2, 3], "b": "xy", "c": [None, True], "d": range(4)}
    rows = cases.pairwise(factors)
    for first, second in ((f, s) for f in factors for s in factors if f != s):
        seen = {(row[first], row[second]) for row in rows}
        assert len(seen) == len(factors[first]) * len(factors[second])
    assert len(rows) <= 18  # 12 is the least possible
    assert rows == cases.pairwise(factors)


def test_cases_are_data() -> None:
    case = cases.Case(
        dtype="bfloat16", heads=6, heads_kv=2, window=(3, None), alibi="BH", batch=(2, 1)
    )
    assert str(case) == "bfloat16-b2x1-h6/2-l128x128-d64-window3_None-alibiBH"
    first, second = case.data(), cases.Case(**vars(case)).data()
    assert first.q.dtype == ml_dtypes.bfloat16
    assert first.k.shape == (2, 1, 2, 128, 64)
    assert first.alibi_slopes is not None
    assert first.alibi_slopes.shape == (2, 1, 6)
    assert first.dout.tobytes() == second.dout.tobytes()
    for suite in cases.SUITES.values():
        assert len({str(c) for c in suite}) == len(suite)
    covering = cases.covering()
    assert len({str(c) for c in covering}) == len(covering)
