"""Self-attention as a layer: by cuflash, and by the matrices it replaces.

A layer takes queries, keys and values as the projection before it leaves them, one array
(batch, length, 3, heads, head dim), and returns (batch, length, heads, head dim) and a pullback
from its gradient to the gradient of that one array and of the relative-position table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuflash

from .layers import Pullback, namespace
from .relative import Relative


@dataclass(frozen=True)
class Attention:
    """How the positions of a sequence look at one another.

    Attributes
    ----------
    kind : str
        "cuflash", or "plain" for matmul, softmax, matmul.
    mask : BlockMask, optional
        Who may look at whom; None for everybody at everybody.
    relative : Relative, optional
        A learned term of the logit that depends on the distance.
    dtype : dtype, optional
        Of the two products alone, such as float16 on a GPU; None for that of the layer's input.
    """

    kind: str = "cuflash"
    mask: cuflash.BlockMask | None = None
    relative: Relative | None = None
    dtype: Any = None

    def __call__(self, qkv: Any, table: Any = None) -> tuple[Any, Pullback]:
        """softmax(q k^T / sqrt(D) + relative) v.

        Parameters
        ----------
        qkv : array (batch, length, 3, heads, D)
        table : array (heads, entries), optional
            Of `relative`.

        Returns
        -------
        out : array (batch, length, heads, D)
        pullback : callable
            dout -> dqkv, dtable (None without)
        """
        if self.kind == "plain":
            return plain_attention(qkv, table, self.mask, self.relative)
        return self._fused(qkv, table)

    def _fused(self, qkv: Any, table: Any) -> tuple[Any, Pullback]:
        dtype = qkv.dtype if self.dtype is None else np.dtype(self.dtype)
        parts = qkv.astype(dtype, copy=False)
        options: dict[str, Any] = {"mask": self.mask}
        if self.relative is not None:
            options["score_mod"] = self.relative.score_mod(table)
            options["wrt"] = ("q", "k", "v", "table")
        # q, k and v are strided views of one array, read in place.
        q, k, v = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
        out, gradients = cuflash.attention_vjp(q, k, v, layout="LHD", **options)

        def pullback(dout: Any) -> tuple[Any, Any]:
            xp, unit = namespace(dout), 1
            if dtype.itemsize < dout.dtype.itemsize:
                # The gradient is linear in dout: brought to the middle of a 16-bit range, so that
                # small ones do not vanish.
                unit = abs(dout).max() + xp.finfo(dout.dtype).tiny
                dout = dout / unit
            dparts = xp.empty_like(parts)
            dq, dk, dv = dparts[:, :, 0], dparts[:, :, 1], dparts[:, :, 2]
            found = gradients(dout.astype(dtype, copy=False), dq=dq, dk=dk, dv=dv).score_params
            dqkv = dparts.astype(qkv.dtype, copy=False)
            dqkv *= unit
            return dqkv, None if found is None else found["table"] * unit

        return out.astype(qkv.dtype, copy=False), pullback


def plain_attention(
    qkv: Any,
    table: Any = None,
    mask: cuflash.BlockMask | None = None,
    relative: Relative | None = None,
) -> tuple[Any, Pullback]:
    """The same with whole (batch, heads, length, length) matrices.

    The weights live until the pullback, which makes two more matrices of their size.
    """
    xp = namespace(qkv)
    q, k, v = (qkv[:, :, part].swapaxes(1, 2) for part in range(3))
    length, scale = qkv.shape[1], 1 / math.sqrt(qkv.shape[-1])
    p = q @ k.swapaxes(-1, -2)
    p *= scale
    if relative is not None:
        p += relative.matrix(table, length)
    if mask is not None:
        p += xp.asarray(np.where(mask.to_dense()[0], 0, -np.inf).astype(p.dtype))
    p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)

    def pullback(dout: Any) -> tuple[Any, Any]:
        dout = dout.swapaxes(1, 2)
        ds = dout @ v.swapaxes(-1, -2)
        ds *= p
        ds -= p * ds.sum(axis=-1, keepdims=True)
        dtable = None if relative is None else relative.gradient(ds)
        ds *= scale
        dqkv = xp.empty_like(qkv)
        dqkv[:, :, 0] = (ds @ k).swapaxes(1, 2)
        dqkv[:, :, 1] = (ds.swapaxes(-1, -2) @ q).swapaxes(1, 2)
        dqkv[:, :, 2] = (p.swapaxes(-1, -2) @ dout).swapaxes(1, 2)
        return dqkv, dtable

    return (p @ v).swapaxes(1, 2), pullback


def plain_bytes(batch: int, heads: int, length: int, layers: int, itemsize: int) -> int:
    """Bytes of matrices that a training step through `plain_attention` holds at its largest.

    One per layer waits for the pullback, which makes two more.

    Examples
    --------
    >>> plain_bytes(1, 4, 65536, 4, 4) / 2**30
    384.0
    """
    return batch * heads * length * length * (layers + 2) * itemsize
