"""Packed sequences on the NumPy backend: those of equal lengths are one call with a batch axis.

Thousands of sequences of a few tokens must not be thousands of steps, and nothing is padded. What
counts positions or sequences (alignment, dropout, masks, score functions) is told which sequence
it is at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from . import _cpu_backward, _cpu_forward
from ._cpu_backward import buffers_of, differentiate
from ._cpu_forward import attend
from ._cpu_place import Axes
from ._cpu_rows import Rows, packed_rows
from ._cpu_sums import KeySum
from ._cpu_tiles import TILE_KEYS, TILE_ROWS, Call, Extras, Shape, accumulator
from ._options import Options
from ._order import empty_like_order


@dataclass(frozen=True)
class _Group:
    """The sequences of one pair of lengths."""

    sequences: np.ndarray  # their numbers
    starts_q: np.ndarray
    starts_k: np.ndarray
    len_q: int
    len_k: int

    def rows(self, x: np.ndarray, axes: Axes) -> Rows:
        """Their part of an array (H, total_q, n) as (*outer, G, Lq, n)."""
        grouped = x.reshape(axes.heads_kv, axes.group, *x.shape[1:])
        return packed_rows(grouped, self.starts_q, self.len_q)

    def keys(self, x: np.ndarray) -> Rows:
        """Their part of an array (Hkv, total_k, n) as (*outer, Lk, n)."""
        return packed_rows(x, self.starts_k, self.len_k)


@dataclass(frozen=True)
class _Packing:
    """Where sequences are, and what the call says about all of them."""

    cu_q: np.ndarray
    cu_k: np.ndarray
    heads: int
    heads_kv: int

    @property
    def axes(self) -> Axes:
        """The leading axes of options: sequences and heads."""
        group = self.heads // self.heads_kv if self.heads_kv else 1
        return Axes((len(self.cu_q) - 1,), self.heads_kv, group)

    @property
    def pairs(self) -> int:
        """About how many pairs of query and key there are."""
        return int(np.dot(np.diff(self.cu_q), np.diff(self.cu_k))) * self.heads

    @property
    def units(self) -> int:
        """How many pairs of sequence and kv head have rows: at most so many units."""
        heads = self.heads_kv if self.heads else 0
        return int(np.count_nonzero(np.diff(self.cu_q))) * heads

    def groups(self) -> Iterator[_Group]:
        """All sequences with rows, by their lengths."""
        lengths = np.stack([np.diff(self.cu_q), np.diff(self.cu_k)], axis=1)
        filled = np.flatnonzero(lengths[:, 0])
        kinds, kind = np.unique(lengths[filled], axis=0, return_inverse=True)
        # Sequences of one kind side by side, each kind's in their order.
        order = filled[np.argsort(kind.reshape(-1), kind="stable")]
        counts = np.bincount(kind.reshape(-1), minlength=len(kinds))
        for numbers, (len_q, len_k) in zip(
            np.split(order, np.cumsum(counts)[:-1]), kinds.tolist(), strict=True
        ):
            yield _Group(numbers, self.cu_q[numbers], self.cu_k[numbers], len_q, len_k)


def _packing(q: np.ndarray, k: np.ndarray, cu_q: np.ndarray, cu_k: np.ndarray) -> _Packing:
    # Tokens are counted and multiplied in int64, whatever the caller counts in.
    return _Packing(cu_q.astype(np.int64), cu_k.astype(np.int64), q.shape[0], k.shape[0])


def varlen_forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_q: np.ndarray,
    cu_k: np.ndarray,
    options: Options,
    *,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`forward` of every packed sequence by itself.

    Parameters
    ----------
    q, k, v
        (H, total_q, D), (Hkv, total_k, D), (Hkv, total_k, Dv); any strides.
    cu_q, cu_k
        (batch + 1,) integers from 0, not decreasing: sequence b has rows `cu[b]:cu[b + 1]`.
    options
        The resolved options. `q_offset` None stands for each sequence's `len_k - len_q`; mask,
        blocks and bias broadcast to (batch, H, longest len_q, longest len_k) and are indexed within
        the sequence; alibi_slopes broadcast to (batch, H).
    out
        Where to write; allocated in q's memory order when None.

    Returns
    -------
    out (H, total_q, Dv) in q's dtype, lse (H, total_q) float32 (float64 for float64); rows that
    belong to no sequence are 0 and -inf.
    """
    packing, dtype = _packing(q, k, cu_q, cu_k), accumulator(q.dtype)
    if out is None:
        out = empty_like_order((*q.shape[:-1], v.shape[-1]), q.dtype, q)
    lse = np.empty(q.shape[:-1], dtype=dtype)
    end = int(packing.cu_q[-1])
    out[:, end:], lse[:, end:] = 0, -np.inf
    axes = packing.axes
    extras = Extras.of(options, axes, dtype)

    def parts() -> Iterator[_cpu_forward.Arrays]:
        for group in packing.groups():
            yield _cpu_forward.Arrays(
                _call(group, extras, q, v),
                q=group.rows(q, axes),
                k=group.keys(k),
                v=group.keys(v),
                out=group.rows(out, axes),
                lse=group.rows(lse[..., None], axes),
            )

    if packing.units:
        tiles = packing.pairs // (TILE_ROWS * TILE_KEYS)
        attend(parts(), dtype, max(packing.units, tiles), packing.pairs)
    return out, lse


