"""What happens to a tile between `scale * q @ k.T` and the mask: one small class per score.

    apply(scores, place)                     changes scores (*unit, G, rows, keys) in place
    record(scores, place)                    the same in backward; returns what `backward` will need
    backward(grads, saved, place, part)      turns the gradient of the result into that of the
                                             argument, in place

A score with gradients of its own adds a tile's terms to `part` in `backward`:

    begin(unit)         a unit's `part`
    end(unit, part)     adds it to the total; units take turns, in their order
    owner(unit, packed) units of one owner are one thread's
    gradients()         by name

A new score is another class with these methods.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from ._cpu_place import Axes, Place, Spread, Unit
from ._cpu_sums import PART_ELEMENTS, OptionSum
from ._options import Options

if TYPE_CHECKING:
    from ._scoremod import ScoreMod


class Score:
    """A score without gradients of its own."""

    def apply(self, scores: np.ndarray, place: Place) -> None:
        """Change the scores of a tile."""
        raise NotImplementedError

    def record(self, scores: np.ndarray, place: Place) -> Any:
        """Change the scores of a tile; what `backward` needs of it."""
        self.apply(scores, place)

    def backward(self, grads: np.ndarray, saved: Any, place: Place, part: Any) -> None:
        """Change the gradient of the result into that of the argument: the same for a sum."""

    def begin(self, unit: Unit) -> Any:
        """Where a unit adds its own part of the gradients to."""
        return None

    def end(self, unit: Unit, part: Any) -> None:
        """Take a unit's part."""

    def owner(self, unit: Unit, packed: bool) -> tuple[int, ...] | None:
        """Units of one owner must be one thread's, one after the other; None: nobody minds."""
        return None

    def gradients(self) -> dict[str, Any]:
        """Gradients that were asked for, by argument name."""
        return {}


class Softcap(Score):
    """`s = cap * tanh(s / cap)`: logits are squeezed smoothly into (-cap, cap)."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def apply(self, scores: np.ndarray, place: Place) -> None:
        self.record(scores, place)

    def record(self, scores: np.ndarray, place: Place) -> np.ndarray:
        scores /= self.cap
        tanh = np.tanh(scores)
        np.multiply(tanh, self.cap, out=scores)
        return tanh

    def backward(self, grads: np.ndarray, saved: np.ndarray, place: Place, part: None) -> None:
        saved *= saved
        np.subtract(1, saved, out=saved)
        # 0 * NaN: a pair without gradient keeps none, whatever its score was.
        np.multiply(grads, saved, out=grads, where=grads != 0)


class Summand(Score):
    """A score that adds something to `s`, with one array whose gradient may be wanted."""

    def __init__(self, name: str, total: OptionSum | None) -> None:
        """`total` collects the gradient of argument `name`; None: it is not asked for."""
        self.name, self.total = name, total

    def terms(self, grads: np.ndarray, place: Place) -> np.ndarray:
        """Gradient of the array, spread out over the tile, from that of the tile."""
        return grads

    def backward(self, grads: np.ndarray, saved: Any, place: Place, part: Any) -> None:
        if self.total is not None:
            self.total.add(part, place, self.terms(grads, place))

    def begin(self, unit: Unit) -> Any:
        return None if self.total is None else self.total.begin(unit)

    def end(self, unit: Unit, part: Any) -> None:
        if self.total is not None:
            self.total.end(unit, part)

    def owner(self, unit: Unit, packed: bool) -> tuple[int, ...] | None:
        return None if self.total is None else self.total.owner(unit, packed)

    def gradients(self) -> dict[str, Any]:
        return {} if self.total is None else {self.name: self.total.result()}


class Bias(Summand):
    """`s + bias`, an array of any shape that broadcasts."""

    def __init__(self, bias: np.ndarray, axes: Axes, dtype: np.dtype, wanted: bool) -> None:
        shape = (1,) * (2 - bias.ndim) + bias.shape
        super().__init__("bias", OptionSum(bias, shape, axes, dtype) if wanted else None)
        self.bias = Spread.reading(bias.reshape(shape), axes)
        self.dtype = dtype

    def apply(self, scores: np.ndarray, place: Place) -> None:
        scores += self.bias.tile(place).astype(self.dtype, copy=False)


class Alibi(Summand):
    """`s - slope * abs(d - j)`: a penalty on the distance from the row's position d to key j."""

    def __init__(self, slopes: np.ndarray, axes: Axes, dtype: np.dtype, wanted: bool) -> None:
        """`slopes` broadcastable to (*B, H)."""
        shape = (*slopes.shape, 1, 1)
        super().__init__("alibi_slopes", OptionSum(slopes, shape, axes, dtype) if wanted else None)
        self.slopes = Spread.reading(slopes.reshape(shape), axes)
        self.dtype = dtype
        self.farthest = int(np.finfo(dtype).max) // 2

    def _distance(self, place: Place) -> np.ndarray:
        # Finite in the tile's dtype, so that a slope of 0 adds 0.
        shift = float(
            max(-self.farthest, min(self.farthest, place.q0 + place.unit.q_offset - place.k0))
        )
        rows, keys = place.q1 - place.q0, place.k1 - place.k0
        row = np.arange(rows, dtype=np.float64)[:, None] + shift
        return np.abs(row - np.arange(keys)).astype(self.dtype)

    def apply(self, scores: np.ndarray, place: Place) -> None:
        slopes = self.slopes.tile(place).astype(self.dtype)
        scores -= slopes * self._distance(place)

    def terms(self, grads: np.ndarray, place: Place) -> np.ndarray:
        return grads * -self._distance(place)


