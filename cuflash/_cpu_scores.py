"""What happens to a tile between `scale * q @ k.T` and the mask: one small class per score.

    apply(scores, place)               changes scores (*unit, G, rows, keys) in place,
                                       returns what backward will need
    backward(grads, saved, place)      turns the gradient of the result into that of the argument,
                                       in place

`place` says which rows and keys of which heads the tile holds. A new score is another class with
these two methods; one with parameters of its own also accumulates their gradient in `backward` and
returns it from `gradient()`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._options import Options


@dataclass(frozen=True)
class Place:
    """Where a tile lies: leading index (batch axes, kv heads), rows `q0:q1`, keys `k0:k1`."""

    unit: tuple[slice, ...]
    q0: int
    q1: int
    k0: int
    k1: int


class Softcap:
    """`s = cap * tanh(s / cap)`: logits are squeezed smoothly into (-cap, cap)."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def apply(self, scores: np.ndarray, place: Place) -> np.ndarray:
        scores /= self.cap
        tanh = np.tanh(scores)
        np.multiply(tanh, self.cap, out=scores)
        return tanh

    def backward(self, grads: np.ndarray, saved: np.ndarray, place: Place) -> None:
        saved *= saved
        np.subtract(1, saved, out=saved)
        # 0 * NaN: a pair without gradient keeps none, whatever its score was.
        np.multiply(grads, saved, out=grads, where=grads != 0)


class Alibi:
    """`s - slope * abs(d - j)`: a penalty on the distance from the row's position d to key j."""

    def __init__(
        self, slopes: np.ndarray, shape: tuple[int, ...], options: Options, dtype: np.dtype
    ) -> None:
        """`slopes` broadcastable to (*B, H); `shape` is (*B, Hkv, G)."""
        self.given = slopes
        *batch, heads_kv, group = shape
        self.full_shape = (*batch, heads_kv * group)
        self.slopes = np.broadcast_to(slopes, self.full_shape).astype(dtype).reshape(shape)
        self.q_offset = options.q_offset
        self.dtype = dtype
        # One number per head, summed over every pair: float64 costs nothing here.
        self.slope_grads = np.zeros(shape, dtype=np.float64)

    def _distance(self, place: Place) -> np.ndarray:
        shift = float(place.q0 + self.q_offset - place.k0)
        rows, keys = place.q1 - place.q0, place.k1 - place.k0
        row = np.arange(rows, dtype=np.float64)[:, None] + shift
        return np.abs(row - np.arange(keys)).astype(self.dtype)

    def apply(self, scores: np.ndarray, place: Place) -> None:
        scores -= self.slopes[place.unit][..., None, None] * self._distance(place)

    def backward(self, grads: np.ndarray, saved: None, place: Place) -> None:
        weighted = grads * self._distance(place)
        self.slope_grads[place.unit] -= weighted.sum(axis=(-2, -1), dtype=np.float64)

    def gradient(self) -> np.ndarray:
        """Gradient in the shape and dtype in which the slopes were given."""
        total = self.slope_grads.reshape(self.full_shape)
        total = total.sum(axis=tuple(range(total.ndim - self.given.ndim)))
        ones = tuple(a for a, n in enumerate(self.given.shape) if n == 1)
        return total.sum(axis=ones, keepdims=True).astype(self.given.dtype)


def scores_of(options: Options, shape: tuple[int, ...], dtype: np.dtype) -> list[Softcap | Alibi]:
    """The scores that `options` ask for, in the order of their application.

    `shape` is (*B, Hkv, G).
    """
    scores: list[Softcap | Alibi] = []
    if options.softcap is not None:
        scores.append(Softcap(options.softcap))
    if options.alibi_slopes is not None:
        scores.append(Alibi(np.asarray(options.alibi_slopes), shape, options, dtype))
    return scores
