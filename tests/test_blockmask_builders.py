"""Patterns of the literature: each against the sets its paper writes down, built here pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash import BlockMask
from tests.blockmask import PROPERTY, SIZES, raised, same

# (Lq, Lk, q_offset)
FRAMES = [
    (100, 100, None),
    (129, 129, None),
    (37, 100, None),
    (100, 37, None),
    (50, 60, 0),
    (50, 60, 13),
    (60, 50, -25),
    (40, 40, 200),
    (0, 9, None),
    (9, 0, None),
    (1, 1, None),
]


def by_rows(frame: tuple[int, int, int | None], visible: Callable[[int], set[int]]) -> np.ndarray:
    """Bool (1, Lq, Lk) where the query at position d sees the keys `visible(d)`."""
    len_q, len_k, offset = frame
    dense = np.zeros((1, len_q, len_k), bool)
    for i in range(len_q):
        d = i + (len_k - len_q if offset is None else offset)
        dense[0, i, [j for j in visible(d) if 0 <= j < len_k]] = True
    return dense


def framed(frame: tuple[int, int, int | None], size: Any) -> dict[str, Any]:
    return {"shape": frame[:2], "q_offset": frame[2], "block_size": size}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", SIZES)
def test_sliding_window(frame: Any, size: Any) -> None:
    far = 10**6
    for left, right in (
        (0, 0),
        (5, 0),
        (3, 20),
        (40, 40),
        (None, 0),
        (2, None),
        (None, None),
        (far, 10**30),
    ):
        wanted = by_rows(
            frame,
            lambda d, left=left, right=right: set(
                range(
                    0 if left is None else max(0, d - left),
                    frame[1] if right is None else min(frame[1], d + right + 1),
                )
            ),
        )
        same(BlockMask.sliding_window((left, right), **framed(frame, size)), wanted)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", SIZES)
def test_dilated_window(frame: Any, size: Any) -> None:
    for left, right, gap in (
        (2, 0, 3),
        (4, 4, 7),
        (None, 1, 2),
        (1, 1, 33),
        (3, 3, 1),
        (1, 1, 10**30),
    ):
        wanted = by_rows(
            frame,
            lambda d, left=left, right=right, gap=gap: {
                d + n * gap for n in range(-400 if left is None else -left, right + 1)
            },
        )
        same(BlockMask.dilated_window((left, right), gap, **framed(frame, size)), wanted)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 5, 16, 50, 10**30])
def test_strided(frame: Any, size: Any, stride: int) -> None:
    def before(d: int) -> set[int]:
        """A(1) and A(2) of section 4.3: {t, ..., i} with t = max(0, i - l), and (i - j) mod l = 0."""
        near = set(range(max(0, d - stride), d + 1))
        return near | {j for j in range(d + 1) if (d - j) % stride == 0}

    def after(d: int) -> set[int]:
        return {j for j in range(frame[1]) if j > d and (j - d <= stride or (j - d) % stride == 0)}

    same(BlockMask.strided(stride, **framed(frame, size)), by_rows(frame, before))
    wanted = by_rows(frame, lambda d: before(d) | after(d))
    same(BlockMask.strided(stride, causal=False, **framed(frame, size)), wanted)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("stride", "summary"), [(1, 1), (5, 2), (16, 1), (50, 50), (30, 3), (10**30, 1)]
)
def test_fixed(frame: Any, size: Any, stride: int, summary: int) -> None:
    def both_ways(d: int) -> set[int]:
        """A(1) and A(2) of section 4.3, for any order."""
        chunk = {j for j in range(frame[1]) if d >= 0 and j // stride == d // stride}
        return chunk | {j for j in range(frame[1]) if j % stride in range(stride - summary, stride)}

    wanted = by_rows(frame, both_ways)
    same(BlockMask.fixed(stride, summary, causal=False, **framed(frame, size)), wanted)
    wanted = by_rows(frame, lambda d: {j for j in both_ways(d) if j <= d})
    same(BlockMask.fixed(stride, summary, **framed(frame, size)), wanted)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", SIZES)
def test_global_window(frame: Any, size: Any) -> None:
    every = set(range(frame[1]))
    for positions in ([], [0], [0, 1, 30], [frame[1] - 1, 0, 0]):
        positions = [p for p in positions if p in every]
        chosen = set(positions)
        wanted = by_rows(
            frame,
            lambda d, chosen=chosen: (
                every if d in chosen else chosen | set(range(max(0, d - 4), d + 3))
            ),
        )
        mask = BlockMask.global_window((4, 2), np.array(positions, np.int32), **framed(frame, size))
        same(mask, wanted)


# ---- whole blocks


def aligned(lengths: tuple[int, int], size: int) -> tuple[list[int], int]:
    """For each block of queries, the block of keys at its place; and how many of these there are."""
    n_q, n_k = (-(-n // size) for n in lengths)
    return [a + n_k - n_q for a in range(n_q)], n_k


@pytest.mark.parametrize(
    "lengths", [(500, 500), (512, 400), (100, 900), (700, 100), (0, 64), (64, 0), (1, 1)]
)
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    ("random", "window", "first"), [(3, 3, 2), (0, 5, 0), (2, 0, 1), (100, 1, 0), (1, 1, 0)]
)
def test_bigbird(lengths: Any, size: int, random: int, window: int, first: int) -> None:
    options = {"random": random, "window": window, "global_blocks": first, "heads": 3}
    mask = BlockMask.bigbird(shape=lengths, seed=5, block_size=size, **options)
    again = BlockMask.bigbird(shape=lengths, seed=5, block_size=size, **options)
    assert (mask.slots == again.slots).all() and len(mask.bits) == 0
    places, n_k = aligned(lengths, size)
    assert mask.slots.shape == (3, len(places), n_k) and mask.shape == lengths
    for a, place in enumerate(places):
        for h in range(3):
            seen = {c for c in range(n_k) if mask.slots[h, a, c] == -2}
            always = set(range(first)) if not 0 <= place < first else set(range(n_k))
            always |= set(range(place - window // 2, place + window // 2 + 1)) if window else set()
            always &= set(range(n_k))
            assert always <= seen
            assert len(seen - always) == min(random, n_k - len(always))


def test_bigbird_draws() -> None:
    def draw(seed: int, heads: int = 1) -> np.ndarray:
        return BlockMask.bigbird(shape=(2048, 2048), seed=seed, block_size=16, heads=heads).slots

    assert (draw(0) != draw(1)).any()
    heads = draw(0, 2)
    assert (heads[0] != heads[1]).any() and (heads[0] == draw(0)[0]).all()
    # Uniform over the blocks that are neither in the window nor global: 3 of 123 or so per row.
    counts = (draw(3, 60)[:, 2:, 2:] == -2).sum(axis=0)
    rows, keys = np.indices(counts.shape)
    drawn = counts[np.abs(rows - keys) > 1] / 60
    p = 3 / 123
    assert abs(drawn.mean() / p - 1) < 0.001  # every row has 3
    assert abs(drawn.var() * 60 / (p * (1 - p)) - 1) < 0.1
    columns = np.where(np.abs(rows - keys) > 1, counts, 0).sum(axis=0) / 123 / 60
    assert np.abs(columns - p).max() < 5 * np.sqrt(p / 123 / 60)
    # The same draws in every release: raw Philox numbers, whose stream NumPy has promised to keep.
    small = BlockMask.bigbird(
        shape=(160, 160), seed=2024, random=1, window=1, global_blocks=1, block_size=16
    )
    assert repr(small).split()[-10:] == GOLDEN


GOLDEN = [
    "##########",
    "##.....#..",
    "#.#.....#.",
    "#..#.#....",
    "##..#.....",
    "#....#...#",
    "#.....#..#",
    "#.....##..",
    "#.#.....#.",
    "#..#.....#",
]


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 13, 16])
def test_butterfly(blocks: int, size: int) -> None:
    lengths = (blocks * size, blocks * size - 3)
    side = 1 << (blocks - 1).bit_length()
    for last in range(5):
        # The sum of the butterfly factor matrices of strides 2, 4, ..., 2**last (section 3 of the paper):
        # block diagonal, of blocks [[D, D], [D, D]] with diagonal D.
        total = np.eye(side, dtype=int)
        for stride in (1 << n for n in range(1, last + 1) if 1 << n <= side):
            factor = np.kron(np.ones((2, 2), int), np.eye(stride // 2, dtype=int))
            total += np.kron(np.eye(side // stride, dtype=int), factor)
        visible = (total > 0)[:blocks, :blocks]
        wanted = visible.repeat(size, axis=0).repeat(size, axis=1)[None, : lengths[0], : lengths[1]]
        same(BlockMask.butterfly(shape=lengths, max_stride=1 << last, block_size=size), wanted)
    if side <= 16:
        same(BlockMask.butterfly(shape=lengths, block_size=size), wanted)


def test_butterfly_beyond_the_square() -> None:
    mask = BlockMask.butterfly(shape=(96, 128), block_size=16, global_blocks=1)
    # Queries 0 to 5 are where keys 2 to 7 are: 010 sees 010, 011, 000, 110, and the global 000.
    assert repr(mask).split()[-6:] == [
        "#.##..#.",
        "####...#",
        "#...###.",
        "##..##.#",
        "#.#.#.##",
        "#..#.###",
    ]
    tall = BlockMask.butterfly(shape=(64, 32), block_size=16)
    assert repr(tall).split()[-4:] == ["..", "..", "##", "##"]
    assert BlockMask.butterfly(shape=(0, 32)).density == 0.0
    assert BlockMask.butterfly(shape=(4096, 4096), max_stride=1 << 80).density == (5 + 1) / 32


# ---- documents


def by_ids(ids: Any, ids_k: Any) -> np.ndarray:
    """Bool (*B, 1, Lq, Lk)."""
    queries, keys = np.asarray(ids), np.asarray(ids_k)
    lead = np.broadcast_shapes(queries.shape[:-1], keys.shape[:-1])
    dense = np.zeros((*lead, 1, queries.shape[-1], keys.shape[-1]), bool)
    queries, keys = (np.broadcast_to(x, (*lead, x.shape[-1])) for x in (queries, keys))
    for *item, _, i, j in np.ndindex(dense.shape):
        q, k = queries[(*item, i)], keys[(*item, j)]
        dense[(*item, 0, i, j)] = q == k and q >= 0
    return dense


@PROPERTY
@given(
    lead=st.sampled_from([(), (1,), (2,), (2, 1), (0,)]),
    lead_k=st.sampled_from([(), (1,), (2,), (0,)]),
    lengths=st.tuples(*[st.sampled_from([0, 1, 16, 31, 64, 70])] * 2),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 99),
)
def test_documents_by_ids(lead: Any, lead_k: Any, lengths: Any, size: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 4, (*lead, lengths[0]))
    ids_k = rng.integers(-2, 3, (*lead_k, lengths[1]))
    if seed % 2:  # consecutive, as packed documents are
        ids.sort(axis=-1)
        ids_k.sort(axis=-1)
    same(BlockMask.documents(ids, block_size=size), by_ids(ids, ids))
    try:
        np.broadcast_shapes(lead, lead_k)
    except ValueError:
        start = f"ids has batch axes {lead}, and ids_k has {lead_k}."
        assert raised(ValueError, BlockMask.documents, ids, ids_k).startswith(start)
    else:
        same(BlockMask.documents(ids, ids_k, block_size=size), by_ids(ids, ids_k))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "lengths", [[], [0], [5], [1, 2, 3], [40, 0, 60, 0, 0, 1], [64, 64], [0, 100]]
)
def test_documents_by_lengths(lengths: list[int], size: Any) -> None:
    ids = [n for n, length in enumerate(lengths) for _ in range(length)]
    cumulative = np.cumsum([0, *lengths]).astype(np.int32)
    same(BlockMask.documents(lengths=lengths, block_size=size), by_ids(ids, ids))
    same(BlockMask.documents(cu_seqlens=cumulative, block_size=size), by_ids(ids, ids))
    longer = [*ids, *[-1] * 20]
    shape = len(ids), len(longer)
    same(
        BlockMask.documents(lengths=np.array(lengths, np.uint64), shape=shape, block_size=size),
        by_ids(ids, longer),
    )
    same(
        BlockMask.documents(cu_seqlens=cumulative.tolist(), shape=shape[::-1], block_size=size),
        by_ids(longer, ids),
    )
    lengths_k = [(n * 7 + 3) % 30 for n in lengths]
    ids_k = [n for n, length in enumerate(lengths_k) for _ in range(length)]
    same(
        BlockMask.documents(lengths=lengths, lengths_k=lengths_k, block_size=size),
        by_ids(ids, ids_k),
    )


# ---- long sequences


def test_long_patterns_take_few_evaluations() -> None:
    """131072 queries and keys: 2**34 pairs, of which a few million are looked at."""
    length = 131072
    frame = {"shape": (length, length)}
    start = time.process_time()
    masks = {
        "dilated": BlockMask.dilated_window((1000, 0), 7, **frame),
        "strided": BlockMask.strided(362, **frame),
        "fixed": BlockMask.fixed(256, 8, **frame),
        "global": BlockMask.global_window((256, 256), [0, 70000], **frame),
        "documents": BlockMask.documents(lengths=[1000] * 131, **frame),
    }
    assert time.process_time() - start < 10  # 0.6 s on a slow machine
    j = np.arange(length)
    for d in (0, 1, 255, 256, 70000, 70001, 131071):
        gap = d - j
        rows = {
            "dilated": (gap >= 0) & (gap <= 7000) & (gap % 7 == 0),
            "strided": (gap >= 0) & ((gap <= 362) | (gap % 362 == 0)),
            "fixed": (gap >= 0) & ((d // 256 == j // 256) | (j % 256 >= 248)),
            "global": (abs(gap) <= 256) | (d in (0, 70000)) | (j == 0) | (j == 70000),
            "documents": (d < 131000) & (j < 131000) & (d // 1000 == j // 1000),
        }
        for name, wanted in rows.items():
            found = masks[name].element_tile((0,), d, d + 1, 0, length)[0]
            assert (found == wanted).all(), (name, d)
