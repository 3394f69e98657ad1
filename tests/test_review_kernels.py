"""Corners of the option kernels and their launches that a review found wrong, one test each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.machines import Emulator, Machine, Numpy

RNG = np.random.default_rng(11)
# Head dim 64: the kernels that the other tests of options have compiled.
Q, DOUT = (RNG.standard_normal((2, 6, 64)).astype(np.float16) for _ in range(2))
K, V = (RNG.standard_normal((2, 5, 64)).astype(np.float16) for _ in range(2))
ENDS = np.array([0, 2, 4]), np.array([0, 3, 5])  # two rows are past the end


@pytest.fixture
def emulator() -> Iterator[Machine]:
    with Emulator("sm_80") as machine:
        yield machine


def as_numpy_says(machine: Machine, *arrays: Any, dlse: Any, **options: Any) -> tuple[Any, Any]:
    """Packed (out, lse) and gradients, compared with the CPU backend's."""
    q, k, v, *ends = arrays
    found = []
    for place in (Numpy(), machine):
        out, lse = place.varlen(q, k, v, *ends, **options, return_lse=True)
        wrt = ("q", "k", "v", *(("sinks",) if "sinks" in options else ()))
        grads = place.varlen_backward(DOUT, q, k, v, out, lse, *ends, dlse=dlse, wrt=wrt, **options)
        found.append((out, lse, *(getattr(grads, name) for name in wrt)))
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=4e-3, atol=4e-3)
    return found[1][:2], found[1][2:]


@pytest.mark.parametrize("offset", [-1, 1, 3, 1000])
def test_offset_of_packed_sequences_moves_the_band(emulator: Machine, offset: int) -> None:
    # Without q_offset each sequence aligns itself; given, it counts from each sequence's start.
    (out, _), _ = as_numpy_says(emulator, Q, K, V, *ENDS, dlse=None, causal=True, q_offset=offset)
    plain = emulator.varlen(Q, K, V, *ENDS, causal=True)
    assert np.abs(out - plain).max() > 0.1


@pytest.mark.parametrize("sink", [np.inf, np.nan, -np.inf, 2.0, 2e38])
def test_a_row_without_keys_is_zero_whatever_the_sink(emulator: Machine, sink: float) -> None:
    sinks = np.array([sink, 1], np.float32)
    mask = np.arange(6)[:, None] > 1
    out, lse = emulator.attention(Q, K, V, mask=mask, sinks=sinks, return_lse=True)
    assert not out[:, :2].any()
    np.testing.assert_allclose(lse[:, :2], np.repeat(sinks[:, None], 2, 1), rtol=1e-6)
    assert np.isfinite(lse[1]).all() and out[1, 2:].all()


@pytest.mark.parametrize("keys", [0, 5])
def test_sinks_stay_with_rows_of_sequences_when_there_are_no_keys(
    emulator: Machine, keys: int
) -> None:
    ends = ENDS[0], np.zeros(3, np.int64)
    sinks, dlse = np.array([0.5, -np.inf], np.float32), np.ones((2, 6), np.float32)
    arrays = Q, K[:, :keys], V[:, :keys], *ends
    (out, lse), grads = as_numpy_says(emulator, *arrays, dlse=dlse, sinks=sinks)
    assert not out.any()
    assert np.isneginf(lse[:, 4:]).all() and (lse[0, :4] == 0.5).all()
    np.testing.assert_array_equal(grads[-1], [4, 0])


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_bounds_of_lengths_may_be_huge(emulator: Machine, name: str) -> None:
    """Tile maps and sums over pairs cover the rows there are, not the bound."""
    option = {"mask": np.array([True]), "bias": np.zeros((2, 1, 1), np.float32)}[name]
    wrt = ("q", "bias") if name == "bias" else ("q",)
    results = []
    for bound in (6, 2**30 - 2):
        options = {"max_seqlen_q": bound, "max_seqlen_k": bound, name: option}
        out, lse = emulator.varlen(Q, K, V, *ENDS, **options, return_lse=True)
        given = DOUT, Q, K, V, out, lse, *ENDS
        grads = emulator.varlen_backward(*given, **options, wrt=wrt, deterministic=True)
        results.append((out, lse, grads.q, *([grads.bias] if name == "bias" else [])))
    for small, large in zip(*results, strict=True):
        np.testing.assert_array_equal(small, large)


def test_bounds_of_lengths_beyond_32_bits(emulator: Machine) -> None:
    bounds = {"max_seqlen_q": 10**30, "max_seqlen_k": 10**30}
    out = emulator.varlen(Q, K, V, *ENDS, **bounds)
    np.testing.assert_array_equal(out, emulator.varlen(Q, K, V, *ENDS))
    with pytest.raises(cuflash.UnsupportedError, match="len_q 1000000"):
        emulator.varlen(Q, K, V, *ENDS, **bounds, mask=np.array([True]))


