"""Which pairs a tile may use, in NumPy: one small class per kind of mask.

A mask answers three questions about a tile of rows `q0:q1` and keys `k0:k1`, so that the loops need no arithmetic on
tiles that a mask leaves whole and never visit tiles that it hides:

    keys(q0, q1)            the range of keys that some row of q0:q1 may see
    keep(q0, q1, k0, k1)    None when every pair is visible, else bool (q1 - q0, k1 - k0), True = may attend

A new mask is another class with these two methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Band:
    """Row i sees keys `d - left <= j <= d + right` around `d = i + q_offset`: full, causal and windowed attention.

        left = None, right = 0     left = 1, right = 0     left = 0, right = 1
              1 0 0 0                    1 0 0 0                 1 1 0 0
              1 1 0 0                    1 1 0 0                 0 1 1 0
              1 1 1 0                    0 1 1 0                 0 0 1 1
              1 1 1 1                    0 0 1 1                 0 0 0 1

    Bounds are Python ints until they have been clipped to a tile, so no window or offset is too large.
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

    def keep(self, q0: int, q1: int, k0: int, k1: int) -> np.ndarray | None:
        """The visible pairs of a tile, or None when the band does not cut it."""
        rows, keys = q1 - q0, k1 - k0
        shift = q0 + self.q_offset - k0  # of the tile's first row on the tile's own key axis
        open_left = self.left is None or rows - 1 + shift - self.left <= 0
        open_right = self.right is None or shift + self.right >= keys - 1
        if open_left and open_right:
            return None
        # Only distances within the tile matter, which keeps the comparison in range for any band.
        distance = np.arange(keys) - np.arange(rows)[:, None]
        visible = np.ones((rows, keys), dtype=bool)
        if not open_left and self.left is not None:
            visible &= distance >= min(shift - self.left, keys)
        if not open_right and self.right is not None:
            visible &= distance <= max(shift + self.right, -rows)
        return visible
