"""Which attention weights dropout keeps: a pure function of (seed, batch, head, row, key).

The same for every backend, kernel and tile size, in forward and backward, because nothing is drawn
in an order: the number of a pair is computed from where the pair is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import _checks
from cuflash._errors import Seen, kind_of
from cuflash._philox import LOW, philox4x32

# Philox counters computed at once. Their words (64 KB each in NumPy) should stay in a core's level
# 2 cache; on a GPU the number of launches counts instead.
COUNTERS = {"numpy": 1 << 13, "cupy": 1 << 22}


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of one call.

    Parameters
    ----------
    threshold
        A weight is kept if its 32-bit number is at least this.
    factor
        1 / (1 - p): what kept weights are multiplied by.
    seed
        In [0, 2**64).
    """

    threshold: int
    factor: float
    seed: int

    @classmethod
    def of(cls, p: float, seed: int) -> Dropout:
        """From a probability in [0, 1)."""
        return cls(min(round(p * 2**32), 2**32 - 1), 1 / (1 - p), seed)

    def keep(self, out: Any, b: Any, h: Any, i: Any, first_key: int, *, xp: Any = np) -> None:
        """Write to `out` (n, keys), bool, which pairs of rows and keys are kept.

        Parameters
        ----------
        out
            Columns are the keys from `first_key` on.
        b, h, i
            Integer arrays (n,): batch number, query head and query row of every row of `out`.
        """
        rows, keys = out.shape
        first, last = first_key // 4, -(-(first_key + keys) // 4)
        blocks = xp.arange(first, last)
        start = first_key - 4 * first
        step = max(1, COUNTERS[xp.__name__] // max(1, last - first))
        key = self.seed & LOW, self.seed >> 32
        threshold = xp.uint64(self.threshold)
        for low in range(0, rows, step):
            cut = np.s_[low : low + step, None]
            words = philox4x32((blocks, i[cut], h[cut], b[cut]), key, xp=xp)
            kept = xp.stack([word >= threshold for word in words], axis=-1)
            out[low : low + step] = kept.reshape(len(kept), -1)[:, start : start + keys]


def dropout_mask(seed: Any, dropout_p: float, shape: Sequence[int], *, xp: Any = np) -> Any:
    """Which attention weights `attention(..., dropout_p=dropout_p, seed=seed)` keeps.

    Parameters
    ----------
    seed : int or array
        In [0, 2**64), or an array of one unsigned integer (read by the host).
    dropout_p : float
        Probability in [0, 1) that a weight is dropped.
    shape : sequence of int
        `(*B, H, Lq, Lk)`, or `(Lq, Lk)` for a call without heads. Several batch axes count as one,
        in C order. For packed sequences B is their number, and the mask of sequence b is the upper
        left corner of `mask[b]`.
    xp : module
        `numpy` or `cupy`: where the mask is made.

    Returns
    -------
    array of bool, (*B, H, Lq, Lk)
        True where a weight is kept (and multiplied by `1 / (1 - dropout_p)`).

    Raises
    ------
    TypeError
        A seed or a shape that is no integer, a probability that is no real number.
    ValueError
        A seed outside [0, 2**64), a probability outside [0, 1), a negative extent, fewer than two
        extents.

    Notes
    -----
    Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
    2011, section 3.3), with counter words `(j // 4, i, h, b)` and key words `(seed % 2**32,
    seed // 2**32)`; pair (i, j) has word `j % 4` of the result, and is kept if that is at least
    `round(dropout_p * 2**32)`. The mask is therefore the same for any tile size, kernel and
    backend, and that of a shorter sequence is a part of that of a longer one.

    Examples
    --------
    >>> import cuflash
    >>> cuflash.dropout_mask(7, 0.5, (1, 1, 2, 8)).astype(int)[0, 0]
    array([[1, 1, 0, 0, 0, 1, 0, 1],
           [0, 0, 1, 1, 0, 0, 0, 0]])
    """
    seen = Seen({}, {"seed": seed, "dropout_p": dropout_p, "shape": shape, "xp": _name(xp)})
    if _name(xp) not in COUNTERS:
        raise seen.error(
            TypeError, f"xp is {kind_of(xp)}, neither numpy nor cupy.", "xp=numpy or xp=cupy."
        )
    extents = _extents(shape, seen)
    p = _checks.real("dropout_p", dropout_p, seen)
    if not 0 <= p < 1:
        raise seen.error(
            ValueError, f"dropout_p is {p}, and must be in [0, 1).", "a probability below 1."
        )
    dropout = Dropout.of(p, _seed(seed, seen))
    *batch, heads, len_q, len_k = extents if len(extents) > 2 else (1, *extents)
    rows = math.prod(batch) * heads * len_q
    mask = xp.empty((rows, len_k), dtype=bool)
    # So many rows at once that their three coordinates stay small beside their part of the mask.
    step = max(1, 8 * COUNTERS[_name(xp)] // max(1, len_k))
    for low in range(0, rows, step):
        row = xp.arange(low, min(low + step, rows))
        b, h, i = row // (heads * len_q), row // len_q % heads, row % len_q
        dropout.keep(mask[low : low + step], b, h, i, 0, xp=xp)
    return mask.reshape(extents)


def _name(xp: Any) -> str:
    return getattr(xp, "__name__", type(xp).__name__)


def _extents(shape: Any, seen: Seen) -> tuple[int, ...]:
    way_out = "shape=(B, H, Lq, Lk), ints >= 0."
    if not isinstance(shape, (tuple, list)):
        raise seen.error(TypeError, f"shape is {kind_of(shape)}, not a tuple.", way_out)
    extents = tuple(_checks.integer("shape", n, seen) for n in shape)
    if len(extents) < 2:
        raise seen.error(
            ValueError, f"shape has {len(extents)} extents, and at least 2 are needed.", way_out
        )
    if min(extents) < 0:
        raise seen.error(ValueError, f"shape holds {min(extents)}, which is below 0.", way_out)
    return extents


def _seed(seed: Any, seen: Seen) -> int:
    if getattr(seed, "shape", ()) != () and getattr(seed, "size", 0) == 1:
        seed = seed.reshape(()).item()
    number = _checks.integer("seed", seed, seen)
    if not 0 <= number < 2**64:
        raise seen.error(
            ValueError, f"seed is {number}, and must be in [0, 2**64).", "an int in that range."
        )
    return number
