"""Products of tiles on BLAS: operands it can read in place, buffers, and pairs that a mask hides."""

from __future__ import annotations

import numpy as np

from ._cpu_masks import Cut


class Scratch:
    """Buffers reused from tile to tile: fresh pages would cost as much as the arithmetic."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Uninitialised contiguous array of `shape`, valid until `name` is taken again."""
        size = int(np.prod(shape))
        buffer = self.buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self.buffers[name] = np.empty(size, dtype=self.dtype)
        return buffer[:size].reshape(shape)


def for_blas(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in `dtype` with rows that BLAS can read in place; `x` itself when it is so already."""
    step, item = x.strides[-2], x.itemsize
    in_place = (
        x.dtype == dtype
        and x.flags.aligned
        and x.strides[-1] == item
        and step >= item * x.shape[-1]
        and step % item == 0
    )
    return x if in_place else x.astype(dtype, order="C")


def stack_rows(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tile (*unit, G, rows, n) as (*unit, G * rows, n): the group's heads share one product."""
    if x.shape[-3] == 1:
        return for_blas(x[..., 0, :, :], dtype)
    dense = np.ascontiguousarray(x, dtype=dtype)
    return dense.reshape(*x.shape[:-3], -1, x.shape[-1])


def visible_matmul(
    weights: np.ndarray,
    x: np.ndarray,
    cut: Cut | None,
    out: np.ndarray | None = None,
    *,
    transposed: bool = False,
) -> np.ndarray:
    """`weights @ x` in which pairs that `cut` hides have no part, whatever `x` holds there.

    Hidden pairs have weight 0, which is enough as long as `x` is finite; but 0 * NaN is NaN, and
    one NaN in a key that some rows of the tile do not see would reach them. So non-finite values
    are taken out of `x`, and given back to the pairs that see them.

    Parameters
    ----------
    weights
        (..., rows, n), 0 wherever hidden.
    x
        (..., n, dim).
    cut
        The hidden pairs, or None when there are none.
    transposed
        Weights are (keys, queries), as in the gradients of k and v.
    """
    if cut is None or (finite := np.isfinite(x)).all():
        return np.matmul(weights, x, out=out)
    out = np.matmul(weights, np.where(finite, x, 0), out=out)
    visible = cut.visible(weights.shape[-1 if transposed else -2] // cut.rows)
    visible = visible.swapaxes(-1, -2) if transposed else visible

    def count(weight_is: np.ndarray | bool, x_is: np.ndarray) -> np.ndarray:
        return np.matmul((visible & weight_is).astype(x.dtype), x_is.astype(x.dtype))

    up, down = weights > 0, weights < 0
    plus, minus = np.isposinf(x), np.isneginf(x)
    out[count(up, plus) + count(down, minus) > 0] += np.inf
    out[count(up, minus) + count(down, plus) > 0] -= np.inf
    # Whatever is left is NaN: NaN anywhere, and inf times a weight of 0 or NaN.
    undefined = count(~(up | down), plus | minus) + count(True, np.isnan(x))
    out[undefined > 0] = np.nan
    return out
