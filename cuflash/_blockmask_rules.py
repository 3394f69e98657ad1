"""Rules under which many blocks are equal or known without a look: distance, membership, identity.

What the builders of patterns are made of. Each costs a few evaluations of elements and one table of
blocks, however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuflash._blockmask_grid import ABSENT, FULL, Assembler, Grid, Slots, from_codes


def _single(grid: Grid, codes: np.ndarray, evaluate: Callable[[np.ndarray], np.ndarray]) -> Slots:
    """Storage of one mask for all batches and heads, from codes (nQ, nK)."""
    blocks = Assembler(grid)
    return blocks.finish(from_codes(grid, codes, evaluate, blocks)[None])


def by_distance(grid: Grid, offset: int, sees: Callable[[np.ndarray], np.ndarray]) -> Slots:
    """Pairs that `sees` by d - j alone: blocks at one distance from the diagonal are equal."""
    (n_q, n_k), (bq, bk) = grid.counts, grid.block_size
    first = np.arange(n_q, dtype=np.int64)[:, None] * bq + offset - np.arange(n_k) * bk
    step = int(np.gcd(bq, bk))
    low = int(first.min()) if first.size else 0

    def evaluate(codes: np.ndarray) -> np.ndarray:
        delta = (low + codes * step)[:, None] + np.arange(1 - bk, bq)
        windows = np.lib.stride_tricks.sliding_window_view(sees(delta), bk, axis=1)
        return windows[..., ::-1]  # row r, key s: delta of the block's corner + r - s

    return _single(grid, (first - low) // step, evaluate)


def by_member(grid: Grid, axis: int, members: np.ndarray) -> Slots:
    """Pairs whose query (axis 0) or key (axis 1) is one of `members`, bool (Lq,) or (Lk,)."""
    blocks = _padded(members, grid.block_size[axis], False)
    codes = np.where(blocks.any(axis=1), np.arange(len(blocks)), ABSENT)

    def evaluate(some: np.ndarray) -> np.ndarray:
        tiles = np.expand_dims(blocks[some], 2 - axis)
        return np.broadcast_to(tiles, (len(some), *grid.block_size))

    return _single(grid, np.broadcast_to(np.expand_dims(codes, 1 - axis), grid.counts), evaluate)


def _padded(values: np.ndarray, block: int, fill: Any) -> np.ndarray:
    """(blocks, block) of (n,), the last block filled up."""
    padded = np.full(-(-len(values) // block) * block, fill, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, block)


def same_id(grid: Grid, ids_q: Sequence[np.ndarray], ids_k: Sequence[np.ndarray]) -> Slots:
    """Pairs of equal ids, one mask (n, nQ, nK) per pair of int64 arrays (Lq,), (Lk,).

    Negative ids are equal to none. Blocks of one id, and blocks whose ids cannot meet, are told by
    their least and largest.
    """
    n_q, n_k = grid.counts
    blocks = Assembler(grid)
    slots = np.empty((len(ids_q), n_q, n_k), np.int32)
    for item, pair in enumerate(zip(ids_q, ids_k, strict=True)):
        sides = [_padded(ids, block, -1) for ids, block in zip(pair, grid.block_size, strict=True)]
        (low_q, high_q), (low_k, high_k) = (
            _range(ids, block) for ids, block in zip(pair, grid.block_size, strict=True)
        )
        meet = (low_q[:, None] <= high_k) & (low_k <= high_q[:, None]) & (high_k >= 0)
        one = (low_q == high_q)[:, None] & (low_k == high_k)
        codes = np.arange(n_q * n_k, dtype=np.int64).reshape(n_q, n_k)
        codes = np.where(meet, np.where(one, FULL, codes), ABSENT)

        def evaluate(some: np.ndarray, sides: list[np.ndarray] = sides) -> np.ndarray:
            q, k = sides[0][some // n_k][:, :, None], sides[1][some % n_k][:, None, :]
            return (q == k) & (q >= 0)

        slots[item] = from_codes(grid, codes, evaluate, blocks)
    return blocks.finish(slots)


def _range(ids: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest id of each block."""
    starts = np.arange(0, len(ids), block)
    if not len(starts):
        return ids, ids
    return np.minimum.reduceat(ids, starts), np.maximum.reduceat(ids, starts)
