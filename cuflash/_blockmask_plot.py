"""The pattern of a BlockMask for the eye: a few lines of text, or an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cuflash._blockmask_grid import ABSENT, FULL, ones

if TYPE_CHECKING:
    from cuflash._blockmask import BlockMask

# Cells of the picture in `repr`, at most; a character is about twice as high as wide.
_CELLS = (16, 32)


class Picture:
    """`repr` and `plot` of BlockMask."""

    __slots__ = ()

    def _title(self) -> str:
        mask = cast("BlockMask", self)
        return (
            f"BlockMask(shape={mask.shape}, block_size={mask.block_size}, batch={mask.batch}, "
            f"heads={mask.heads})"
        )

    def __repr__(self) -> str:
        mask = cast("BlockMask", self)
        slots = mask.slots
        full, absent = int((slots == FULL).sum()), int((slots == ABSENT).sum())
        extents = [n for n in slots.shape[:-2] if n != 1] + list(slots.shape[-2:])
        lines = [
            f"{self._title()}, density {mask.density:.3g}",
            f"  {' x '.join(map(str, extents))} blocks: {full} full, "
            f"{slots.size - full - absent} partial ({len(mask.bits)} distinct), {absent} absent",
        ]
        if slots.size:
            lines += [f"    {row}" for row in _drawn(slots.reshape(-1, *slots.shape[-2:])[0])]
        return "\n".join(lines)

    def plot(self, ax: Any = None, *, index: tuple[int, ...] | None = None) -> Any:
        """Draw the pattern: black where a block is full, white where it is absent, grey by the share
        of visible elements between.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; by default a new figure.
        index : tuple of ints, optional
            Which (*Bm, Hm) to draw; by default the first.

        Returns
        -------
        matplotlib Axes

        Raises
        ------
        ImportError
            `ax` is not given and matplotlib is not installed.
        ValueError
            `index` names no batch entry and head of this mask, or there is none.

        Examples
        --------
        >>> from cuflash import BlockMask
        >>> mask = BlockMask.strided(64, shape=(1024, 1024), block_size=32)
        >>> axes = mask.plot()                                            # doctest: +SKIP
        >>> axes.figure.savefig("pattern.png")                            # doctest: +SKIP
        """
        mask = cast("BlockMask", self)
        lead = mask.slots.shape[:-2]
        at = (0,) * len(lead) if index is None else tuple(index)
        if len(at) != len(lead) or any(not -n <= i < n for i, n in zip(at, lead, strict=True)):
            raise ValueError(
                f"index {at} is outside of the extents {lead} of this mask's batch and heads.\n"
                f"  {self._title()}\n  Way out: one int per extent."
            )
        if ax is None:
            ax = _new_axes()
        (len_q, len_k), (bq, bk) = mask.shape, mask.block_size
        shares = _shares(mask, at)
        if shares.size:
            ax.imshow(
                shares,
                cmap="Greys",
                vmin=0,
                vmax=1,
                interpolation="nearest",
                extent=(0, shares.shape[1] * bk, shares.shape[0] * bq, 0),
            )
        ax.set_xlim(0, len_k or 1)
        ax.set_ylim(len_q or 1, 0)
        ax.set_xlabel("key")
        ax.set_ylabel("query")
        ax.set_title(f"density {mask.density:.3g}")
        return ax


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"plot needs matplotlib, which cannot be imported ({error}).\n"
            "  Way out: pip install matplotlib, pass ax=, or print the mask."
        ) from error
    return pyplot.subplots()[1]


def _shares(mask: BlockMask, at: tuple[int, ...]) -> np.ndarray:
    """float (nQ, nK): visible share of the elements of each block that lie inside the sequence."""
    slots = mask.slots[at]
    shares = (slots == FULL).astype(np.float64)
    rows, keys = mask._grid.extents()
    partial = slots >= 0
    shares[partial] = ones(mask.bits)[slots[partial]] / (rows[:, None] * keys)[partial]
    return shares


def _drawn(slots: np.ndarray) -> list[str]:
    """Rows of characters: # all full, . all absent, + anything else."""
    full, absent = slots == FULL, slots == ABSENT
    for axis, most in enumerate(_CELLS):
        length = slots.shape[axis]
        starts = np.arange(0, length, -(-length // most))
        full = np.logical_and.reduceat(full, starts, axis=axis)
        absent = np.logical_and.reduceat(absent, starts, axis=axis)
    cells = np.where(full, "#", np.where(absent, ".", "+"))
    return ["".join(row) for row in cells]
