"""`attention`: the call this package exists for."""

from __future__ import annotations

from typing import Any

from cuflash._extras import split
from cuflash._prepare import prepared


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    """Exact attention, `softmax(scale * q @ k.T) @ v`, without ever storing the matrix of scores.

    Shape letters: `B...` batch axes (any number, also none), `H` query heads, `Hkv` key/value heads
    with `H % Hkv == 0` (MHA, GQA, MQA), `Lq` queries, `Lk` keys, `D` head dim of q and k, `Dv` head
    dim of v.

    Parameters
    ----------
    q : array (*B, H, Lq, D)
        Queries; also (H, Lq, D) and (Lq, D). NumPy arrays run on the CPU; CuPy arrays, and any
        object with `__cuda_array_interface__` or CUDA `__dlpack__`, on their GPU and CuPy's current
        stream. float16, bfloat16 (`ml_dtypes.bfloat16`), float32 or float64; any strides.
    k : array (*B, Hkv, Lk, D)
        Keys, of q's rank; batch axes equal q's, or 1 (broadcast, no copy).
    v : array (*B, Hkv, Lk, Dv)
        Values.
    causal : bool
        Row i, at position `d = i + q_offset` of the key axis, sees keys `j <= d`.
    window : (left, right), optional
        Row i sees keys `d - left <= j <= d + right`, inclusive; each an int >= 0, or None for no
        bound.
    q_offset : int, optional
        Position of query row 0 on the key axis. Default `Lk - Lq`: the last query sits at the last
        key (bottom-right alignment). 0 is top-left alignment.
    mask : bool array or BlockMask, optional
        True where a query may attend; broadcastable to (*B, H, Lq, Lk), (Lq, Lk) without a head
        axis. Tiles that are wholly False are skipped. Everything else (causal, window) still holds.
    bias : array, optional
        Added to the logits; broadcastable as mask is, of q's dtype or float32. -inf entries give a
        pair no weight.
    softcap : float, optional
        Logits become `softcap * tanh(logits / softcap)`, before score_mod, bias, ALiBi and masks.
    alibi_slopes : array (H,) or (*B, H), optional
        Adds `-slope * abs(d - j)` to the logits; of q's dtype or float32.
    sinks : array (H,), optional
        One further logit per head that takes its share of the softmax and has no value; lse
        includes it. Of q's dtype or float32.
    score_mod : ScoreMod, optional
        The logit as an expression of the scaled score and its place.
    scale : float, optional
        Factor on `q @ k.T`: any finite number, 0 and negative included. Default `1 / sqrt(D)`.
    dropout_p : float
        Probability with which a weight is dropped after the softmax, in [0, 1); kept ones are
        divided by `1 - dropout_p`.
    seed : int or uint64 array of one element
        Of dropout, needed when `dropout_p > 0`. An array is read when the kernel runs, so that
        replays of a CUDA graph may differ. `dropout_mask` gives the weights that a seed keeps.
    precision : {"ieee", "tf32"}, optional
        How products of float32 inputs are formed: with the accuracy of float32 (the default), or from
        factors of 10 mantissa bits, faster on GPUs that have TF32 (relative error about 1e-3). Turing
        and NumPy have not, and compute "ieee" for both.
    layout : {"HLD", "LHD"}
        Order of the last three axes of q, k, v and out. "LHD" is (*B, L, H, D), as FlashAttention
        and JAX have it; lse, mask, bias and alibi_slopes keep their shapes. Arrays of two axes are (L, D) in
        both.
    return_lse : bool
        Also return the log-sum-exp.
    out : array (*B, H, Lq, Dv), optional
        Where to write: dtype of q, writable, not overlapping the inputs. It is returned.

    Returns
    -------
    out : array (*B, H, Lq, Dv)
        In q's dtype and layout; its memory order follows q's.
    lse : array (*B, H, Lq)
        Natural log of the sum of exp of the final logits, float32 (float64 for float64). Only with
        `return_lse`.

    Raises
    ------
    TypeError
        Something is no array, has a wrong dtype, or NumPy and CUDA arrays are mixed.
    ValueError
        Shapes or values that do not fit.
    UnsupportedError
        The call is valid, but no kernel of this GPU serves it.
    CompileError
        NVRTC refused a kernel.

    See Also
    --------
    attention_vjp : The result together with its pullback, for training.
    attention_varlen : Sequences of several lengths, packed one behind the other.
    merge_attention : Attention over a union of keys from parts.
    explain : Which kernel a call runs, and why.

    Notes
    -----
    Order of operations: `s = scale * q @ k.T`; softcap; score_mod; bias; ALiBi; masks set
    `s = -inf`; softmax over the keys and the sink; dropout; `@ v`. Sums and softmax are float32 for
    16-bit and float32 inputs, float64 for float64.

    What a causal row sees with 2 queries and 5 keys, and with 5 queries and 2 keys (1 = sees)::

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    A row that sees no key has out = 0, lse = -inf (with a sink: the sink) and gradient 0, never
    NaN. What a masked key holds, NaN included, never matters; `bias = -inf` makes no such promise.

    Weight (b, h, i, j) is dropped when word `j % 4` of Philox-4x32-10 [4]_ of the counter (j // 4,
    i, h, b) under the key `seed` is below `dropout_p * 2**32`, b counting over all batch axes.

    Memory beyond the results is O(Lq + Lk): tiles of keys pass by a running maximum and sum, the
    algorithm of [1]_ (section 3.1) on the online softmax of [2]_, parallel over queries as in [3]_
    (section 3).

    References
    ----------
    .. [1] Dao, Fu, Ermon, Rudra, Re, "FlashAttention", 2022, arXiv:2205.14135.
    .. [2] Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
    .. [3] Dao, "FlashAttention-2", 2023, arXiv:2307.08691.
    .. [4] Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 2, 300, 64), dtype=np.float32)  # 2 heads serve 8
    >>> attention(q, k, v, causal=True).shape
    (2, 8, 100, 64)

    The mask, made visible: equal scores and one-hot values.

    >>> q, k, v = np.zeros((2, 4)), np.zeros((5, 4)), np.eye(5)
    >>> (attention(q, k, v, causal=True) > 0).astype(int)
    array([[1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1]])
    >>> (attention(q, k, v, window=(1, 0)) > 0).astype(int)
    array([[0, 0, 1, 1, 0],
           [0, 0, 0, 1, 1]])
    """
    mask, seed, extra = split(mask, seed, score_mod)
    call, arrays = prepared(
        "forward",
        (q, k, v, mask, bias, alibi_slopes, sinks, seed, out),
        (causal, window, q_offset, scale, softcap, layout, dropout_p, precision, return_lse),
        extra,
    )
    result, lse = call.run(arrays, extra)
    if out is not None:
        result = out
    return (result, lse) if return_lse else result
