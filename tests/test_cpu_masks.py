"""Bool masks and block masks on the NumPy backend: what is hidden never matters and is not visited."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuflash import _cpu, _cpu_tiles
from cuflash._blockmask import BlockMask
from cuflash._dropout import dropout_mask
from cuflash._options import Options
from tests.cpu_calls import (
    HEADS,
    LEN_K,
    LEN_Q,
    PAIRS,
    SEED,
    SHAPES,
    TINY,
    P,
    arrays,
    call_of,
    check,
    cotangents,
    options_of,
    run,
    shrink_tiles,
    some_mask,
)
from tests.dense import Dense


@pytest.fixture(params=TINY, ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, *request.param)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_of_every_shape(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    mask = np.asarray(rng.random(shape) < 0.7)
    dense = Dense(**arrays(rng), mask=np.broadcast_to(mask, PAIRS))
    check(dense, options_of(dense))
    check(dense, options_of(dense.having(mask=mask)))


def test_mask_and_blocks_together() -> None:
    dense, options = call_of(("blocks", "sinks"))
    mask = some_mask(np.random.default_rng(5), *PAIRS)
    both = dense.having(mask=mask & dense.mask)
    check(both, replace(options, mask=mask))


def test_hidden_rows_do_nothing() -> None:
    """out 0, lse -inf, dq 0; and whatever reaches them backward changes nothing else."""
    rng = np.random.default_rng(0)
    mask = np.ones((LEN_Q, LEN_K), bool)
    mask[[2, 5]] = False
    dense = Dense(**arrays(rng), mask=mask)
    options = options_of(dense)
    out, lse = _cpu.forward(dense.q, dense.k, dense.v, options)
    assert (out[:, :, [2, 5]] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(~mask.any(-1), lse.shape))
    dout, _ = cotangents(dense)
    results = []
    for value in (0.0, 1e300, np.nan):
        dout[:, :, [2, 5]] = value
        grads = _cpu.backward(dout, dense.q, dense.k, dense.v, out, lse, options)
        assert (grads["q"][:, :, [2, 5]] == 0).all()
        results.append(b"".join(grad.tobytes() for grad in grads.values()))
    assert len(set(results)) == 1


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 6e4])
@pytest.mark.parametrize("kind", ["dense", "keys", "blocks"])
def test_contents_of_hidden_keys_never_matter(kind: str, garbage: float) -> None:
    rng = np.random.default_rng(0)
    dead = rng.random(LEN_K) < 0.4
    dead[16:32] = True
    mask = (rng.random(PAIRS) < 0.7) & ~dead
    if kind == "keys":
        mask = ~dead[None, :]
    blocks = BlockMask.from_dense(mask, block_size=16) if kind == "blocks" else None
    dense = Dense(**arrays(rng), mask=mask, keep=dropout_mask(SEED, P, PAIRS), p=P)
    options = options_of(dense, blocks)
    clean = dense.having(k=dense.k.copy(), v=dense.v.copy())
    for name in ("k", "v"):
        getattr(clean, name)[:, :, dead] = 0
        getattr(dense, name)[:, :, dead] = garbage
    got, want = run(dense, options), run(clean, options)
    for a, b in zip((*got[:2], *got[2].values()), (*want[:2], *want[2].values()), strict=True):
        assert a.tobytes() == b.tobytes()
    assert (got[2]["k"][:, :, dead] == 0).all()
    assert (got[2]["v"][:, :, dead] == 0).all()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("blocks", [False, True])
def test_garbage_reaches_only_the_rows_that_see_it(blocks: bool, garbage: float) -> None:
    """Heads of one unit see different keys."""
    rng = np.random.default_rng(0)
    mask = rng.random(PAIRS) < 0.5
    dense = Dense(**arrays(rng), mask=mask)
    options = options_of(dense, BlockMask.from_dense(mask, block_size=16) if blocks else None)
    want_out, want_lse, want = run(dense, options)
    for name in ("k", "v"):
        getattr(dense, name)[1, 1, 17] = garbage
    out, lse, grads = run(dense, options)
    touched = np.zeros(PAIRS[:3], bool)
    touched[1, 2:] = mask[1, 2:, :, 17]
    assert not np.isfinite(out[touched]).any()
    np.testing.assert_array_equal(out[~touched], want_out[~touched])
    np.testing.assert_array_equal(lse[~touched], want_lse[~touched])
    np.testing.assert_array_equal(grads["q"][~touched], want["q"][~touched])
    assert np.isfinite(grads["q"][~touched]).all()


def tiles_of(dense: Dense, options: Options) -> list[Any]:
    """The tiles that forward visits."""
    shape = _cpu_tiles.Shape.of(dense.q, dense.k, dense.v)
    call = _cpu_tiles.Call.of(shape, _cpu_tiles.Extras.of(options, shape.axes, dense.q.dtype))
    return [
        place
        for unit in call.units()
        for q0, q1 in call.row_tiles()
        for place in call.tiles(unit, q0, q1)
    ]


@pytest.mark.parametrize("block", [16, 64, 128, (32, 64), (512, 64)])
def test_absent_blocks_are_not_visited(block: Any) -> None:
    """Each visible block is visited once, and its neighbours are not."""
    rng = np.random.default_rng(0)
    bq, bk = block if isinstance(block, tuple) else (block, block)
    length = 1024
    pattern = np.eye(-(-length // bq), -(-length // bk), dtype=bool)
    pattern[0, -1] = True
    mask = BlockMask.from_blocks(pattern, block_size=block, shape=(length, length))
    q = rng.standard_normal((1, length, 4))
    dense = Dense(q, q, q)
    tiles = tiles_of(dense, options_of(dense, mask))
    visited = sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in tiles)
    # Several rows of small blocks are one tile, which visits what any of them shows.
    joined = max(1, _cpu_tiles.LEAST_ROWS // bq)
    assert visited <= pattern.sum() * bq * bk * joined
    assert visited >= pattern.sum() * bq * bk


def test_hidden_tiles_of_dense_masks_are_not_visited() -> None:
    length = 1024
    q = np.zeros((1, length, 4))
    i, j = np.arange(length)[:, None], np.arange(length)
    mask = (i // 256 == j // 256) & (j <= i)
    dense = Dense(q, q, q)
    tiles = tiles_of(dense, options_of(dense.having(mask=mask)))
    assert sorted((t.q0, t.k0, t.k1) for t in tiles) == [
        (n, n, n + 256) for n in range(0, 1024, 256)
    ]


def test_whole_tiles_are_not_cut() -> None:
    """Neither by full blocks nor by the True part of a mask; and a cut has only its columns."""
    length = 512
    q = np.zeros((1, length, 4))
    dense = Dense(q, q, q)
    mask = np.ones((length, length), bool)
    mask[300:, 100:120] = False
    for blocks in (None, BlockMask.from_dense(mask, block_size=128)):
        options = options_of(dense.having(mask=mask), blocks)
        shape = _cpu_tiles.Shape.of(q, q, q)
        call = _cpu_tiles.Call.of(shape, _cpu_tiles.Extras.of(options, shape.axes, q.dtype))
        (unit,) = call.units()
        cuts = {
            (place.q0, place.k0): call.masks.cut(place)
            for q0, q1 in call.row_tiles()
            for place in call.tiles(unit, q0, q1)
        }
        assert any(cut is None for cut in cuts.values())
        found = [cut for cut in cuts.values() if cut is not None]
        assert [columns for cut in found for columns, _ in cut.parts] == [slice(100, 120)] * len(
            found
        )


@pytest.mark.parametrize("lengths", [(100, 129), (129, 100), (1000, 999), (1, 300), (300, 1)])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_blocks_of_odd_lengths(lengths: tuple[int, int], block: int) -> None:
    rng = np.random.default_rng(0)
    len_q, len_k = lengths
    pattern = rng.random((HEADS, -(-len_q // block), -(-len_k // block))) < 0.5
    pattern[1, 0], pattern[2] = False, False
    mask = BlockMask.from_blocks(pattern, block_size=block, shape=lengths)
    dense = Dense(**arrays(rng, 1, len_q, len_k), right=0, q_offset=len_k - len_q)
    full = dense.having(mask=mask.to_dense())
    check(full, options_of(full, mask))


def test_full_blocks_are_no_mask_at_all() -> None:
    dense, options = call_of(("causal", "sinks"))
    ones = BlockMask.from_dense(np.ones((LEN_Q, LEN_K), bool), block_size=16)
    full = run(dense, options_of(dense, ones))
    for a, b in zip(full[:2], run(dense, options)[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
