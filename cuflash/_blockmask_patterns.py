"""Published sparse patterns of whole blocks, and the boundaries of packed documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import _blockmask_checks as checks
from cuflash._blockmask_documents import ids_of_both
from cuflash._blockmask_grid import Grid, Slots
from cuflash._blockmask_rules import same_id
from cuflash._errors import Seen

if TYPE_CHECKING:
    from cuflash._blockmask import BlockMask


class Patterns:
    """Constructors of BlockMask for patterns of blocks, and for documents."""

    __slots__ = ()

    @classmethod
    def _of(cls, grid: Grid, storage: Slots) -> BlockMask:
        raise NotImplementedError

    @classmethod
    def from_blocks(cls, blocks: Any, *, shape: Any, block_size: Any = 128) -> BlockMask:
        raise NotImplementedError

    @classmethod
    def bigbird(
        cls,
        *,
        shape: tuple[int, int],
        seed: int,
        random: int = 3,
        window: int = 3,
        global_blocks: int = 2,
        heads: int = 1,
        block_size: int = 128,
    ) -> BlockMask:
        """The pattern of BigBird: a window, global and random blocks, all visible whole.

        With a' the block of keys at the same place as block a of queries (a + nK - nQ: the last
        blocks are aligned), block a sees block c of keys where `abs(a' - c) <= window // 2`, or
        `c < global_blocks`, or `0 <= a' < global_blocks`, or c is one of `random` others drawn for
        this a and head.

        Parameters
        ----------
        shape : (Lq, Lk)
            Lengths of queries and keys, in elements.
        seed : int
            Of the draws, >= 0. The same seed gives the same mask everywhere.
        random, window, global_blocks : int
            How many blocks of each kind; `window` is odd, or 0 for none.
        heads : int
            Draws; 1 for a mask that all heads share.
        block_size : int
            A multiple of 16 (64 in the paper).

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            Something is no int or out of its range, or blocks are not square.

        Notes
        -----
        Zaheer et al., "Big Bird: Transformers for Longer Sequences" (arXiv:2007.14062, 2020),
        section 2 and appendix D, in its internal construction (existing tokens are global): the
        defaults are those of the paper's base models. Random blocks are drawn without replacement
        from those that are neither in the window nor global, where there are as many.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.bigbird(shape=(1024, 1024), seed=0, random=1, global_blocks=1, block_size=64,
        ...                   heads=12).slots.shape
        (12, 16, 16)
        """
        counts = {"random": random, "window": window, "global_blocks": global_blocks}
        seen = Seen(
            {}, {"shape": shape, "seed": seed, **counts, "heads": heads, "block_size": block_size}
        )
        grid = _square(shape, block_size, seen)
        draws, width, first = (checks.count(name, n, 0, seen) for name, n in counts.items())
        if width and width % 2 == 0:
            raise seen.error(
                ValueError,
                f"window is {width} blocks, and a window with equal sides has an odd number.",
                f"window={width - 1} or {width + 1}, or 0 for none.",
            )
        count = checks.count("heads", heads, 0, seen)
        bits = np.random.Philox(checks.count("seed", seed, 0, seen))
        place, key = _places(grid)
        blocks = (key < first) | ((place >= 0) & (place < first))
        if width:
            blocks = blocks | (np.abs(place - key) <= width // 2)
        n_q, n_k = grid.counts
        draws = min(draws, n_k)
        visible = np.broadcast_to(blocks, (count, n_q, n_k)).copy()
        for head in visible if draws else ():
            # The smallest of independent 64-bit numbers: a draw without replacement that, unlike
            # Generator.choice, no release of NumPy may change.
            order = bits.random_raw(n_q * n_k).reshape(n_q, n_k)
            order[blocks] = np.iinfo(np.uint64).max
            chosen = np.argpartition(order, draws - 1, axis=1)[:, :draws]
            np.put_along_axis(head, chosen, True, axis=1)
        return cls.from_blocks(visible, shape=grid.shape, block_size=grid.block_size)

    @classmethod
    def butterfly(
        cls,
        *,
        shape: tuple[int, int],
        max_stride: int | None = None,
        global_blocks: int = 0,
        block_size: int = 128,
    ) -> BlockMask:
        """The flat block butterfly of Pixelfly: blocks whose numbers differ in one binary digit.

        With a' the block of keys at the same place as block a of queries (a + nK - nQ: the last
        blocks are aligned), block a sees block c of keys where `a' == c`, or `a' >= 0` and `a' ^ c`
        is a power of two below `max_stride`, or `c < global_blocks`, or `0 <= a' < global_blocks`.

        Parameters
        ----------
        shape : (Lq, Lk)
            Lengths of queries and keys, in elements.
        max_stride : int, optional
            The largest factor of the butterfly, in blocks: a power of two, 1 for the diagonal
            alone. By default that of the whole sequence.
        global_blocks : int
            Blocks that see and are seen by all, in the place of Pixelfly's low-rank term.
        block_size : int
            A multiple of 16.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            Something is no int or out of its range, or blocks are not square.

        Notes
        -----
        Dao, Chen, Liang, Yang, Song, Rudra, Ré, "Pixelated Butterfly: Simple and Efficient Sparse
        Training for Neural Network Models" (arXiv:2112.00029, ICLR 2022), section 3: the sum of the
        butterfly factor matrices of strides 2, 4, ..., `max_stride`. Block-sparse FlashAttention
        uses it: Dao, Fu, Ermon, Rudra, Ré, "FlashAttention" (arXiv:2205.14135, 2022), section 3.3.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> print(*repr(BlockMask.butterfly(shape=(128, 128), block_size=16)).split()[-8:], sep="\\n")
        ###.#...
        ##.#.#..
        #.##..#.
        .###...#
        #...###.
        .#..##.#
        ..#.#.##
        ...#.###
        """
        seen = Seen(
            {},
            {
                "shape": shape,
                "max_stride": max_stride,
                "global_blocks": global_blocks,
                "block_size": block_size,
            },
        )
        grid = _square(shape, block_size, seen)
        first = checks.count("global_blocks", global_blocks, 0, seen)
        widest = max(1, *grid.counts)  # no power of two from here on lies between two blocks
        if max_stride is not None:
            stride = checks.count("max_stride", max_stride, 1, seen)
            if stride & (stride - 1):
                raise seen.error(
                    ValueError,
                    f"max_stride is {stride}, and must be a power of two.",
                    f"max_stride={1 << (stride.bit_length() - 1)}, or None for the largest.",
                )
            widest = min(stride, widest)
        place, key = _places(grid)
        digits = place ^ key
        blocks = (place >= 0) & (digits < widest) & ((digits & (digits - 1)) == 0)
        blocks |= (key < first) | ((place >= 0) & (place < first))
        return cls.from_blocks(blocks, shape=grid.shape, block_size=grid.block_size)

    @classmethod
    def documents(
        cls,
        ids: Any = None,
        ids_k: Any = None,
        *,
        lengths: Any = None,
        lengths_k: Any = None,
        cu_seqlens: Any = None,
        cu_seqlens_k: Any = None,
        shape: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """Documents packed into one sequence: each query sees the keys of its own document.

        Query i sees key j where their documents are equal, element by element. With `causal=True`
        in the call, each document is causal by itself.

        Parameters
        ----------
        ids : int array (*B, Lq), or list
            Document of each query; of each key too, unless `ids_k` is given. Any numbers in any
            order; a negative one is padding, which sees nothing and is seen by none.
        ids_k : int array (*B, Lk), or list, optional
            Document of each key.
        lengths, lengths_k : list or int array (documents,)
            Instead of ids: lengths of consecutive documents.
        cu_seqlens, cu_seqlens_k : list or int array (documents + 1,)
            Instead of ids: where documents begin and the last one ends, as in `attention_varlen`.
        shape : (Lq, Lk), optional
            Lengths of queries and keys, where padding follows the last document.
        block_size : int or (bq, bk)
            Multiples of 16.

        Returns
        -------
        BlockMask
            With the batch axes of the ids, and one head for all.

        Raises
        ------
        TypeError, ValueError
            Not exactly one of the three ways is given, or what is given does not fit.

        See Also
        --------
        cuflash.attention : `mask=` takes the result.

        Notes
        -----
        Krell, Kosec, Perez, Fitzgibbon, "Efficient Sequence Packing without Cross-contamination"
        (arXiv:2107.02027, 2021).

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.documents(lengths=[1, 2], shape=(4, 4)).to_dense().astype(int)[0]
        array([[1, 0, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 0, 0, 0]])
        """
        ways = {
            "ids": (ids, ids_k),
            "lengths": (lengths, lengths_k),
            "cu_seqlens": (cu_seqlens, cu_seqlens_k),
        }
        sides = {
            f"{name}{end}": x
            for name, pair in ways.items()
            for end, x in zip(("", "_k"), pair, strict=True)
        }
        # As arrays in messages, where a long list is told by its kind.
        seen = Seen(sides, {"shape": shape, "block_size": block_size})
        sizes = checks.block_size(block_size, seen)
        given = [name for name, pair in ways.items() if any(x is not None for x in pair)]
        if len(given) != 1 or ways[given[0]][0] is None:
            raise seen.error(
                ValueError,
                f"documents are given by {' and '.join(given) or 'nothing'}, and one way is needed.",
                "ids, lengths or cu_seqlens; and the same with _k where keys differ.",
            )
        totals = (None, None) if shape is None else checks.shape(shape, seen)
        queries, keys = ids_of_both(given[0], ways[given[0]], totals, seen)
        grid = Grid((queries.shape[-1], keys.shape[-1]), sizes)
        try:
            lead = np.broadcast_shapes(queries.shape[:-1], keys.shape[:-1])
        except ValueError:
            raise seen.error(
                ValueError,
                f"ids has batch axes {queries.shape[:-1]}, and ids_k has {keys.shape[:-1]}.",
                "equal extents, or 1 to broadcast.",
            ) from None
        rows, columns = (
            np.broadcast_to(x, (*lead, x.shape[-1])).reshape(-1, x.shape[-1])
            if x.shape[-1]
            else np.empty((int(np.prod(lead)), 0), np.int64)
            for x in (queries, keys)
        )
        slots, bits = same_id(grid, list(rows), list(columns))
        return cls._of(grid, Slots(slots.reshape(*lead, 1, *grid.counts), bits))


def _square(shape: Any, block_size: Any, seen: Seen) -> Grid:
    grid = Grid(checks.shape(shape, seen), checks.block_size(block_size, seen))
    bq, bk = grid.block_size
    if bq != bk:
        raise seen.error(
            ValueError,
            f"block_size is {(bq, bk)}, and this pattern has square blocks.",
            f"block_size={bk}; with_block_size changes it afterwards.",
        )
    return grid


def _places(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (nQ, 1) and (1, nK): the block of keys where each block of queries is, and of keys."""
    n_q, n_k = grid.counts
    return np.arange(n_q)[:, None] + (n_k - n_q), np.arange(n_k)[None, :]
