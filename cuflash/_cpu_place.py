"""Where tiles of the NumPy backend lie, and what arrays of options hold there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

# Of one axis: a range, or for packed sequences the numbers of any sequences.
Index: TypeAlias = "slice | np.ndarray"
WHOLE = slice(None)


@dataclass(frozen=True, eq=False)
class Unit:
    """A block of (batch, kv head) pairs that one step of the backend computes together.

    Parameters
    ----------
    place
        Its slices of the call's leading axes (*B, Hkv).
    batch
        The same of the batch axes of options. They differ for packed sequences: there `place` counts
        sequences of one pair of lengths, `batch` all of them.
    numbers
        (*B of the unit): the flat number of each batch element, which dropout and score functions
        know as b.
    group
        Query heads per kv head.
    q_offset
        Of every row.
    """

    place: tuple[slice, ...]
    batch: tuple[Index, ...]
    numbers: np.ndarray
    group: int
    q_offset: int

    @property
    def heads(self) -> slice:
        """Its kv heads."""
        return self.place[-1]

    @property
    def query_heads(self) -> slice:
        """Its query heads."""
        return slice(self.heads.start * self.group, self.heads.stop * self.group)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tile lies: rows `q0:q1`, keys `k0:k1` of a unit."""

    unit: Unit
    q0: int
    q1: int
    k0: int
    k1: int

    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Batch number, query head, query row and key as int64 arrays that broadcast to the tile
        (*unit, G, rows, keys)."""
        unit = self.unit
        heads = np.arange(unit.query_heads.start, unit.query_heads.stop)
        return (
            unit.numbers[..., None, None, None, None],
            heads.reshape(-1, unit.group, 1, 1),
            np.arange(self.q0, self.q1)[:, None],
            np.arange(self.k0, self.k1),
        )


@dataclass(frozen=True)
class Axes:
    """The leading axes that arrays of options broadcast to: `batch` axes, then Hkv * G heads."""

    batch: tuple[int, ...]
    heads_kv: int
    group: int

    @property
    def outer(self) -> tuple[int, ...]:
        """The axes that units are cut from."""
        return (*self.batch, self.heads_kv)

    def split(self, x: np.ndarray) -> np.ndarray:
        """View (*B', Hkv', G', m, n) of `x` (*B', H', m, n), which may lack leading axes.

        Every extent is that of the call or 1.
        """
        x = x.reshape((1,) * (len(self.batch) + 3 - x.ndim) + x.shape)
        heads = (1, 1) if x.shape[-3] == 1 else (self.heads_kv, self.group)
        return x.reshape(*x.shape[:-3], *heads, *x.shape[-2:])


class Spread:
    """An option's array of a shape that broadcasts to (*B, H, Lq, Lk), cut to tiles without ever
    being spread out."""

    def __init__(self, x: np.ndarray, axes: Axes) -> None:
        self.x = axes.split(x)

    @classmethod
    def reading(cls, x: np.ndarray, axes: Axes) -> Spread:
        """To be read only: axes of stride 0 are as good as axes of extent 1, and cost nothing."""
        one = tuple(slice(0, 1) if step == 0 else WHOLE for step in x.strides)
        return cls(x[one], axes)

    def index(self, unit: Unit, rows: slice = WHOLE, keys: slice = WHOLE) -> tuple[Index, ...]:
        """Where a unit's part is, axes of extent 1 kept whole."""
        wanted = (*unit.batch, unit.heads, WHOLE, rows, keys)
        return tuple(WHOLE if n == 1 else cut for n, cut in zip(self.x.shape, wanted, strict=True))

    def tile(self, place: Place) -> np.ndarray:
        """(*unit, G, rows, keys), with 1 in place of every extent along which it is constant."""
        return self.x[self.index(place.unit, slice(place.q0, place.q1), slice(place.k0, place.k1))]
