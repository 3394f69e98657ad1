"""Sinks and dropout on the NumPy backend: what takes part in the softmax beside the keys."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash import _cpu
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.cpu_calls import (
    BATCH,
    HEADS,
    HEADS_KV,
    LEN_K,
    LEN_Q,
    PAIRS,
    SEED,
    TINY,
    P,
    arrays,
    call_of,
    cotangents,
    options_of,
    run,
    shrink_tiles,
    with_sinks,
)
from tests.dense import Dense


@pytest.fixture(params=TINY, ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, *request.param)


def test_sink_of_minus_infinity_is_none() -> None:
    for names in (("causal",), ("mask",), ("dropout",)):
        dense, options = call_of(names)
        without = run(dense, options)
        with_none = run(*with_sinks(dense, options, np.full(HEADS, -np.inf)))
        assert (with_none[2].pop("sinks") == 0).all()
        pairs = zip(
            (*without[:2], *without[2].values()),
            (*with_none[:2], *with_none[2].values()),
            strict=True,
        )
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("len_k", [0, LEN_K])
def test_rows_with_nothing_but_a_sink(len_k: int) -> None:
    """lse is the sink's logit exactly, and its gradient passes through."""
    rng = np.random.default_rng(0)
    sinks = np.array([0.3, -50.0, 700.0, -np.inf])
    mask = np.zeros((LEN_Q, len_k), bool)
    dense = Dense(**arrays(rng, len_k=len_k), sinks=sinks, mask=mask)
    out, lse, grads = run(dense, options_of(dense))
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[:, None], lse.shape))
    _, dlse = cotangents(dense)
    want = np.where(np.isneginf(sinks), 0, dlse.sum(axis=(0, 2)))
    np.testing.assert_allclose(grads["sinks"], want, rtol=1e-12)
    assert all((grads[name] == 0).all() for name in ("q", "k", "v"))


@pytest.mark.parametrize("sink", [1e4, -1e4, 80.0])
def test_huge_sinks(sink: float) -> None:
    dense, options = call_of(("mask",))
    inputs = {n: getattr(dense, n).astype(np.float32) for n in ("q", "k", "v")}
    dense, options = with_sinks(dense.having(**inputs), options, np.full(HEADS, sink, np.float32))
    out, lse, grads = run(dense, options)
    want, want_lse = dense.forward()
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    assert all(np.isfinite(grad).all() for grad in grads.values())


def test_no_dropout_bitwise() -> None:
    dense, options = call_of(("mask", "alibi"))
    with_zero = options_of(dense.having(keep=np.ones(PAIRS, bool), p=0.0))
    assert with_zero.dropout is not None
    without, zero = run(dense, options), run(dense, with_zero)
    assert without[0].tobytes() == zero[0].tobytes()
    assert all(without[2][n].tobytes() == zero[2][n].tobytes() for n in without[2])


@pytest.mark.usefixtures("tiny_tiles")
def test_which_weights_are_dropped() -> None:
    """Values of one-hot keys show every weight; the same whatever the tiles, and lse has all."""
    rng = np.random.default_rng(0)
    inputs = arrays(rng)
    inputs["v"] = np.broadcast_to(np.eye(LEN_K), (BATCH, HEADS_KV, LEN_K, LEN_K))
    dense = Dense(**inputs, right=20)
    plain, plain_lse = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense))
    keep = dropout_mask(SEED, P, PAIRS)
    out, lse = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense.having(keep=keep, p=P)))
    np.testing.assert_array_equal(out != 0, keep & dense.visible())
    np.testing.assert_allclose(out, plain * keep / (1 - P), rtol=1e-12)
    np.testing.assert_array_equal(lse, plain_lse)


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_dropout_keeps_the_mean(p: float) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 2, 256, 8))
    options = Options(0.1, 0, dropout=Dropout.of(p, 3))
    out, _ = _cpu.forward(q, k, np.ones((1, 2, 256, 1)), options)
    spread = np.sqrt(p / (1 - p) / 256)
    assert abs(out.mean() - 1) < 5 * spread / np.sqrt(out.size)
    assert 0.7 * spread < out.std() < 1.5 * spread
