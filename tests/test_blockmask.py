"""BlockMask: storage, conversions, algebra and tiles, against dense bool arrays (museum J3, J5, J7)."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import sys
import time
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import BlockMask

PROPERTY = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SIZES = [16, 32, 48, (16, 32), (48, 16), (64, 80), 128]
LEADS = [(1,), (2,), (3, 1), (1, 2), (2, 2), (0, 2), (2, 0), (2, 1, 3)]
LENGTHS = st.sampled_from([0, 1, 15, 16, 17, 48, 100, 129]) | st.integers(0, 140)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def dense_mask(lead: tuple[int, ...], shape: tuple[int, int], seed: int) -> np.ndarray:
    """Bool (*lead, *shape) with empty, full and ragged regions that end on and off blocks."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*lead, *shape)) < rng.choice([0.02, 0.5, 0.98])
    for _ in range(6):
        item = tuple(rng.integers(0, n) for n in lead if n)
        rows, keys = (
            slice(*sorted(rng.integers(0, n + 1, 2) // s * s))
            for n, s in zip(shape, rng.choice([1, 16], 2), strict=True)
        )
        if len(item) == len(lead):
            mask[(*item, rows, keys)] = rng.random() < 0.6
    return mask


def same(mask: BlockMask, dense: np.ndarray) -> None:
    """Storage and meaning of `mask` are those of bool (*lead, Lq, Lk), block by block and bit by bit."""
    assert mask.shape == dense.shape[-2:]
    assert (*mask.batch, mask.heads) == dense.shape[:-2]
    (bq, bk), (len_q, len_k) = mask.block_size, mask.shape
    assert mask.slots.shape == (*dense.shape[:-2], -(-len_q // bq), -(-len_k // bk))
    assert mask.slots.dtype == np.int32 and mask.bits.dtype == np.uint32
    assert mask.bits.shape[1:] == (bq, -(-bk // 32))
    for array in (mask.slots, mask.bits):
        assert array.flags.c_contiguous and not array.flags.writeable
    for place in np.ndindex(mask.slots.shape):
        *item, a, c = place
        block = dense[(*item, slice(a * bq, (a + 1) * bq), slice(c * bk, (c + 1) * bk))]
        slot = mask.slots[place]
        if block.all() or not block.any():
            assert slot == (-2 if block.all() else -1)
            continue
        rows, keys = np.arange(bq)[:, None], np.arange(32 * mask.bits.shape[2])
        stored = (mask.bits[slot][rows, keys // 32] >> (keys % 32).astype(np.uint32)) & 1
        wanted = np.zeros(stored.shape, bool)
        wanted[: block.shape[0], : block.shape[1]] = block
        assert (stored == wanted).all(), place
    # No row of bits is kept twice, or for nothing.
    assert set(mask.slots[mask.slots >= 0]) == set(range(len(mask.bits)))
    assert len({row.tobytes() for row in mask.bits}) == len(mask.bits)
    assert mask.density == (dense.mean() if dense.size else 0.0)
    found = mask.to_dense()
    assert found.dtype == bool and found.shape == dense.shape
    assert (found == dense).all()


def raised(kind: type[Exception], function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the error `function` raises: exactly `kind`, with a way out."""
    with pytest.raises(kind) as info:
        function(*args, **kwargs)
    assert type(info.value) is kind
    assert "\n  Way out: " in str(info.value)
    return str(info.value)


# ---- from what a user has


@PROPERTY
@given(
    lead=st.sampled_from(LEADS),
    len_q=LENGTHS,
    len_k=LENGTHS,
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 99),
)
def test_round_trip_of_dense_masks(
    lead: tuple[int, ...], len_q: int, len_k: int, size: Any, seed: int
) -> None:
    dense = dense_mask(lead, (len_q, len_k), seed)
    mask = BlockMask.from_dense(dense, block_size=size)
    same(mask, dense)
    assert mask.block_size == pair(size)


def test_dense_masks_of_any_strides() -> None:
    dense = dense_mask((3, 2), (90, 70), 1)
    same(BlockMask.from_dense(dense[0, 0], block_size=32), dense[:1, 0])
    same(
        BlockMask.from_dense(dense[::-1, :, ::-2, 1::3], block_size=16), dense[::-1, :, ::-2, 1::3]
    )
    same(BlockMask.from_dense(dense.swapaxes(-1, -2), block_size=16), dense.swapaxes(-1, -2))
    wide = np.broadcast_to(dense[0, 0], (50, 4, 90, 70))
    mask = BlockMask.from_dense(wide, block_size=16)
    same(mask, wide)
    assert len(mask.bits) <= 6 * 5  # equal blocks share a row


@PROPERTY
@given(len_q=LENGTHS, len_k=LENGTHS, size=st.sampled_from(SIZES), seed=st.integers(0, 99))
def test_blocks(len_q: int, len_k: int, size: Any, seed: int) -> None:
    bq, bk = pair(size)
    n_q, n_k = -(-len_q // bq), -(-len_k // bk)
    rng = np.random.default_rng(seed)
    for lead in ((), (2,), (1, 3)):
        for counts in ((n_q, n_k), (1, n_k), (n_q, 1), (1, 1)):
            blocks = rng.random((*lead, *counts)) < 0.5
            mask = BlockMask.from_blocks(blocks, block_size=size, shape=(len_q, len_k))
            whole = np.broadcast_to(blocks, (*(lead or (1,)), n_q, n_k))
            elements = whole.repeat(bq, axis=-2).repeat(bk, axis=-1)[..., :len_q, :len_k]
            same(mask, elements)


@pytest.mark.parametrize("length", [100, 129, 1000])
@pytest.mark.parametrize("size", [64, 128])
def test_J3_the_last_block_is_partly_outside(size: int, length: int) -> None:
    rng = np.random.default_rng(length)
    counts = -(-length // size)
    blocks = rng.random((2, counts, counts)) < 0.5
    blocks[0, -1, -1], blocks[1, -1] = True, False
    mask = BlockMask.from_blocks(blocks, block_size=size, shape=(length, length))
    i = np.arange(length) // size
    same(mask, blocks[:, i[:, None], i])
    assert 0 <= mask.density <= 1 and (~mask).density == pytest.approx(1 - mask.density, abs=1e-15)
    full = BlockMask.from_blocks(np.ones((1, 1), bool), block_size=size, shape=(length, length))
    assert full.density == 1.0 and (~full).density == 0.0 and (full.slots == -2).all()


FORMATS = ["bsr", "csr", "csc", "coo", "lil", "dok"]


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_matrices(name: str, kind: str) -> None:
    dense = dense_mask((), (100, 90), 3)
    values = np.where(dense, np.random.default_rng(0).standard_normal(dense.shape), 0)
    matrix = getattr(scipy.sparse, f"coo_{kind}")(values).asformat(name)
    for size in SIZES:
        same(BlockMask.from_sparse(matrix, block_size=size), dense[None])
    blocks = scipy.sparse.coo_array(dense).asformat(name)
    mask = BlockMask.from_sparse(blocks, block_size=(16, 32), shape=(1595, 2880))
    same(mask, dense[None].repeat(16, axis=1).repeat(32, axis=2)[:, :1595])


def test_sparse_diagonals() -> None:
    matrix = scipy.sparse.diags_array([1.0, -1.0, 2.0], offsets=[-30, 0, 7], shape=(90, 80))
    same(BlockMask.from_sparse(matrix, block_size=32), matrix.toarray()[None] != 0)


def test_sparse_stored_zeros_and_duplicates() -> None:
    bsr = scipy.sparse.bsr_array(
        np.kron(np.eye(3, dtype=bool), np.tri(32, dtype=bool)), blocksize=(32, 32)
    )
    assert bsr.nnz == 3 * 32 * 32  # the zeros above the diagonal are stored
    same(BlockMask.from_sparse(bsr, block_size=32), bsr.toarray()[None])
    entries = np.array([1.0, -1.0, 0.0, np.nan]), (np.array([3, 3, 5, 6]), np.array([4, 4, 5, 17]))
    mask = BlockMask.from_sparse(scipy.sparse.coo_array(entries, shape=(20, 20)), block_size=16)
    assert np.argwhere(mask.to_dense()[0]).tolist() == [[3, 4], [6, 17]]
    zero = scipy.sparse.coo_array((np.zeros(1), ([0], [0])), shape=(2, 2))
    assert BlockMask.from_sparse(zero, shape=(32, 32), block_size=16).density == 0.0
    same(
        BlockMask.from_sparse(scipy.sparse.csr_array((0, 7)), block_size=16),
        np.zeros((1, 0, 7), bool),
    )


def test_sparse_matrices_on_the_gpu_are_copied() -> None:
    host = scipy.sparse.csr_array(np.tri(40))
    calls = []

    class OnDevice:
        shape = host.shape

        def get(self) -> Any:
            calls.append("get")
            return host

        def tocoo(self) -> None:
            raise AssertionError("worked on the device")

    OnDevice.__module__ = "cupyx.scipy.sparse._csr"
    same(BlockMask.from_sparse(OnDevice(), block_size=16), np.tri(40, dtype=bool)[None])
    assert calls == ["get"]


@pytest.mark.gpu
def test_device_arrays_are_copied() -> None:
    import cupy
    import cupyx.scipy.sparse

    dense = dense_mask((2,), (100, 90), 3)
    same(BlockMask.from_dense(cupy.asarray(dense), block_size=16), dense)
    blocks = np.random.default_rng(0).random((2, 7, 3)) < 0.5
    found = BlockMask.from_blocks(cupy.asarray(blocks), block_size=(16, 32), shape=(100, 90))
    wanted = BlockMask.from_blocks(blocks, block_size=(16, 32), shape=(100, 90))
    assert (found.slots == wanted.slots).all()
    matrix = cupyx.scipy.sparse.csr_matrix(cupy.asarray(dense[0].astype(np.float32)))
    same(BlockMask.from_sparse(matrix, block_size=16), dense[:1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("batch", "heads", "lead"),
    [
        (1, 1, (1,)),
        (3, 2, (3, 2)),
        ((2, 3), 2, (2, 3, 2)),
        ((), 4, (4,)),
        ((1,), 2, (1, 2)),
        (0, 2, (0, 2)),
    ],
)
def test_functions(batch: Any, heads: int, lead: tuple[int, ...], size: Any) -> None:
    def fn(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ((i + 2 * j + 3 * h + 5 * b) % 7 < 3) | (i // 40 == j // 30)

    item = np.arange(int(np.prod(lead)))
    b, h = (x.reshape(*lead, 1, 1) for x in (item // max(1, heads), item % max(1, heads)))
    i, j = np.arange(100)[:, None], np.arange(130)
    mask = BlockMask.from_function(fn, shape=(100, 130), batch=batch, heads=heads, block_size=size)
    same(mask, np.broadcast_to(fn(b, h, i, j), (*lead, 100, 130)))


def test_functions_see_some_blocks_at_a_time() -> None:
    length, most, seen = 2000, 0, 0
    table = np.random.default_rng(0).random(length)  # an index outside of [0, L) would raise

    def fn(b: Any, h: Any, i: Any, j: Any) -> Any:
        nonlocal most, seen
        assert all(isinstance(x, np.ndarray) and x.dtype == np.int64 for x in (b, h, i, j))
        result = (table[i] < table[j]) & (b == 1) & (h >= 0)
        most, seen = max(most, result.size), seen + result.size
        return result

    tracemalloc.start()
    mask = BlockMask.from_function(fn, shape=(length, length), heads=2, batch=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 4 * length * length  # every pair once
    assert most <= 1 << 19
    assert peak < 2 * mask.bits.nbytes + (48 << 20) < 4 * length * length * 8
    assert mask.to_dense()[1, 1, 77, 1234] == (table[77] < table[1234])
    assert not mask.to_dense()[0].any()


def test_functions_that_return_less_than_asked() -> None:
    for fn in (lambda b, h, i, j: True, lambda b, h, i, j: np.bool_(1), lambda b, h, i, j: j >= 0):
        mask = BlockMask.from_function(fn, shape=(20, 30), block_size=16)
        same(mask, np.ones((1, 20, 30), bool))


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


# ---- an object to hold and to show


def test_immutable_and_compared_by_identity() -> None:
    mask = BlockMask.from_dense(np.tri(40, dtype=bool), block_size=16)
    other = BlockMask.from_dense(np.tri(40, dtype=bool), block_size=16)
    assert mask != other and mask == mask and len({mask, other, mask}) == 2
    for array in (mask.slots, mask.bits):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for name in ("shape", "slots", "anything"):
        with pytest.raises(AttributeError):
            setattr(mask, name, None)
    watch = weakref.ref(mask)
    del mask
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies(again: Any) -> None:
    dense = dense_mask((2, 3), (70, 50), 1)
    same(again(BlockMask.from_dense(dense, block_size=32)), dense)


def test_repr() -> None:
    dense = np.tri(64, 96, 32, dtype=bool)
    assert repr(
        BlockMask.from_dense(np.stack([dense, dense]), block_size=(32, 16))
    ).splitlines() == [
        "BlockMask(shape=(64, 96), block_size=(32, 16), batch=(), heads=2), density 0.672",
        "  2 x 2 x 6 blocks: 12 full, 8 partial (2 distinct), 4 absent",
        "    ##++..",
        "    ####++",
    ]
    lines = repr(BlockMask.sliding_window((5000, 0), shape=(50000, 60000))).splitlines()
    assert len(lines) <= 2 + 16 and max(map(len, lines)) <= 100
    assert {len(line) for line in lines[2:]} == {len(lines[2])}
    empty = repr(BlockMask.from_blocks(np.zeros((1, 1), bool), shape=(0, 7)))
    assert empty.startswith(
        "BlockMask(shape=(0, 7), block_size=(128, 128), batch=(), heads=1), density 0\n"
    )


class Axes:
    """Takes what matplotlib's Axes would draw."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.update({name: (args, kwargs)})


def test_plot_draws_the_share_of_each_block() -> None:
    dense = dense_mask((2, 3), (100, 70), 4)
    mask = BlockMask.from_dense(dense, block_size=(32, 16))
    axes = Axes()
    assert mask.plot(axes, index=(1, 2)) is axes
    (image,), options = axes.calls["imshow"]
    for a in range(4):
        for c in range(5):
            block = dense[1, 2, a * 32 : a * 32 + 32, c * 16 : c * 16 + 16]
            assert image[a, c] == block.mean()
    assert options["extent"] == (0, 80, 128, 0)
    assert axes.calls["set_xlim"] == ((0, 70), {}) and axes.calls["set_ylim"] == ((100, 0), {})
    mask.plot(axes)
    assert axes.calls["imshow"][0][0][0, 0] == dense[0, 0, :32, :16].mean()
    empty = Axes()
    BlockMask.from_dense(np.zeros((0, 5), bool)).plot(empty)
    assert "imshow" not in empty.calls
    assert raised(ValueError, mask.plot, axes, index=(2, 0)).startswith("index (2, 0) is outside")
    assert raised(ValueError, mask.plot, axes, index=(0,)).startswith("index (0,) is outside")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    mask = BlockMask.from_dense(np.tri(40, dtype=bool))
    assert raised(ImportError, mask.plot).startswith(
        "plot needs matplotlib, which cannot be imported"
    )


def test_plot_with_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = BlockMask.from_dense(np.tri(100, dtype=bool), block_size=16).plot()
    axes.figure.canvas.draw()
    assert axes.get_ylim() == (100, 0) and axes.get_xlabel() == "key"


def test_docstring_examples() -> None:
    import doctest

    tried = 0
    for module in ("", "_builders", "_convert", "_grid", "_patterns"):
        failed, count = doctest.testmod(importlib.import_module(f"cuflash._blockmask{module}"))
        assert failed == 0 and count > 0
        tried += count
    assert tried > 20


# ---- large masks


def test_J7_more_blocks_than_any_fixed_buffer() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.random((3, 150, 151)) < 0.3
    assert blocks.size > 40000 and blocks.size > 2 * 32768
    mask = BlockMask.from_blocks(blocks, shape=(16 * 150 - 3, 16 * 151 - 5), block_size=16)
    assert (mask.slots == np.where(blocks, -2, -1)).all()
    for h, i, j in rng.integers(0, (3, 2397, 2411), (2000, 3)):
        assert mask.element_tile((h,), i, i + 1, j, j + 1)[0, 0] == blocks[h, i // 16, j // 16]
    part = mask & ~BlockMask.from_function(
        lambda b, h, i, j: i == j, shape=mask.shape, block_size=16
    )
    i = np.arange(2397)
    for h in range(3):
        wanted = blocks[h][i[:, None] // 16, np.arange(2411) // 16] & (
            i[:, None] != np.arange(2411)
        )
        assert (part.element_tile((h,), 0, 2397, 0, 2411) == wanted).all()


def test_J7_bits_of_131072_keys() -> None:
    length = 131072
    rng = np.random.default_rng(1)
    dense = rng.random((160, length)) < 0.5  # 2560 blocks of (64, 128), each with a row of its own
    mask = BlockMask.from_dense(dense, block_size=(64, 128))
    assert len(mask.bits) == 3 * 1024
    for i in (0, 63, 64, 127, 159):
        assert (mask.element_tile((0,), i, i + 1, 0, length)[0] == dense[i]).all()
    assert mask.density == dense.mean()
    assert (mask.T.element_tile((0,), 70000, 131072, 0, 160) == dense.T[70000:]).all()


def test_long_sequences_take_no_time() -> None:
    """Processor time of what takes 0.02 to 0.25 s on a slow machine."""
    length = 131072
    start = time.process_time()
    blocks = BlockMask.from_blocks(np.tri(1024, dtype=bool), shape=(length, length))
    window = BlockMask.sliding_window((1000, 0), shape=(length, length))
    mask = (blocks & window) | ~window.T
    assert mask.visible_tiles(64, 64).shape == (1, 2048, 2048)
    assert time.process_time() - start < 10
    i = np.arange(70000, 70100)[:, None]
    j = np.arange(length)
    near = (j <= i) & (j >= i - 1000)
    wanted = (near & (j // 128 <= i // 128)) | ~((i <= j) & (i >= j - 1000))
    assert (mask.element_tile((0,), 70000, 70100, 0, length) == wanted).all()


# ---- errors

B = np.ones((2, 3), bool)
FN = lambda b, h, i, j: i >= j  # noqa: E731
SPARSE = scipy.sparse.csr_array(np.eye(4))


def blocks(*args: Any, **kwargs: Any) -> Any:
    return lambda: BlockMask.from_blocks(*args, **{"shape": (200, 300), **kwargs})


def function(fn: Any = FN, **kwargs: Any) -> Any:
    return lambda: BlockMask.from_function(fn, **{"shape": (20, 30), **kwargs})


WAYS_IN = {
    "blocks": lambda **kwargs: blocks(B, **kwargs)(),
    "dense": lambda **kwargs: BlockMask.from_dense(B, **kwargs),
    "sparse": lambda **kwargs: BlockMask.from_sparse(SPARSE, **kwargs),
    "function": lambda **kwargs: function(**kwargs)(),
    "regroup": lambda **kwargs: blocks(B)().with_block_size(**kwargs),
    "window": lambda **kwargs: BlockMask.sliding_window((1, 1), shape=(3, 3), **kwargs),
    "documents": lambda **kwargs: BlockMask.documents([1, 2], **kwargs),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(
    ("size", "kind", "start"),
    [
        (0, ValueError, "block_size is 0, and 0 is not a positive multiple of 16."),
        (-16, ValueError, "block_size is -16, and -16 is not a positive multiple of 16."),
        (100, ValueError, "block_size is 100, and 100 is not a positive multiple of 16."),
        ((16, 24), ValueError, "block_size is (16, 24), and 24 is not a positive multiple of 16."),
        ((16,), ValueError, "block_size has 1 entries, and must have 2."),
        ((16, 16, 16), ValueError, "block_size has 3 entries, and must have 2."),
        (16.0, TypeError, "block_size is a float, not an int."),
        (True, TypeError, "block_size is a bool, not an int."),
        ("128", TypeError, "block_size is a str, not an int."),
        (None, TypeError, "block_size is a NoneType, not an int."),
        ((16, 16.0), TypeError, "block_size is a float, not an int."),
        ({16, 32}, TypeError, "block_size is a set, not an int."),
    ],
)
def test_block_sizes_are_refused(way: str, size: Any, kind: type[Exception], start: str) -> None:
    assert raised(kind, WAYS_IN[way], block_size=size).startswith(start)


@pytest.mark.parametrize("way", [blocks, function])
@pytest.mark.parametrize(
    ("shape", "kind", "start"),
    [
        (None, TypeError, "shape is a NoneType, not a pair."),
        (200, TypeError, "shape is an int, not a pair."),
        ("ab", TypeError, "shape is a str, not a pair."),
        ((200,), ValueError, "shape has 1 entries, and must have 2."),
        ((1, 200, 300), ValueError, "shape has 3 entries, and must have 2."),
        ((200, 300.0), TypeError, "shape is a float, not an int."),
        ((200, True), TypeError, "shape is a bool, not an int."),
        ((200, -1), ValueError, "shape is (200, -1), and must be >= 0."),
    ],
)
def test_shapes_are_refused(way: Any, shape: Any, kind: type[Exception], start: str) -> None:
    argument = B if way is blocks else FN
    assert raised(kind, way(argument, shape=shape)).startswith(start)


def test_shape_is_needed() -> None:
    for call in (lambda: BlockMask.from_blocks(B), lambda: BlockMask.from_function(FN)):
        with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'shape'"):
            call()


Z = np.zeros
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    # kinds and dtypes
    "blocks list": (blocks([[True]]), TypeError, "blocks is a list, not an array."),
    "blocks float": (blocks(Z((2, 3))), TypeError, "blocks is float64, and bool is needed."),
    "blocks int": (blocks(Z((2, 3), int)), TypeError, "blocks is int64, and bool is needed."),
    "blocks masked": (blocks(np.ma.masked_array(B)), TypeError, "blocks is a masked array"),
    "blocks axes": (blocks(Z(3, bool)), ValueError, "blocks has 1 axes, and needs at least 2."),
    "mask float": (
        lambda: BlockMask.from_dense(Z((2, 3))),
        TypeError,
        "mask is float64, and bool is needed.",
    ),
    "mask uint8": (
        lambda: BlockMask.from_dense(Z((2, 3), np.uint8)),
        TypeError,
        "mask is uint8, and bool is needed.",
    ),
    "mask none": (lambda: BlockMask.from_dense(None), TypeError, "mask is None, not an array."),
    "mask sparse": (
        lambda: BlockMask.from_dense(SPARSE),
        TypeError,
        "mask is a csr_array, not an array.",
    ),
    "mask axes": (
        lambda: BlockMask.from_dense(Z(5, bool)),
        ValueError,
        "mask has 1 axes, and needs at least 2.",
    ),
    "matrix dense": (
        lambda: BlockMask.from_sparse(B),
        TypeError,
        "matrix is a ndarray, not a sparse matrix.",
    ),
    "matrix none": (
        lambda: BlockMask.from_sparse(None),
        TypeError,
        "matrix is a NoneType, not a sparse matrix.",
    ),
    "matrix axes": (
        lambda: BlockMask.from_sparse(scipy.sparse.coo_array(Z(5))),
        ValueError,
        "matrix has 1 axes, and must have 2.",
    ),
    # patterns of the wrong size (museum J5)
    "J5 nQ": (
        blocks(Z((3, 3), bool)),
        ValueError,
        "blocks has 3 blocks of queries, and 200 queries in blocks of 128 are 2.",
    ),
    "J5 nQ short": (
        blocks(Z((2, 3), bool), shape=(300, 300)),
        ValueError,
        "blocks has 2 blocks of queries, and 300 queries in blocks of 128 are 3.",
    ),
    "J5 nK": (
        blocks(Z((4, 2, 2), bool)),
        ValueError,
        "blocks has 2 blocks of keys, and 300 keys in blocks of 128 are 3.",
    ),
    "J5 size": (
        blocks(B, block_size=64),
        ValueError,
        "blocks has 2 blocks of queries, and 200 queries in blocks of 64 are 4.",
    ),
    "J5 none": (
        blocks(B, shape=(0, 300)),
        ValueError,
        "blocks has 2 blocks of queries, and 0 queries",
    ),
    "J5 matrix": (
        lambda: BlockMask.from_sparse(SPARSE, shape=(200, 512)),
        ValueError,
        "matrix has (4, 4) entries, and (200, 512) in blocks of (128, 128) are (2, 4) blocks.",
    ),
    "J5 matrix of one": (
        lambda: BlockMask.from_sparse(scipy.sparse.eye_array(1), shape=(200, 300)),
        ValueError,
        "matrix has (1, 1) entries, and (200, 300) in blocks of (128, 128) are (2, 3) blocks.",
    ),
    # functions
    "fn": (function(None), TypeError, "fn is a NoneType, not callable."),
    "fn float": (
        function(lambda b, h, i, j: i * 1.0),
        TypeError,
        "fn returned float64, and bool is needed.",
    ),
    "fn none": (
        function(lambda b, h, i, j: None),
        TypeError,
        "fn returned object, and bool is needed.",
    ),
    "fn shape": (
        function(lambda b, h, i, j: np.ones(7, bool)),
        ValueError,
        "fn returned shape (7,) for b, h, i, j that broadcast to (1, 20, 30).",
    ),
    "fn axes": (
        function(lambda b, h, i, j: np.ones((2, 1, 20, 30), bool)),
        ValueError,
        "fn returned shape (2, 1, 20, 30) for",
    ),
    "heads": (function(heads=-1), ValueError, "heads is -1, and must be >= 0."),
    "heads float": (function(heads=2.0), TypeError, "heads is a float, not an int."),
    "batch": (function(batch=(2, -3)), ValueError, "batch is -3, and must be >= 0."),
    "batch none": (function(batch=None), TypeError, "batch is a NoneType, not an int."),
    "batch str": (function(batch="2"), TypeError, "batch is a str, not an int."),
    # algebra
    "and array": (
        lambda: blocks(B)() & B,
        TypeError,
        "BlockMask & a ndarray: & takes two BlockMasks.",
    ),
    "array and": (
        lambda: B & blocks(B)(),
        TypeError,
        "BlockMask & a ndarray: & takes two BlockMasks.",
    ),
    "or none": (
        lambda: blocks(B)() | None,
        TypeError,
        "BlockMask | a NoneType: | takes two BlockMasks.",
    ),
    "true or": (
        lambda: True | blocks(B)(),
        TypeError,
        "BlockMask | a bool: | takes two BlockMasks.",
    ),
    "J5 shapes": (
        lambda: blocks(B)() & blocks(B, shape=(200, 301))(),
        ValueError,
        "& of masks of shape (200, 300) and (200, 301).",
    ),
    "J5 heads": (
        lambda: blocks(Z((2, 1, 1), bool))() | blocks(Z((3, 1, 1), bool))(),
        ValueError,
        "| of masks of 2 and 3 heads.",
    ),
    "J5 batch": (
        lambda: blocks(Z((2, 4, 1, 1), bool))() | blocks(Z((3, 4, 1, 1), bool))(),
        ValueError,
        "| of masks of 2 and 3 batch entries.",
    ),
    "block sizes": (
        lambda: blocks(B)() & blocks(Z((1, 1), bool), block_size=64)(),
        ValueError,
        "& of masks in blocks of (128, 128) and (64, 64).",
    ),
    # the rest
    "constructor": (
        lambda: BlockMask(B, shape=(200, 300)),
        TypeError,
        "BlockMask takes no arguments of its own, and 2",
    ),
    "tile": (
        lambda: blocks(B)().visible_tiles(0, 64),
        ValueError,
        "tile_q is 0, and must be >= 1.",
    ),
    "tile float": (
        lambda: blocks(B)().visible_tiles(64, 6.4),
        TypeError,
        "tile_k is a float, not an int.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_input_is_refused(name: str) -> None:
    function, kind, start = ERRORS[name]
    assert raised(kind, function).startswith(start)


def test_messages_show_what_was_given() -> None:
    message = raised(
        ValueError, lambda: cuflash.BlockMask.from_blocks(B, shape=(200, 400), block_size=(128, 64))
    )
    assert message.splitlines() == [
        "blocks has 3 blocks of keys, and 400 keys in blocks of 64 are 7.",
        "  blocks  (2, 3) bool",
        "  shape=(200, 400), block_size=(128, 64)",
        "  Way out: blocks of shape (..., 2, 7).",
    ]
    message = raised(ValueError, lambda: blocks(B)() & blocks(B, shape=(200, 299))())
    assert (
        "first=BlockMask(shape=(200, 300), block_size=(128, 128), batch=(), heads=1), second="
        in message
    )
