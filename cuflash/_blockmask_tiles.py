"""What a BlockMask says about tiles: rectangles of any size, anywhere on its grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash._blockmask_grid import ABSENT, FULL, Grid, Slots, pack, unpack


def select(slots: np.ndarray, index: tuple[Any, ...]) -> np.ndarray:
    """View (*lead, nQ, nK) of the slots that `index` names.

    `index` holds ints and slices over the leading axes of a call, which may be more than the mask
    has (the mask serves all of the others) or fewer (then its own must be of extent 1). Axes of
    extent 1 serve every index: an int drops them, a slice keeps them.
    """
    rank = slots.ndim - 2
    if len(index) < rank:
        index = (0,) * (rank - len(index)) + tuple(index)
    extents = (1,) * (len(index) - rank) + slots.shape[:-2]
    slots = slots.reshape(*extents, *slots.shape[-2:])
    return slots[
        tuple(
            at if extent != 1 else slice(0, 1) if isinstance(at, slice) else 0
            for at, extent in zip(index, extents, strict=True)
        )
    ]


def elements(
    grid: Grid, bits: np.ndarray, slots: np.ndarray, q0: int, q1: int, k0: int, k1: int
) -> np.ndarray:
    """Bool (*lead, q1 - q0, k1 - k0) of slots (*lead, nQ, nK)."""
    bq, bk = grid.block_size
    lead = slots.shape[:-2]
    tile = np.empty((*lead, max(0, q1 - q0), max(0, k1 - k0)), bool)
    if not tile.size:
        return tile
    first_k = k0 // bk
    keys = slice(k0 - first_k * bk, k1 - first_k * bk)
    for a in range(q0 // bq, -(-q1 // bq)):
        start, stop = max(q0, a * bq), min(q1, (a + 1) * bq)
        here = slots[..., a, first_k : -(-k1 // bk)]
        rows = slice(start - a * bq, stop - a * bq)
        tile[..., start - q0 : stop - q0, :] = _strip(here, bits, rows, bk)[..., keys]
    return tile


def _strip(slots: np.ndarray, bits: np.ndarray, rows: slice, bk: int) -> np.ndarray:
    """Bool (*lead, rows, n * bk), or one row for all, of slots (*lead, n) of one row of blocks."""
    full = slots == FULL
    if not (slots >= 0).any():
        return np.repeat(full, bk, axis=-1)[..., None, :]
    words = bits[np.maximum(slots, 0), rows]
    words[slots == ABSENT] = 0
    words[full] = ~np.uint32(0)
    tiles = np.moveaxis(unpack(words, bk), -3, -2)  # (*lead, rows, n, bk)
    return tiles.reshape(*tiles.shape[:-2], -1)


def state(
    grid: Grid, bits: np.ndarray, slots: np.ndarray, q0: int, q1: int, k0: int, k1: int
) -> str:
    """ "absent", "full" or "partial": all of slots (*lead, nQ, nK) together."""
    (bq, bk) = grid.block_size
    here = slots[..., q0 // bq : -(-q1 // bq), k0 // bk : -(-k1 // bk)]
    if q1 <= q0 or k1 <= k0 or not here.size:
        return "absent"
    least, most = int(here.min()), int(here.max())
    if least == most == FULL:
        return "full"
    if least == most == ABSENT:
        return "absent"
    some_full, some_absent = least == FULL, bool((here == ABSENT).any())
    if some_full and some_absent:
        return "partial"
    # A tile smaller than its blocks may miss what they show, or see only that.
    tile = elements(grid, bits, slots, q0, q1, k0, k1)
    if not some_full and not tile.any():
        return "absent"
    return "full" if not some_absent and tile.all() else "partial"


def visible(grid: Grid, storage: Slots, tile_q: int, tile_k: int) -> np.ndarray:
    """Bool (*Bm, Hm, ceil(Lq / tile_q), ceil(Lk / tile_k)): tiles with a visible element.

    Both axes are cut where a block or a tile begins. A piece lies in one block and one tile, at one
    of a few places within its block, and which partial blocks show something there is found once
    per place.
    """
    slots, bits = storage
    lead = slots.shape[:-2]
    (len_q, len_k), (bq, bk) = grid.shape, grid.block_size
    counts = -(-len_q // tile_q), -(-len_k // tile_k)
    tiles = np.zeros((*lead, *counts), bool)
    if not tiles.size:
        return tiles
    block_q, place_q, spans_q, starts_q = _pieces(len_q, bq, tile_q)
    block_k, place_k, spans_k, starts_k = _pieces(len_k, bk, tile_k)
    # FULL and ABSENT, as negative indices, find the two entries after the partial blocks.
    table = np.zeros((len(spans_q), len(spans_k), len(bits) + 2), bool)
    table[:, :, FULL] = True
    keys = pack((np.arange(bk) >= spans_k[:, :1]) & (np.arange(bk) < spans_k[:, 1:]))
    for n, (start, stop) in enumerate(spans_q):
        rows = np.bitwise_or.reduce(bits[:, start:stop], axis=1)
        for m, within in enumerate(keys):
            table[n, m, : len(bits)] = (rows & within).any(axis=-1)
    for item in np.ndindex(lead):
        # One row of tiles after the other would loop longer; all at once would need nQ x Sk ints.
        pieces = np.empty((len(block_q), counts[1]), bool)
        for n, (block, place) in enumerate(zip(block_q, place_q, strict=True)):
            row = table[place][place_k, slots[item][block][block_k]]
            pieces[n] = np.logical_or.reduceat(row, starts_k)
        tiles[item] = np.logical_or.reduceat(pieces, starts_q, axis=0)
    return tiles


def _pieces(length: int, block: int, tile: int) -> tuple[np.ndarray, ...]:
    """An axis cut at every start of a block or a tile.

    Returns
    -------
    block, place
        Per piece: its block, and the number of its place within that.
    spans
        (start, stop) of each place within a block.
    starts
        Per tile: its first piece.
    """
    cuts = np.union1d(np.arange(0, length, block), np.arange(0, length, tile))
    # The end of the sequence cuts no bits, and would only add places.
    ends = np.append(cuts[1:], (cuts[-1] // block + 1) * block)
    start, stop = cuts % block, ends - cuts // block * block
    spans, place = np.unique(np.stack([start, stop], axis=1), axis=0, return_inverse=True)
    starts = np.searchsorted(cuts, np.arange(0, length, tile))
    return cuts // block, place.reshape(-1), spans, starts
