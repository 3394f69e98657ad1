"""Element-wise steps for which NumPy's own take a branch per element."""

from __future__ import annotations

import numpy as np


def overwrite(x: np.ndarray, value: float, where: np.ndarray) -> None:
    """`np.copyto(x, value, where=where)`, 15 times as fast where `where` is random.

    `x` is float32 or float64; `where` bool, of a shape that broadcasts to it.
    """
    word = np.dtype(f"i{x.itemsize}")
    bits = x.view(word)
    stay = where.astype(word)
    stay -= 1  # all bits where False, none where True
    bits &= stay
    if value:
        np.invert(stay, out=stay)
        stay &= np.array(value, x.dtype).view(word)
        bits |= stay


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x.astype(dtype)`, also fast where float32 numbers become subnormal in float16.

    NumPy takes 40 times as long for a number that it has to round there; near 0.75 float32 has just
    the step that subnormal float16 has.
    """
    if dtype == np.float16 and x.dtype == np.float32:
        near = np.float32(0.75)
        coarse, bits = ((x + near) - near).view(np.int32), x.view(np.int32)
        # Those of `coarse` for a small number, else those of `x`.
        small = -(np.abs(x) < 2.0**-14).astype(np.int32)
        x = (bits ^ ((bits ^ coarse) & small)).view(np.float32)
    return x.astype(dtype, copy=False)
