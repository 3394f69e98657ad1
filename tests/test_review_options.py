"""Corners of masks, scores and packed sequences that a review found wrong, one test each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import BlockMask

RNG = np.random.default_rng(3)
Q, K, V = (RNG.standard_normal((2, 4, n, 8)).astype(np.float32) for n in (6, 5, 5))
ENDS = np.array([0, 2, 6]), np.array([0, 3, 5])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_query_heads_for_some_key_heads(dropout_p: float) -> None:
    options = {"dropout_p": dropout_p, "seed": 1, "causal": True}
    out, pullback = cuflash.attention_vjp(Q[:, :0], K, V, **options)
    assert out.shape == (2, 0, 6, 8)
    grads = pullback(out)
    assert grads.q.shape == out.shape
    assert not grads.k.any() and not grads.v.any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_query_heads_in_packed_sequences(dropout_p: float) -> None:
    options = {"dropout_p": dropout_p, "seed": 1, "bias": np.ones((1, 3), np.float32)}
    out, pullback = cuflash.attention_varlen_vjp(
        Q[0, :0], K[0], V[0], *ENDS, wrt=("k", "bias"), **options
    )
    assert out.shape == (0, 6, 8)
    grads = pullback(out)
    assert not grads.k.any() and not grads.bias.any()


@pytest.mark.parametrize("sink", [np.inf, np.nan, -np.inf, 2.0])
def test_a_row_without_keys_is_zero_whatever_the_sink(sink: float) -> None:
    # Row 0 shares its tile with rows that see keys, and with a mask of one row it has none.
    mask = np.arange(6)[:, None] > 0
    sinks = np.full(4, sink, np.float32)
    for rows in (slice(None), slice(0, 1)):
        out, lse = cuflash.attention(
            Q[:, :, rows], K, V, mask=mask[rows], sinks=sinks, return_lse=True
        )
        assert not out[:, :, 0].any()
        np.testing.assert_array_equal(lse[:, :, 0], np.broadcast_to(sinks, (2, 4)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slopes_of_zero_add_nothing_however_far_the_rows(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    plain = cuflash.attention(q, k, v)
    for offset in (10**39, -(10**39), 10**400, -(10**400)):
        out = cuflash.attention(q, k, v, q_offset=offset, alibi_slopes=np.zeros(4, dtype))
        np.testing.assert_array_equal(out, plain)


def test_bounds_of_lengths_may_be_huge_beside_a_mask() -> None:
    q, k, v = Q[0], K[0], V[0]
    mask = np.array([True])
    out = cuflash.attention_varlen(
        q, k, v, *ENDS, mask=mask, max_seqlen_q=10**30, max_seqlen_k=2**40
    )
    np.testing.assert_array_equal(out, cuflash.attention_varlen(q, k, v, *ENDS))


def test_a_window_that_is_an_iterator_is_read_anew() -> None:
    class Once:
        """Equal to itself, with other numbers each time."""

        def __init__(self) -> None:
            self.sides = [(0, 0), (None, None)]

        def __iter__(self) -> Any:
            return iter(self.sides.pop(0))

    window = Once()
    first, second = (cuflash.attention(Q, K, V, window=window) for _ in range(2))
    np.testing.assert_array_equal(first, cuflash.attention(Q, K, V, window=(0, 0)))
    np.testing.assert_array_equal(second, cuflash.attention(Q, K, V))


def test_windows_without_bounds_reach_from_the_farthest_offset() -> None:
    for offset in (2**60, -(2**60)):
        mask = BlockMask.sliding_window((None, None), shape=(30, 3), q_offset=offset)
        assert mask.density == 1
        with pytest.raises(ValueError, match="holds offsets up to"):
            BlockMask.sliding_window((None, None), shape=(30, 3), q_offset=2 * offset)


def test_messages_name_a_block_mask_in_one_line() -> None:
    mask = BlockMask.sliding_window((9, 0), shape=(6, 5), block_size=16)
    for call in (cuflash.attention, cuflash.explain):
        with pytest.raises(ValueError, match="sinks has shape") as error:
            call(Q, K, V, mask=mask, sinks=np.zeros(3, np.float32))
        (line,) = (x for x in str(error.value).splitlines() if "mask=" in x)
        assert "BlockMask(shape=(6, 5)" in line
        assert "dropout_p" not in line
        assert "blocks:" not in str(error.value)


def test_explain_tells_the_tiles_of_a_block_mask() -> None:
    q = np.zeros((1, 2, 1024, 16), np.float32)
    mask = BlockMask.sliding_window((9, 0), shape=(1024, 1024), block_size=96)
    assert "tiles of 96 queries" in str(cuflash.explain(q, q, q, mask=mask))


SHAPE = (2, 4, 6, 8)
SHAPES = [(SHAPE, SHAPE, SHAPE)]
TILE = BlockMask.documents(lengths=[3])
Wrong = tuple[Callable[[], Any], type[Exception], str]
WRONG: dict[str, Wrong] = {
    "layout": (
        lambda: cuflash.attention_varlen(Q[0], K[0], V[0], *ENDS, layout=np.array(["HLD", "LHD"])),
        TypeError,
        "layout is a ndarray, not a str.",
    ),
    "scale": (
        lambda: cuflash.attention(Q, K, V, scale=10**400),
        ValueError,
        "scale is inf, which is not finite.",
    ),
    "dropout_p": (
        lambda: cuflash.attention(Q, K, V, dropout_p=-(10**400), seed=1),
        ValueError,
        "dropout_p is -inf, which is not finite.",
    ),
    "dropout_p array": (
        lambda: cuflash.attention(Q, K, V, dropout_p=np.zeros(2)),
        TypeError,
        "dropout_p is a ndarray, not a real number.",
    ),
    "ids": (
        lambda: BlockMask.documents([[1, 2], [3]]),
        ValueError,
        "ids has rows of several lengths.",
    ),
    "tile": (
        lambda: TILE.element_tile((0,), 0, 5, 0, 3),
        ValueError,
        "tile of queries 0:5, and the mask has 3 queries.",
    ),
    "state": (
        lambda: TILE.tile_state((0,), 0, 3, -2, 3),
        ValueError,
        "tile of keys -2:3, and the mask has 3 keys.",
    ),
    "explain": (
        lambda: cuflash.explain(Q, K, V, backward="yes"),
        TypeError,
        "backward is a str, not a bool.",
    ),
    "warmup wrt": (
        lambda: cuflash.warmup(SHAPES, wrt="q"),
        TypeError,
        "wrt is a str, not a tuple of names.",
    ),
    "warmup bias": (
        lambda: cuflash.warmup(SHAPES, bias=np.zeros((6, 6))),
        TypeError,
        "bias is a ndarray, not a bool.",
    ),
    "warmup mask": (
        lambda: cuflash.warmup(SHAPES, mask=np.ones(6, bool)),
        ValueError,
        "mask is array([ True,  True,  True,  True,  True,  True]), not one of None, 'dense', "
        "'blocks'.",
    ),
    "warmup dtype": (
        lambda: cuflash.warmup(SHAPES, dtype="float8"),
        TypeError,
        "dtype is 'float8', which is none.",
    ),
    "warmup shapes": (
        lambda: cuflash.warmup([(SHAPE, SHAPE)]),
        ValueError,
        "shapes holds 2 shapes for a call of 3 arrays.",
    ),
    "warmup one shape": (
        lambda: cuflash.warmup((SHAPE, SHAPE, SHAPE)),
        TypeError,
        "shapes holds (2, 4, 6, 8), not three shapes.",
    ),
    "warmup axes": (
        lambda: cuflash.warmup([((8,), (8,), (8,))], mask="blocks"),
        ValueError,
        "shapes holds (8,).",
    ),
    "warmup arch": (
        lambda: cuflash.warmup(SHAPES, arch=90),
        TypeError,
        "arch is an int, not a str.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told_in_the_form_of_all_errors(name: str) -> None:
    call, kind, sentence = WRONG[name]
    with pytest.raises(kind) as error:
        call()
    lines = str(error.value).splitlines()
    assert lines[0] == sentence
    assert lines[-1].startswith("  Way out: ")
