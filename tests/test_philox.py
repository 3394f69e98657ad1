"""Philox against the published vectors; dropout's mask against an implementation of its own."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from cuflash._dropout import Dropout, dropout_mask
from cuflash._philox import philox4x32
from tests import philox

# Random123's known-answer vectors (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == words(result)


def test_counters_broadcast() -> None:
    """Small words against the same ones spread out."""
    parts = np.arange(5), np.arange(3)[:, None], np.uint64(2**32 - 1), np.arange(2)[:, None, None]
    spread = np.broadcast_arrays(*parts)
    got = philox4x32(parts, (1, 2))
    want = philox4x32((spread[0], spread[1], spread[2], spread[3]), (1, 2))
    for a, b in zip(got, want, strict=True):
        assert a.shape == (2, 3, 5)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (3, 4, 33, 130), (1, 1, 2, 1), (2, 0, 3, 4), (1, 1, 5, 0)]
)
@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_mask_against_another_implementation(shape: tuple[int, ...], seed: int) -> None:
    got = dropout_mask(seed, 0.3, shape)
    assert got.dtype == bool
    assert got.shape == shape
    np.testing.assert_array_equal(got, philox.keep_mask(seed, 0.3, *shape))


def test_several_batch_axes_count_as_one() -> None:
    flat = dropout_mask(5, 0.4, (6, 2, 9, 11))
    np.testing.assert_array_equal(
        dropout_mask(5, 0.4, (2, 3, 2, 9, 11)), flat.reshape(2, 3, 2, 9, 11)
    )
    np.testing.assert_array_equal(dropout_mask(5, 0.4, (9, 11)), flat[0, 0])
    np.testing.assert_array_equal(dropout_mask(5, 0.4, (2, 9, 11)), flat[0])


def test_a_part_of_the_mask_is_computed_alone() -> None:
    """Any rows, any run of keys: what tiles of any size do."""
    whole = dropout_mask(11, 0.5, (2, 3, 20, 50))
    rng = np.random.default_rng(0)
    b, h, i = (rng.integers(0, n, 30) for n in (2, 3, 20))
    for first, stop in ((0, 50), (1, 2), (3, 5), (4, 8), (7, 50), (49, 50)):
        out = np.empty((30, stop - first), bool)
        Dropout.of(0.5, 11).keep(out, b, h, i, first)
        np.testing.assert_array_equal(out, whole[b, h, i, first:stop])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.17, 0.5, 0.9, 1 - 2**-40])
def test_fraction_kept_and_independence(p: float) -> None:
    kept = dropout_mask(3, p, (2, 4, 128, 256)).astype(np.float64)
    sigma = np.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) <= 5 * sigma / np.sqrt(kept.size)
    # Neighbours along every axis, and the four words of one counter, are uncorrelated.
    centred = kept - (1 - p)
    for axis, step in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 4)):
        ahead = np.take(centred, range(step, kept.shape[axis]), axis)
        behind = np.take(centred, range(kept.shape[axis] - step), axis)
        assert abs((ahead * behind).mean()) <= 5 * sigma**2 / np.sqrt(ahead.size)


def test_seeds_differ_and_repeat() -> None:
    masks = [dropout_mask(seed, 0.5, (1, 2, 16, 64)) for seed in (0, 1, 2**32, 0)]
    np.testing.assert_array_equal(masks[0], masks[3])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < (masks[a] == masks[b]).mean() < 0.6
    state = np.random.get_state()[1].copy()  # noqa: NPY002  the global one is what must not move
    dropout_mask(0, 0.5, (2, 4))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_seed_in_an_array() -> None:
    np.testing.assert_array_equal(
        dropout_mask(np.array([2**63 + 5], np.uint64), 0.5, (3, 40)),
        dropout_mask(2**63 + 5, 0.5, (3, 40)),
    )


def test_memory_is_bounded() -> None:
    """16 MB of mask; its random words would be 64 MB."""
    tracemalloc.start()
    mask = dropout_mask(1, 0.5, (2, 2, 2048, 2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - mask.nbytes < 8e6


@pytest.mark.parametrize(
    ("kind", "sentence", "arguments"),
    [
        (ValueError, "dropout_p is 1.0, and must be in [0, 1).", (7, 1, (2, 3))),
        (ValueError, "dropout_p is -0.5, and must be in [0, 1).", (7, -0.5, (2, 3))),
        (ValueError, "dropout_p is nan", (7, float("nan"), (2, 3))),
        (TypeError, "dropout_p is a bool", (7, True, (2, 3))),
        (ValueError, "seed is -1, and must be in [0, 2**64).", (-1, 0.5, (2, 3))),
        (ValueError, f"seed is {2**64}, and must be in [0, 2**64).", (2**64, 0.5, (2, 3))),
        (TypeError, "seed is a float, not an int.", (1.0, 0.5, (2, 3))),
        (TypeError, "seed is a ndarray, not an int.", (np.arange(2), 0.5, (2, 3))),
        (TypeError, "shape is an int, not a tuple.", (7, 0.5, 3)),
        (TypeError, "shape is a float, not an int.", (7, 0.5, (2, 3.0))),
        (ValueError, "shape has 1 extents, and at least 2 are needed.", (7, 0.5, (3,))),
        (ValueError, "shape holds -2, which is below 0.", (7, 0.5, (3, -2))),
    ],
)  # fmt: skip
def test_bad_arguments(kind: type[Exception], sentence: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(kind) as caught:
        dropout_mask(*arguments)
    assert str(caught.value).startswith(sentence)
    assert "Way out:" in str(caught.value)


def test_module_must_be_numpy_or_cupy() -> None:
    with pytest.raises(TypeError, match="neither numpy nor cupy"):
        dropout_mask(1, 0.5, (2, 3), xp=np.random)
