"""The softmax over a row's keys, tile by tile, and what takes part in it beside the keys: a sink in
its denominator, dropout of its weights."""

from __future__ import annotations

import numpy as np

from ._cpu_bits import overwrite
from ._cpu_masks import Cut
from ._cpu_place import Axes, Place, Spread, Unit
from ._cpu_products import Scratch, visible_matmul
from ._cpu_sums import OptionSum
from ._dropout import Dropout


class OnlineSoftmax:
    """Running softmax-weighted mean of a stack of rows, over tiles of keys."""

    def __init__(self, total: np.ndarray, scratch: Scratch) -> None:
        """`total` (..., rows, Dv) is where the running output lives; its contents do not matter."""
        self.total = total
        self.scratch = scratch
        self.maximum: np.ndarray | None = None
        self.sum: np.ndarray | None = None

    def update(
        self,
        scores: np.ndarray,
        values: np.ndarray,
        cut: Cut | None,
        dropped: np.ndarray | None = None,
    ) -> None:
        """Take in a tile.

        Parameters
        ----------
        scores
            (..., rows, keys), used up.
        values
            (..., keys, Dv).
        cut
            The hidden pairs, whose scores are -inf.
        dropped
            bool, of the size of `scores`: weights that the sum has and the output has not.
        """
        maximum = row_maximum(scores)
        if self.maximum is not None:
            np.maximum(maximum, self.maximum, out=maximum)
        # -inf - -inf is NaN: a row that has seen no key yet subtracts 0, and all its weights are
        # exp(-inf) = 0.
        shift = np.where(np.isneginf(maximum), 0, maximum)
        np.subtract(scores, shift, out=scores)
        weights = np.exp(scores, out=scores)
        # As a product with ones the row sums run at the speed of BLAS, four times that of `sum`.
        ones = np.ones((weights.shape[-1], 1), dtype=weights.dtype)
        sums = np.matmul(weights, ones)
        if dropped is not None:
            overwrite(weights, 0, dropped.reshape(weights.shape))
        if self.maximum is None or self.sum is None:
            self.sum = sums
            visible_matmul(weights, values, cut, out=self.total)
        else:
            rescale = np.exp(self.maximum - shift)
            self.sum *= rescale
            self.sum += sums
            self.total *= rescale
            part = self.scratch.take("part", self.total.shape)
            self.total += visible_matmul(weights, values, cut, out=part)
        self.maximum = maximum

    def finish(
        self, sink: np.ndarray | None = None, factor: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised output (in place of `total`) times `factor`, and lse (..., rows).

        `sink` (..., rows, 1) holds logits that take part in the sum only.
        """
        assert self.maximum is not None and self.sum is not None
        if sink is not None:
            # A row without keys has lse = sink and out = 0 even where the sink is inf or NaN.
            alone = np.isneginf(self.maximum)
            maximum = np.maximum(self.maximum, sink)
            shift = np.where(alone, 0, maximum)
            rescale = np.exp(self.maximum - shift)
            self.sum = np.where(alone, 1, self.sum * rescale + np.exp(sink - shift))
            self.total *= rescale
            self.maximum = np.where(alone, sink, maximum)
        self.total /= np.where(self.sum == 0, 1, self.sum)
        if factor != 1:
            self.total *= factor
        lse = np.log(self.sum) + self.maximum
        return self.total, lse[..., 0]


def row_maximum(scores: np.ndarray) -> np.ndarray:
    """Maximum over the last axis of a contiguous array, which stays as an axis of 1; NaN if there
    is one.

    NumPy vectorises `argmax` along rows better than `max`, which takes twice as long.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    index = flat.argmax(axis=-1)
    return flat[np.arange(len(flat)), index].reshape(*scores.shape[:-1], 1)


class Sinks:
    """One more logit per head, of a key without a value: it takes its share of every row's sum."""

    def __init__(self, sinks: np.ndarray, axes: Axes, dtype: np.dtype, wanted: bool) -> None:
        """`sinks` (H,)."""
        shape = (*sinks.shape, 1, 1)
        self.logits = Spread(sinks.reshape(shape).astype(dtype), axes)
        self.total = OptionSum(sinks, shape, axes, dtype) if wanted else None

    def of(self, unit: Unit, rows: int) -> np.ndarray:
        """(*unit, G * rows, 1), unit axes along which all is equal with extent 1: the logits of a
        group's stacked rows."""
        logits = self.logits.x[self.logits.index(unit)]
        logits = np.repeat(logits, rows, axis=-2)
        return logits.reshape(*logits.shape[:-3], -1, 1)

    def begin(self, unit: Unit) -> np.ndarray | None:
        """Where a unit adds its own part of the gradient to."""
        return None if self.total is None else self.total.begin(unit)

    def end(self, unit: Unit, part: np.ndarray | None) -> None:
        """Take a unit's part; units take turns."""
        if self.total is not None:
            self.total.end(unit, part)

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradient, if it was asked for."""
        return {} if self.total is None else {"sinks": self.total.result()}

    def backward(
        self, lse: np.ndarray, delta: np.ndarray, place: Place, part: np.ndarray | None
    ) -> None:
        """Add the part of rows whose lse (finite, where the row has any weight) and delta are
        (*unit, G * rows, 1)."""
        if self.total is None:
            return
        rows = place.q1 - place.q0
        terms = np.exp(self.of(place.unit, rows) - lse) * -delta
        self.total.add(part, place, terms.reshape(*terms.shape[:-2], -1, rows, 1))


class Dropped:
    """Which weights dropout takes away."""

    def __init__(self, dropout: Dropout) -> None:
        self.dropout = dropout
        self.factor = dropout.factor

    def tile(self, place: Place) -> np.ndarray:
        """bool (*unit, G, rows, keys), True = dropped."""
        b, h, i, j = place.coordinates()
        shape = np.broadcast_shapes(b.shape, h.shape, i.shape)
        b, h, i = (np.broadcast_to(x, shape).reshape(-1) for x in (b, h, i))
        kept = np.empty((len(i), len(j)), dtype=bool)
        self.dropout.keep(kept, b, h, i, place.k0)
        return np.logical_not(kept, out=kept).reshape(*shape[:-1], len(j))
