"""Museum family F, dropout: the same mask everywhere, forward and backward, and a good one; others' bugs by number."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle, packed, philox
from tests.case import Case, answer, check
from tests.machines import Cupy, Emulator, Machine, Numpy, normal, same_bits
from tests.packed import Packed

SEED, P = 0xDEADBEEF_12345678, 0.3
BASE = Case(batch=(2,), heads=2, heads_kv=1, len_q=65, len_k=200, head_dim=64, dropout=P)


def forward_mask(
    machine: Machine, dim: int, batch: int, heads: int, len_q: int, len_k: int, **options: Any
) -> np.ndarray:
    """The keep mask that forward applies: equal weights, one-hot values in slices of `dim` keys."""
    q = np.zeros((batch, heads, len_q, dim), np.float16)
    k = np.zeros((batch, 1, len_k, dim), np.float16)
    hot = np.eye(len_k, -(-len_k // dim) * dim, dtype=np.float16)
    parts = [
        machine.attention(q, k, np.tile(part, (batch, 1, 1, 1)), **options)
        for part in np.split(hot, hot.shape[1] // dim, axis=1)
    ]
    return np.concatenate(parts, axis=-1)[..., :len_k] != 0


def backward_masks(
    machine: Machine, dim: int, batch: int, len_q: int, len_k: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The keep masks that dV and dQ see, one head.

    dV of one-hot douts is the transposed matrix of kept weights. With q = 0, one-hot keys and
    dP = 1 everywhere, dQ is P * (Z - delta): positive where kept, negative where dropped.
    """
    run = {"deterministic": True, **options}
    q = np.zeros((batch, 1, len_q, dim), np.float16)
    zeros = np.zeros((batch, 1, len_k, dim), np.float16)
    of_v, of_q = [], []
    for start in range(0, len_q, dim):
        dout = np.tile(np.eye(len_q, dim, -start, dtype=np.float16), (batch, 1, 1, 1))
        _, grads = machine.vjp(q, zeros, zeros, dout, wrt=("v",), **run)
        of_v.append(grads.v.swapaxes(-1, -2) != 0)
    first = np.zeros((batch, 1, 1, dim), np.float16)
    first[..., 0] = 1
    for start in range(0, len_k, dim):
        k = np.tile(np.eye(len_k, dim, -start, dtype=np.float16), (batch, 1, 1, 1))
        dout, v = np.tile(first, (len_q, 1)), np.tile(first, (len_k, 1))
        _, grads = machine.vjp(q, k, v, dout, wrt=("q",), scale=1.0, **run)
        of_q.append(grads.q > 0)
    return np.concatenate(of_v, axis=-2)[..., :len_q, :], np.concatenate(of_q, axis=-1)[..., :len_k]


# ---- one mask


def test_dropout_mask_is_philox() -> None:
    for seed, p in itertools.product((0, 1, SEED, 2**64 - 1), (0.0, 0.17, 0.5, 0.999)):
        got = cuflash.dropout_mask(seed, p, (2, 3, 5, 11))
        assert got.dtype == bool
        np.testing.assert_array_equal(got, philox.keep_mask(seed, p, 2, 3, 5, 11))


@pytest.mark.parametrize("length", [64, 65, 200])
def test_F1_forward_and_backward_drop_the_same(backend: Machine, length: int) -> None:
    """The mask of dropout_mask, recovered from out, from dV and from dQ, past one tile of keys."""
    run = {"dropout_p": P, "seed": SEED}
    keep = philox.keep_mask(SEED, P, 2, 1, length, length)
    np.testing.assert_array_equal(forward_mask(backend, 64, 2, 1, length, length, **run), keep)
    of_v, of_q = backward_masks(backend, 64, 2, length, length, **run)
    np.testing.assert_array_equal(of_v, keep)
    np.testing.assert_array_equal(of_q, keep)


