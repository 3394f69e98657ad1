"""Philox-4x32-10, the counter-based generator behind dropout, vectorised for NumPy and CuPy.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A pure function
of a counter and a key: whoever needs the number at some place computes it there, in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
# What a round adds to the key: the golden ratio and sqrt(3) - 1, as fractions of 2**32.
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Any, Any, Any, Any], key: tuple[int, int], *, xp: Any = np
) -> tuple[Any, Any, Any, Any]:
    """The four 32-bit words that Philox-4x32-10 makes of each counter.

    Parameters
    ----------
    counter
        Four integer arrays (or ints) of words below 2**32 that broadcast against each other. A word
        that varies along few axes stays small for the first rounds, which saves a fifth of the work.
    key
        Two words.
    xp
        The array module: `numpy` or `cupy`.

    Returns
    -------
    Four uint64 arrays of the broadcast shape, values below 2**32.
    """
    low, half = xp.uint64(LOW), xp.uint64(32)
    factors = tuple(xp.uint64(m) for m in MULTIPLIERS)
    x0, x1, x2, x3 = (xp.asarray(word).astype(xp.uint64) for word in counter)
    for step in range(ROUNDS):
        keys = [xp.uint64((word + step * weyl) & LOW) for word, weyl in zip(key, WEYL, strict=True)]
        # A product of 32-bit words fits 64 bits: its halves are what the round passes on.
        first, second = x0 * factors[0], x2 * factors[1]
        x0, x2 = (second >> half) ^ (x1 ^ keys[0]), (first >> half) ^ (x3 ^ keys[1])
        x1, x3 = second & low, first & low
    x0, x1, x2, x3 = xp.broadcast_arrays(x0, x1, x2, x3)
    return x0, x1, x2, x3
