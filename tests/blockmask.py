"""What the tests of BlockMask share: dense masks, and the comparison with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cuflash import BlockMask

PROPERTY = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SIZES = [16, 32, 48, (16, 32), (48, 16), (64, 80), 128]
LEADS = [(1,), (2,), (3, 1), (1, 2), (2, 2), (0, 2), (2, 0), (2, 1, 3)]
LENGTHS = st.sampled_from([0, 1, 15, 16, 17, 48, 100, 129]) | st.integers(0, 140)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def dense_mask(lead: tuple[int, ...], shape: tuple[int, int], seed: int) -> np.ndarray:
    """Bool (*lead, *shape) with empty, full and ragged regions that end on and off blocks."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*lead, *shape)) < rng.choice([0.02, 0.5, 0.98])
    for _ in range(6):
        item = tuple(rng.integers(0, n) for n in lead if n)
        rows, keys = (
            slice(*sorted(rng.integers(0, n + 1, 2) // s * s))
            for n, s in zip(shape, rng.choice([1, 16], 2), strict=True)
        )
        if len(item) == len(lead):
            mask[(*item, rows, keys)] = rng.random() < 0.6
    return mask


def same(mask: BlockMask, dense: np.ndarray) -> None:
    """Storage and meaning of `mask` are those of bool (*lead, Lq, Lk), block by block and bit by bit."""
    assert mask.shape == dense.shape[-2:]
    assert (*mask.batch, mask.heads) == dense.shape[:-2]
    (bq, bk), (len_q, len_k) = mask.block_size, mask.shape
    assert mask.slots.shape == (*dense.shape[:-2], -(-len_q // bq), -(-len_k // bk))
    assert mask.slots.dtype == np.int32 and mask.bits.dtype == np.uint32
    assert mask.bits.shape[1:] == (bq, -(-bk // 32))
    for array in (mask.slots, mask.bits):
        assert array.flags.c_contiguous and not array.flags.writeable
    for place in np.ndindex(mask.slots.shape):
        *item, a, c = place
        block = dense[(*item, slice(a * bq, (a + 1) * bq), slice(c * bk, (c + 1) * bk))]
        slot = mask.slots[place]
        if block.all() or not block.any():
            assert slot == (-2 if block.all() else -1)
            continue
        rows, keys = np.arange(bq)[:, None], np.arange(32 * mask.bits.shape[2])
        stored = (mask.bits[slot][rows, keys // 32] >> (keys % 32).astype(np.uint32)) & 1
        wanted = np.zeros(stored.shape, bool)
        wanted[: block.shape[0], : block.shape[1]] = block
        assert (stored == wanted).all(), place
    # No row of bits is kept twice, or for nothing.
    assert set(mask.slots[mask.slots >= 0]) == set(range(len(mask.bits)))
    assert len({row.tobytes() for row in mask.bits}) == len(mask.bits)
    assert mask.density == (dense.mean() if dense.size else 0.0)
    found = mask.to_dense()
    assert found.dtype == bool and found.shape == dense.shape
    assert (found == dense).all()


def raised(kind: type[Exception], function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the error `function` raises: exactly `kind`, with a way out."""
    with pytest.raises(kind) as info:
        function(*args, **kwargs)
    assert type(info.value) is kind
    assert "\n  Way out: " in str(info.value)
    return str(info.value)
