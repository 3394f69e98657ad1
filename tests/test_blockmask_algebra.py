"""BlockMasks combined, turned, regrouped and asked for tiles, against dense bool arrays."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash import BlockMask
from tests.blockmask import LEADS, LENGTHS, PROPERTY, SIZES, dense_mask, pair, raised, same

# ---- algebra


@PROPERTY
@given(
    first=st.sampled_from(LEADS[:5]),
    second=st.sampled_from(LEADS[:5]),
    len_q=LENGTHS,
    len_k=LENGTHS,
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 99),
)
def test_algebra(first: Any, second: Any, len_q: int, len_k: int, size: Any, seed: int) -> None:
    a, b = (dense_mask(lead, (len_q, len_k), seed + n) for n, lead in enumerate((first, second)))
    x, y = (BlockMask.from_dense(dense, block_size=size) for dense in (a, b))
    try:
        np.broadcast_shapes(first, second)
    except ValueError:
        for operation in (lambda: x & y, lambda: x | y):
            assert "equal extents, or 1 to broadcast" in raised(ValueError, operation)
    else:
        same(x & y, a & b)
        same(x | y, a | b)
    same(~x, ~a)
    same(~~x, a)
    turned = x.T
    same(turned, a.swapaxes(-1, -2))
    assert turned.block_size == x.block_size[::-1]
    for other in (16, (32, 48)):
        regrouped = x.with_block_size(other)
        same(regrouped, a)
        assert regrouped.block_size == pair(other)
    for kept, dense in ((x, a), (y, b)):  # operands are as they were
        assert (kept.to_dense() == dense).all()


def test_algebra_of_whole_blocks_keeps_whole_blocks() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 5, 6)) < 0.5, rng.random((1, 5, 6)) < 0.5
    x, y = (BlockMask.from_blocks(blocks, shape=(130, 190), block_size=32) for blocks in (a, b))
    for mask, blocks in ((x & y, a & b), (x | y, a | b), (~x, ~a)):
        assert (mask.slots == np.where(blocks, -2, -1)).all()
        assert len(mask.bits) == 0


# ---- tiles


def bounds(draw: st.DrawFn, length: int) -> tuple[int, int]:
    first, last = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
    return first, last


@st.composite
def tile_cases(draw: st.DrawFn) -> tuple[Any, ...]:
    lead = draw(st.sampled_from([x for x in LEADS if 0 not in x]))
    shape = draw(LENGTHS), draw(LENGTHS)
    index = []
    for extent in lead:
        served = extent if extent > 1 else 5  # an axis of 1 serves a call of 5
        start, stop = bounds(draw, served)
        index.append(
            draw(
                st.sampled_from(
                    [min(start, served - 1), slice(start, stop), slice(None), slice(None, None, 2)]
                )
            )
        )
    return (
        dense_mask(lead, shape, draw(st.integers(0, 99))),
        draw(st.sampled_from(SIZES)),
        tuple(index),
        *bounds(draw, shape[0]),
        *bounds(draw, shape[1]),
    )


@PROPERTY
@given(tile_cases())
def test_element_tiles_and_their_states(case: tuple[Any, ...]) -> None:
    dense, size, index, q0, q1, k0, k1 = case
    mask = BlockMask.from_dense(dense, block_size=size)
    own = tuple(
        at if extent > 1 else slice(0, 1) if isinstance(at, slice) else 0
        for at, extent in zip(index, dense.shape[:-2], strict=True)
    )
    wanted = dense[own][..., q0:q1, k0:k1]
    tile = mask.element_tile(index, q0, q1, k0, k1)
    assert tile.dtype == bool and tile.shape == wanted.shape and (tile == wanted).all()
    state = "absent" if not wanted.any() else "full" if wanted.all() else "partial"
    assert mask.tile_state(index, q0, q1, k0, k1) == state


def test_tiles_of_calls_with_more_or_fewer_axes() -> None:
    dense = dense_mask((2,), (50, 40), 5)
    mask = BlockMask.from_dense(dense, block_size=16)
    assert (mask.element_tile((7, 3, 1), 3, 40, 5, 39) == dense[1, 3:40, 5:39]).all()
    tile = mask.element_tile((slice(2, 4), slice(None)), 3, 40, 5, 39)
    assert tile.shape == (1, 2, 37, 34) and (tile[0] == dense[:, 3:40, 5:39]).all()
    shared = BlockMask.from_dense(dense[0], block_size=16)
    assert (shared.element_tile((), 3, 40, 5, 39) == dense[0, 3:40, 5:39]).all()


def test_tile_states_ask_for_no_elements_where_blocks_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.zeros((64, 64), bool)
    dense[:, :16] = dense[20, 40] = True
    mask = BlockMask.from_dense(dense, block_size=16)
    tiles = importlib.import_module("cuflash._blockmask_tiles")
    monkeypatch.setattr(tiles, "elements", None)
    assert mask.tile_state((0,), 0, 64, 0, 16) == "full"
    assert mask.tile_state((0,), 0, 64, 0, 20) == "partial"
    assert mask.tile_state((slice(None),), 32, 64, 16, 64) == "absent"


@PROPERTY
@given(
    lead=st.sampled_from(LEADS),
    len_q=LENGTHS,
    len_k=LENGTHS,
    size=st.sampled_from(SIZES),
    tile_q=st.sampled_from([1, 16, 64, 128]) | st.integers(1, 150),
    tile_k=st.sampled_from([1, 16, 64, 128]) | st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_visible_tiles(
    lead: Any, len_q: int, len_k: int, size: Any, tile_q: int, tile_k: int, seed: int
) -> None:
    dense = dense_mask(lead, (len_q, len_k), seed)
    found = BlockMask.from_dense(dense, block_size=size).visible_tiles(tile_q, tile_k)
    wanted = np.zeros((*lead, -(-len_q // tile_q), -(-len_k // tile_k)), bool)
    for *item, i, j in np.argwhere(dense):
        wanted[(*item, i // tile_q, j // tile_k)] = True
    assert found.dtype == bool and found.shape == wanted.shape and (found == wanted).all()
