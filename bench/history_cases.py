"""Sizes, masks and calls of `--suite history`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuflash
from bench.cases import Case, sweep
from cuflash import BlockMask

# The experiments, in the letters of the introduction.
DROPOUT = Case(32, 8, 8, 2048, 2048, 64, "float16")
DROPOUT_P, TRIALS = 0.2, 10
GPT2 = Case(64, 16, 16, 1024, 1024, 64, "float16")
MEMORY = Case(16, 8, 8, 128, 128, 64, "float16")
SPARSE = Case(4, 16, 16, 16384, 16384, 64, "float16")
SWEEP = [c for c in sweep("float16") if c.head_dim in (64, 128)]
LENGTHS = tuple(2**n for n in range(7, 17))
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
BLOCK = 128


def patterns(length: int, density: float, heads: int = 1) -> dict[str, BlockMask]:
    """Block masks of about a density: blocks at random, a band with global blocks, a butterfly.

    The butterfly has the density that its form gives; it is listed with the nearest.
    """
    blocks = length // BLOCK
    rng = np.random.default_rng(0)
    keep = rng.permuted(
        np.arange(blocks) < max(1, round(density * blocks)) * np.ones((blocks, 1)), axis=1
    )
    found = {
        "random": BlockMask.from_blocks(keep.astype(bool), block_size=BLOCK, shape=(length, length))
    }
    if density < 1:
        # A block column and a block row of global positions, the rest of the share in a band.
        band = max(0, round((density * blocks - 2) / 2))
        place = np.arange(blocks)
        near = abs(place[:, None] - place) <= band
        near[0] = near[:, 0] = True
        found["band + global"] = BlockMask.from_blocks(
            near, block_size=BLOCK, shape=(length, length)
        )
    butterfly = BlockMask.butterfly(shape=(length, length), block_size=BLOCK)
    nearest = min(DENSITIES, key=lambda d: abs(d - butterfly.density))
    if density == nearest:
        found["butterfly"] = butterfly
    return found


def attend(case: Case, x: Any, **given: Any) -> dict[str, Callable[[], Any]]:
    """Forward with lse, and backward, of cuflash."""
    out, lse = cuflash.attention(x.q, x.k, x.v, return_lse=True, causal=case.causal, **given)
    return {
        "forward": lambda: cuflash.attention(
            x.q, x.k, x.v, return_lse=True, causal=case.causal, **given
        ),
        "backward": lambda: cuflash.attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, causal=case.causal, **given
        ),
    }
