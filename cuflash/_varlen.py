"""Attention over packed sequences: arrays that hold sequences of several lengths one behind the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cuflash import _checks
from cuflash._errors import Seen
from cuflash._extras import split
from cuflash._gradient import Gradients, Pullback, _names, score_parameters
from cuflash._packed_bounds import bounds_of
from cuflash._prepare import prepared


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    layout: str = "HLD",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of each of several sequences with itself (or its own keys), packed without padding.

    Sequence b has queries `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` and keys `cu_seqlens_k[b]` to
    `cu_seqlens_k[b + 1]`; everything is as if `attention` were called on it alone. Any of them may be
    empty.

    Parameters
    ----------
    q : array (H, total_q, D)
        Queries of all sequences; `(total_q, H, D)` with layout "LHD".
    k : array (Hkv, total_k, D)
        Keys.
    v : array (Hkv, total_k, Dv)
        Values.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 array (batch + 1,)
        Cumulative lengths on the arrays' device: they start at 0 and never decrease.
    max_seqlen_q, max_seqlen_k : int, optional
        Bounds of the lengths. With both given nothing synchronises: CUDA arrays of lengths are then
        not read by the host, and a length beyond its bound gives NaN in every row. Without, the
        lengths are read and checked.
    causal, window, q_offset, softcap, score_mod, scale, precision, layout
        As in `attention`, with positions counted in each sequence; q_offset's default is its own
        `len_k - len_q`.
    mask, bias : array, optional
        As in `attention`, broadcastable to (batch, H, max_seqlen_q, max_seqlen_k) and indexed within
        the sequence; also a BlockMask of (max_seqlen_q, max_seqlen_k).
    alibi_slopes : array (H,) or (batch, H), optional
        As in `attention`.
    sinks, dropout_p, seed
        As in `attention`; dropout's batch index is the number of the sequence.
    return_lse : bool
        Also return the log-sum-exp.
    out : array (H, total_q, Dv), optional
        Where to write, in q's layout.

    Returns
    -------
    out : array (H, total_q, Dv)
        In q's dtype and layout. Rows past `cu_seqlens_q[-1]` are 0.
    lse : array (H, total_q)
        In both layouts; -inf past the last sequence. Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError
        As `attention`; also lengths of another dtype, or that decrease, exceed the arrays or their
        bound (where the host reads them).

    See Also
    --------
    attention_varlen_vjp : The result together with its pullback.

    Notes
    -----
    Time follows the sum of the sequences' work: blocks are laid out over the tiles that exist, from a
    table made on the device. The packed form is FlashAttention's (Dao et al. 2022,
    arXiv:2205.14135, its implementation).

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention, attention_varlen
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 10, 16))
    >>> ends = np.array([0, 3, 3, 10], dtype=np.int32)  # lengths 3, 0 and 7
    >>> out = attention_varlen(q, k, v, ends, ends, causal=True)
    >>> alone = attention(q[:, 3:], k[:, 3:], v[:, 3:], causal=True)
    >>> bool(np.allclose(out[:, 3:], alone))
    True
    """
    mask, seed, extra = split(mask, seed, score_mod)
    bounds = bounds_of(
        (q, k, cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        layout,
        mask is not None or bias is not None or extra.blocks is not None,
    )
    options = (mask, bias, alibi_slopes, sinks, seed)
    call, arrays = prepared(
        "varlen_forward",
        (q, k, v, *options, out, cu_seqlens_q, cu_seqlens_k),
        (
            causal,
            window,
            q_offset,
            scale,
            softcap,
            layout,
            dropout_p,
            precision,
            *bounds,
            return_lse,
        ),
        extra,
    )
    result, lse = call.run(arrays, extra)
    if out is not None:
        result = out
    return (result, lse) if return_lse else result


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    dlse: Any = None,
    deterministic: bool = False,
    wrt: Iterable[str] = ("q", "k", "v"),
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    layout: str = "HLD",
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    dbias: Any = None,
) -> Gradients:
    """Gradients of `sum(out * dout) + sum(lse * dlse)`, from what `attention_varlen` returned.

    Parameters
    ----------
    dout : array (H, total_q, Dv)
        Gradient of out.
    q : array (H, total_q, D)
        As given to `attention_varlen`, like k, v and the cumulative lengths.
    k : array (Hkv, total_k, D)
        Keys.
    v : array (Hkv, total_k, Dv)
        Values.
    out : array (H, total_q, Dv)
        As returned.
    lse : array (H, total_q)
        As returned.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 array (batch + 1,)
        Cumulative lengths.
    dlse : array (H, total_q), optional
        Gradient of lse; None for 0.
    deterministic, wrt, dq, dk, dv, dbias
        As in `attention_backward`.
    max_seqlen_q, max_seqlen_k, causal, window, q_offset, mask, bias, softcap, alibi_slopes, sinks, \
score_mod, scale, dropout_p, seed, precision, layout
        As in `attention_varlen`.

    Returns
    -------
    Gradients
        As from `attention_backward`; rows past the last sequence are 0.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError
        As `attention_varlen` and `attention_backward`.

    Notes
    -----
    See `attention_backward`; gradients of what sequences share (bias, slopes, sinks, score
    parameters) are summed over them.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention_varlen, attention_varlen_backward
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 2, 10, 16))
    >>> ends = np.array([0, 4, 9])
    >>> out, lse = attention_varlen(q, k, v, ends, ends, return_lse=True)
    >>> grads = attention_varlen_backward(dout, q, k, v, out, lse, ends, ends)
    >>> grads.q.shape, float(np.abs(grads.q[:, 9]).max())
    ((2, 10, 16), 0.0)
    """
    if type(wrt) is not tuple:
        wrt = _names(wrt)
    mask, seed, extra = split(mask, seed, score_mod)
    bounds = bounds_of(
        (q, k, cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        layout,
        mask is not None or bias is not None or extra.blocks is not None,
    )
    options = (mask, bias, alibi_slopes, sinks, seed)
    values = (causal, window, q_offset, scale, softcap, layout, dropout_p, precision, *bounds)
    arrays: Any = (dout, q, k, v, out, lse, dlse, *options, dq, dk, dv, dbias)
    call, arrays = prepared(
        "varlen_backward",
        (*arrays, cu_seqlens_q, cu_seqlens_k),
        (*values, deterministic, wrt),
        extra,
    )
    grads = call.run(arrays, extra)
    for name, buffer in (("q", dq), ("k", dk), ("v", dv), ("bias", dbias)):
        if buffer is not None:
            grads[name] = buffer
    return Gradients(**grads)


def attention_varlen_vjp(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    deterministic: bool = False,
    wrt: Iterable[str] = ("q", "k", "v"),
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    layout: str = "HLD",
    return_lse: bool = False,
    out: Any = None,
) -> tuple[Any, Pullback]:
    """`attention_varlen`, and the function that turns a gradient of its result into gradients of its
    arguments.

    Parameters
    ----------
    q : array (H, total_q, D)
        Queries.
    k : array (Hkv, total_k, D)
        Keys.
    v : array (Hkv, total_k, Dv)
        Values.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 array (batch + 1,)
        Cumulative lengths.
    deterministic, wrt
        As in `attention_backward`, for every pullback.
    max_seqlen_q, max_seqlen_k, causal, window, q_offset, mask, bias, softcap, alibi_slopes, sinks, \
score_mod, scale, dropout_p, seed, precision, layout, return_lse, out
        As in `attention_varlen`.

    Returns
    -------
    out : array (H, total_q, Dv)
        As from `attention_varlen`; `(out, lse)` with `return_lse`.
    pullback : callable
        As from `attention_vjp`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError
        As `attention_varlen` and `attention_varlen_backward`.

    Notes
    -----
    See `attention_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention_varlen_vjp
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 10, 16))
    >>> ends = np.array([0, 4, 10])
    >>> out, pullback = attention_varlen_vjp(q, k, v, ends, ends, causal=True)
    >>> pullback(np.ones_like(out)).k.shape
    (2, 10, 16)
    """
    given = {"q": q, "k": k, "v": v, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    seen = Seen(given, {"deterministic": deterministic, "wrt": wrt})
    wrt = _checks.wrt(wrt, given, seen, score_parameters(score_mod))
    options = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "causal": causal,
        "window": window,
        "q_offset": q_offset,
        "mask": mask,
        "bias": bias,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "score_mod": score_mod,
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": seed,
        "precision": precision,
        "layout": layout,
    }
    deterministic = _checks.flag("deterministic", deterministic, seen)
    _checks.flag("return_lse", return_lse, seen)
    ends = (cu_seqlens_q, cu_seqlens_k)
    result, lse = attention_varlen(q, k, v, *ends, **options, return_lse=True, out=out)
    options.update(deterministic=deterministic, wrt=wrt)
    pullback = Pullback(attention_varlen_backward, (q, k, v, result, lse, *ends), options)
    return ((result, lse) if return_lse else result), pullback
