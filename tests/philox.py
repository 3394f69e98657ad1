"""Which weights dropout keeps, written from the paper, on its own: the package must agree with it.

Philox-4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011, section 3.3 and table 2. Element (b, h, i, j) is word `j % 4` of the block at counter
`(j // 4, i, h, b)` under the two halves of the seed.
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Four words of 32 bits (in uint64 arrays) for every counter; ten rounds."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & LOW,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def keep_mask(
    seed: int, p: float, batch: int, heads: int, len_q: int, len_k: int, *, first_batch: int = 0
) -> np.ndarray:
    """bool (batch, heads, len_q, len_k); `first_batch` is the batch number of the first entry."""
    quads = -(-len_k // 4)
    b = first_batch + np.arange(batch)[:, None, None, None]
    h, i = np.arange(heads)[:, None, None], np.arange(len_q)[:, None]
    words = philox([np.arange(quads), i, h, b], (seed & 0xFFFFFFFF, seed >> 32))
    drawn = np.stack(words, axis=-1).reshape(batch, heads, len_q, 4 * quads)[..., :len_k]
    return drawn >= np.uint64(min(round(p * 2**32), 2**32 - 1))
