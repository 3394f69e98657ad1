"""Biases on the NumPy backend: every shape and dtype, gradients in their own shape, infinities."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import _cpu, _cpu_sums
from tests.cpu_calls import (
    BATCH,
    HEADS,
    LEN_K,
    LEN_Q,
    PAIRS,
    SHAPES,
    TINY,
    arrays,
    check,
    cotangents,
    options_of,
    run,
    shrink_tiles,
)
from tests.dense import Dense


@pytest.fixture(params=TINY, ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, *request.param)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("part_elements", [0, 1 << 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_of_every_shape(
    shape: tuple[int, ...], part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", part_elements)
    rng = np.random.default_rng(0)
    dense = Dense(**arrays(rng), bias=np.asarray(rng.standard_normal(shape)), right=16)
    grads = check(dense, options_of(dense))
    assert (grads["bias"] != 0).any()


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bias_dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("shape", [PAIRS, (HEADS, LEN_Q, LEN_K), (BATCH, 1, 1, LEN_K)], ids=str)
def test_bias_dtypes(shape: tuple[int, ...], dtype: Any, bias_dtype: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = {n: x.astype(dtype) for n, x in arrays(rng).items()}
    dense = Dense(**inputs, bias=rng.standard_normal(shape).astype(bias_dtype))
    out, lse, grads = run(dense, options_of(dense))
    want = dense.backward(*(x.astype(dtype).astype(np.float64) for x in cotangents(dense)))["bias"]
    assert (grads["bias"].shape, grads["bias"].dtype) == (shape, np.dtype(bias_dtype))
    # delta is taken from the rounded output: an error of its eps times what cancels in a row.
    eps = 4 * max(float(ml_dtypes.finfo(d).eps) for d in (dtype, bias_dtype))
    np.testing.assert_allclose(
        grads["bias"].astype(np.float64), want, rtol=eps, atol=eps * abs(want).max()
    )
    want_out, want_lse = dense.forward()
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.astype(np.float64), want_out, rtol=eps, atol=eps)


def test_bias_broadcast_by_the_user_keeps_its_shape() -> None:
    """A view of stride 0 has as many gradients as it has elements."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, HEADS, 1, LEN_K))
    dense = Dense(**arrays(rng), bias=np.broadcast_to(row, PAIRS))
    assert check(dense, options_of(dense))["bias"].shape == PAIRS
    strange = rng.standard_normal((LEN_K, LEN_Q, HEADS)).transpose(2, 1, 0)[:, ::-1, ::-1]
    dense = dense.having(bias=strange)
    check(dense, options_of(dense))


@pytest.mark.usefixtures("tiny_tiles")
def test_bias_of_minus_infinity() -> None:
    """A prefix over several tiles, single entries, one whole row; no gradient there, and no NaN."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(PAIRS)
    bias[..., :30] = -np.inf
    bias[1] = np.where(rng.random(PAIRS[1:]) < 0.5, -np.inf, rng.standard_normal(PAIRS[1:]))
    bias[1, 2, 7] = -np.inf
    for sinks in (None, rng.standard_normal(HEADS)):
        dense = Dense(**arrays(rng), bias=bias, sinks=sinks)
        grads = check(dense, options_of(dense))
        assert (grads["bias"][np.isneginf(bias)] == 0).all()
        assert all(np.isfinite(grad).all() for grad in grads.values())
        out, lse = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense))
        assert (out[1, 2, 7] == 0).all()
        assert (lse[1, 2, 7] == (-np.inf if sinks is None else sinks[2])).all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_bias_of_infinity_is_seen_in_its_row_only(value: float) -> None:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(PAIRS)
    bias[1, 2, 7, 20] = value
    dense = Dense(**arrays(rng), bias=bias)
    out, lse, grads = run(dense, options_of(dense))
    row = np.zeros(PAIRS[:3], bool)
    row[1, 2, 7] = True
    for x in (out, grads["q"], grads["bias"]):
        np.testing.assert_array_equal(np.isnan(x).all(axis=-1), row)
        assert np.isfinite(x[~row]).all()
    np.testing.assert_array_equal(np.isnan(lse), row)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("key", [0, 1, 63, 64, 127])
def test_one_finite_key(key: int) -> None:
    rng = np.random.default_rng(0)
    bias = np.full((1, 128), -np.inf)
    bias[0, key] = 0.5
    dense = Dense(**arrays(rng, len_k=128), bias=bias)
    check(dense, options_of(dense))
    out, _ = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense))
    want = np.repeat(dense.v[:, :, key], 2, axis=1)[:, :, None]
    np.testing.assert_array_equal(out, np.broadcast_to(want, out.shape))
