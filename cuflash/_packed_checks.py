"""Rules for packed sequences: cumulative lengths and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash import _array_checks, _checks
from cuflash._arrays import Meta
from cuflash._errors import Seen, shown_dtype

SIDES = ("q", "k")


def extents(
    arrays: Mapping[str, Meta],
    options: Mapping[str, Any],
    sizes: _array_checks.Extents,
    rank: int,
    seen: Seen,
) -> _array_checks.Extents:
    """The extents that options are about, from those of the packed arrays: the batch is the number of
    sequences, the lengths are bounds.
    """
    if rank != 3:
        raise seen.error(
            ValueError,
            f"q has {rank} axes, and packed sequences have 3.",
            "(H, total_q, D), or (total_q, H, D) with layout='LHD'.",
        )
    counts = [_count(f"cu_seqlens_{side}", arrays[f"cu_seqlens_{side}"], seen) for side in SIDES]
    if counts[0] != counts[1]:
        raise seen.error(
            ValueError,
            f"cu_seqlens_q is for {counts[0]} sequences, and cu_seqlens_k for {counts[1]}.",
            "one more entry than there are sequences, in both.",
        )
    longest = [options[f"max_seqlen_{side}"] for side in SIDES]
    return sizes._replace(batch=(counts[0],), len_q=longest[0], len_k=longest[1])


def _count(name: str, meta: Meta, seen: Seen) -> int:
    """Number of sequences."""
    if meta.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise seen.error(
            TypeError,
            f"{name} is {shown_dtype(meta.dtype)}, and must be int32 or int64.",
            f"{name}.astype(numpy.int32).",
        )
    if len(meta.shape) != 1 or meta.shape[0] < 1:
        raise seen.error(
            ValueError,
            f"{name} has shape {meta.shape}, and must be (batch + 1,).",
            "[0, end of the first sequence, end of the second, ...].",
        )
    return meta.shape[0] - 1


def longest(name: str, value: Any, seen: Seen) -> int:
    """A bound of the lengths that the caller gives."""
    number = _checks.integer(name, value, seen)
    if number < 0:
        raise seen.error(
            ValueError, f"{name} is {number}, and must be >= 0.", "the longest length."
        )
    return number


def contents(name: str, cu: np.ndarray, total: int, bound: int | None, seen: Seen) -> int:
    """Checks cumulative lengths that the host can read; the longest of them."""
    way_out = "start at 0, never decrease, end within the arrays."
    if cu[0] != 0:
        raise seen.error(ValueError, f"{name} starts at {cu[0]}, and must start at 0.", way_out)
    lengths = np.diff(cu.astype(np.int64))
    if (lengths < 0).any():
        at = int(np.argmax(lengths < 0))
        raise seen.error(
            ValueError,
            f"{name} decreases from {cu[at]} to {cu[at + 1]} at entry {at + 1}.",
            way_out,
        )
    if cu[-1] > total:
        raise seen.error(
            ValueError, f"{name} ends at {cu[-1]}, and the arrays have {total} rows.", way_out
        )
    most = int(lengths.max(initial=0))
    if bound is not None and most > bound:
        side = name[-1]
        raise seen.error(
            ValueError,
            f"max_seqlen_{side} is {bound}, and {name} has a sequence of {most}.",
            f"max_seqlen_{side}={most} or more, or None.",
        )
    return most
