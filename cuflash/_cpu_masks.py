"""Which pairs a tile may use, in NumPy: one small class per kind of mask.

A mask answers two questions, so that the loops never visit tiles that it hides and do no arithmetic
on those it leaves whole:

    ranges(unit, q0, q1, low, high)    the ranges of keys in low:high that some row q0:q1 of some
                                       head of the unit may see, in order and disjoint
    cut(place)                         None when every pair of the tile is visible, else the Cut
                                       that says which

A new mask is another class with these two methods. The band, which every call has, is asked first,
and without a unit: it is the same for all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ._cpu_bits import overwrite
from ._cpu_place import Axes, Index, Place, Spread, Unit
from ._options import Options

if TYPE_CHECKING:
    from ._blockmask import BlockMask

Ranges: TypeAlias = "list[tuple[int, int]]"

# Keys of a dense mask that are visited or skipped together: fewer would make tiles whose overhead
# exceeds their arithmetic.
CHUNK = 128


@dataclass(frozen=True)
class Cut:
    """The hidden pairs of one tile of `rows` x `keys`, kept only for the columns that have any.

    Parameters
    ----------
    parts
        (columns, hidden) with `hidden` bool (rows, number of columns), True = may not attend; or
        with leading axes that broadcast to (*unit, G, rows, number of columns). A pair that any
        part hides is hidden.
    """

    rows: int
    keys: int
    parts: tuple[tuple[slice, np.ndarray], ...]

    def fill(self, tile: np.ndarray, value: float) -> None:
        """Set the hidden pairs of `tile` (*unit, G, rows, keys), whatever they hold."""
        for columns, hidden in self.parts:
            overwrite(tile[..., columns], value, hidden)

    def visible(self, group: int) -> np.ndarray:
        """bool (*unit, group * rows, keys), True = may attend, for a group's stacked rows; unit
        axes along which all is equal have extent 1 or are missing."""
        lead = np.broadcast_shapes(*(hidden.shape[:-3] for _, hidden in self.parts))
        visible = np.ones((*lead, group, self.rows, self.keys), dtype=bool)
        for columns, hidden in self.parts:
            visible[..., columns] &= ~hidden
        return visible.reshape(*lead, group * self.rows, self.keys)


@dataclass(frozen=True)
class Band:
    """Row i sees keys `d - left <= j <= d + right` around `d = i + q_offset`: full, causal and
    windowed attention.

        left = None, right = 0     left = 1, right = 0     left = 0, right = 1
              1 0 0 0                    1 0 0 0                 1 1 0 0
              1 1 0 0                    1 1 0 0                 0 1 1 0
              1 1 1 0                    0 1 1 0                 0 0 1 1
              1 1 1 1                    0 0 1 1                 0 0 0 1

    Bounds are Python ints until they have been clipped to a tile, so no window or offset is too
    large.
    """

    len_k: int
    q_offset: int
    left: int | None
    right: int | None

    def keys(self, q0: int, q1: int) -> tuple[int, int]:
        """The keys `[low, high)` that rows `q0:q1` see between them; `low >= high` when none."""
        low = 0 if self.left is None else max(0, q0 + self.q_offset - self.left)
        high = (
            self.len_k if self.right is None else min(self.len_k, q1 + self.q_offset + self.right)
        )
        return low, high

    def cut(self, q0: int, q1: int, k0: int, k1: int) -> Cut | None:
        """What the band hides of a tile."""
        rows, keys = q1 - q0, k1 - k0
        shift = q0 + self.q_offset - k0  # of the tile's first row on the tile's own key axis
        # Row r of the tile sees keys r + lowest .. r + highest of it; beyond the tile any bound is
        # as good.
        lowest = -rows if self.left is None else _clip(shift - self.left, -rows, keys)
        highest = keys if self.right is None else _clip(shift + self.right, -rows, keys)
        # The last row does not see the keys before left_end, nor the first row those from right_start.
        left_end = _clip(rows - 1 + lowest, 0, keys)
        right_start = _clip(highest + 1, 0, keys)
        if left_end == 0 and right_start == keys:
            return None
        ranges = [(0, left_end), (right_start, keys)] if left_end <= right_start else [(0, keys)]
        row = np.arange(rows)[:, None]
        parts = []
        for start, stop in ranges:
            if start < stop:
                distance = np.arange(start, stop) - row
                parts.append((slice(start, stop), (distance < lowest) | (distance > highest)))
        return Cut(rows, keys, tuple(parts))


def _clip(x: Any, low: int, high: int) -> int:
    return max(low, min(int(x), high))


class DenseMask:
    """A bool array, True = may attend."""

    def __init__(self, mask: np.ndarray, axes: Axes) -> None:
        self.mask = Spread.reading(mask, axes)

    def ranges(self, unit: Unit, q0: int, q1: int, low: int, high: int) -> Ranges:
        """Runs of chunks with a visible pair."""
        tile = self.mask.tile(Place(unit, q0, q1, low, high))
        seen = np.asarray(tile.any(axis=tuple(range(tile.ndim - 1))))
        if len(seen) == 1:  # one column for all keys
            return [(low, high)] if seen[0] else []
        chunks = np.logical_or.reduceat(seen, np.arange(0, high - low, CHUNK))
        return list(runs(chunks, CHUNK, low, high))

    def cut(self, place: Place) -> Cut | None:
        """What the mask hides of a tile."""
        return _cut_of(self.mask.tile(place), place)


class Blocks:
    """A BlockMask: absent blocks are not visited, full ones are not looked into."""

    def __init__(self, blocks: BlockMask, axes: Axes) -> None:
        self.blocks, self.axes = blocks, axes

    def _index(self, unit: Unit) -> tuple[Index | int, ...]:
        """Of the mask's own leading axes."""
        extents = self.blocks.slots.shape[:-2]
        wanted: tuple[Index | int, ...] = (*unit.batch, unit.query_heads)
        # A mask with more axes than the call has 1 there, one with fewer serves all batches alike.
        wanted = (0,) * (len(extents) - len(wanted)) + wanted[-len(extents) :]
        return tuple(
            slice(0, 1) if n == 1 and not isinstance(at, int) else at
            for n, at in zip(extents, wanted, strict=True)
        )

    def _slots(self, unit: Unit, q0: int, q1: int, low: int, high: int) -> np.ndarray:
        bq, bk = self.blocks.block_size
        across = slice(q0 // bq, -(-q1 // bq)), slice(low // bk, -(-high // bk))
        return self.blocks.slots[(*self._index(unit), *across)]

    def ranges(self, unit: Unit, q0: int, q1: int, low: int, high: int) -> Ranges:
        """Runs of blocks that are not absent."""
        slots = self._slots(unit, q0, q1, low, high)
        seen = np.asarray((slots != -1).any(axis=tuple(range(slots.ndim - 1))))
        bk = self.blocks.block_size[1]
        found = runs(seen, bk, low // bk * bk, high)
        return [(max(start, low), stop) for start, stop in found]

    def cut(self, place: Place) -> Cut | None:
        """What the mask hides of a tile."""
        unit, box = place.unit, (place.q0, place.q1, place.k0, place.k1)
        if (self._slots(unit, *box) == -2).all():
            return None
        visible = self.blocks.element_tile(self._index(unit), *box)  # type: ignore[arg-type]
        heads = (1, 1) if visible.shape[-3] == 1 else (-1, self.axes.group)
        return _cut_of(visible.reshape(*visible.shape[:-3], *heads, *visible.shape[-2:]), place)


def _cut_of(visible: np.ndarray, place: Place) -> Cut | None:
    """The Cut of a tile from its visible pairs (*unit', G', rows', keys'), extents full or 1."""
    whole = np.asarray(visible.all(axis=tuple(range(visible.ndim - 1))))
    if whole.all():
        return None
    keys = place.k1 - place.k0
    if len(whole) == 1:
        columns, hidden = slice(0, keys), ~visible
    else:
        cut = np.flatnonzero(~whole)
        columns = slice(int(cut[0]), int(cut[-1]) + 1)
        hidden = ~visible[..., columns]
    return Cut(place.q1 - place.q0, keys, ((columns, hidden),))


def runs(seen: np.ndarray, step: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive True in `seen`, whose element n stands for `step` keys from low + n * step;
    the last one ends at `high` at most."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], seen, [False])).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield low + start * step, min(low + stop * step, high)


def common(first: Ranges, second: Ranges) -> Ranges:
    """The keys that are in ranges of both."""
    result, n, m = [], 0, 0
    while n < len(first) and m < len(second):
        low, high = max(first[n][0], second[m][0]), min(first[n][1], second[m][1])
        if low < high:
            result.append((low, high))
        if first[n][1] < second[m][1]:
            n += 1
        else:
            m += 1
    return result


@dataclass(frozen=True)
class Masks:
    """All masks of a call: a pair is visible if it is in each."""

    band: Band
    others: tuple[DenseMask | Blocks, ...] = ()

    def ranges(self, unit: Unit, q0: int, q1: int) -> Ranges:
        """The keys that rows `q0:q1` of the unit's heads see between them."""
        low, high = self.band.keys(q0, q1)
        ranges = [(low, high)] if low < high else []
        for mask in self.others:
            if ranges:
                seen = mask.ranges(unit, q0, q1, ranges[0][0], ranges[-1][1])
                ranges = common(ranges, seen)
        return ranges

    def cut(self, place: Place) -> Cut | None:
        """What they hide of a tile between them."""
        band = self.band.cut(place.q0, place.q1, place.k0, place.k1)
        if not self.others:
            return band
        cuts = [
            cut for cut in (band, *(mask.cut(place) for mask in self.others)) if cut is not None
        ]
        if len(cuts) < 2:
            return cuts[0] if cuts else None
        return Cut(cuts[0].rows, cuts[0].keys, tuple(part for cut in cuts for part in cut.parts))


def masks_of(options: Options, axes: Axes) -> tuple[DenseMask | Blocks, ...]:
    """The masks beside the band that `options` ask for."""
    masks: list[DenseMask | Blocks] = []
    if options.blocks is not None:
        masks.append(Blocks(options.blocks, axes))
    if options.mask is not None:
        masks.append(DenseMask(np.asarray(options.mask), axes))
    return tuple(masks)
