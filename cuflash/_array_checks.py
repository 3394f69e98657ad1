"""Rules about the arrays of a call, one function per rule, each raising in the form of `_errors`.

Metadata only: shapes, strides and dtypes. Nothing here reads an array, launches or allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cuflash import _dtypes
from cuflash._arrays import Meta
from cuflash._errors import Seen, shown_dtype


class Extents(NamedTuple):
    """The shape letters of one call."""

    batch: tuple[int, ...]
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    head_dim: int
    head_dim_v: int

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a result, in the order (*B, H, L, D)."""
        rows = (*self.batch, self.heads, self.len_q)
        return rows if name in ("lse", "dlse") else (*rows, self.head_dim_v)


def dtype(arrays: Mapping[str, Meta], seen: Seen) -> str:
    """The one dtype of q, k, v (and dout, out, dq, dk, dv)."""
    first = arrays["q"].dtype
    for name in ("q", "k", "v", "dout", "out", "dq", "dk", "dv"):
        if name not in arrays:
            continue
        found = arrays[name].dtype
        if found not in _dtypes.BY_NUMPY:
            hint = (
                ", or q.view(ml_dtypes.bfloat16) if these are bfloat16 bits"
                if found == np.uint16
                else ""
            )
            raise seen.error(
                TypeError,
                f"{name} is {shown_dtype(found)}, which is not one of {_dtypes.NAMES}.",
                f"convert it with astype{hint}.",
            )
        if found != first:
            raise seen.error(
                TypeError,
                f"{name} is {shown_dtype(found)}, and q is {shown_dtype(first)}.",
                "convert one of them with astype: q, k, v, dout and out share one dtype.",
            )
    return _dtypes.BY_NUMPY[first].name


def ranks(arrays: Mapping[str, Meta], seen: Seen) -> int:
    """The rank of q, which k, v and the like share."""
    rank = len(arrays["q"].shape)
    if rank < 2:
        raise seen.error(
            ValueError,
            f"q has {rank} axes, and needs at least 2.",
            "(Lq, D), (H, Lq, D) or (*B, H, Lq, D).",
        )
    for name in ("k", "v"):
        found = len(arrays[name].shape)
        if found != rank:
            raise seen.error(
                ValueError,
                f"{name} has {found} axes, and q has {rank}.",
                "give them equal rank; an axis of extent 1 broadcasts over the batch.",
            )
    return rank


def extents(q: Meta, k: Meta, v: Meta, seen: Seen) -> Extents:
    """The shape letters, from metadata in the order (*B, H, L, D)."""
    *batch, heads, len_q, head_dim = q.shape
    *_, heads_kv, len_k, head_dim_k = k.shape
    head_dim_v = v.shape[-1]
    if head_dim_k != head_dim:
        raise seen.error(
            ValueError,
            f"k has head_dim {head_dim_k}, and q has head_dim {head_dim}.",
            "give q and k the same last axis; v may have its own.",
        )
    for name, dim in (("q", head_dim), ("v", head_dim_v)):
        if dim == 0:
            raise seen.error(
                ValueError,
                f"{name} has head_dim 0, and needs at least 1.",
                "a non-empty last axis.",
            )
    for what, axis in (("heads", -3), ("keys", -2)):
        if v.shape[axis] != k.shape[axis]:
            raise seen.error(
                ValueError,
                f"v has {v.shape[axis]} {what}, and k has {k.shape[axis]} {what}.",
                'give them equal numbers; layout="LHD" reads (L, H, D).',
            )
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv != 0):
        raise seen.error(
            ValueError,
            f"k has {heads_kv} heads, which does not divide the {heads} heads of q.",
            'heads of k and v must divide those of q; layout="LHD" reads (L, H, D).',
        )
    for name, meta in (("k", k), ("v", v)):
        for axis, extent in enumerate(batch):
            if meta.shape[axis] not in (extent, 1):
                raise seen.error(
                    ValueError,
                    f"{name} has {meta.shape[axis]} on batch axis {axis}, and q has {extent}.",
                    "equal extents, or 1 to broadcast.",
                )
    return Extents(tuple(batch), heads, heads_kv, len_q, len_k, head_dim, head_dim_v)


def matches(name: str, meta: Meta, shape: tuple[int, ...], wanted: np.dtype, seen: Seen) -> None:
    """An array of exactly this shape and dtype."""
    if meta.shape != shape:
        raise seen.error(
            ValueError,
            f"{name} has shape {meta.shape}, and {shape} is needed.",
            f"pass {name} in that shape.",
        )
    if meta.dtype != wanted:
        raise seen.error(
            TypeError,
            f"{name} is {shown_dtype(meta.dtype)}, and {wanted.name} is needed.",
            f"pass {name} in that dtype.",
        )


def output(name: str, meta: Meta, shape: tuple[int, ...], wanted: np.dtype, seen: Seen) -> None:
    """An array that can be written to: `matches`, writable, no two elements at one address."""
    matches(name, meta, shape, wanted, seen)
    if not meta.writable:
        raise seen.error(
            ValueError, f"{name} is read-only.", f"pass a writable array, or no {name}=."
        )
    if meta.overlaps_itself():
        raise seen.error(
            ValueError,
            f"{name} has strides {meta.strides} for shape {meta.shape}: elements share memory.",
            f"pass a dense array, or no {name}=.",
        )


def slopes(meta: Meta, sizes: Extents, wanted: np.dtype, rank: int, seen: Seen) -> None:
    """alibi_slopes: (H,) or (*B, H), of q's dtype or float32."""
    if meta.dtype not in (wanted, np.dtype(np.float32)):
        raise seen.error(
            TypeError,
            f"alibi_slopes is {shown_dtype(meta.dtype)}, and q is {wanted.name}.",
            f"convert it to {wanted.name} or float32.",
        )
    if rank == 2 and meta.shape == ():
        return
    if meta.shape[-1:] == (sizes.heads,):
        own = meta.shape[:-1]
        if not own or (
            len(own) == len(sizes.batch)
            and all(n in (b, 1) for n, b in zip(own, sizes.batch, strict=True))
        ):
            return
    full = (*sizes.batch, sizes.heads)
    allowed = f"{(sizes.heads,)} or {full}" if sizes.batch else f"{(sizes.heads,)}"
    raise seen.error(
        ValueError,
        f"alibi_slopes has shape {meta.shape}, and {allowed} is needed.",
        "one slope per query head, or per batch and query head.",
    )


def addressable(name: str, meta: Meta, seen: Seen) -> None:
    """Device memory is read in whole elements: an address or stride between two would fault."""
    item = meta.itemsize
    if meta.empty:
        return
    steps = [step for step, n in zip(meta.strides, meta.shape, strict=True) if n > 1]
    if meta.offset % item or any(step % item for step in steps):
        raise seen.error(
            ValueError,
            f"{name} has elements of {item} bytes at addresses that are no multiple of {item} "
            f"(strides {meta.strides}).",
            "copy it to an aligned array first.",
        )
