"""How a BlockMask is stored, and how blocks get there: bits, their edges, which blocks are whole.

Blocks of bool become 32-bit words here, are cut at the end of the sequence, and sorted into absent,
full and partial ones. Equal partial blocks share one row of bits, so that the regular patterns of
the literature cost a few rows however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# What a slot holds where no row of bits is needed.
ABSENT, FULL = -1, -2
# Elements worked on at a time: temporaries of NumPy expressions over them stay in cache.
WORK = 1 << 19
# Words hold 32 elements in the room of 4.
PACKED = 8
_ONES = 0xFFFFFFFF
# Ones per octet: numpy.bitwise_count came with NumPy 2.
_COUNT = np.array([bin(n).count("1") for n in range(256)], np.uint8)


class Grid(NamedTuple):
    """Extents of a mask and of its blocks."""

    shape: tuple[int, int]  # (Lq, Lk)
    block_size: tuple[int, int]  # (bq, bk)

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks along queries and keys."""
        (len_q, len_k), (bq, bk) = self.shape, self.block_size
        return -(-len_q // bq), -(-len_k // bk)

    @property
    def words(self) -> int:
        """32-bit words per row of a block."""
        return -(-self.block_size[1] // 32)

    @property
    def batch(self) -> int:
        """Blocks of bool worked on at a time; of words it may be `PACKED` times as many."""
        return max(1, WORK // (self.block_size[0] * self.block_size[1]))

    def transposed(self) -> Grid:
        """Queries and keys exchanged."""
        return Grid(self.shape[::-1], self.block_size[::-1])

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each block of queries and keys of each block of keys, int64 (nQ,) and (nK,)."""
        sizes = []
        for length, block in zip(self.shape, self.block_size, strict=True):
            starts = np.arange(0, length, block, dtype=np.int64)
            sizes.append(np.minimum(length - starts, block))
        return sizes[0], sizes[1]

    def edges(self) -> np.ndarray:
        """int64 (nQ, nK): 1 where the end of the queries cuts a block, 2 where the end of the keys
        does, 3 for both, else 0.
        """
        rows, keys = self.extents()
        cut_q, cut_k = rows < self.block_size[0], keys < self.block_size[1]
        return cut_q[:, None] + 2 * cut_k[None, :].astype(np.int64)

    def within(self) -> np.ndarray:
        """uint32 (4, bq, words): for each kind of edge, the bits inside the sequence."""
        (len_q, len_k), (bq, bk) = self.shape, self.block_size
        rows, keys = np.arange(bq), np.arange(bk)
        tiles = np.empty((4, bq, bk), bool)
        for edge in range(4):
            in_q = rows < len_q % bq if edge & 1 else rows < bq
            in_k = keys < len_k % bk if edge & 2 else keys < bk
            tiles[edge] = in_q[:, None] & in_k
        return pack(tiles)


class Slots(NamedTuple):
    """The storage itself."""

    slots: np.ndarray  # int32 (*Bm, Hm, nQ, nK): ABSENT, FULL, or a row of `bits`
    bits: np.ndarray  # uint32 (rows, bq, words)


def pack(tiles: np.ndarray) -> np.ndarray:
    """uint32 (..., ceil(n / 32)) of bool (..., n), n a multiple of 16; element j is bit j % 32."""
    octets = np.packbits(tiles, axis=-1, bitorder="little")
    if octets.shape[-1] % 4:
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], 2), np.uint8)], axis=-1)
    return np.ascontiguousarray(octets).view("<u4")


def unpack(words: np.ndarray, count: int) -> np.ndarray:
    """Bool (..., count) of uint32 (..., ceil(count / 32))."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=count, bitorder="little").view(bool)


def ones(bits: np.ndarray) -> np.ndarray:
    """int64 (rows,): visible elements of each row of bits."""
    return _COUNT[bits.view(np.uint8)].sum(axis=(1, 2), dtype=np.int64)


def words_of(slots: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """uint32 (*slots.shape, *bits.shape[1:]): the bits of blocks of every kind.

    Full blocks come without the cut at the end of the sequence.
    """
    words = np.empty((*slots.shape, *bits.shape[1:]), np.uint32)
    partial = slots >= 0
    words[partial] = bits[slots[partial]]
    words[slots == ABSENT] = 0
    words[slots == FULL] = _ONES
    return words


class Assembler:
    """Takes blocks in any number of portions and keeps one row of bits per distinct partial block.

    >>> grid = Grid((16, 20), (16, 16))
    >>> blocks = Assembler(grid)
    >>> tile = np.ones((1, 16, 16), bool)
    >>> blocks.slots(pack(tile), np.array([0])), blocks.slots(pack(tile), np.array([2]))
    (array([-2], dtype=int32), array([-2], dtype=int32))
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._within = grid.within()
        self._rows: dict[bytes, int] = {}

    def slots(self, words: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """int32 (n,) slots of blocks with these bits, uint32 (n, bq, words), at these edges."""
        within = self._within[edges]
        words = words & within
        slots = np.full(len(words), ABSENT, np.int32)
        some = words.any(axis=(1, 2))
        full = some & (words == within).all(axis=(1, 2))
        slots[full] = FULL
        rows = self._rows
        for n in np.flatnonzero(some & ~full):
            slots[n] = rows.setdefault(words[n].tobytes(), len(rows))
        return slots

    def finish(self, slots: np.ndarray) -> Slots:
        """The storage, once every slot is known."""
        shape = (len(self._rows), self.grid.block_size[0], self.grid.words)
        bits = np.frombuffer(b"".join(self._rows), np.uint32).reshape(shape)
        slots = np.ascontiguousarray(slots, np.int32)
        slots.flags.writeable = False
        return Slots(slots, bits)


# ---- ways to fill a grid

# Writes elements [q0, q1) x [k0, k1) of the leading items [n0, n1) into a bool array (n, q, k).
Fill = Callable[[np.ndarray, slice, slice, slice], None]


def from_tiles(grid: Grid, lead: tuple[int, ...], fill: Fill) -> Slots:
    """Blocks of elements that `fill` makes, some blocks at a time."""
    blocks = Assembler(grid)
    (bq, bk), (n_q, n_k) = grid.block_size, grid.counts
    items = int(np.prod(lead, dtype=np.int64))
    slots = np.empty((items, n_q, n_k), np.int32)
    edges = grid.edges()
    for n, a, c in _portions((items, n_q, n_k), grid.batch):
        here = slots[n, a, c]
        buffer = np.zeros((len(here), here.shape[1] * bq, here.shape[2] * bk), bool)
        rows = slice(a.start * bq, min(a.stop * bq, grid.shape[0]))
        keys = slice(c.start * bk, min(c.stop * bk, grid.shape[1]))
        fill(buffer[:, : rows.stop - rows.start, : keys.stop - keys.start], n, rows, keys)
        words = pack(buffer.reshape(len(here), here.shape[1], bq, here.shape[2], bk))
        words = words.swapaxes(2, 3).reshape(-1, bq, grid.words)
        kinds = np.broadcast_to(edges[a, c], here.shape).reshape(-1)
        here[...] = blocks.slots(words, kinds).reshape(here.shape)
    return blocks.finish(slots.reshape(*lead, n_q, n_k))


def _portions(counts: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `most` cells that cover an array of shape `counts` in C order."""
    if 0 in counts:
        return
    if not counts:
        yield ()
        return
    inner = int(np.prod(counts[1:], dtype=np.int64))
    step = max(1, most // inner)
    for start in range(0, counts[0], step):
        first = slice(start, min(start + step, counts[0]))
        for rest in _portions(counts[1:], most):
            yield (first, *rest)


# Bool contents (n, bq, bk) of blocks with these codes, not cut at the edges.
Evaluate = Callable[[np.ndarray], np.ndarray]


def from_codes(grid: Grid, codes: np.ndarray, evaluate: Evaluate, blocks: Assembler) -> np.ndarray:
    """int32 (nQ, nK) slots, where equal codes mean equal contents, made once per code.

    Parameters
    ----------
    codes
        int64 (nQ, nK): ABSENT, FULL, or small numbers that `evaluate` knows.
    """
    # One number for contents and edge; ABSENT and FULL move to the end of the table of slots.
    known = codes >= 0
    keys = codes[known] * 4 + grid.edges()[known]
    used = np.flatnonzero(np.bincount(keys)) if keys.size else np.empty(0, np.int64)
    table = np.empty(int(used[-1]) + 1 if used.size else 0, np.int32)
    for start in range(0, len(used), grid.batch):
        part = used[start : start + grid.batch]
        table[part] = blocks.slots(pack(evaluate(part // 4)), part % 4)
    slots = codes.astype(np.int32)
    slots[known] = table[keys]
    return slots


def combine(grid: Grid, first: Slots, second: Slots, operation: Callable[..., np.ndarray]) -> Slots:
    """`operation` (numpy.bitwise_and, _or, _xor) of two masks on one grid; leading axes broadcast."""
    lead = np.broadcast_shapes(first.slots.shape[:-2], second.slots.shape[:-2])
    shape = (*lead, *grid.counts)
    pairs = [np.broadcast_to(x.slots, shape) for x in (first, second)]
    slots = np.empty(shape, np.int32)
    blocks = Assembler(grid)
    if not (len(first.bits) or len(second.bits)):
        visible = operation(pairs[0] == FULL, pairs[1] == FULL)
        return blocks.finish(np.where(visible, np.int32(FULL), np.int32(ABSENT)))
    edges = grid.edges()
    count = len(second.bits) + 2
    for item in np.ndindex(lead):
        one, two = (x[item].astype(np.int64) + 2 for x in pairs)
        codes, where = np.unique((one * count + two) * 4 + edges, return_inverse=True)
        part = np.empty(len(codes), np.int32)
        step = PACKED * grid.batch
        for start in range(0, len(codes), step):
            code = codes[start : start + step]
            pair, edge = code // 4, code % 4
            words = operation(
                words_of(pair // count - 2, first.bits), words_of(pair % count - 2, second.bits)
            )
            part[start : start + step] = blocks.slots(words, edge)
        slots[item] = part[where].reshape(grid.counts)
    return blocks.finish(slots)


def transpose(grid: Grid, storage: Slots) -> Slots:
    """Queries and keys exchanged; `grid` is that of `storage`."""
    bk, turned = grid.block_size[1], grid.transposed()
    bits = np.empty((len(storage.bits), bk, turned.words), np.uint32)
    for start in range(0, len(bits), grid.batch):
        part = slice(start, start + grid.batch)
        bits[part] = pack(unpack(storage.bits[part], bk).swapaxes(1, 2))
    bits.flags.writeable = False
    slots = np.ascontiguousarray(storage.slots.swapaxes(-1, -2))
    slots.flags.writeable = False
    return Slots(slots, bits)
