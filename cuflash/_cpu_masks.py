"""Which pairs a tile may use, in NumPy: one small class per kind of mask.

A mask answers two questions about the rows `q0:q1`, so that the loops never visit tiles that it
hides and do no arithmetic on those it leaves whole:

    keys(q0, q1)           the range of keys that some row of q0:q1 may see
    cut(q0, q1, k0, k1)    None when every pair of the tile is visible, else the Cut that says which

A new mask is another class with these two methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cut:
    """The hidden pairs of one tile of `rows` x `keys`, kept only for the columns that have any.

    Parameters
    ----------
    parts
        (columns, hidden) with `hidden` bool (rows, number of columns), True = may not attend.
    """

    rows: int
    keys: int
    parts: tuple[tuple[slice, np.ndarray], ...]

    def fill(self, tile: np.ndarray, value: float) -> None:
        """Set the hidden pairs of `tile` (..., rows, keys), whatever they hold."""
        for columns, hidden in self.parts:
            np.copyto(tile[..., columns], value, where=hidden)

    def visible(self, group: int) -> np.ndarray:
        """bool (group * rows, keys), True = may attend, for a group's stacked rows."""
        visible = np.ones((self.rows, self.keys), dtype=bool)
        for columns, hidden in self.parts:
            visible[:, columns] = ~hidden
        return np.tile(visible, (group, 1))


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
