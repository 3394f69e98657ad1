"""Documents of a packed sequence, given by ids, lengths or boundaries: the number of each element."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import _blockmask_checks as checks
from cuflash._errors import Seen


def ids_of_both(
    way: str, pair: tuple[Any, Any], totals: tuple[int | None, int | None], seen: Seen
) -> tuple[np.ndarray, np.ndarray]:
    """int64 (*B, Lq) and (*B, Lk), from any of the ways to give them."""
    sides: list[np.ndarray] = []
    counts: list[int] = []
    for end, value, total in zip(("", "_k"), pair, totals, strict=True):
        name = way if value is None else f"{way}{end}"
        numbers = checks.integers(name, pair[0] if value is None else value, seen)
        if numbers.ndim == 0 or (numbers.ndim > 1 and way != "ids"):
            raise seen.error(
                ValueError,
                f"{name} has {numbers.ndim} axes, and needs {'at least ' * (way == 'ids')}1.",
                f"{name} as one list.",
            )
        if way == "cu_seqlens":
            numbers = _differences(name, numbers, seen)
        if way != "ids":
            counts.append(len(numbers))
            numbers = _consecutive(name, numbers, total, seen)
        elif total not in (None, numbers.shape[-1]):
            raise seen.error(
                ValueError,
                f"{name} is of {numbers.shape[-1]} elements, and shape says {total}.",
                "leave shape out, or pad with -1.",
            )
        sides.append(numbers)
    if len(set(counts)) == 2:
        raise seen.error(
            ValueError,
            f"{way} has {counts[0]} documents, and {way}_k has {counts[1]}.",
            "one entry per document in both; a length of 0 is allowed.",
        )
    return sides[0], sides[1]


def _differences(name: str, cumulative: np.ndarray, seen: Seen) -> np.ndarray:
    """Lengths of documents from where they begin."""
    if not len(cumulative) or cumulative[0] != 0:
        start = f"starts at {cumulative[0]}" if len(cumulative) else "is empty"
        raise seen.error(ValueError, f"{name} {start}, and must start at 0.", "0, then the ends.")
    lengths = np.diff(cumulative)
    for n in np.flatnonzero(lengths < 0)[:1]:
        raise seen.error(
            ValueError,
            f"{name} falls from {cumulative[n]} to {cumulative[n + 1]} at entry {n + 1}.",
            "numbers that do not decrease.",
        )
    return lengths


def _consecutive(name: str, lengths: np.ndarray, total: int | None, seen: Seen) -> np.ndarray:
    """Number of the document of each element, -1 after the last."""
    for length in lengths[lengths < 0][:1]:
        raise seen.error(ValueError, f"{name} holds {length}, and must be >= 0.", "lengths.")
    end = sum(lengths.tolist())
    size = end if total is None else total
    if end > size:
        raise seen.error(
            ValueError,
            f"{name} are {end} elements together, and shape says {size}.",
            "a larger shape, or fewer documents.",
        )
    ids: np.ndarray = np.full(size, -1, np.int64)
    ids[:end] = np.repeat(np.arange(len(lengths)), lengths)
    return ids
