"""Gradients: from saved results (`attention_backward`), or as a pullback (`attention_vjp`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cuflash import _checks
from cuflash._attention import attention
from cuflash._errors import Seen
from cuflash._extras import split
from cuflash._prepare import prepared


class Gradients(NamedTuple):
    """Gradients by argument; None for what was not asked for.

    Attributes
    ----------
    q, k, v : array or None
        Shape, dtype and axis order of their argument.
    bias, alibi_slopes, sinks : array or None
        Shape and dtype of their argument.
    score_params : dict or None
        Gradients of score parameters by name.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    score_params: Mapping[str, Any] | None = None


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    deterministic: bool = False,
    wrt: Iterable[str] = ("q", "k", "v"),
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
    """Gradients of `sum(out * dout) + sum(lse * dlse)`, from what `attention` returned.

    Shape letters as in `attention`. The options must be those of the forward call.

    Parameters
    ----------
    dout : array (*B, H, Lq, Dv)
        Gradient of out; dtype of q, any strides.
    q : array (*B, H, Lq, D)
        As given to `attention`.
    k : array (*B, Hkv, Lk, D)
        As given to `attention`.
    v : array (*B, Hkv, Lk, Dv)
        As given to `attention`.
    out : array (*B, H, Lq, Dv)
        As returned by `attention`.
    lse : array (*B, H, Lq)
        As returned by `attention(..., return_lse=True)`: float32 (float64 for float64).
    dlse : array (*B, H, Lq), optional
        Gradient of lse, in its dtype; None for 0.
    deterministic : bool
        Bitwise the same gradients from run to run. On a GPU the default sums q's gradient in
        whatever order blocks finish, which is faster. The CPU backend is always deterministic.
    wrt : sequence of str
        What to differentiate: any of "q", "k", "v", and of "bias", "alibi_slopes", "sinks" and the
        names of score_mod's arrays when given.
    causal, window, q_offset, mask, bias, softcap, alibi_slopes, sinks, score_mod, scale, \
dropout_p, seed, precision, layout
        As in `attention`; dropout needs the seed of the forward call.
    dq : array (*B, H, Lq, D), optional
        Where to write q's gradient; writable, dtype of q, overlapping nothing else. It is returned.
        A buffer for a gradient that `wrt` does not name is an error.
    dk : array (*B, Hkv, Lk, D), optional
        Same for k.
    dv : array (*B, Hkv, Lk, Dv), optional
        Same for v.
    dbias : array, optional
        Same for the bias, in its shape and dtype.

    Returns
    -------
    Gradients
        Named tuple (q, k, v, bias, alibi_slopes, sinks, score_params); None where not asked for.
        Each has the shape and dtype of its argument: k and v that broadcast over the batch, or
        serve several heads, get the sum, and so does a bias along the axes it lacks. Those of
        bias, slopes, sinks and score parameters are always reproducible. score_params is a dict.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError
        As `attention`. ValueError also when `wrt` names something that was not given.

    See Also
    --------
    attention_vjp : Keeps out and lse for you.

    Notes
    -----
    With `P = exp(s - lse)` recomputed tile by tile: `dv = P.T @ dout`, `dP = dout @ v.T`,
    `dS = P * (dP - rowsum(dout * out) + dlse)`, `dq = scale * dS @ k`, `dk = scale * dS.T @ q`;
    FlashAttention [1]_, section 3.1 and appendix B.2. A row that sees no key gives 0 to every
    gradient; a key that no row sees gets exactly 0. The bias gets `dS` itself, before softcap and
    score_mod. With dropout, P in dv and dP are dropped and scaled as in the forward pass.

    References
    ----------
    .. [1] Dao, Fu, Ermon, Rudra, Re, "FlashAttention", 2022, arXiv:2205.14135.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention, attention_backward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 2, 10, 16))
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> grads = attention_backward(dout, q, k, v, out, lse, causal=True)
    >>> grads.k.shape
    (2, 10, 16)

    Each row of weights sums to 1, so the gradient of v sums to that of out:

    >>> bool(np.allclose(grads.v.sum(axis=1), dout.sum(axis=1)))
    True
    """
    if type(wrt) is not tuple:
        wrt = _names(wrt)
    mask, seed, extra = split(mask, seed, score_mod)
    options = (mask, bias, alibi_slopes, sinks, seed)
    call, arrays = prepared(
        "backward",
        (dout, q, k, v, out, lse, dlse, *options, dq, dk, dv, dbias),
        (
            causal,
            window,
            q_offset,
            scale,
            softcap,
            layout,
            dropout_p,
            precision,
            deterministic,
            wrt,
        ),
        extra,
    )
    grads = call.run(arrays, extra)
    for name, buffer in (("q", dq), ("k", dk), ("v", dv), ("bias", dbias)):
        if buffer is not None:
            grads[name] = buffer
    return Gradients(**grads)


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    deterministic: bool = False,
    wrt: Iterable[str] = ("q", "k", "v"),
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
    """Attention and the function that turns a gradient of its result into gradients of its
    arguments.

    Shape letters as in `attention`.

    Parameters
    ----------
    q : array (*B, H, Lq, D)
        Queries.
    k : array (*B, Hkv, Lk, D)
        Keys.
    v : array (*B, Hkv, Lk, Dv)
        Values.
    deterministic, wrt
        As in `attention_backward`, for every pullback.
    causal, window, q_offset, mask, bias, softcap, alibi_slopes, sinks, score_mod, scale, \
dropout_p, seed, precision, layout, out
        As in `attention`.
    return_lse : bool
        Return `((out, lse), pullback)`.

    Returns
    -------
    out : array (*B, H, Lq, Dv)
        As from `attention`.
    pullback : callable
        `pullback(dout, dlse=None, *, dq=None, dk=None, dv=None, dbias=None)` returns `Gradients`. It may be
        called any number of times. It keeps q, k, v, out and lse, not copies: they must not change
        before it is called.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError
        As `attention` and `attention_backward`.

    See Also
    --------
    attention_backward : The same from arrays you keep yourself.

    Notes
    -----
    Memory kept between the two passes is lse alone beside the arguments and out: scores are
    recomputed (FlashAttention, arXiv:2205.14135, section 3.1).

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention_vjp
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 10, 16))
    >>> out, pullback = attention_vjp(q, k, v, causal=True)
    >>> grads = pullback(np.ones_like(out))
    >>> grads.q.shape, grads.bias is None
    ((2, 10, 16), True)

    A small step along a gradient changes the result as promised:

    >>> step = 1e-6 * rng.standard_normal(k.shape)
    >>> moved, _ = attention_vjp(q, k + step, v, causal=True)
    >>> bool(np.isclose((moved - out).sum(), (grads.k * step).sum()))
    True
    """
    given = {"q": q, "k": k, "v": v, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    seen = Seen(given, {"deterministic": deterministic, "wrt": wrt})
    wrt = _checks.wrt(wrt, given, seen, score_parameters(score_mod))
    options = {
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
    result, lse = attention(q, k, v, **options, return_lse=True, out=out)
    options.update(deterministic=deterministic, wrt=wrt)
    pullback = Pullback(attention_backward, (q, k, v, result, lse), options)
    return ((result, lse) if return_lse else result), pullback


class Pullback:
    """What `attention_vjp` returns beside the result; see there."""

    __slots__ = ("_backward", "_options", "_saved")

    def __init__(
        self,
        backward: Callable[..., Gradients],
        saved: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> None:
        self._backward = backward
        self._saved = saved
        self._options = options

    def __call__(
        self,
        dout: Any,
        dlse: Any = None,
        *,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        dbias: Any = None,
    ) -> Gradients:
        """Gradients of `sum(out * dout) + sum(lse * dlse)`.

        Parameters
        ----------
        dout : array (*B, H, Lq, Dv)
            Gradient of out, in its dtype and layout.
        dlse : array (*B, H, Lq), optional
            Gradient of lse, in its dtype; None for 0.
        dq, dk, dv, dbias : array, optional
            Where to write; see `attention_backward`.

        Returns
        -------
        Gradients
        """
        buffers = {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias}
        return self._backward(dout, *self._saved, dlse=dlse, **buffers, **self._options)


def score_parameters(score_mod: Any) -> dict[str, bool]:
    """Parameters of a score expression by name: is it an array? Empty for what is no ScoreMod."""
    arrays = getattr(score_mod, "arrays", {})
    return {name: name in arrays for name in getattr(score_mod, "params", {})}


def _names(wrt: Any) -> Any:
    """A list or set of names as a tuple, which can be part of a key; the checks see the rest."""
    return tuple(wrt) if isinstance(wrt, (list, set, frozenset)) else wrt
