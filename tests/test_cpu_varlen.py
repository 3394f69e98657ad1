"""Packed sequences on the NumPy backend: each must come out as if it were called alone."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import _cpu, _cpu_backward, _cpu_forward, _cpu_masks, _cpu_sums, _cpu_tiles
from cuflash._blockmask import BlockMask
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.dense import Dense, Warp

HEADS, HEADS_KV, DIM, DIM_V = 4, 2, 5, 3
SEED, P = 11, 0.3

# Empty sequences anywhere, equal lengths at equal and at unequal distances, one row, one key.
LENGTHS = {
    "museum": ([5, 0, 130, 1, 0], [0, 7, 129, 0, 0]),
    "equal": ([6, 6, 6, 6], [9, 9, 9, 9]),
    "scattered": ([3, 2, 3, 3, 1, 2, 3, 0, 3], [4, 5, 4, 4, 1, 5, 4, 3, 0]),
    "alone": ([17], [23]),
    "nothing": ([0, 0], [3, 0]),
}
NAMES = (
    "plain", "causal", "window", "softcap", "alibi", "alibi_each", "mask", "blocks", "bias",
    "bias_shared", "bias_keys", "sinks", "score_mod", "dropout", "everything",
)  # fmt: skip


@pytest.fixture(params=[(16, 8, 1, 4), (64, 16, 4000, 8)], ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """(rows, keys, elements, chunk): edges everywhere, units of one sequence and of several."""
    rows, keys, elements, chunk = request.param
    monkeypatch.setattr(_cpu_tiles, "TILE_ROWS", rows)
    monkeypatch.setattr(_cpu_tiles, "TILE_KEYS", keys)
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(_cpu_masks, "CHUNK", chunk)


class Packed:
    """Packed arrays with garbage behind the last sequence, and options for them."""

    def __init__(
        self, len_q: list[int], len_k: list[int], name: str = "plain", dtype: Any = np.float64
    ) -> None:
        rng = np.random.default_rng(0)
        self.lengths = list(zip(len_q, len_k, strict=True))
        self.cu_q, self.cu_k = (np.concatenate(([0], np.cumsum(n))) for n in (len_q, len_k))
        self.pairs = len(len_q), HEADS, max(len_q), max(len_k)
        total_q, total_k = int(self.cu_q[-1]) + 37, int(self.cu_k[-1]) + 5
        self.q = rng.standard_normal((HEADS, total_q, DIM)).astype(dtype)
        self.k = rng.standard_normal((HEADS_KV, total_k, DIM)).astype(dtype)
        self.v = rng.standard_normal((HEADS_KV, total_k, DIM_V)).astype(dtype)
        self.dout = rng.standard_normal((HEADS, total_q, DIM_V)).astype(dtype)
        self.dlse = rng.standard_normal((HEADS, total_q)).astype(
            _cpu_tiles.accumulator(self.q.dtype)
        )
        for x, end in (
            (self.q, self.cu_q), (self.dout, self.cu_q), (self.dlse, self.cu_q),
            (self.k, self.cu_k), (self.v, self.cu_k),
        ):  # fmt: skip
            x[:, end[-1] :] = np.nan
        self.options = self._options(name, rng)

    def _options(self, name: str, rng: np.random.Generator) -> Options:
        batch, heads, len_q, len_k = self.pairs
        mask = rng.random(self.pairs) < 0.7
        made: dict[str, Any] = {
            "causal": {"right": 0},
            "window": {"left": 4, "right": 2, "q_offset": 1},
            "softcap": {"softcap": 1.5},
            "alibi": {"alibi_slopes": rng.random(heads)},
            "alibi_each": {"alibi_slopes": rng.random((batch, heads))},
            "mask": {"mask": mask},
            "blocks": {"blocks": BlockMask.from_dense(mask, block_size=16) if mask.size else None},
            "bias": {"bias": rng.standard_normal(self.pairs)},
            "bias_shared": {"bias": rng.standard_normal((heads, len_q, len_k))},
            "bias_keys": {"bias": rng.standard_normal((batch, 1, 1, len_k))},
            "sinks": {"sinks": rng.standard_normal(heads)},
            "score_mod": {
                "score_mod": Warp({"gain": 0.5 + rng.random(heads), "table": rng.random(7)})
            },
            "dropout": {"dropout": Dropout.of(P, SEED)},
        }  # fmt: skip
        options: dict[str, Any] = {"q_offset": None}
        chosen = (
            "causal",
            "softcap",
            "alibi_each",
            "mask",
            "bias_shared",
            "sinks",
            "score_mod",
            "dropout",
        )
        for option in chosen if name == "everything" else (name,):
            options |= made.get(option, {})
        return Options(0.3, **options)

    def wrt(self) -> list[str]:
        """Everything that has a gradient."""
        options, mod = self.options, self.options.score_mod
        given = [n for n in ("bias", "alibi_slopes", "sinks") if getattr(options, n) is not None]
        return ["q", "k", "v", *given, *([] if mod is None else mod.arrays)]

    def forward(self, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        return _cpu.varlen_forward(
            self.q, self.k, self.v, self.cu_q, self.cu_k, self.options, **kwargs
        )

    def backward(self, out: np.ndarray, lse: np.ndarray, **kwargs: Any) -> dict[str, Any]:
        """Gradients, those of score parameters among them."""
        kwargs = {"wrt": self.wrt(), "dlse": self.dlse, **kwargs}
        given = self.dout, self.q, self.k, self.v, out, lse, self.cu_q, self.cu_k, self.options
        grads = _cpu.varlen_backward(*given, **kwargs)
        return grads | grads.pop("score_params", {})

    def alone(self, b: int) -> tuple[Dense, np.ndarray, np.ndarray]:
        """Sequence b as a call of its own by the formula, its dout and dlse."""
        options, (len_q, len_k) = self.options, self.lengths[b]
        own_q, own_k = slice(self.cu_q[b], self.cu_q[b + 1]), slice(self.cu_k[b], self.cu_k[b + 1])
        mask = options.mask if options.blocks is None else options.blocks.to_dense()

        def part(x: np.ndarray | None) -> np.ndarray | None:
            """Of an option's array that broadcasts to (batch, H, longest Lq, longest Lk)."""
            return (
                None if x is None else np.broadcast_to(x, self.pairs)[b : b + 1, :, :len_q, :len_k]
            )

        slopes, keep = options.alibi_slopes, None
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[b : b + 1]
        if options.dropout is not None:
            keep = part(dropout_mask(SEED, P, self.pairs))
        dense = Dense(
            *(x[None, :, own].astype(np.float64) for x, own in ((self.q, own_q), (self.k, own_k), (self.v, own_k))),
            scale=options.scale,
            q_offset=len_k - len_q if options.q_offset is None else options.q_offset,
            left=options.left, right=options.right, softcap=options.softcap, alibi_slopes=slopes,
            mask=part(mask), bias=part(options.bias), sinks=options.sinks,
            score_mod=options.score_mod, keep=keep, p=P, first_batch=b,
        )  # fmt: skip
        return dense, self.dout[None, :, own_q].astype(np.float64), self.dlse[None, :, own_q]

    def expected(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """out, lse and gradients from the formula, one sequence at a time."""
        out, lse = np.zeros(self.dout.shape), np.full(self.dlse.shape, -np.inf)
        mod = self.options.score_mod
        grads = {
            name: np.zeros((mod.params[name] if mod is not None and name in mod.params
                            else getattr(self, name, None) if name in "qkv"
                            else getattr(self.options, name)).shape)
            for name in self.wrt()
        }  # fmt: skip
        for b, (len_q, len_k) in enumerate(self.lengths):
            dense, dout, dlse = self.alone(b)
            own_q, own_k = (
                slice(self.cu_q[b], self.cu_q[b + 1]),
                slice(self.cu_k[b], self.cu_k[b + 1]),
            )
            (out[:, own_q],), (lse[:, own_q],) = dense.forward()
            own = dense.backward(dout, dlse)
            own |= own.pop("score_params", {})
            for name, rows in (("q", own_q), ("k", own_k), ("v", own_k)):
                grads[name][:, rows] = own.pop(name)[0]
            for name, grad in own.items():
                into = grads[name]
                if name == "bias":
                    # The part of the bias that this sequence has, axes of extent 1 kept.
                    into = into[_own_part(into.shape, b, len_q, len_k)]
                    into += _fold(grad, into.shape)
                elif name == "alibi_slopes" and into.ndim == 2:
                    into[b] += grad[0]
                else:
                    into += grad
        return out, lse, grads


def _own_part(shape: tuple[int, ...], b: int, len_q: int, len_k: int) -> tuple[slice, ...]:
    whole = (slice(b, b + 1), slice(None), slice(0, len_q), slice(0, len_k))[-len(shape) :]
    return tuple(slice(None) if n == 1 else cut for n, cut in zip(shape, whole, strict=True))


def _fold(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    axes = tuple(a for a, n in enumerate(shape) if n == 1)
    return grad.sum(axis=axes, keepdims=True)


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
