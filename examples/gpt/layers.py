"""The layers of a transformer, each a function that returns its result and a pullback.

As in `cuflash.attention_vjp`: `y, pullback = layer(x, ...)`, and `pullback(dy)` gives the gradient
of every array argument, in their order. A pullback changes nothing and may be called again. Arrays
are NumPy or CuPy; results have the dtype of the arguments.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LAYER_NORM_EPS = 1e-5
BYTES = 256  # values that a token of one byte takes


def namespace(x: Any) -> Any:
    """The module whose functions take x: `numpy`, or `cupy`."""
    if isinstance(x, np.ndarray):
        return np
    import cupy

    return cupy


def linear(x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """x @ weight + bias.

    Parameters
    ----------
    x : array (..., in)
        Rows.
    weight : array (in, out)
        Stored as GPT-2 does.
    bias : array (out,)
        Added to every row.

    Returns
    -------
    y : array (..., out)
    pullback : callable
        dy -> dx, dweight, dbias

    Examples
    --------
    >>> y, pullback = linear(np.ones((2, 3)), np.ones((3, 4)), np.zeros(4))
    >>> [gradient.shape for gradient in pullback(y)]
    [(2, 3), (3, 4), (4,)]
    """
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight
    y += bias

    def pullback(dy: Any) -> tuple[Any, Any, Any]:
        dy = dy.reshape(-1, dy.shape[-1])
        return (dy @ weight.T).reshape(x.shape), rows.T @ dy, dy.sum(axis=0)

    return y.reshape(*x.shape[:-1], -1), pullback


def layer_norm(x: Any, gain: Any, bias: Any) -> tuple[Any, Any]:
    """Rows shifted to mean 0 and scaled to variance 1, times gain, plus bias.

    Parameters
    ----------
    x : array (..., width)
        Rows.
    gain, bias : array (width,)
        Applied to every row.

    Returns
    -------
    y : array (..., width)
    pullback : callable
        dy -> dx, dgain, dbias

    Notes
    -----
    Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450, section 3.
    """
    xp = namespace(x)
    unit = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / xp.sqrt((unit * unit).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    unit *= scale
    y = unit * gain
    y += bias

    def pullback(dy: Any) -> tuple[Any, Any, Any]:
        width = dy.shape[-1]
        dgain = (dy * unit).reshape(-1, width).sum(axis=0)
        dbias = dy.reshape(-1, width).sum(axis=0)
        dx = dy * gain
        along = (dx * unit).mean(axis=-1, keepdims=True)
        dx -= dx.mean(axis=-1, keepdims=True)
        dx -= unit * along
        dx *= scale
        return dx, dgain, dbias

    return y, pullback


def gelu(x: Any) -> tuple[Any, Any]:
    """x times the normal distribution's mass below x, in GPT-2's form with tanh.

    Parameters
    ----------
    x : array
        Any shape.

    Returns
    -------
    y : array
        Shape of x.
    pullback : callable
        dy -> dx. It computes tanh once more: time is cheaper here than memory.

    Notes
    -----
    Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415, section 2.
    """
    xp, slope, cubic = namespace(x), math.sqrt(2 / math.pi), 0.044715

    def tanh() -> Any:
        t = x * x
        t *= slope * cubic
        t += slope
        t *= x
        return xp.tanh(t, out=t)

    y = tanh()
    y += 1
    y *= x
    y *= 0.5

    def pullback(dy: Any) -> Any:
        t = tanh()
        # d/dx x (1 + t) / 2  =  (1 + t) / 2 * (1 + (1 - t) * x * d/dx of tanh's argument)
        dx = x * x
        dx *= 3 * slope * cubic
        dx += slope
        dx *= x
        dx *= 1 - t
        dx += 1
        t += 1
        dx *= t
        dx *= 0.5
        dx *= dy
        return dx

    return y, pullback


def embedding(tokens: Any, table: Any, positions: Any) -> tuple[Any, Any]:
    """Rows of the table that the tokens name, plus a row for each position.

    Parameters
    ----------
    tokens : integer array (batch, length)
        Bytes.
    table : array (vocabulary, width)
        One row per token.
    positions : array (context, width)
        One row per position; length <= context.

    Returns
    -------
    x : array (batch, length, width)
    pullback : callable
        dx -> dtable, dpositions
    """
    xp, length = namespace(table), tokens.shape[1]
    x = table[tokens]
    x += positions[:length]

    def pullback(dx: Any) -> tuple[Any, Any]:
        # A product with a one-hot matrix, and no scattered additions: on a GPU those add up in a
        # different order in every run. Tokens are bytes, so 256 columns are enough.
        names = xp.arange(min(BYTES, len(table)))
        chosen = (tokens.reshape(-1, 1) == names).astype(dx.dtype)
        dtable = xp.zeros_like(table)
        dtable[: len(names)] = chosen.T @ dx.reshape(-1, dx.shape[-1])
        dpositions = xp.zeros_like(positions)
        dpositions[:length] = dx.sum(axis=0)
        return dtable, dpositions

    return x, pullback


def tied_head(x: Any, table: Any) -> tuple[Any, Any]:
    """Scores of every token: x @ table.T, with the embedding's own table.

    Parameters
    ----------
    x : array (rows, width)
        Last hidden state.
    table : array (vocabulary, width)
        The embedding's.

    Returns
    -------
    logits : array (rows, vocabulary)
    pullback : callable
        dlogits -> dx, dtable

    Notes
    -----
    Press, Wolf, "Using the Output Embedding to Improve Language Models", arXiv:1608.05859.
    """
    return x @ table.T, lambda dlogits: (dlogits @ table, dlogits.T @ x)


def cross_entropy(logits: Any, targets: Any) -> tuple[Any, Any]:
    """Mean over rows of -log softmax(logits)[target], in nats.

    Parameters
    ----------
    logits : array (rows, vocabulary)
        Scores.
    targets : integer array (rows,)
        The tokens that came.

    Returns
    -------
    loss : array ()
    pullback : callable
        dloss -> dlogits
    """
    xp, rows = namespace(logits), len(logits)
    every = xp.arange(rows)
    # exp of a difference <= 0 cannot overflow.
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[every, targets]
    p = xp.exp(shifted, out=shifted)
    total = p.sum(axis=1, keepdims=True)
    loss = (xp.log(total[:, 0]) - chosen).mean()
    p /= total

    def pullback(dloss: float = 1.0) -> Any:
        dlogits = p * (dloss / rows)
        dlogits[every, targets] -= dloss / rows
        return dlogits

    return loss, pullback