@pytest.mark.parametrize(("arch", "dim"), [("sm_80", 128), ("sm_75", 64), ("sm_90a", 64)])
def test_F1_all_kernels_drop_the_same(arch: str, dim: int) -> None:
    """Other tiles, other architectures, three heads on one, and a mask beside it."""
    keep = philox.keep_mask(SEED, P, 1, 3, 70, 130)
    run = {"dropout_p": P, "seed": SEED}
    with Emulator(arch) as machine:
        for options in ({}, {"causal": True}, {"window": (20, 65)}):
            seen = oracle.visible(70, 130, **options)
            got = forward_mask(machine, dim, 1, 3, 70, 130, **run, **options)
            np.testing.assert_array_equal(got, keep & seen)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (70, 3)},
        {"mask": "blocks", "block": (32, 64)},
        {"layout": "LHD", "causal": True},
        {"batch": (2, 2), "len_q": 33},
    ],
    ids=str,
)
def test_F1_results_under_the_known_mask(backend: Machine, options: dict[str, Any]) -> None:
    check(backend, replace(BASE, **options), deterministic=True)


def test_blocks_of_another_size_drop_the_same(backend: Machine) -> None:
    """What a mask hides is not drawn otherwise, nor does the block size enter."""
    keep = philox.keep_mask(SEED, P, 1, 1, 70, 130)
    hidden = np.random.default_rng(0).random((70, 130)) < 0.5
    for mask in (~hidden, cuflash.BlockMask.from_dense(~hidden, block_size=(32, 16))):
        got = forward_mask(backend, 64, 1, 1, 70, 130, dropout_p=P, seed=SEED, mask=mask)
        np.testing.assert_array_equal(got[0, 0], keep[0, 0] & ~hidden)


# ---- reproducibility


def test_F5_a_seed_is_all_there_is(backend: Machine) -> None:
    """Equal seeds give equal bits whatever happened between; NumPy's generator is left alone."""
    data = answer(BASE).data
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is the point

    def out(seed: Any) -> Any:
        return backend.attention(data.q, data.k, data.v, dropout_p=P, seed=seed)

    first, second = out(1), out(2)
    assert not same_bits(first, second)
    assert same_bits(first, out(1)) and same_bits(second, out(2))
    assert not same_bits(first, out(1 + 2**32)), "the upper half of the seed counts"
    for same in (np.int64(1), np.uint64(1), np.array([1], np.uint64), np.array(1, np.uint64)):
        assert same_bits(first, out(same))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_an_array_is_read_by_each_call(backend: Machine) -> None:
    """The same array, another value: another mask, in forward and backward."""
    data = answer(BASE).data
    seed = np.array([1], np.uint64)
    for value in (5, SEED):
        seed[0] = value
        given = {"dropout_p": P, "deterministic": True}
        got = backend.vjp(data.q, data.k, data.v, data.dout, seed=seed, **given)
        want = backend.vjp(data.q, data.k, data.v, data.dout, seed=value, **given)
        assert same_bits(got[0], want[0])
        assert all(map(same_bits, got[1][:3], want[1][:3]))


@pytest.mark.gpu
def test_F3_a_replayed_graph_reads_the_seed_again() -> None:
    import cupy

    with Cupy() as machine:
        data = answer(BASE).data
        q, k, v, dout = map(machine.put, (data.q, data.k, data.v, data.dout))
        seed = cupy.array([1], cupy.uint64)
        run: dict[str, Any] = {"dropout_p": P, "seed": seed, "deterministic": True}
        cuflash.attention_vjp(q, k, v, **run)[1](dout)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            out, pullback = cuflash.attention_vjp(q, k, v, **run)
            grads = pullback(dout)
            graph = stream.end_capture()
        for value in (1, 2, 1):
            seed.fill(value)
            cupy.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            want = machine.vjp(
                *(data.q, data.k, data.v, data.dout), **{**run, "seed": np.array([value], "u8")}
            )
            assert same_bits(machine.get(out), want[0])
            assert all(
                same_bits(machine.get(a), b) for a, b in zip(grads[:3], want[1], strict=False)
            )


# ---- size and independence


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_F7_the_expectation_is_kept(backend: Machine, p: float) -> None:
    """v = 1: out is kept weights over 1 - p, whose mean is 1 within four sigma."""
    rng = np.random.default_rng(7)
    q, k = normal(rng, 1, 2, 130, 64), normal(rng, 1, 2, 200, 64)
    v = np.ones((1, 2, 200, 64), np.float16)
    out = backend.attention(q, k, v, dropout_p=p, seed=SEED)[..., 0].astype(float)
    weights = oracle.exact(q, k, np.eye(200)[None, None].repeat(2, axis=1)).out
    sigma = np.sqrt((weights**2).sum() * p / (1 - p)) / out.size
    assert abs(out.mean() - 1) < 4 * sigma
    assert abs(out - 1).max() > 10 * sigma


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.17, 0.5, 0.9, 1 - 1e-3])
def test_the_fraction_kept(p: float) -> None:
    shape = (4, 5, 203, 301)
    for seed in (0, 1, SEED):
        kept = int(cuflash.dropout_mask(seed, p, shape).sum())
        size = int(np.prod(shape))
        assert abs(kept - (1 - p) * size) < 4 * np.sqrt(size * p * (1 - p)), (seed, kept)


