"""Rules for masks, biases, sinks, score expressions and dropout; the form is that of `_checks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash import _array_checks, _checks
from cuflash._arrays import Meta
from cuflash._errors import Seen, shown_dtype

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def pair_shape(sizes: _array_checks.Extents, rank: int) -> tuple[int, ...]:
    """(*B, H, Lq, Lk), or (Lq, Lk) for a call without heads."""
    shape = (*sizes.batch, sizes.heads, sizes.len_q, sizes.len_k)
    return shape[-2:] if rank == 2 else shape


def mask(meta: Meta, pairs: tuple[int, ...], seen: Seen) -> None:
    """A bool array, broadcastable to the pairs."""
    if meta.dtype != np.bool_:
        raise seen.error(
            TypeError,
            f"mask is {shown_dtype(meta.dtype)}, not bool.",
            "mask.astype(bool), True where a query may see a key; numbers to add are a bias.",
        )
    broadcastable("mask", meta.shape, pairs, seen)


def bias(meta: Meta, pairs: tuple[int, ...], dtype: np.dtype, seen: Seen) -> None:
    """An array of q's dtype or float32, broadcastable to the pairs."""
    side_dtype("bias", meta.dtype, dtype, seen)
    broadcastable("bias", meta.shape, pairs, seen)


def side_dtype(name: str, found: np.dtype, dtype: np.dtype, seen: Seen) -> None:
    """q's dtype or float32."""
    if found in (dtype, FLOAT32):
        return
    hint = ", and True/False masks go to mask=" if found == np.bool_ else ""
    raise seen.error(
        TypeError,
        f"{name} is {shown_dtype(found)}, and q is {dtype.name}.",
        f"convert it to {dtype.name} or float32{hint}.",
    )


def broadcastable(name: str, shape: tuple[int, ...], pairs: tuple[int, ...], seen: Seen) -> None:
    """Whether NumPy would broadcast `shape` to the pairs."""
    missing = len(pairs) - len(shape)
    if missing >= 0 and all(n in (1, full) for n, full in zip(shape, pairs[missing:], strict=True)):
        return
    raise seen.error(
        ValueError,
        f"{name} has shape {shape}, and must broadcast to {pairs}.",
        "its axes, from the last, are keys, queries, heads, batch; each may be 1 or missing.",
    )


def blocks(pattern: Any, pairs: tuple[int, ...], seen: Seen) -> None:
    """A BlockMask of these lengths whose batch and heads broadcast."""
    if pattern.shape != pairs[-2:]:
        raise seen.error(
            ValueError,
            f"mask is a BlockMask of {pattern.shape[0]} queries and {pattern.shape[1]} keys, and the "
            f"call has {pairs[-2]} and {pairs[-1]}.",
            "make it for these lengths.",
        )
    lead = pattern.slots.shape[:-2]
    own = lead[-1:] if len(pairs) == 2 else lead
    full = pairs[:-2] or (1,)
    missing = len(full) - len(own)
    fits = missing >= 0 and all(n in (1, m) for n, m in zip(own, full[missing:], strict=True))
    if not fits or any(n != 1 for n in lead[: len(lead) - len(own)]):
        raise seen.error(
            ValueError,
            f"mask is a BlockMask for (*batch, heads) = {lead}, and the call has {pairs[:-2]}.",
            "give it the call's batch axes and heads; each may be 1.",
        )


def sinks(meta: Meta, heads: int, dtype: np.dtype, rank: int, seen: Seen) -> None:
    """(H,), q's dtype or float32."""
    side_dtype("sinks", meta.dtype, dtype, seen)
    if meta.shape == (heads,) or (rank == 2 and meta.shape == ()):
        return
    raise seen.error(
        ValueError,
        f"sinks has shape {meta.shape}, and {(heads,)} is needed.",
        "one logit per query head.",
    )


def dropout(p: Any, has_seed: bool, seen: Seen) -> float:
    """The probability of dropping a weight."""
    number = _checks.real("dropout_p", p, seen)
    if not 0 <= number < 1:
        raise seen.error(
            ValueError,
            f"dropout_p is {number}, and must be in [0, 1).",
            "the probability that a weight is dropped; 0 for none.",
        )
    if number > 0 and not has_seed:
        raise seen.error(
            ValueError,
            f"dropout_p is {number}, and seed was not given.",
            "seed=, an int or a uint64 array of one element; the gradient needs the same one.",
        )
    return number


def seed(meta: Meta, seen: Seen) -> None:
    """A uint64 array of one element."""
    if meta.dtype != np.uint64:
        raise seen.error(
            TypeError,
            f"seed is an array of {shown_dtype(meta.dtype)}, not uint64.",
            "seed.astype(numpy.uint64), or an int.",
        )
    if int(np.prod(meta.shape, dtype=np.int64)) != 1:
        raise seen.error(
            ValueError,
            f"seed has shape {meta.shape}, and one element is needed.",
            "an array of shape () or (1,), or an int.",
        )


def score_arrays(
    metas: Mapping[str, Meta], dtype: np.dtype, taken: tuple[str, ...], seen: Seen
) -> None:
    """Parameter arrays of a score expression: dtypes, and names that wrt can tell apart."""
    for name, meta in metas.items():
        side_dtype(f"score_mod parameter {name}", meta.dtype, dtype, seen)
        if name in taken:
            raise seen.error(
                ValueError,
                f"score_mod has a parameter {name!r}, which is an argument of the call too.",
                "give the parameter another name.",
            )
