"""A learned logit per head and distance, with positions that stand outside the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import cuflash

from .layers import namespace

# Two positions of the sequence take the entry of their distance. The last two entries of a head are
# for pairs whose key is global, and for those whose query alone is.
_CODE = (
    "s + table[h][j < first ? 2 * reach + 1 : i < first ? 2 * reach + 2 "
    ": min(max(j - i, -reach), reach) + reach]"
)


@dataclass(frozen=True)
class Relative:
    """A logit that depends on `j - i` alone, clipped to `reach`.

    Attributes
    ----------
    heads, reach : int
        The table has `2 * reach + 1` entries per head for distances, and two for global positions.
    first : int
        So many positions at the beginning are global: they stand nowhere in the sequence.

    Notes
    -----
    Shaw, Uszkoreit, Vaswani, "Self-Attention with Relative Position Representations"
    (arXiv:1803.02155, 2018), section 3.2, for the clipped distance; Raffel et al., "Exploring the
    Limits of Transfer Learning" (arXiv:1910.10683, 2019), section 2.1, for one number per head.

    Examples
    --------
    >>> relative = Relative(heads=1, reach=1)
    >>> relative.matrix(np.array([[-1.0, 0.0, 2.0, 8.0, 9.0]]), 3)[0]
    array([[ 0.,  2.,  2.],
           [-1.,  0.,  2.],
           [-1., -1.,  0.]])
    """

    heads: int
    reach: int
    first: int = 0

    @property
    def entries(self) -> int:
        """Of the table, per head."""
        return 2 * self.reach + 3

    def score_mod(self, table: Any) -> cuflash.ScoreMod:
        """The expression for `cuflash.attention`, which differentiates it; table (heads, entries)."""
        params = {"table": table, "reach": self.reach, "first": self.first}
        return cuflash.ScoreMod(_CODE, params)

    def _places(self, xp: Any, length: int) -> Any:
        """int (length, length): each pair's entry."""
        i, j = xp.arange(length)[:, None], xp.arange(length)
        place = xp.clip(j - i, -self.reach, self.reach) + self.reach
        place = xp.where(i < self.first, 2 * self.reach + 2, place)
        return xp.where(j < self.first, 2 * self.reach + 1, place)

    def matrix(self, table: Any, length: int) -> Any:
        """Array (heads, length, length): the whole of what `score_mod` adds, for comparisons."""
        return table[:, self._places(namespace(table), length)]

    def gradient(self, ds: Any) -> Any:
        """Gradient of the table from that of the logits (batch, heads, length, length)."""
        xp = namespace(ds)
        places = self._places(xp, ds.shape[-1]).ravel()
        rows = [
            xp.bincount(places, weights=head.ravel(), minlength=self.entries)
            for head in ds.sum(axis=0)
        ]
        return xp.stack(rows).astype(ds.dtype)


def look_at(relative: Relative, offsets: Any, strength: float, width: float) -> np.ndarray:
    """A table whose head n begins by looking at offset `offsets[n]`.

    Parameters
    ----------
    relative : Relative
    offsets : sequence of int
        One per head.
    strength : float
        Logit at the offset, above those far from it.
    width : float
        Distance over which the logit falls off.

    Returns
    -------
    array (heads, entries)

    Notes
    -----
    d'Ascoli, Touvron, Leavitt, Morcos, Biroli, Sagun, "ConViT: Improving Vision Transformers with
    Soft Convolutional Inductive Biases" (arXiv:2103.10697, 2021), section 3: heads that begin as a
    convolution and are free to become something else.
    """
    distance = np.arange(-relative.reach, relative.reach + 1) - np.asarray(offsets)[:, None]
    table = np.zeros((relative.heads, relative.entries))
    table[:, : distance.shape[1]] = strength * np.exp(-((distance / width) ** 2))
    return table
