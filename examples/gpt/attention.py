"""Causal self-attention as a layer: by cuflash, and by the three lines it replaces.

A layer takes queries, keys and values as the projection before it leaves them, one array
(batch, length, 3, heads, head dim), and returns (batch, length, heads, head dim) and a pullback
from its gradient to the gradient of that one array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

import cuflash

from .layers import namespace

Layer: TypeAlias = Callable[[Any], tuple[Any, Callable[[Any], Any]]]


def fused_attention(qkv: Any, *, deterministic: bool = True) -> tuple[Any, Any]:
    """softmax(q k^T / sqrt(D)) v over the keys up to each row's own, by cuflash.

    Parameters
    ----------
    qkv : array (batch, length, 3, heads, D)
        Read in place: q, k and v are strided views.
    deterministic : bool
        On a GPU: gradients bitwise equal from run to run.

    Returns
    -------
    out : array (batch, length, heads, D)
    pullback : callable
        dout -> dqkv, written in place through strided views too
    """
    out, gradients = cuflash.attention_vjp(
        *_parts(qkv), causal=True, layout="LHD", deterministic=deterministic
    )

    def pullback(dout: Any) -> Any:
        dqkv = namespace(qkv).empty_like(qkv)
        dq, dk, dv = _parts(dqkv)
        gradients(dout, dq=dq, dk=dk, dv=dv)
        return dqkv

    return out, pullback


def plain_attention(qkv: Any) -> tuple[Any, Any]:
    """The same with whole matrices: matmul, softmax, matmul.

    Parameters
    ----------
    qkv : array (batch, length, 3, heads, D)
        Queries, keys, values.

    Returns
    -------
    out : array (batch, length, heads, D)
    pullback : callable
        dout -> dqkv. It keeps the weights, (batch, heads, length, length).
    """
    xp, dtype, length = namespace(qkv), qkv.dtype, qkv.shape[1]
    # Products of 16-bit numbers are made in float32: batched products of bfloat16 matrices fail in
    # CuPy 14 (cupy/cupy#10317). The weights are kept in 16 bits, as everybody does.
    wide = dtype if dtype.itemsize > 2 else np.dtype(np.float32)
    q, k, v = (x.swapaxes(1, 2).astype(wide, copy=False) for x in _parts(qkv))
    scale = 1 / math.sqrt(q.shape[-1])
    p = q @ k.swapaxes(-1, -2)
    p *= scale
    p += xp.where(xp.tri(length, dtype=bool), 0.0, -np.inf).astype(wide)
    p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    p = p.astype(dtype, copy=False)
    out = (p.astype(wide, copy=False) @ v).swapaxes(1, 2)

    def pullback(dout: Any) -> Any:
        dout = dout.astype(wide, copy=False)
        # rowsum(p * dp) = rowsum(out * dout): FlashAttention, arXiv:2205.14135, appendix B.2.
        delta = (out * dout).sum(axis=-1).swapaxes(1, 2)[..., None]
        dout = dout.swapaxes(1, 2)
        weights = p.astype(wide, copy=False)
        ds = dout @ v.swapaxes(-1, -2)
        ds -= delta
        ds *= weights
        ds *= scale
        gradients = ds @ k, ds.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dout
        dqkv = xp.empty(qkv.shape, dtype=dtype)
        for part, gradient in zip(_parts(dqkv), gradients, strict=True):
            part[...] = gradient.swapaxes(1, 2)
        return dqkv

    return out.astype(dtype, copy=False), pullback


LAYERS: dict[str, Layer] = {"cuflash": fused_attention, "plain": plain_attention}


def in_precision(layer: Layer, dtype: Any) -> Layer:
    """A layer that computes in `dtype` between arrays of another.

    Parameters
    ----------
    layer : callable
        Any layer of this file.
    dtype : dtype
        float16 and bfloat16 are what the GPU's kernels take.

    Returns
    -------
    callable
        The layer itself where the arrays have that dtype already.

    Notes
    -----
    Gradients of a mean over many tokens lie below the smallest float16. The gradient that comes in
    is therefore multiplied by a power of two, and what goes out is divided by it: this changes no
    digit. "Loss scaling" of Micikevicius et al., arXiv:1710.03740, section 3.2, by layer.
    """
    dtype = np.dtype(dtype)

    def converted(qkv: Any) -> tuple[Any, Any]:
        if qkv.dtype == dtype:
            return layer(qkv)
        out, inner = layer(qkv.astype(dtype))

        def pullback(dout: Any) -> Any:
            factor = _power_of_two(dout) if dtype == np.float16 else None
            dout = (dout if factor is None else dout * factor).astype(dtype)
            dqkv = inner(dout).astype(qkv.dtype)
            return dqkv if factor is None else dqkv / factor

        return out.astype(qkv.dtype), pullback

    return converted


def _power_of_two(x: Any) -> Any:
    """A factor that brings the largest element of x to between 1/16 and 1/8, as an array of x's dtype.

    A key that every row looks at sums as many gradients as there are rows: 2^16 / 2^-3 leaves room.
    """
    xp = namespace(x)
    largest = xp.maximum(xp.abs(x).max(), np.finfo(np.float32).tiny)
    return xp.exp2(-4 - xp.floor(xp.log2(largest))).astype(x.dtype)


def _parts(qkv: Any) -> tuple[Any, Any, Any]:
    """Views of q, k and v, each (batch, length, heads, D)."""
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
