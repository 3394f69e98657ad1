"""The NumPy backend, for users without a GPU: the kernels' tiled online softmax, on BLAS.

Its functions receive checked arguments, always in the axis order (*B, H, L, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._cpu_backward import backward
from ._cpu_forward import forward
from ._cpu_packed import varlen_backward, varlen_forward
from ._cpu_tiles import accumulator
from ._order import empty_like_order

__all__ = ["backward", "forward", "merge", "varlen_backward", "varlen_forward"]


def merge(
    outs: Sequence[np.ndarray], lses: Sequence[np.ndarray], *, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the union of disjoint sets of keys, from the results over each.

    Parameters
    ----------
    outs, lses
        At least one (*B, H, Lq, Dv) and (*B, H, Lq) each.
    out
        Where to write, which may be one of `outs`; None: allocated in the first's memory order.

    Returns
    -------
    out, lse as from `forward`. A part with lse = -inf saw no key and has no say, whatever it holds;
    parts with lse = inf (an infinite sink) have all of it.
    """
    first = outs[0]
    dtype = accumulator(first.dtype)
    with np.errstate(all="ignore"):
        # Few numbers, and an error here multiplies whole rows: float64 costs nothing.
        lse = lses[0].astype(np.float64)
        for part in lses[1:]:
            lse = np.logaddexp(lse, part.astype(np.float64))
        infinite = sum(np.isposinf(part) for part in lses)
        shift = np.where(np.isinf(lse), 0, lse)
        total = np.zeros(first.shape, dtype=dtype)
        for part, part_lse in zip(outs, lses, strict=True):
            seen = ~np.isneginf(part_lse)
            weight = np.exp(part_lse.astype(np.float64) - shift)
            weight = np.where(infinite, np.isposinf(part_lse) / np.maximum(infinite, 1), weight)
            term = part * weight[..., None].astype(dtype)
            np.add(total, term, out=total, where=seen[..., None])
        if out is None:
            out = empty_like_order(first.shape, first.dtype, first)
        out[...] = total
    return out, lse.astype(lses[0].dtype)
