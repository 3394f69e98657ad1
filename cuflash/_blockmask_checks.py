"""Every rule that the arguments of a BlockMask must satisfy, each raising in the form of `_errors`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash import _arrays, _checks
from cuflash._errors import Seen, kind_of, shown_dtype

# Sums of a position, an offset and a window stay inside int64, and no window without a bound ends
# before the farthest offset.
_FAR, _FARTHEST_OFFSET = 2**61, 2**60
# Longest side of a block, most batches and heads: products of what is counted stay inside int64.
_LARGEST = 2**30


def block_size(value: Any, seen: Seen) -> tuple[int, int]:
    """(bq, bk), from an int or a pair."""
    way_out = "a multiple of 16, or a pair (bq, bk) of them; 128 is the default."
    sides = _pair("block_size", value, seen, way_out) if _is_sequence(value) else (value, value)
    sizes = []
    for side in sides:
        size = _checks.integer("block_size", side, seen)
        if size <= 0 or size % 16:
            raise seen.error(
                ValueError,
                f"block_size is {value!r}, and {size} is not a positive multiple of 16.",
                way_out,
            )
        _at_most("block_size", size, seen)
        sizes.append(size)
    return sizes[0], sizes[1]


def shape(value: Any, seen: Seen) -> tuple[int, int]:
    """(Lq, Lk)."""
    way_out = "shape=(Lq, Lk), the lengths of queries and keys."
    if not _is_sequence(value):
        raise seen.error(TypeError, f"shape is {kind_of(value)}, not a pair.", way_out)
    pair = _pair("shape", value, seen, way_out)
    lengths = [_checks.integer("shape", side, seen) for side in pair]
    if min(lengths) < 0:
        raise seen.error(ValueError, f"shape is {tuple(lengths)}, and must be >= 0.", way_out)
    return lengths[0], lengths[1]


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (str, bytes, set, frozenset, Mapping)):
        return False
    return _checks.iterable(value)


def _pair(name: str, value: Any, seen: Seen, way_out: str) -> tuple[Any, Any]:
    sides = tuple(value)
    if len(sides) != 2:
        raise seen.error(ValueError, f"{name} has {len(sides)} entries, and must have 2.", way_out)
    return sides[0], sides[1]


def count(name: str, value: Any, least: int, seen: Seen) -> int:
    """An int that is not below `least`."""
    number = _checks.integer(name, value, seen)
    if number < least:
        raise seen.error(
            ValueError, f"{name} is {number}, and must be >= {least}.", f"a larger {name}."
        )
    return number


def _at_most(name: str, number: int, seen: Seen) -> int:
    if number > _LARGEST:
        raise seen.error(
            ValueError, f"{name} is {number}, and at most 2**30 is possible.", f"a smaller {name}."
        )
    return number


def lead(batch: Any, heads: Any, seen: Seen) -> tuple[int, ...]:
    """(*Bm, Hm); a batch of 1 is no axis, as it broadcasts all the same."""
    last = _at_most("heads", count("heads", heads, 0, seen), seen)
    if _is_sequence(batch):
        extents = (count("batch", extent, 0, seen) for extent in batch)
        return (*(_at_most("batch", extent, seen) for extent in extents), last)
    extent = _at_most("batch", count("batch", batch, 0, seen), seen)
    return (last,) if extent == 1 else (extent, last)


def position(value: Any, lengths: tuple[int, int], seen: Seen) -> int:
    """q_offset: position of query row 0 on the key axis, by default with the ends aligned."""
    if value is None:
        return lengths[1] - lengths[0]
    offset = _checks.integer("q_offset", value, seen)
    if abs(offset) > _FARTHEST_OFFSET:
        raise seen.error(
            ValueError,
            f"q_offset is {offset}, and a BlockMask holds offsets up to 2**60 either way.",
            f"q_offset between {-lengths[0]} and {lengths[1]}: beyond, no row meets a key.",
        )
    return offset


def window(value: Any, dilation: int, seen: Seen) -> tuple[int, int]:
    """(left, right) of a window in positions; None and what lies far outside become one bound."""
    left, right = _checks.band(False, value, seen)
    sides = [_FAR if side is None else min(side * dilation, _FAR) for side in (left, right)]
    return sides[0], sides[1]


def tile(rows: tuple[int, int], keys: tuple[int, int], lengths: tuple[int, int]) -> None:
    """Ranges of queries and keys that lie inside the mask."""
    for what, (start, stop), length in zip(("queries", "keys"), (rows, keys), lengths, strict=True):
        if not 0 <= start <= stop <= length:
            seen = Seen({}, {"queries": rows, "keys": keys})
            raise seen.error(
                ValueError,
                f"tile of {what} {start}:{stop}, and the mask has {length} {what}.",
                f"0 <= start <= stop <= {length}.",
            )


def array(name: str, value: Any, kinds: str, what: str, seen: Seen) -> np.ndarray:
    """A NumPy array whose dtype is of one of `kinds`; device arrays are copied to the host."""
    found = _arrays._adopt_one(name, value, seen)
    if found.dtype.kind not in kinds:
        raise seen.error(
            TypeError,
            f"{name} is {shown_dtype(found.dtype)}, and {what} is needed.",
            f"convert {name} with astype, or compare: {name} != 0."
            if kinds == "b"
            else f"convert {name} with astype.",
        )
    return found if isinstance(found, np.ndarray) else found.get()


def bools(name: str, value: Any, least: int, seen: Seen) -> np.ndarray:
    """A bool array of at least `least` axes, on the host."""
    found = array(name, value, "b", "bool", seen)
    if found.ndim < least:
        raise seen.error(
            ValueError,
            f"{name} has {found.ndim} axes, and needs at least {least}.",
            f"{name} of the last axes (queries, keys).",
        )
    return found


def integers(name: str, value: Any, seen: Seen) -> np.ndarray:
    """An int64 array on the host, from an array or a list of ints."""
    if isinstance(value, (list, tuple, range)):
        try:
            value = np.asarray(value if len(value) else np.empty(0, np.int64))
        except ValueError:
            raise seen.error(
                ValueError,
                f"{name} has rows of several lengths.",
                "rows of equal length, or one list.",
            ) from None
    found = array(name, value, "iu", "an integer dtype", seen)
    if found.dtype == np.uint64 and found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise seen.error(ValueError, f"{name} goes beyond int64.", "smaller numbers.")
    return found.astype(np.int64)
