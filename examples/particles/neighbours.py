"""Which particles are near enough: an order in which neighbours stand together, and a block mask.

What cells and neighbour lists are to other codes. Particles are sorted along a curve that fills
the plane; each run of `BLOCK` of them has a bounding box, and two runs see each other when their
boxes are closer than `REACH` widths. Only whole blocks are left out, so no list is per particle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import cuflash

BLOCK = 64
# exp(-6.2**2) = 2e-17: a particle's own Gaussian is 1, and what lies beyond is below its rounding.
REACH = 6.2


def order(x: np.ndarray, bits: int = 16) -> np.ndarray:
    """Indices that sort points along Morton's curve.

    Parameters
    ----------
    x : array (n, 2)
    bits : int
        Of each coordinate, between its smallest and its largest.

    Examples
    --------
    >>> corners = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> corners[order(corners)].tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    low, high = x.min(axis=0), x.max(axis=0)
    cells = ((x - low) / np.maximum(high - low, 1e-300) * (2**bits - 1)).astype(np.uint64)
    key = np.zeros(len(x), np.uint64)
    for bit in range(bits):  # the two coordinates' bits, alternating
        for axis in range(2):
            one = (cells[:, axis] >> np.uint64(bit)) & np.uint64(1)
            key |= one << np.uint64(2 * bit + axis)
    return np.argsort(key, kind="stable")


def near(x: Any, distance: float, xp: Any, block: int = BLOCK) -> cuflash.BlockMask:
    """All pairs of particles closer than `distance`, and others of their blocks.

    Parameters
    ----------
    x : array (n, 2)
        In an order where neighbours stand together; in any other the mask is merely full.
    distance : float
    xp : module
        `numpy` or `cupy`.
    block : int
        Particles per block.
    """
    count = -(-len(x) // block)
    filled = xp.concatenate([x, xp.repeat(x[-1:], count * block - len(x), axis=0)])
    runs = filled.reshape(count, block, 2)
    low, high = runs.min(axis=1), runs.max(axis=1)
    if xp is not np:  # a box per block: small, and masks are built on the host
        low, high = low.get(), high.get()
    gap = np.maximum(low[:, None] - high[None], low[None] - high[:, None])
    apart = (np.maximum(gap, 0) ** 2).sum(axis=2)
    return cuflash.BlockMask.from_blocks(
        apart < distance**2, block_size=block, shape=(len(x), len(x))
    )
