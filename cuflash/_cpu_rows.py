"""Where a unit's rows are in the caller's arrays: side by side, or scattered among packed sequences."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np


class Dense:
    """Rows of an array (*outer, ..., L, n), in place."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    @property
    def extents(self) -> tuple[int, int]:
        """(L, n)."""
        return self.x.shape[-2], self.x.shape[-1]

    def get(self, place: tuple[slice, ...], start: int, stop: int) -> np.ndarray:
        """View (*unit, ..., stop - start, n)."""
        return self.x[place][..., start:stop, :]

    def put(self, place: tuple[slice, ...], start: int, stop: int, value: Any) -> None:
        """Write the same rows."""
        self.x[place][..., start:stop, :] = value


class Scattered:
    """The same of an array (heads, ..., tokens, n) that holds sequences of one length anywhere
    along its axis of tokens; (sequences, heads) are the outer axes."""

    def __init__(self, x: np.ndarray, starts: np.ndarray, length: int) -> None:
        """`starts` (sequences,): the token that each begins at; `length`: its tokens."""
        self.x, self.starts, self.length = x, starts, length

    @property
    def extents(self) -> tuple[int, int]:
        """(L, n)."""
        return self.length, self.x.shape[-1]

    def _tokens(self, sequences: slice, start: int, stop: int) -> np.ndarray:
        return self.starts[sequences, None] + np.arange(start, stop)

    def get(self, place: tuple[slice, ...], start: int, stop: int) -> np.ndarray:
        """Copy (sequences, heads, ..., stop - start, n)."""
        sequences, heads = place
        tokens = self._tokens(sequences, start, stop)
        return np.moveaxis(self.x[heads][..., tokens, :], -3, 0)

    def put(self, place: tuple[slice, ...], start: int, stop: int, value: Any) -> None:
        """Write the same rows."""
        sequences, heads = place
        if np.ndim(value):
            value = np.moveaxis(value, 0, -3)
        self.x[heads][..., self._tokens(sequences, start, stop), :] = value


Rows: TypeAlias = "Dense | Scattered"


def packed_rows(x: np.ndarray, starts: np.ndarray, length: int) -> Rows:
    """Rows of the sequences of one length that begin at `starts` of x (heads, ..., tokens, n).

    Sequences at equal distances, as one or two always are, need no gathering.
    """
    steps = np.diff(starts)
    step = int(steps[0]) if len(steps) else 0
    if (steps != step).any():
        return Scattered(x, starts, length)
    first = int(starts[0])
    view = np.lib.stride_tricks.as_strided(
        x[..., first : first + length, :],
        (len(starts), *x.shape[:-2], length, x.shape[-1]),
        (step * x.strides[-2], *x.strides),
    )
    return Dense(view)
