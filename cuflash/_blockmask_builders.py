"""Published sparse patterns, element by element: windows, strides, global tokens.

In all of them row i sits at position d = i + q_offset of the key axis, as everywhere in cuflash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import _blockmask_checks as checks
from cuflash import _checks
from cuflash._blockmask_grid import Grid, Slots, combine
from cuflash._blockmask_rules import by_distance, by_member, same_id
from cuflash._errors import Seen

if TYPE_CHECKING:
    from cuflash._blockmask import BlockMask

# Beyond any difference of positions: a stride this long repeats nowhere.
_NEVER = 2**62


class Builders:
    """Constructors of BlockMask for patterns of elements."""

    __slots__ = ()

    @classmethod
    def _of(cls, grid: Grid, storage: Slots) -> BlockMask:
        raise NotImplementedError

    @classmethod
    def sliding_window(
        cls,
        window: tuple[int | None, int | None],
        *,
        shape: tuple[int, int],
        q_offset: int | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """Each query sees its neighbours: `d - left <= j <= d + right`.

        The same pairs as the option `window` of `attention`, as a mask that combines with others.

        Parameters
        ----------
        window : (left, right)
            Keys before and after the query's own position, each an int >= 0 or None for no bound.
        shape : (Lq, Lk)
            Lengths of queries and keys.
        q_offset : int, optional
            Row i sits at `d = i + q_offset`; by default Lk - Lq (the ends aligned).
        block_size : int or (bq, bk)
            Multiples of 16.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            Something is no int, no pair, or out of its range.

        Notes
        -----
        Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers"
        (arXiv:1904.10509, 2019), section 4; Beltagy, Peters, Cohan, "Longformer: The Long-Document
        Transformer" (arXiv:2004.05150, 2020), section 3.1, whose window w is `(w // 2, w // 2)`.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.sliding_window((1, 0), shape=(3, 4)).to_dense().astype(int)[0]
        array([[1, 1, 0, 0],
               [0, 1, 1, 0],
               [0, 0, 1, 1]])
        """
        return cls.dilated_window(window, 1, shape=shape, q_offset=q_offset, block_size=block_size)

    @classmethod
    def dilated_window(
        cls,
        window: tuple[int | None, int | None],
        dilation: int,
        *,
        shape: tuple[int, int],
        q_offset: int | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """A sliding window with gaps: every `dilation`-th key, `left` before and `right` after.

        Query at d sees key j where `d - j` is a multiple of `dilation` and
        `d - left * dilation <= j <= d + right * dilation`.

        Parameters
        ----------
        window : (left, right)
            How many keys to see before and after the query's own position; None for all.
        dilation : int
            Distance between them, >= 1; 1 is `sliding_window`.
        shape, q_offset, block_size
            As in `sliding_window`.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            As `sliding_window`.

        Notes
        -----
        Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer" (arXiv:2004.05150,
        2020), section 3.1, "Dilated Sliding Window".

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.dilated_window((1, 1), 2, shape=(5, 5)).to_dense().astype(int)[0]
        array([[1, 0, 1, 0, 0],
               [0, 1, 0, 1, 0],
               [1, 0, 1, 0, 1],
               [0, 1, 0, 1, 0],
               [0, 0, 1, 0, 1]])
        """
        seen = _seen(shape, q_offset, block_size, window=window, dilation=dilation)
        grid, offset = _frame(shape, q_offset, block_size, seen)
        step = min(checks.count("dilation", dilation, 1, seen), _NEVER)
        left, right = checks.window(window, step, seen)

        def sees(delta: np.ndarray) -> np.ndarray:
            near = (delta <= left) & (delta >= -right)
            return near if step == 1 else near & (delta % step == 0)

        return cls._of(grid, by_distance(grid, offset, sees))

    @classmethod
    def strided(
        cls,
        stride: int,
        *,
        shape: tuple[int, int],
        causal: bool = True,
        q_offset: int | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """The strided pattern of the Sparse Transformer: the last `stride` keys, and every
        `stride`-th one before.

        Query at d sees key j where `abs(d - j) <= stride` or `(d - j) % stride == 0`, and with
        `causal` only `j <= d`.

        Parameters
        ----------
        stride : int
            The paper's l, >= 1; near the square root of the length.
        causal : bool
            The paper's autoregressive pattern; False for its mirror image as well.
        shape, q_offset, block_size
            As in `sliding_window`.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            As `sliding_window`.

        Notes
        -----
        Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers"
        (arXiv:1904.10509, 2019), section 4.3; the union of both heads is the "merged head" of
        section 5.1. At element level: where `stride` is below the block size, every block before
        the query holds a few pairs.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.strided(3, shape=(8, 8)).to_dense().astype(int)[0, 7]
        array([0, 1, 0, 0, 1, 1, 1, 1])
        """
        seen = _seen(shape, q_offset, block_size, stride=stride, causal=causal)
        grid, offset = _frame(shape, q_offset, block_size, seen)
        step = min(checks.count("stride", stride, 1, seen), _NEVER)
        forward_too = not _checks.flag("causal", causal, seen)

        def sees(delta: np.ndarray) -> np.ndarray:
            visible = (np.abs(delta) <= step) | (delta % step == 0)
            return visible if forward_too else visible & (delta >= 0)

        return cls._of(grid, by_distance(grid, offset, sees))

    @classmethod
    def fixed(
        cls,
        stride: int,
        summary: int,
        *,
        shape: tuple[int, int],
        causal: bool = True,
        q_offset: int | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """The fixed pattern of the Sparse Transformer: one's own chunk, and the last `summary` keys
        of every chunk.

        Query at d >= 0 sees key j where `d // stride == j // stride` or
        `j % stride >= stride - summary`, and with `causal` only `j <= d`. A query before the first
        key (d < 0) is in no chunk.

        Parameters
        ----------
        stride : int
            Length of a chunk, the paper's l, >= 1 (128 or 256 there).
        summary : int
            The paper's c, from 1 to `stride` (8, 16 or 32 there).
        causal : bool
            The paper's autoregressive pattern; False to see both ways.
        shape, q_offset, block_size
            As in `sliding_window`.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            As `sliding_window`, or `summary` is larger than `stride`.

        Notes
        -----
        Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers"
        (arXiv:1904.10509, 2019), section 4.3; the union of both heads is the "merged head" of
        section 5.1. The paper also lets heads take different stretches of a chunk as its summary;
        this is the last one.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.fixed(4, 1, shape=(8, 8)).to_dense().astype(int)[0, 6]
        array([0, 0, 0, 1, 1, 1, 1, 0])
        """
        seen = _seen(shape, q_offset, block_size, stride=stride, summary=summary, causal=causal)
        grid, offset = _frame(shape, q_offset, block_size, seen)
        step = min(checks.count("stride", stride, 1, seen), _NEVER)
        last = checks.count("summary", summary, 1, seen)
        if last > step:
            raise seen.error(
                ValueError,
                f"summary is {last}, and a chunk has {step} keys.",
                "1 <= summary <= stride.",
            )
        len_q, len_k = grid.shape
        j = np.arange(len_k)
        chunk = same_id(grid, [(np.arange(len_q) + offset) // step], [j // step])
        summaries = by_member(grid, 1, j % step >= step - last)
        storage = combine(grid, chunk, summaries, np.bitwise_or)
        if _checks.flag("causal", causal, seen):
            before = by_distance(grid, offset, lambda delta: delta >= 0)
            storage = combine(grid, storage, before, np.bitwise_and)
        return cls._of(grid, storage)

    @classmethod
    def global_window(
        cls,
        window: tuple[int | None, int | None],
        global_positions: Sequence[int] | np.ndarray,
        *,
        shape: tuple[int, int],
        q_offset: int | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """The pattern of the Longformer: a sliding window, and tokens that see and are seen by all.

        Query at d sees key j where `d - left <= j <= d + right`, or d is a global position, or j is.

        Parameters
        ----------
        window : (left, right)
            As in `sliding_window`; the paper's window w is `(w // 2, w // 2)`.
        global_positions : sequence or array of ints
            Positions on the key axis, in [0, Lk); such as that of the classification token.
        shape, q_offset, block_size
            As in `sliding_window`.

        Returns
        -------
        BlockMask

        Raises
        ------
        TypeError, ValueError
            As `sliding_window`, or a global position outside of the keys.

        Notes
        -----
        Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer" (arXiv:2004.05150,
        2020), section 3.1, "Global Attention", which is symmetric.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> BlockMask.global_window((1, 0), [0], shape=(4, 4)).to_dense().astype(int)[0]
        array([[1, 1, 1, 1],
               [1, 1, 0, 0],
               [1, 1, 1, 0],
               [1, 0, 1, 1]])
        """
        seen = Seen(
            {"global_positions": global_positions},
            _seen(shape, q_offset, block_size, window=window).options,
        )
        grid, offset = _frame(shape, q_offset, block_size, seen)
        len_q, len_k = grid.shape
        positions = checks.integers("global_positions", global_positions, seen).reshape(-1)
        for position in positions[(positions < 0) | (positions >= len_k)][:1]:
            raise seen.error(
                ValueError,
                f"global_positions holds {position}, and there are {len_k} keys.",
                f"positions from 0 to {len_k - 1}.",
            )
        rows = positions - offset
        queries, keys = np.zeros(len_q, bool), np.zeros(len_k, bool)
        queries[rows[(rows >= 0) & (rows < len_q)]] = True
        keys[positions] = True
        left, right = checks.window(window, 1, seen)
        near = by_distance(grid, offset, lambda delta: (delta <= left) & (delta >= -right))
        storage = combine(grid, near, by_member(grid, 0, queries), np.bitwise_or)
        return cls._of(grid, combine(grid, storage, by_member(grid, 1, keys), np.bitwise_or))


def _seen(shape: Any, q_offset: Any, block_size: Any, **own: Any) -> Seen:
    return Seen({}, {**own, "shape": shape, "q_offset": q_offset, "block_size": block_size})


def _frame(shape: Any, q_offset: Any, block_size: Any, seen: Seen) -> tuple[Grid, int]:
    grid = Grid(checks.shape(shape, seen), checks.block_size(block_size, seen))
    return grid, checks.position(q_offset, grid.shape, seen)
