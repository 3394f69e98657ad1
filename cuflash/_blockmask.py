"""`BlockMask`: which keys each query may see, as a list of visible blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash import _blockmask_checks as checks
from cuflash import _blockmask_tiles as tiles
from cuflash._blockmask_builders import Builders
from cuflash._blockmask_convert import Conversions
from cuflash._blockmask_grid import (
    ABSENT,
    FULL,
    Assembler,
    Grid,
    Slots,
    combine,
    ones,
    pack,
    transpose,
)
from cuflash._blockmask_patterns import Patterns
from cuflash._blockmask_plot import Picture
from cuflash._errors import Seen, kind_of


class BlockMask(Conversions, Builders, Patterns, Picture):
    """Which keys each query may see, per batch and head, by blocks of (bq, bk) elements.

    A block is absent (and then costs nothing), full, or partial: then it carries one bit per
    element. Make one with `from_blocks`, `from_dense`, `from_sparse`, `from_function`, or with a
    builder of a published pattern, and pass it as `mask=`. Immutable; masks combine with `&`, `|`
    and `~`, and `.T` exchanges queries and keys. Compared by identity, as arrays are not.

    Attributes
    ----------
    shape : (Lq, Lk)
        Lengths in elements.
    block_size : (bq, bk)
        Multiples of 16.
    batch : tuple of ints
        Batch extents *Bm, each 1 (for all) or full; () for a mask the whole batch shares.
    heads : int
        Hm: 1 (for all) or the query heads.
    density : float
        Share of visible pairs.
    slots : int32 array (*Bm, Hm, ceil(Lq / bq), ceil(Lk / bk))
        Per block: -1 absent, -2 full, else its row of `bits`. Read-only.
    bits : uint32 array (rows, bq, ceil(bk / 32))
        Partial blocks: element (i, j) is visible where bit j % 32 of word (i, j // 32) is 1. Equal
        blocks share a row. Elements beyond Lq or Lk are 0. Read-only.

    Notes
    -----
    A block that is visible wherever it lies inside the sequence is full, also at its end. Memory:
    4 bytes per block, and bq * ceil(bk / 32) * 4 bytes per distinct partial block.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import BlockMask, attention
    >>> mask = BlockMask.sliding_window((64, 0), shape=(256, 256), block_size=64)
    >>> mask
    BlockMask(shape=(256, 256), block_size=(64, 64), batch=(), heads=1), density 0.222
      4 x 4 blocks: 0 full, 7 partial (2 distinct), 9 absent
        +...
        ++..
        .++.
        ..++
    >>> (mask | mask.T).density < 2 * mask.density
    True
    """

    __slots__ = ("__weakref__", "_density", "_grid", "_storage")
    # NumPy arrays leave `array & mask` to this class instead of looping over elements.
    __array_ufunc__ = None

    _grid: Grid
    _storage: Slots
    _density: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"BlockMask takes no arguments of its own, and {len(args) + len(kwargs)} were given.\n"
            "  Way out: BlockMask.from_blocks, from_dense, from_sparse, from_function, or a builder."
        )

    @classmethod
    def _of(cls, grid: Grid, storage: Slots) -> BlockMask:
        self = object.__new__(cls)
        self._grid, self._storage, self._density = grid, storage, None
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._grid, self._storage)

    # ---- what it is

    @property
    def shape(self) -> tuple[int, int]:
        """(Lq, Lk)."""
        return self._grid.shape

    @property
    def block_size(self) -> tuple[int, int]:
        """(bq, bk)."""
        return self._grid.block_size

    @property
    def batch(self) -> tuple[int, ...]:
        """Batch extents."""
        return self.slots.shape[:-3]

    @property
    def heads(self) -> int:
        """Extent of the head axis."""
        return self.slots.shape[-3]

    @property
    def slots(self) -> np.ndarray:
        """int32 (*Bm, Hm, nQ, nK)."""
        return self._storage.slots

    @property
    def bits(self) -> np.ndarray:
        """uint32 (rows, bq, ceil(bk / 32))."""
        return self._storage.bits

    @property
    def density(self) -> float:
        """Visible pairs over all pairs of this mask's batch, heads, queries and keys; exact up to
        the last rounding. 0 where there is no pair.
        """
        if self._density is None:
            pairs = (
                int(np.prod(self.slots.shape[:-2], dtype=object)) * self.shape[0] * self.shape[1]
            )
            self._density = self._visible_pairs() / pairs if pairs else 0.0
        return self._density

    def _visible_pairs(self) -> int:
        rows, keys = self._grid.extents()
        counts = ones(self.bits)
        total = 0
        for slots in self.slots.reshape(-1, *self._grid.counts):
            total += int(rows @ ((slots == FULL) @ keys))
            total += int(counts[slots[slots >= 0]].sum())
        return total

    def to_dense(self) -> np.ndarray:
        """The mask element by element.

        Returns
        -------
        array (*Bm, Hm, Lq, Lk)
            Bool, True where query i may attend to key j.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.documents(lengths=[2, 3]).to_dense().astype(int)[0]
        array([[1, 1, 0, 0, 0],
               [1, 1, 0, 0, 0],
               [0, 0, 1, 1, 1],
               [0, 0, 1, 1, 1],
               [0, 0, 1, 1, 1]])
        """
        return tiles.elements(self._grid, self.bits, self.slots, 0, self.shape[0], 0, self.shape[1])

    # ---- tiles, for those who compute with the mask

    def element_tile(
        self, index: tuple[Any, ...], q0: int, q1: int, k0: int, k1: int
    ) -> np.ndarray:
        """Elements [q0, q1) x [k0, k1) of the batch and heads that `index` names.

        Parameters
        ----------
        index : tuple of ints and slices
            Over the leading axes (*B, H) of a call. An axis of extent 1 in the mask serves every
            index: an int drops it, a slice keeps it with extent 1.

        Returns
        -------
        array (*lead, q1 - q0, k1 - k0)
            Bool.

        Raises
        ------
        ValueError
            The tile reaches beyond the mask.
        """
        checks.tile((q0, q1), (k0, k1), self.shape)
        slots = tiles.select(self.slots, index)
        return tiles.elements(self._grid, self.bits, slots, q0, q1, k0, k1)

    def tile_state(self, index: tuple[Any, ...], q0: int, q1: int, k0: int, k1: int) -> str:
        """ "absent", "full" or "partial": elements [q0, q1) x [k0, k1) of all of `index` together.

        Exact also inside partial blocks; elements are looked at only where blocks do not tell.
        """
        checks.tile((q0, q1), (k0, k1), self.shape)
        slots = tiles.select(self.slots, index)
        return tiles.state(self._grid, self.bits, slots, q0, q1, k0, k1)

    def visible_tiles(self, tile_q: int, tile_k: int) -> np.ndarray:
        """Which tiles of another size hold a visible element: what a kernel has to visit.

        Parameters
        ----------
        tile_q, tile_k : int
            Any positive size.

        Returns
        -------
        array (*Bm, Hm, ceil(Lq / tile_q), ceil(Lk / tile_k))
            Bool, exact also inside partial blocks.
        """
        seen = Seen({}, {"tile_q": tile_q, "tile_k": tile_k})
        sizes = [
            checks.count(name, size, 1, seen)
            for name, size in (("tile_q", tile_q), ("tile_k", tile_k))
        ]
        return tiles.visible(self._grid, self._storage, *sizes)

    # ---- algebra

    def __and__(self, other: Any) -> BlockMask:
        return self._combined("&", other, np.bitwise_and)

    def __or__(self, other: Any) -> BlockMask:
        return self._combined("|", other, np.bitwise_or)

    # Only reached with something that is no BlockMask on the left.
    __rand__ = __and__
    __ror__ = __or__

    def __invert__(self) -> BlockMask:
        grid = self._grid
        everything = Slots(
            np.full((1, *grid.counts), FULL, np.int32),
            np.empty((0, grid.block_size[0], grid.words), np.uint32),
        )
        return self._of(grid, combine(grid, self._storage, everything, np.bitwise_xor))

    @property
    def T(self) -> BlockMask:
        """Queries and keys exchanged, in shape and block size too."""
        return self._of(self._grid.transposed(), transpose(self._grid, self._storage))

    def with_block_size(self, block_size: int | tuple[int, int]) -> BlockMask:
        """The same elements in blocks of another size.

        Parameters
        ----------
        block_size : int or (bq, bk)
            Multiples of 16.

        Returns
        -------
        BlockMask

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> mask = BlockMask.sliding_window((9, 0), shape=(100, 100), block_size=128)
        >>> mask.with_block_size(16).density == mask.density
        True
        """
        seen = Seen({}, {"block_size": block_size})
        grid = Grid(self.shape, checks.block_size(block_size, seen))
        return self._of(grid, self._regrouped(grid))

    def _regrouped(self, grid: Grid) -> Slots:
        """Storage over another grid: only blocks that are neither absent nor full are looked into."""
        bq, bk = grid.block_size
        some = self.visible_tiles(bq, bk)
        hidden = (~self).visible_tiles(bq, bk)
        slots = np.where(some, np.int32(FULL), np.int32(ABSENT))
        blocks = Assembler(grid)
        edges = grid.edges()
        for *item, a, c in np.argwhere(some & hidden):
            q0, k0 = a * bq, c * bk
            q1, k1 = min(q0 + bq, grid.shape[0]), min(k0 + bk, grid.shape[1])
            tile = np.zeros((1, bq, bk), bool)
            tile[0, : q1 - q0, : k1 - k0] = self.element_tile(tuple(item), q0, q1, k0, k1)
            slots[(*item, a, c)] = blocks.slots(pack(tile), edges[a, c : c + 1])[0]
        return blocks.finish(slots)

    def _combined(self, sign: str, other: Any, operation: Callable[..., np.ndarray]) -> BlockMask:
        if not isinstance(other, BlockMask):
            seen = Seen({"other": other} if hasattr(other, "dtype") else {})
            raise seen.error(
                TypeError,
                f"BlockMask {sign} {kind_of(other)}: {sign} takes two BlockMasks.",
                "BlockMask.from_dense for a bool array.",
            )
        seen = Seen({}, {"first": _Brief(self), "second": _Brief(other)})
        if self.shape != other.shape:
            raise seen.error(
                ValueError,
                f"{sign} of masks of shape {self.shape} and {other.shape}.",
                "masks of equal (Lq, Lk).",
            )
        if self.block_size != other.block_size:
            raise seen.error(
                ValueError,
                f"{sign} of masks in blocks of {self.block_size} and {other.block_size}.",
                "with_block_size of one of them; small blocks make slow kernels, so none is chosen.",
            )
        lead, others = self.slots.shape[:-2], other.slots.shape[:-2]
        for n, (one, two) in enumerate(zip(lead[::-1], others[::-1], strict=False)):
            if one != two and 1 not in (one, two):
                raise seen.error(
                    ValueError,
                    f"{sign} of masks of {one} and {two} {'batch entries' if n else 'heads'}.",
                    "equal extents, or 1 to broadcast.",
                )
        return self._of(self._grid, combine(self._grid, self._storage, other._storage, operation))


class _Brief:
    """A mask in one line, for messages."""

    def __init__(self, mask: BlockMask) -> None:
        self.mask = mask

    def __repr__(self) -> str:
        return self.mask._title()


def _restored(grid: Grid, storage: Slots) -> BlockMask:
    """What pickle calls; NumPy restores arrays writable."""
    for array in storage:
        array.flags.writeable = False
    return BlockMask._of(grid, storage)