def correlation(x: np.ndarray, y: np.ndarray, p: float) -> float:
    """Of two parts of a mask, in units of its standard deviation if they are independent."""
    spread = p * (1 - p)
    product = (x - (1 - p)) * (y - (1 - p))
    return float(product.mean() / spread * np.sqrt(product.size))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_on_every_axis_are_independent(p: float) -> None:
    """Shifts by 1 to 9, and by a tile, along b, h, i and j: all correlations within four sigma."""
    mask = cuflash.dropout_mask(3, p, (12, 14, 96, 160)).astype(float)
    for axis in range(4):
        for shift in (1, 2, 3, 4, 5, 8, 9, 64, 128):
            if shift < mask.shape[axis]:
                x = mask.take(range(shift, mask.shape[axis]), axis)
                y = mask.take(range(mask.shape[axis] - shift), axis)
                assert abs(correlation(x, y, p)) < 4, (axis, shift)
    # Along diagonals, where a counter built from sums of the indices would repeat.
    for a, b in itertools.combinations(range(4), 2):
        turned = np.swapaxes(mask, a, b)
        common = tuple(slice(min(n, m)) for n, m in zip(mask.shape, turned.shape, strict=True))
        x, y = mask[common], turned[common]
        off = np.ones(x.shape, bool)
        index = np.indices(x.shape, sparse=True)
        off = np.broadcast_to(index[a] < index[b], x.shape)
        assert abs(correlation(x[off], y[off], p)) < 4, (a, b)


def test_seeds_are_independent() -> None:
    """Neighbouring seeds, and seeds that differ in the upper half only."""
    masks = [
        cuflash.dropout_mask(seed, 0.5, (2, 2, 128, 256)).astype(float)
        for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    ]
    for x, y in itertools.combinations(masks, 2):
        assert abs(correlation(x, y, 0.5)) < 4


# ---- packed


def test_F9_a_packed_sequence_drops_as_its_number_says(backend: Machine) -> None:
    """Position in the packed arrays does not enter, the number of the sequence does."""
    case = replace(BASE, causal=True)
    lens = (3, 0, 70), (40, 9, 130)
    _, _, third = packed.check(backend, Packed(*lens, case), deterministic=True)
    assert third is not None
    # Alone it is sequence 0, and drops otherwise; as third of a batch it drops the same.
    data = packed.answer(Packed(*lens, case)).data
    q, k, v, dout = (
        x[:, :, :n]
        for x, n in zip((data.q, data.k, data.v, data.dout), (70, 130, 130, 70), strict=True)
    )
    run = {"causal": True, "dropout_p": P, "seed": case.dropout_seed, "deterministic": True}
    _, batch = backend.vjp(q, k, v, dout, dlse=data.dlse[:, :, :70], **run)
    alone = backend.vjp(q[2:], k[2:], v[2:], dout[2:], dlse=data.dlse[2:, :, :70], **run)[1]
    assert np.allclose(third.q[:, 3:73].astype(float), batch.q[2].astype(float), atol=4e-3)
    assert not np.allclose(third.q[:, 3:73].astype(float), alone.q[0].astype(float), atol=4e-3)


def test_backends_agree_on_a_gradient_with_dropout() -> None:
    """Emulated kernels and the NumPy backend, on the same float16 arrays."""
    data = answer(BASE).data
    run = {"dropout_p": P, "seed": SEED}
    with Emulator() as machine:
        out, grads = machine.vjp(data.q, data.k, data.v, data.dout, **run)
    other, others = Numpy().vjp(data.q, data.k, data.v, data.dout, **run)
    for a, b in zip((out, *grads[:3]), (other, *others[:3]), strict=True):
        a, b = a.astype(float), b.astype(float)
        assert abs(a - b).max() <= 8e-3 * max(1.0, abs(b).max())
