"""BlockMasks of arrays, matrices and functions, against dense bool arrays (museum J3, J7)."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from cuflash import BlockMask
from tests.blockmask import LEADS, LENGTHS, PROPERTY, SIZES, dense_mask, pair, same

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
