"""How the NumPy backend cuts a call into tiles: sizes and loops.

A step of the backend is one `np.matmul` over a *unit*: a block of (batch, kv head) pairs, all query
heads of each (GQA shares K and V by stacking the group's rows), `rows` queries and `keys` keys.
Long sequences make units of one head with tiles that fit the cache; short ones make units of many
heads, so no Python loop runs over heads of 16 tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._cpu_masks import Band, Blocks, DenseMask, Masks, masks_of
from ._cpu_place import Axes, Place, Unit
from ._cpu_products import for_blas
from ._cpu_scores import Score, scores_of
from ._cpu_softmax import Dropped, Sinks
from ._options import Options

# Elements of a step's operands and scores together: they should stay in a core's level 2 cache (2
# MB of float32).
TILE_ELEMENTS = 1 << 19
# Rows and keys of a tile at most. Larger ones leave the cache, smaller ones leave BLAS and NumPy
# with their overheads.
TILE_ROWS = 256
TILE_KEYS = 512
# Rows of a tile that joins several rows of small blocks.
LEAST_ROWS = 64
# K and V are converted (16-bit dtypes, odd strides) once per unit up to this many bytes, beyond it
# tile by tile.
CONVERTED_BYTES = 16 << 20


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype in which scores, softmax and sums are kept: float64 for float64, else float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


@dataclass(frozen=True)
class Shape:
    """The extents of one call."""

    batch: tuple[int, ...]
    heads_kv: int
    group: int
    len_q: int
    len_k: int
    dim: int
    dim_v: int

    @classmethod
    def of(cls, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Shape:
        *batch, heads, len_q, dim = q.shape
        heads_kv, len_k = k.shape[-3], k.shape[-2]
        group = heads // heads_kv if heads_kv else 1
        return cls(tuple(batch), heads_kv, group, len_q, len_k, dim, v.shape[-1])

    @property
    def outer(self) -> tuple[int, ...]:
        """The axes a unit is cut from."""
        return (*self.batch, self.heads_kv)

    @property
    def axes(self) -> Axes:
        """The leading axes as options see them."""
        return Axes(self.batch, self.heads_kv, self.group)

    def group_rows(self, x: np.ndarray) -> np.ndarray:
        """View of (*B, H, Lq, ...) as (*B, Hkv, G, Lq, ...)."""
        axis = len(self.batch)
        return x.reshape(*x.shape[:axis], self.heads_kv, self.group, *x.shape[axis + 1 :])

    def spread(self, x: np.ndarray) -> np.ndarray:
        """View of k or v with its batch axes broadcast to q's."""
        return np.broadcast_to(x, (*self.outer, *x.shape[-2:]))


