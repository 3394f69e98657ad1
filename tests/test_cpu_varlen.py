"""Packed sequences on the NumPy backend: each must come out as if it were called alone."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import _cpu, _cpu_backward, _cpu_forward, _cpu_sums, _cpu_tiles
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.cpu_calls import shrink_tiles
from tests.cpu_packed import DIM, DIM_V, HEADS, HEADS_KV, LENGTHS, NAMES, SEED, P, Packed
from tests.dense import Dense


@pytest.fixture(params=[(16, 8, 1, 4), (64, 16, 4000, 8)], ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, *request.param)


def check(packed: Packed, rtol: float = 1e-10) -> None:
    """Forward and backward against the formula, shapes and dtypes of all gradients."""
    out, lse = packed.forward()
    grads = packed.backward(out, lse)
    want_out, want_lse, want = packed.expected()
    np.testing.assert_allclose(out, want_out, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(lse, want_lse, rtol=rtol, atol=rtol)
    assert set(grads) == set(want)
    for name, grad in grads.items():
        size = max(1.0, abs(want[name]).max(initial=0))
        np.testing.assert_allclose(grad, want[name], rtol=rtol, atol=rtol * size, err_msg=name)
    end_q, end_k = packed.cu_q[-1], packed.cu_k[-1]
    assert (out[:, end_q:] == 0).all()
    assert np.isneginf(lse[:, end_q:]).all()
    assert (grads["q"][:, end_q:] == 0).all()
    assert (grads["k"][:, end_k:] == 0).all()
    assert (grads["v"][:, end_k:] == 0).all()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("name", NAMES)
def test_each_sequence_is_as_if_alone(name: str, lengths: str) -> None:
    check(Packed(*LENGTHS[lengths], name))


@pytest.mark.parametrize("part_elements", [0, 1 << 16])
@pytest.mark.parametrize("name", ["bias", "bias_shared", "score_mod", "everything"])
def test_sums_over_sequences_in_place_and_apart(
    name: str, part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", part_elements)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", part_elements)
    check(Packed(*LENGTHS["scattered"], name))


@pytest.mark.parametrize("part_elements", [0, 1 << 16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_on_any_number_of_threads(
    dtype: str, part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", part_elements)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", part_elements)
    packed = Packed(*LENGTHS["scattered"], "everything", np.dtype(dtype))
    results = []
    for threads in (1, 2, 5):
        for module in (_cpu_forward, _cpu_backward):
            monkeypatch.setattr(
                module, "threads_for", lambda items, pairs, n=threads: min(items, n)
            )
        out, lse = packed.forward()
        grads = packed.backward(out, lse)
        results.append([x.tobytes() for x in (out, lse, *grads.values())])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=str)
def test_dtypes(dtype: Any) -> None:
    packed = Packed(*LENGTHS["scattered"], "causal", dtype)
    out, lse = packed.forward()
    grads = packed.backward(out, lse)
    assert (out.dtype, lse.dtype) == (np.dtype(dtype), np.float32)
    want_out, want_lse, want = packed.expected()
    eps = 8 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), want_out, rtol=eps, atol=eps)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert grad.dtype == np.dtype(dtype)
        size = abs(want[name]).max()
        np.testing.assert_allclose(grad.astype(np.float64), want[name], rtol=eps, atol=eps * size)


def test_uniform_lengths_are_a_batch() -> None:
    """The same bits as one call with a batch axis, dropout and score function included."""
    batch, len_q, len_k = 3, 14, 19
    packed = Packed([len_q] * batch, [len_k] * batch, "everything")
    out, lse = packed.forward()
    grads = packed.backward(out, lse)
    end_q, end_k = batch * len_q, batch * len_k

    def apart(x: np.ndarray, end: int) -> np.ndarray:
        return x[:, :end].reshape(len(x), batch, -1, *x.shape[2:]).swapaxes(0, 1)

    rows = [apart(x, end_q) for x in (packed.dout, packed.q, packed.dlse)]
    keys = [apart(x, end_k) for x in (packed.k, packed.v)]
    options = replace(packed.options, q_offset=len_k - len_q)
    want_out, want_lse = _cpu.forward(rows[1], *keys, options)
    given = rows[0], rows[1], *keys, want_out, want_lse, options
    want = _cpu.backward(*given, dlse=rows[2], wrt=packed.wrt())
    want |= want.pop("score_params")
    np.testing.assert_array_equal(apart(out, end_q), want_out)
    np.testing.assert_array_equal(apart(lse, end_q), want_lse)
    for name, grad in grads.items():
        end = {"q": end_q, "k": end_k, "v": end_k}.get(name)
        np.testing.assert_array_equal(grad if end is None else apart(grad, end), want[name])


def test_packing_does_not_matter_to_dropout() -> None:
    """The third of three sequences draws what batch element 2 draws, wherever its rows are."""
    kept = []
    for first in ([4, 9], [13, 0]):
        packed = Packed([*first, 8], [5, 5, 21], "dropout")
        rng = np.random.default_rng(1)
        own_q, own_k = slice(packed.cu_q[2], packed.cu_q[3]), slice(packed.cu_k[2], packed.cu_k[3])
        packed.q[:, own_q] = rng.standard_normal((HEADS, 8, DIM))
        packed.k[:, own_k] = rng.standard_normal((HEADS_KV, 21, DIM))
        packed.v = np.ones((HEADS_KV, packed.k.shape[1], 21))
        packed.v[:, own_k] = np.eye(21)
        kept.append(packed.forward()[0][:, own_q] != 0)
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], dropout_mask(SEED, P, (3, HEADS, 8, 21))[2])


@pytest.mark.parametrize("lengths", ["museum", "scattered"])
def test_given_buffers_and_strange_strides(lengths: str) -> None:
    packed = Packed(*LENGTHS[lengths], "causal")
    out, lse = packed.forward()
    grads = packed.backward(out, lse)
    packed.q, packed.k, packed.v, packed.dout = (
        np.ascontiguousarray(x.swapaxes(0, 1)[::-1]).swapaxes(0, 1)[:, ::-1]
        for x in (packed.q, packed.k, packed.v, packed.dout)
    )
    packed.cu_q, packed.cu_k = (
        np.stack([x, x], axis=1).astype(np.int32)[:, 0] for x in (packed.cu_q, packed.cu_k)
    )
    buffer = np.full((*out.shape[1::-1], 2 * DIM_V), np.nan).swapaxes(0, 1)[..., ::2]
    got, got_lse = packed.forward(out=buffer)
    assert got is buffer
    np.testing.assert_array_equal(got, out)
    np.testing.assert_array_equal(got_lse, lse)
    buffers = {n: np.full_like(grads[n], np.nan) for n in "qkv"}
    again = packed.backward(out, lse, grads_out=buffers)
    for name, grad in grads.items():
        assert again[name] is buffers[name]
        np.testing.assert_allclose(again[name], grad, rtol=1e-12, atol=1e-13)
    assert packed.forward()[0].swapaxes(0, 1).flags.c_contiguous


def test_20000_tiny_sequences() -> None:
    """Nine kinds of them, a few hundred steps: a step each would take minutes."""
    rng = np.random.default_rng(0)
    len_q, len_k = rng.integers(1, 4, (2, 20000))
    cu_q, cu_k = (np.concatenate(([0], np.cumsum(n))) for n in (len_q, len_k))
    q = rng.standard_normal((HEADS, cu_q[-1], 16), dtype=np.float32)
    k, v = rng.standard_normal((2, HEADS_KV, cu_k[-1], 16), dtype=np.float32)
    options = Options(0.25, None, None, 0, dropout=Dropout.of(P, SEED))
    start = time.process_time()
    out, lse = _cpu.varlen_forward(q, k, v, cu_q, cu_k, options)
    grads = _cpu.varlen_backward(out, q, k, v, out, lse, cu_q, cu_k, options)
    assert time.process_time() - start < 10  # measured: 0.7
    for b in (0, 7777, 19999):
        own_q, own_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        keep = dropout_mask(SEED, P, (20000, HEADS, 3, 3))[b : b + 1, :, : len_q[b], : len_k[b]]
        dense = Dense(
            q[None, :, own_q], k[None, :, own_k], v[None, :, own_k], scale=0.25, right=0,
            q_offset=int(len_k[b] - len_q[b]), keep=keep, p=P,
        )  # fmt: skip
        want, want_lse = dense.forward()
        np.testing.assert_allclose(out[:, own_q], want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[:, own_q], want_lse[0], rtol=1e-5, atol=1e-6)
        own = dense.backward(want, np.zeros(want_lse.shape))
        for name, rows in (("q", own_q), ("k", own_k), ("v", own_k)):
            np.testing.assert_allclose(grads[name][:, rows], own[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "alone"),
    [
        ("plain", True),
        ("bias", True),
        ("bias_shared", False),
        ("score_mod", False),
        ("sinks", True),
    ],
)
def test_sequences_that_share_a_sum_are_one_threads(
    option: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", 0)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", 0)
    items: list[int] = []

    def counting(work: Any, worker: Any, threads: int) -> None:
        do = worker(lambda: False)
        for item in work:
            items.append(len(item))
            do(item)

    packed = Packed(*LENGTHS["scattered"], option)
    out, lse = packed.forward()
    monkeypatch.setattr(_cpu_backward, "run", counting)
    packed.backward(out, lse)
    units = 8 * HEADS_KV  # one sequence has no rows
    assert items == ([1] * units if alone else [units])
