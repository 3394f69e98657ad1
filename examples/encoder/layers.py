"""The layers of an encoder, each a function that returns its result and a pullback.

As in `cuflash.attention_vjp`: `y, pullback = layer(x, ...)`, and `pullback(dy)` gives the gradient
of every array argument that has one, in their order. Arrays are NumPy or CuPy of one floating dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Pullback = Callable[..., Any]
LAYER_NORM_EPS = 1e-5


def namespace(x: Any) -> Any:
    """The module whose functions take x: `numpy`, or `cupy`."""
    if isinstance(x, np.ndarray):
        return np
    import cupy

    return cupy


def linear(x: Any, weight: Any, bias: Any) -> tuple[Any, Pullback]:
    """x @ weight + bias.

    Parameters
    ----------
    x : array (..., in)
    weight : array (in, out)
    bias : array (out,)

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
    y = x @ weight
    y += bias

    def pullback(dy: Any) -> tuple[Any, Any, Any]:
        rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        # A product with ones sums rows at the speed of BLAS.
        ones = namespace(dy).ones(len(drows), dy.dtype)
        return dy @ weight.T, rows.T @ drows, ones @ drows

    return y, pullback


def gelu(x: Any) -> tuple[Any, Pullback]:
    """x times the normal distribution's mass below x, by its approximation with tanh.

    Returns
    -------
    y : array
        Shape of x.
    pullback : callable
        dy -> dx

    Notes
    -----
    Hendrycks, Gimpel, "Gaussian Error Linear Units" (arXiv:1606.08415, 2016), section 2.

    Examples
    --------
    >>> y, pullback = gelu(np.array([-9.0, 0.0, 9.0]))
    >>> abs(y), pullback(np.ones(3))
    (array([0., 0., 9.]), array([0. , 0.5, 1. ]))
    """
    xp = namespace(x)
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    tanh = square * (factor * cubic)
    tanh += factor
    tanh *= x
    xp.tanh(tanh, out=tanh)
    y = tanh + 1
    y *= x
    y *= 0.5

    def pullback(dy: Any) -> Any:
        # y = x (1 + t) / 2, and t' = (1 - t^2) (f + 3 f c x^2).
        slope = square * (3 * factor * cubic)
        slope += factor
        slope *= x
        slope *= 1 - tanh * tanh
        slope += tanh
        slope += 1
        slope *= 0.5
        slope *= dy
        return slope

    return y, pullback


def layer_norm(x: Any, weight: Any, bias: Any) -> tuple[Any, Pullback]:
    """Each row to mean 0 and variance 1, then times weight plus bias.

    Parameters
    ----------
    x : array (..., width)
    weight, bias : array (width,)

    Returns
    -------
    y : array (..., width)
    pullback : callable
        dy -> dx, dweight, dbias

    Notes
    -----
    Ba, Kiros, Hinton, "Layer Normalization" (arXiv:1607.06450, 2016).

    Examples
    --------
    >>> y, pullback = layer_norm(np.array([[1.0, 2.0, 6.0]]), np.ones(3), np.zeros(3))
    >>> bool(abs(y.mean()) < 1e-12), round(float((y * y).mean()), 4)
    (True, 1.0)
    """
    xp = namespace(x)
    # Means are products with a vector, at the speed of BLAS.
    width = x.shape[-1]
    average = xp.full((width, 1), 1 / width, x.dtype)
    normal = x - x @ average
    inverse = 1 / xp.sqrt((normal * normal) @ average + LAYER_NORM_EPS)
    normal *= inverse
    y = normal * weight
    y += bias

    def pullback(dy: Any) -> tuple[Any, Any, Any]:
        rows = (-1, width)
        ones = xp.ones(normal.size // width, dy.dtype)
        product = dy * normal
        dweight, dbias = ones @ product.reshape(rows), ones @ dy.reshape(rows)
        dx = dy * weight
        product *= weight
        dx -= dx @ average
        dx -= normal * (product @ average)
        dx *= inverse
        return dx, dweight, dbias

    return y, pullback


def embedding(tokens: Any, table: Any) -> tuple[Any, Pullback]:
    """Row `tokens[...]` of the table, for few kinds of tokens.

    Parameters
    ----------
    tokens : int array (...)
    table : array (kinds, width)

    Returns
    -------
    y : array (..., width)
    pullback : callable
        dy -> dtable

    Examples
    --------
    >>> y, pullback = embedding(np.array([1, 1]), np.eye(2))
    >>> pullback(np.ones((2, 2)))
    array([[0., 0.],
           [2., 2.]])
    """

    def pullback(dy: Any) -> Any:
        # One product with a 0/1 matrix: with few kinds it is small, and it needs no atomic sums.
        xp = namespace(dy)
        kinds = xp.arange(len(table), dtype=tokens.dtype)[:, None]
        chosen = (tokens.reshape(1, -1) == kinds).astype(dy.dtype)
        return chosen @ dy.reshape(-1, dy.shape[-1])

    return table[tokens], pullback


def rotary(qkv: Any, phases: Any) -> tuple[Any, Pullback]:
    """Queries and keys with pairs of columns turned by an angle of their position.

    The scalar product of two turned rows depends on the difference of their positions alone.

    Parameters
    ----------
    qkv : array (batch, length, 3, heads, D)
        Contiguous, D even; changed in place.
    phases : complex array (length, D / 2)
        exp(1j * angle), of the precision of qkv.

    Returns
    -------
    y : array
        qkv itself.
    pullback : callable
        dy -> dqkv, in place

    Notes
    -----
    Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position Embedding"
    (arXiv:2104.09864, 2021), section 3.2.

    Examples
    --------
    >>> rotary(np.array([[[[[1.0, 0.0]]] * 3]]), np.array([[1j]]))[0].reshape(3, 2)
    array([[0., 1.],
           [0., 1.],
           [1., 0.]])
    """

    def turn(x: Any, angles: Any) -> Any:
        x.view(phases.dtype)[:, :, :2] *= angles[:, None, None, :]
        return x

    return turn(qkv, phases), lambda dy: turn(dy, phases.conj())


def cross_entropy(logits: Any, labels: Any) -> tuple[Any, Pullback]:
    """Mean negative log-likelihood of the labels, in nats.

    Parameters
    ----------
    logits : array (n, kinds)
    labels : int array (n,)

    Returns
    -------
    loss : array ()
    pullback : callable
        d -> dlogits, for a number d

    Examples
    --------
    >>> loss, pullback = cross_entropy(np.zeros((1, 4)), np.array([2]))
    >>> round(float(loss), 4), pullback(1.0)
    (1.3863, array([[ 0.25,  0.25, -0.75,  0.25]]))
    """
    xp = namespace(logits)
    rows = xp.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    shifted -= log_sum

    def pullback(d: float) -> Any:
        dlogits = xp.exp(shifted)
        dlogits[rows, labels] -= 1
        dlogits *= d / len(labels)
        return dlogits

    return -shifted[rows, labels].mean(), pullback
