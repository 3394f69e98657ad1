"""BlockMasks of what a user already has: blocks, a dense mask, a sparse matrix, a predicate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import _blockmask_checks as checks
from cuflash._blockmask_grid import (
    ABSENT,
    FULL,
    PACKED,
    Assembler,
    Grid,
    Slots,
    from_tiles,
)
from cuflash._errors import Seen, kind_of, shown_dtype

if TYPE_CHECKING:
    from cuflash._blockmask import BlockMask


class Conversions:
    """Constructors of BlockMask from arrays, matrices and functions."""

    __slots__ = ()

    @classmethod
    def _of(cls, grid: Grid, storage: Slots) -> BlockMask:
        raise NotImplementedError

    @classmethod
    def from_blocks(
        cls, blocks: Any, *, shape: tuple[int, int], block_size: int | tuple[int, int] = 128
    ) -> BlockMask:
        """A mask of whole blocks.

        Parameters
        ----------
        blocks : bool array (*B, H, ceil(Lq / bq), ceil(Lk / bk))
            True where a block is visible. Leading axes may be missing or 1 and then serve every
            batch and head; the last two may be 1 and then serve every block. NumPy or CuPy.
        shape : (Lq, Lk)
            Lengths in elements; the last blocks may reach beyond them.
        block_size : int or (bq, bk)
            Multiples of 16.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            `blocks` is not bool, or has another number of blocks than `shape` and `block_size` give.

        Examples
        --------
        >>> import numpy as np
        >>> from cuflash import BlockMask
        >>> BlockMask.from_blocks(np.eye(3, dtype=bool), shape=(300, 300), block_size=128).density
        0.3856
        """
        seen = Seen({"blocks": blocks}, {"shape": shape, "block_size": block_size})
        grid = Grid(checks.shape(shape, seen), checks.block_size(block_size, seen))
        visible = checks.bools("blocks", blocks, 2, seen)
        for axis, of, found, wanted in zip(
            (-2, -1), ("queries", "keys"), visible.shape[-2:], grid.counts, strict=True
        ):
            if found not in (wanted, 1):
                length, size = grid.shape[axis], grid.block_size[axis]
                raise seen.error(
                    ValueError,
                    f"blocks has {found} blocks of {of}, and {length} {of} in blocks of {size} "
                    f"are {wanted}.",
                    f"blocks of shape (..., {grid.counts[0]}, {grid.counts[1]}).",
                )
        lead = visible.shape[:-2] or (1,)
        visible = np.broadcast_to(visible, (*lead, *grid.counts))
        slots = np.where(visible, np.int32(FULL), np.int32(ABSENT))
        return cls._of(grid, Assembler(grid).finish(slots))

    @classmethod
    def from_dense(cls, mask: Any, *, block_size: int | tuple[int, int] = 128) -> BlockMask:
        """The mask that a bool array of elements describes.

        Parameters
        ----------
        mask : bool array (*B, H, Lq, Lk)
            True where query i may attend to key j; also (H, Lq, Lk) and (Lq, Lk). Any strides.
            NumPy or CuPy (copied to the host).
        block_size : int or (bq, bk)
            Multiples of 16.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            `mask` is not a bool array, or has fewer than two axes.

        Examples
        --------
        >>> import numpy as np
        >>> from cuflash import BlockMask
        >>> causal = np.tri(100, dtype=bool)
        >>> bool((BlockMask.from_dense(causal, block_size=32).to_dense() == causal).all())
        True
        """
        seen = Seen({"mask": mask}, {"block_size": block_size})
        sizes = checks.block_size(block_size, seen)
        dense = checks.bools("mask", mask, 2, seen)
        if dense.ndim == 2:
            dense = dense[None]
        lead, grid = dense.shape[:-2], Grid((dense.shape[-2], dense.shape[-1]), sizes)

        def fill(buffer: np.ndarray, items: slice, rows: slice, keys: slice) -> None:
            # One item at a time: merging leading axes would copy a broadcast or transposed mask.
            for target, item in zip(buffer, range(items.start, items.stop), strict=True):
                target[...] = dense[np.unravel_index(item, lead)][rows, keys]

        return cls._of(grid, from_tiles(grid, lead, fill))

    @classmethod
    def from_sparse(
        cls,
        matrix: Any,
        *,
        block_size: int | tuple[int, int] = 128,
        shape: tuple[int, int] | None = None,
    ) -> BlockMask:
        """The pattern of a sparse matrix, for every batch and head.

        Parameters
        ----------
        matrix : scipy.sparse or cupyx.scipy.sparse matrix or array
            In any format (BSR, CSR, CSC, COO, ...), of any dtype. Row i, column j is query i,
            key j; with `shape`, row and column number blocks, and a visible block is visible whole.
        block_size : int or (bq, bk)
            Multiples of 16; need not be the block size of a BSR matrix.
        shape : (Lq, Lk), optional
            Lengths in elements, when `matrix` holds one entry per block.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            `matrix` is no sparse matrix of two axes, or with `shape` has another number of blocks.

        Notes
        -----
        A pair is visible where at least one stored entry is not zero. A zero that happens to be
        stored (inside a block of BSR, or left over from arithmetic) is hidden: so the result does
        not depend on the format, and `from_sparse(matrix)` is `from_dense(matrix.toarray() != 0)`.

        Examples
        --------
        >>> import scipy.sparse
        >>> from cuflash import BlockMask
        >>> band = scipy.sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(64, 64))
        >>> int(BlockMask.from_sparse(band, block_size=16).to_dense().sum())
        190
        """
        seen = Seen({"matrix": matrix}, {"block_size": block_size, "shape": shape})
        sizes = checks.block_size(block_size, seen)
        entries = _entries(matrix, seen)
        if shape is not None:
            lengths = checks.shape(shape, seen)
            wanted = Grid(lengths, sizes).counts
            if tuple(entries.shape) != wanted:
                raise seen.error(
                    ValueError,
                    f"matrix has {tuple(entries.shape)} entries, and {lengths} in blocks of {sizes} "
                    f"are {wanted} blocks.",
                    "one row per block of queries, one column per block of keys; without shape=, "
                    "rows are queries.",
                )
            visible = entries.data != 0
            blocks = np.zeros(wanted, bool)
            blocks[entries.row[visible], entries.col[visible]] = True
            return cls.from_blocks(blocks, shape=lengths, block_size=sizes)
        grid = Grid((int(entries.shape[0]), int(entries.shape[1])), sizes)
        return cls._of(grid, _scattered(grid, entries))

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Any],
        *,
        shape: tuple[int, int],
        heads: int = 1,
        batch: int | tuple[int, ...] = 1,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """The mask of a predicate, evaluated some blocks at a time.

        Parameters
        ----------
        fn : callable
            `fn(b, h, i, j)` tells whether query i of head h in batch b sees key j. The arguments
            are int64 arrays that broadcast together; the result is a bool array that broadcasts
            with them. `b` counts the batch in C order where it has several axes.
        shape : (Lq, Lk)
            Lengths: i is in [0, Lq) and j in [0, Lk) always.
        heads : int
            H, or 1 for a mask that all heads share.
        batch : int or tuple of ints
            The batch axes *B; 1 (no batch axis) for a mask that the whole batch shares.
        block_size : int or (bq, bk)
            Multiples of 16.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            `fn` is not callable, or returned something else than bool of a fitting shape.

        Notes
        -----
        `fn` sees every pair once: Lq * Lk * heads * batch evaluations, in portions of about half a
        million. The predicates of the literature have builders here, which need far fewer.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> mask = BlockMask.from_function(lambda b, h, i, j: (i - j) % (h + 2) == 0, shape=(64, 64),
        ...                                heads=2, block_size=32)
        >>> mask.to_dense().mean(axis=(1, 2)).round(3).tolist()
        [0.5, 0.333]
        """
        options = {"shape": shape, "heads": heads, "batch": batch, "block_size": block_size}
        seen = Seen({}, options)
        if not callable(fn):
            raise seen.error(
                TypeError, f"fn is {kind_of(fn)}, not callable.", "fn(b, h, i, j) -> bool array."
            )
        grid = Grid(checks.shape(shape, seen), checks.block_size(block_size, seen))
        lead = checks.lead(batch, heads, seen)

        def fill(buffer: np.ndarray, items: slice, rows: slice, keys: slice) -> None:
            item = np.arange(items.start, items.stop, dtype=np.int64)[:, None, None]
            i = np.arange(rows.start, rows.stop, dtype=np.int64)[None, :, None]
            j = np.arange(keys.start, keys.stop, dtype=np.int64)[None, None, :]
            visible = np.asarray(fn(item // lead[-1], item % lead[-1], i, j))
            if visible.dtype != bool:
                raise seen.error(
                    TypeError,
                    f"fn returned {shown_dtype(visible.dtype)}, and bool is needed.",
                    "a comparison, joined by & and |.",
                )
            try:
                buffer[...] = np.broadcast_to(visible, buffer.shape)
            except ValueError:
                raise seen.error(
                    ValueError,
                    f"fn returned shape {visible.shape} for b, h, i, j that broadcast to "
                    f"{buffer.shape}.",
                    "an expression that keeps the axes of b, h, i, j.",
                ) from None

        return cls._of(grid, from_tiles(grid, lead, fill))


def _entries(matrix: Any, seen: Seen) -> Any:
    """`matrix` as COO on the host."""
    if not hasattr(matrix, "tocoo"):
        raise seen.error(
            TypeError,
            f"matrix is {kind_of(matrix)}, not a sparse matrix.",
            "a scipy.sparse or cupyx.scipy.sparse matrix; from_dense takes arrays.",
        )
    if len(matrix.shape) != 2:
        raise seen.error(
            ValueError,
            f"matrix has {len(matrix.shape)} axes, and must have 2.",
            "one matrix of queries by keys.",
        )
    # `get` of a SciPy dictionary of keys is that of dict.
    if type(matrix).__module__.startswith("cupyx."):
        matrix = matrix.get()
    return matrix.tocoo()


def _scattered(grid: Grid, entries: Any) -> Slots:
    """Storage of a mask of single elements, in memory and time of the blocks they touch."""
    (bq, bk), (n_q, n_k) = grid.block_size, grid.counts
    visible = entries.data != 0
    i, j = (x[visible].astype(np.int64) for x in (entries.row, entries.col))
    block = (i // bq) * n_k + j // bk
    touched = np.zeros(n_q * n_k, bool)
    touched[block] = True
    found = np.flatnonzero(touched)
    number = np.cumsum(touched) - 1
    word = (number[block] * bq + i % bq) * grid.words + (j % bk) // 32
    words = np.zeros((len(found), bq, grid.words), np.uint32)
    np.bitwise_or.at(words.reshape(-1), word, np.uint32(1) << (j % bk % 32).astype(np.uint32))
    blocks = Assembler(grid)
    slots = np.full(n_q * n_k, ABSENT, np.int32)
    edges = grid.edges().reshape(-1)
    step = PACKED * grid.batch
    for start in range(0, len(found), step):
        some = found[start : start + step]
        slots[some] = blocks.slots(words[start : start + step], edges[some])
    return blocks.finish(slots.reshape(1, n_q, n_k))
