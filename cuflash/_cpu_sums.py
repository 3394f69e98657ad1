"""Gradients that several tiles, units and threads add to, always in the same order.

The rows of a unit are one thread's, so what belongs to one unit alone needs no care. What units
share (keys broadcast over a batch axis, a bias broadcast over heads, parameters) each sums up on
its own, and `Turns` adds the sums in the units' order, whichever thread is done first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np

from ._cpu_bits import rounded
from ._cpu_place import WHOLE, Axes, Place, Spread, Unit
from ._cpu_rows import Dense, Rows, Scattered

# Elements (per pair of batch and head) up to which a sum of its own for each unit costs next to
# nothing beside the unit's tiles.
PART_ELEMENTS = 1 << 16


class Turns:
    """Runs one action per unit in the units' order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: dict[int, Callable[[], None]] = {}
        self.done = 0

    def take(self, index: int, action: Callable[[], None]) -> None:
        """Run the action of the unit of this index, now or when its predecessors' have run."""
        with self.lock:
            self.waiting[index] = action
            while self.done in self.waiting:
                self.waiting.pop(self.done)()
                self.done += 1


class KeySum:
    """Where the parts of dk or dv are added up.

    In the gradient itself when its dtype is wide enough and every unit has keys of its own. A
    narrow gradient gets one wide sum per unit; keys that several units share (k or v broadcast over
    a batch axis) one for all of them.
    """

    def __init__(self, grad: Rows, outer: tuple[int, ...], dtype: np.dtype) -> None:
        """`grad` holds zeros; `outer` are the axes that units are cut from."""
        self.grad, self.dtype = grad, dtype
        own = isinstance(grad, Scattered) or grad.x.shape[:-2] == outer
        self.in_place = own and isinstance(grad, Dense) and grad.x.dtype == dtype
        self.shared = None if own else np.zeros(grad.x.shape, dtype=dtype)

    def begin(self, place: tuple[slice, ...]) -> np.ndarray:
        """The array that a unit adds its tiles to."""
        if self.in_place:
            return self.grad.get(place, 0, self.grad.extents[0])
        extents = (cut.stop - cut.start for cut in place)
        return np.zeros((*extents, *self.grad.extents), dtype=self.dtype)

    def end(self, place: tuple[slice, ...], part: np.ndarray) -> None:
        """Take the finished sum of a unit; units take turns."""
        if self.shared is not None:
            axes = tuple(a for a, n in enumerate(self.shared.shape[:-2]) if n == 1)
            where = tuple(slice(0, 1) if a in axes else cut for a, cut in enumerate(place))
            self.shared[where] += part.sum(axis=axes, keepdims=True)
        elif not self.in_place:
            self.grad.put(place, 0, self.grad.extents[0], part)

    def finish(self) -> None:
        """Round the shared sum, once."""
        if self.shared is not None:
            with np.errstate(all="ignore"):
                self.grad.x[...] = self.shared


class OptionSum:
    """Gradient of an option's array of a shape that broadcasts to (*B, H, Lq, Lk), in its shape.

    A small one (a number per head, a vector over the keys) is summed in float64, by each unit on
    its own. One with a number for every row and key gets it from one tile of each unit that it
    serves, and is summed in place; units that share it must then be one thread's.
    """

    def __init__(
        self, given: np.ndarray, shape: tuple[int, ...], axes: Axes, dtype: np.dtype
    ) -> None:
        """`shape` is that of `given` followed by 1 for rows and keys if it has no such axes;
        `dtype` is that of the tiles."""
        self.given = given
        extents = axes.split(np.broadcast_to(False, shape)).shape
        self.shared = [n == 1 < m for n, m in zip(extents, axes.outer, strict=False)]
        large = math.prod(shape[-2:]) > PART_ELEMENTS or not any(self.shared)
        self.direct = large and 1 not in shape[-2:]
        wide = dtype if any(self.shared) else given.dtype
        total = np.zeros(shape, dtype=wide if self.direct else np.float64)
        self.total = Spread(total, axes)

    def owner(self, unit: Unit, packed: bool) -> tuple[int, ...] | None:
        """Units of one owner must be one thread's, one after the other; None: nobody minds."""
        if not (self.direct and any(self.shared)):
            return None
        if packed and self.shared[0]:
            return ()
        cuts = zip(unit.place, self.shared, strict=True)
        return tuple(cut.start for cut, shared in cuts if not shared)

    def begin(self, unit: Unit) -> np.ndarray | None:
        """The array that a unit adds its tiles to; None: the total itself."""
        if self.direct:
            return None
        index = self.total.index(unit)
        return np.zeros(self.total.x[index].shape)

    def add(self, part: np.ndarray | None, place: Place, terms: np.ndarray) -> None:
        """Add a tile's terms (*unit, G, rows, keys)."""
        extents = self.total.x.shape
        axes = tuple(a for a, n in enumerate(extents) if n == 1 < terms.shape[a])
        if part is None:
            terms = terms.sum(axis=axes, keepdims=True) if axes else terms
            index = self.total.index(
                place.unit, slice(place.q0, place.q1), slice(place.k0, place.k1)
            )
            if any(self.shared):
                self.total.x[index] += terms
            else:
                self.total.x[index] = rounded(terms, self.total.x.dtype)
        else:
            rows = WHOLE if extents[-2] == 1 else slice(place.q0, place.q1)
            keys = WHOLE if extents[-1] == 1 else slice(place.k0, place.k1)
            part[..., rows, keys] += terms.sum(axis=axes, keepdims=True, dtype=np.float64)

    def end(self, unit: Unit, part: np.ndarray | None) -> None:
        """Take the finished sum of a unit; units take turns."""
        if part is not None:
            self.total.x[self.total.index(unit)] += part

    def result(self) -> np.ndarray:
        """The gradient in the shape and dtype of what was given."""
        with np.errstate(all="ignore"):
            return self.total.x.reshape(self.given.shape).astype(self.given.dtype, copy=False)