@dataclass(frozen=True)
class Tiling:
    """Tile extents: `rows` queries of each of the group's heads, `keys` keys, `heads` a unit."""

    rows: int
    keys: int
    heads: int

    @classmethod
    def of(cls, shape: Shape, block: int | None = None) -> Tiling:
        """`block`: rows of a block mask's blocks, or None."""
        # At least one of everything: empty calls have no tiles, but nothing may divide by zero.
        group = max(1, shape.group)
        rows = -(-TILE_ROWS // group)
        if block is not None:
            rows = _rows_in_blocks(rows, block)
        rows = max(1, min(shape.len_q, rows))
        stacked = rows * group
        per_key = stacked + shape.dim + shape.dim_v
        # A few rows (decoding) make short work of a tile, so it may as well be long.
        longest = TILE_KEYS if stacked > 64 else max(TILE_KEYS, TILE_ELEMENTS // per_key)
        keys = max(1, min(shape.len_k, longest))
        step = stacked * keys + (stacked + keys) * (shape.dim + shape.dim_v)
        return cls(rows, keys, max(1, TILE_ELEMENTS // step))


def _rows_in_blocks(rows: int, block: int) -> int:
    """About `rows`, such that tiles and blocks begin together: a tile over two rows of blocks would
    visit what either shows. Small blocks are worth some waste, since BLAS is slow at a few rows."""
    if block >= rows:
        return -(-block // -(-block // rows))
    return block * max(1, min(rows, LEAST_ROWS) // block)


def units(outer: tuple[int, ...], heads: int) -> Iterator[tuple[slice, ...]]:
    """Blocks of at most `heads` consecutive places of the `outer` axes, as tuples of slices that
    cover them all.

    The last axes are taken whole as long as they fit, one axis is cut in runs, those before it are
    walked one by one.
    """
    cuts: list[list[slice]] = []
    room = heads
    for extent in reversed(outer):
        step = max(1, min(extent, room))
        cuts.append([slice(a, min(a + step, extent)) for a in range(0, extent, step)])
        room = room // extent if step == extent else 1
    return itertools.product(*reversed(cuts))


@dataclass(frozen=True)
class Extras:
    """What a call's options ask for, whatever the lengths: shared by all sequences of a packed call.

    Parameters
    ----------
    options
        The call's.
    axes
        The leading axes that their arrays broadcast to.
    dtype
        The accumulator's.
    masks
        Beside the band.
    scores
        In the order of their application.
    """

    options: Options
    axes: Axes
    dtype: np.dtype
    masks: tuple[DenseMask | Blocks, ...]
    scores: list[Score]
    sinks: Sinks | None
    dropout: Dropped | None

    @classmethod
    def of(cls, options: Options, axes: Axes, dtype: np.dtype, wrt: Collection[str] = ()) -> Extras:
        """`wrt` names the arrays whose gradients are wanted."""
        sinks, dropout = options.sinks, options.dropout
        return cls(
            options,
            axes,
            dtype,
            masks_of(options, axes),
            scores_of(options, axes, dtype, wrt),
            None if sinks is None else Sinks(np.asarray(sinks), axes, dtype, "sinks" in wrt),
            None if dropout is None or dropout.threshold == 0 else Dropped(dropout),
        )

    def begin(self, unit: Unit) -> list[Any]:
        """Where a unit adds its own part of the options' gradients to: one entry per score, then
        that of the sinks."""
        sinks = None if self.sinks is None else self.sinks.begin(unit)
        return [*(score.begin(unit) for score in self.scores), sinks]

    def end(self, unit: Unit, parts: list[Any]) -> None:
        """Take a unit's parts; units take turns."""
        for score, part in zip(self.scores, parts, strict=False):
            score.end(unit, part)
        if self.sinks is not None:
            self.sinks.end(unit, parts[-1])

    def owner(self, unit: Unit, packed: bool) -> tuple[int, ...] | None:
        """Units of one owner are one thread's; None: nobody minds."""
        owners = {score.owner(unit, packed) for score in self.scores} - {None}
        return None if not owners else owners.pop() if len(owners) == 1 else ()

    def gradients(self) -> dict[str, Any]:
        """Gradients of the options' arrays by name."""
        grads: dict[str, Any] = {}
        for part in (*self.scores, self.sinks):
            if part is not None:
                grads |= part.gradients()
        return grads


@dataclass(frozen=True)
class Call:
    """What all tiles of one call, or of the sequences of one pair of lengths, share.

    Parameters
    ----------
    sequences
        Numbers of packed sequences, which are the shape's batch axis; else None.
    """

    shape: Shape
    tiling: Tiling
    masks: Masks
    extras: Extras
    scale: np.generic
    dtype: np.dtype
    q_offset: int
    sequences: np.ndarray | None

    @classmethod
    def of(cls, shape: Shape, extras: Extras, sequences: np.ndarray | None = None) -> Call:
        options, dtype = extras.options, extras.dtype
        q_offset = options.q_offset
        if q_offset is None:
            q_offset = shape.len_k - shape.len_q
        band = Band(shape.len_k, q_offset, options.left, options.right)
        return cls(
            shape,
            Tiling.of(shape, None if options.blocks is None else options.blocks.block_size[0]),
            Masks(band, extras.masks),
            extras,
            dtype.type(options.scale),
            dtype,
            q_offset,
            sequences,
        )

    def pairs(self) -> int:
        """About how many pairs of query and key the tiles have: how much work the call is."""
        seen = 0
        for q0, q1 in self.row_tiles():
            low, high = self.masks.band.keys(q0, q1)
            seen += (q1 - q0) * max(0, high - low)
        blocks = self.extras.options.blocks
        density = 1 if blocks is None else blocks.density
        return int(density * seen) * self.shape.group * math.prod(self.shape.outer)

    def units(self) -> Iterator[Unit]:
        """Blocks of heads that are computed together."""
        for place in units(self.shape.outer, self.tiling.heads):
            *batch, _ = place
            if self.sequences is None:
                numbers = np.zeros((), dtype=np.int64)
                for cut, n in zip(batch, self.shape.batch, strict=True):
                    numbers = numbers[..., None] * n + np.arange(cut.start, cut.stop)
                yield Unit(place, tuple(batch), numbers, self.shape.group, self.q_offset)
            else:
                numbers = self.sequences[batch[0]]
                one = slice(int(numbers[0]), int(numbers[0]) + 1)
                index = one if len(numbers) == 1 else numbers
                yield Unit(place, (index,), numbers, self.shape.group, self.q_offset)

    def whole(self, x: np.ndarray) -> np.ndarray:
        """K or V of a unit, ready for BLAS if that copy is small; else tiles are made ready."""
        return for_blas(x, self.dtype) if x.size * self.dtype.itemsize <= CONVERTED_BYTES else x

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        """Ranges of query rows."""
        for q0 in range(0, self.shape.len_q, self.tiling.rows):
            yield q0, min(q0 + self.tiling.rows, self.shape.len_q)

    def tiles(self, unit: Unit, q0: int, q1: int) -> Iterator[Place]:
        """Tiles of the keys that rows `q0:q1` of a unit see; none when they see no key."""
        for low, high in self.masks.ranges(unit, q0, q1):
            for k0 in range(low, high, self.tiling.keys):
                yield Place(unit, q0, q1, k0, min(k0 + self.tiling.keys, high))
