"""How the NumPy backend cuts a call into tiles: sizes, loops, scratch, products under a mask.

A step of the backend is one `np.matmul` over a *unit*: a block of (batch, kv head) pairs, all query
heads of each (GQA shares K and V by stacking the group's rows), `rows` queries and `keys` keys.
Long sequences make units of one head with tiles that fit the cache; short ones make units of many
heads, so no Python loop runs over heads of 16 tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ._cpu_masks import Band, Cut
from ._cpu_scores import Alibi, Softcap, scores_of
from ._options import Options

# Elements of a step's operands and scores together: they should stay in a core's level 2 cache (2
# MB of float32).
TILE_ELEMENTS = 1 << 19
# Rows and keys of a tile at most. Larger ones leave the cache, smaller ones leave BLAS and NumPy
# with their overheads.
TILE_ROWS = 256
TILE_KEYS = 512
# K and V are converted (16-bit dtypes, odd strides) once per unit up to this many bytes, beyond it
# tile by tile.
CONVERTED_BYTES = 16 << 20


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype in which scores, softmax and sums are kept: float64 for float64, else float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


@dataclass(frozen=True)
class Shape:
    """The extents of one call."""

    batch: tuple[int, ...]
    heads_kv: int
    group: int
    len_q: int
    len_k: int
    dim: int
    dim_v: int

    @classmethod
    def of(cls, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Shape:
        *batch, heads, len_q, dim = q.shape
        heads_kv, len_k = k.shape[-3], k.shape[-2]
        group = heads // heads_kv if heads_kv else 1
        return cls(tuple(batch), heads_kv, group, len_q, len_k, dim, v.shape[-1])

    @property
    def outer(self) -> tuple[int, ...]:
        """The axes a unit is cut from."""
        return (*self.batch, self.heads_kv)

    def group_rows(self, x: np.ndarray) -> np.ndarray:
        """View of (*B, H, Lq, ...) as (*B, Hkv, G, Lq, ...)."""
        axis = len(self.batch)
        return x.reshape(*x.shape[:axis], self.heads_kv, self.group, *x.shape[axis + 1 :])

    def spread(self, x: np.ndarray) -> np.ndarray:
        """View of k or v with its batch axes broadcast to q's."""
        return np.broadcast_to(x, (*self.outer, *x.shape[-2:]))


@dataclass(frozen=True)
class Tiling:
    """Tile extents: `rows` queries of each of the group's heads, `keys` keys, `heads` a unit."""

    rows: int
    keys: int
    heads: int

    @classmethod
    def of(cls, shape: Shape) -> Tiling:
        # At least one of everything: empty calls have no tiles, but nothing may divide by zero.
        rows = max(1, min(shape.len_q, -(-TILE_ROWS // shape.group)))
        stacked = rows * shape.group
        per_key = stacked + shape.dim + shape.dim_v
        # A few rows (decoding) make short work of a tile, so it may as well be long.
        longest = TILE_KEYS if stacked > 64 else max(TILE_KEYS, TILE_ELEMENTS // per_key)
        keys = max(1, min(shape.len_k, longest))
        step = stacked * keys + (stacked + keys) * (shape.dim + shape.dim_v)
        return cls(rows, keys, max(1, TILE_ELEMENTS // step))


def units(outer: tuple[int, ...], heads: int) -> Iterator[tuple[slice, ...]]:
    """Blocks of at most `heads` consecutive places of the `outer` axes, as tuples of slices that
    cover them all.

    The last axes are taken whole as long as they fit, one axis is cut in runs, those before it are
    walked one by one.
    """
    cuts: list[list[slice]] = []
    room = heads
    for extent in reversed(outer):
        step = max(1, min(extent, room))
        cuts.append([slice(a, min(a + step, extent)) for a in range(0, extent, step)])
        room = room // extent if step == extent else 1
    return itertools.product(*reversed(cuts))


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


@dataclass
class Call:
    """What all tiles of one call share."""

    shape: Shape
    tiling: Tiling
    mask: Band
    scores: list[Softcap | Alibi]
    scale: np.generic
    dtype: np.dtype
    scratch: Scratch

    @classmethod
    def of(cls, q: np.ndarray, k: np.ndarray, v: np.ndarray, options: Options) -> Call:
        shape, dtype = Shape.of(q, k, v), accumulator(q.dtype)
        return cls(
            shape,
            Tiling.of(shape),
            Band(shape.len_k, options.q_offset, options.left, options.right),
            scores_of(options, (*shape.outer, shape.group), dtype),
            dtype.type(options.scale),
            dtype,
            Scratch(dtype),
        )

    def own(self) -> Call:
        """The same call for another thread: with buffers of its own."""
        return replace(self, scratch=Scratch(self.dtype))

    def pairs(self) -> int:
        """About how many pairs of query and key the tiles have: how much work the call is."""
        seen = 0
        for q0, q1 in self.row_tiles():
            low, high = self.mask.keys(q0, q1)
            seen += (q1 - q0) * max(0, high - low)
        return seen * self.shape.group * math.prod(self.shape.outer)

    def whole(self, x: np.ndarray) -> np.ndarray:
        """K or V of a unit, ready for BLAS if that copy is small; else tiles are made ready."""
        return for_blas(x, self.dtype) if x.size * self.dtype.itemsize <= CONVERTED_BYTES else x

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        """Ranges of query rows."""
        for q0 in range(0, self.shape.len_q, self.tiling.rows):
            yield q0, min(q0 + self.tiling.rows, self.shape.len_q)

    def key_tiles(self, q0: int, q1: int) -> Iterator[tuple[int, int]]:
        """Ranges of keys that rows `q0:q1` see; none when they see no key."""
        low, high = self.mask.keys(q0, q1)
        for k0 in range(low, high, self.tiling.keys):
            yield k0, min(k0 + self.tiling.keys, high)


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
    visible = visible.T if transposed else visible

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