def test_map_of_a_block_mask_is_for_the_rows_there_are(emulator: Machine) -> None:
    """One mask, first in a call whose arrays end before its hidden rows, then in one that has them."""
    dense = np.ones((160, 64), bool)
    dense[133:] = False
    mask = cuflash.BlockMask.from_dense(dense, block_size=(32, 64))
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 64, 64)).astype(np.float16) for _ in range(2))
    for rows in (130, 150):
        q = rng.standard_normal((1, rows, 64)).astype(np.float16)
        ends = np.array([0, rows]), np.array([0, 64])
        bounds = {"max_seqlen_q": 160, "max_seqlen_k": 64}
        out = emulator.varlen(q, k, v, *ends, mask=mask, **bounds)
        assert out[:, :133].any(axis=-1).all() and not out[:, 133:].any()


def test_walks_over_pairs_leave_short_sequences_at_once(emulator: Machine) -> None:
    """Sums over all pairs of packed sequences: a bound far beyond their lengths costs one look per tile
    of queries, not one per pair of tiles.
    """
    count, length = 8, 40
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.standard_normal((1, count * length, 64)).astype(np.float16) for _ in "qkvd"
    )
    ends = np.arange(count + 1) * length
    bias, looks, grads = np.zeros((1, 1, 1), np.float32), [], []
    for bound in (length, count * length):
        options = {"bias": bias, "max_seqlen_q": bound, "max_seqlen_k": bound}
        out, lse = emulator.varlen(q, k, v, ends, ends, **options, return_lse=True)
        emulator.device.launches.clear()
        emulator.device.count = True
        given = dout, q, k, v, out, lse, ends, ends
        grads.append(emulator.varlen_backward(*given, **options, wrt=("bias",)).bias)
        emulator.device.count = False
        (counters,) = (c for name, _, c in emulator.device.launches if "backward_bias" in name)
        looks.append(counters.count("ld.global.v4"))
    np.testing.assert_array_equal(*grads)
    warps, tiles = 4, -(-count * length // 64)
    assert looks[1] <= looks[0] + warps * count * tiles, looks


@pytest.mark.parametrize("kind", ["mask", "blocks", "bias"])
def test_copies_of_pair_arrays_keep_broadcast_axes(emulator: Machine, kind: str) -> None:
    """Five batch axes that do not merge are copied; heads and rows stay broadcast in the copies."""
    extents, rng = (2, 1, 2, 2, 2, 2), np.random.default_rng(5)

    def odd(order: tuple[int, ...], *tail: int) -> np.ndarray:
        """Batch axes lie in memory in this order."""
        lead = [extents[axis] for axis in order]
        x = rng.standard_normal((*lead, *tail)).astype(np.float16)
        return x.transpose(*np.argsort(order), *range(6, 6 + len(tail)))

    q, dout = odd((4, 2, 0, 3, 1, 5), 2, 5, 64), odd((1, 0, 3, 2, 5, 4), 2, 5, 64)
    k, v = odd((3, 1, 5, 4, 0, 2), 2, 6, 64), odd((5, 4, 3, 2, 1, 0), 2, 6, 64)
    array = odd((2, 4, 1, 3, 5, 0), 1, 1 if kind == "bias" else 5, 6)
    if kind == "blocks":
        dense = np.ascontiguousarray(array > 0)
        option: Any = cuflash.BlockMask.from_dense(dense, block_size=16)
    else:
        option = array > 0 if kind == "mask" else array
    options = {"bias" if kind == "bias" else "mask": option}
    found = [place.vjp(q, k, v, dout, **options) for place in (Numpy(), emulator)]
    (want, exact), (got, grads) = found
    for a, b in zip((got, *grads[:3]), (want, *exact[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("lengths", [(1, 70), (70, 1)], ids=["one query", "one key"])
def test_stride_of_a_single_row_is_never_used(emulator: Machine, lengths: tuple[int, int]) -> None:
    """Tiles are copied in 16-byte pieces; those of rows past the end have addresses, too."""
    len_q, len_k = lengths
    rng = np.random.default_rng(2)

    def odd(rows: int) -> np.ndarray:
        """Aligned where it begins; rows, if there were several, would not be."""
        memory = np.zeros(rows * 80 + 8, np.float16)
        start = -(memory.__array_interface__["data"][0] // 2) % 8
        step = (67 if rows == 1 else 72) * 2
        view = np.lib.stride_tricks.as_strided(memory[start:], (1, rows, 64), (step, step, 2))
        view[...] = rng.standard_normal(view.shape)
        return view

    q, k, v, dout = odd(len_q), odd(len_k), odd(len_k), odd(len_q)
    bias = rng.standard_normal((len_q, len_k)).astype(np.float16)
    for options in ({}, {"bias": bias}):
        want, exact = Numpy().vjp(q, k, v, dout, **options)
        for deterministic in (False, True):
            got, grads = emulator.vjp(q, k, v, dout, deterministic=deterministic, **options)
            for a, b in zip((got, *grads[:3]), (want, *exact[:3]), strict=True):
                np.testing.assert_allclose(a, b, rtol=4e-3, atol=4e-3)