class Modified(Score):
    """A user's function of the score, of where it is, and of parameters."""

    def __init__(self, mod: ScoreMod, wanted: Collection[str]) -> None:
        """`wanted` names the parameter arrays whose gradients are asked for."""
        self.mod, self.arrays = mod, dict(mod.arrays)
        self.wanted = tuple(name for name in self.arrays if name in wanted)
        self.totals = {n: np.zeros(self.arrays[n].shape) for n in self.wanted}
        self.direct = sum(total.size for total in self.totals.values()) > PART_ELEMENTS

    def apply(self, scores: np.ndarray, place: Place) -> None:
        scores[...] = self.mod.evaluate(scores, *place.coordinates(), self.arrays)

    def record(self, scores: np.ndarray, place: Place) -> Any:
        values, slope, scatter = self.mod.derivatives(
            scores.copy(), *place.coordinates(), self.arrays, wrt=self.wanted
        )
        scores[...] = values
        return slope, scatter

    def backward(self, grads: np.ndarray, saved: Any, place: Place, part: Any) -> None:
        slope, scatter = saved
        for name in self.wanted:
            scatter[name](grads, part[name])
        # 0 * NaN: a pair without gradient keeps none, whatever its score was.
        np.multiply(grads, slope, out=grads, where=grads != 0)

    def begin(self, unit: Unit) -> dict[str, np.ndarray]:
        if self.direct:
            return self.totals
        return {name: np.zeros(total.shape) for name, total in self.totals.items()}

    def end(self, unit: Unit, part: dict[str, np.ndarray]) -> None:
        if not self.direct:
            for name, total in self.totals.items():
                total += part[name]

    def owner(self, unit: Unit, packed: bool) -> tuple[int, ...] | None:
        return () if self.direct else None

    def gradients(self) -> dict[str, Any]:
        if not self.wanted:
            return {}
        return {"score_params": {n: t.astype(self.arrays[n].dtype) for n, t in self.totals.items()}}


def scores_of(
    options: Options, axes: Axes, dtype: np.dtype, wrt: Collection[str] = ()
) -> list[Score]:
    """The scores that `options` ask for, in the order of their application.

    `wrt` names the arrays whose gradients are wanted.
    """
    scores: list[Score] = []
    if options.softcap is not None:
        scores.append(Softcap(options.softcap))
    if options.score_mod is not None:
        scores.append(Modified(options.score_mod, wrt))
    if options.bias is not None:
        scores.append(Bias(np.asarray(options.bias), axes, dtype, "bias" in wrt))
    if options.alibi_slopes is not None:
        slopes = np.asarray(options.alibi_slopes)
        scores.append(Alibi(slopes, axes, dtype, "alibi_slopes" in wrt))
    return scores