def varlen_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    cu_q: np.ndarray,
    cu_k: np.ndarray,
    options: Options,
    *,
    dlse: np.ndarray | None = None,
    wrt: Collection[str] = ("q", "k", "v"),
    grads_out: Mapping[str, np.ndarray | None] | None = None,
) -> dict[str, np.ndarray]:
    """`backward` of every packed sequence by itself; gradients of options are summed over them.

    Parameters
    ----------
    dout, q, k, v, out, lse, cu_q, cu_k
        As given to and returned by `varlen_forward`; any strides.
    options, dlse, wrt, grads_out
        As in `backward`, with dlse (H, total_q).

    Returns
    -------
    As from `backward`; rows that belong to no sequence are 0.
    """
    packing, dtype = _packing(q, k, cu_q, cu_k), accumulator(q.dtype)
    axes = packing.axes
    extras = Extras.of(options, axes, dtype, wrt)
    grads = buffers_of({"q": q, "k": k, "v": v}, wrt, grads_out)
    dq = grads.get("q")

    def parts() -> Iterator[_cpu_backward.Arrays]:
        for group in packing.groups():
            call = _call(group, extras, q, v)
            sums = {
                n: KeySum(group.keys(grads[n]), call.shape.outer, dtype)
                for n in ("k", "v")
                if n in grads
            }
            yield _cpu_backward.Arrays(
                call,
                q=group.rows(q, axes),
                k=group.keys(k),
                v=group.keys(v),
                dout=group.rows(dout, axes),
                out=group.rows(out, axes),
                lse=group.rows(lse[..., None], axes),
                dlse=None if dlse is None else group.rows(dlse[..., None], axes),
                dq=None if dq is None else group.rows(dq, axes),
                dk=sums.get("k"),
                dv=sums.get("v"),
            )

    if packing.units:
        differentiate(parts(), dtype, packing.units, packing.pairs, packed=True)
    return grads | extras.gradients()


def _call(group: _Group, extras: Extras, q: np.ndarray, v: np.ndarray) -> Call:
    heads_kv, per_head = extras.axes.heads_kv, extras.axes.group
    shape = Shape(
        (len(group.sequences),),
        heads_kv,
        per_head,
        group.len_q,
        group.len_k,
        q.shape[-1],
        v.shape[-1],
    )
    return Call.of(shape, extras, group.sequences)
