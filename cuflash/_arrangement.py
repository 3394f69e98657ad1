"""How a caller's axes map to the order (*B, H, L, D), which everything below the checks uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuflash._arrays import Meta


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a caller's axes map to the order (*B, H, L, D), which everything below the checks uses.

    Parameters
    ----------
    rank : int
        Axes of q; with 2 there is no head axis.
    layout : {"HLD", "LHD"}
    """

    rank: int
    layout: str

    @property
    def swaps(self) -> bool:
        """Whether heads and rows change places."""
        return self.rank > 2 and self.layout == "LHD"

    @property
    def plain(self) -> bool:
        """Whether the caller's order is the standard one."""
        return self.rank > 2 and not self.swaps

    def standard_meta(self, meta: Meta) -> Meta:
        """Metadata of an array with a head dim, as `standard` would give it."""
        if self.rank == 2:
            return meta.expanded()
        return meta.swapped(-3, -2) if self.swaps else meta

    def standard(self, array: Any) -> Any:
        """View of an array with a head dim as (*B, H, L, D)."""
        if array is None or self.plain:
            return array
        return array[None] if self.rank == 2 else array.swapaxes(-3, -2)

    def restore(self, array: Any) -> Any:
        """View of a standard array in the caller's order."""
        if array is None or self.plain:
            return array
        return array[0] if self.rank == 2 else array.swapaxes(-3, -2)

    def standard_rows(self, array: Any) -> Any:
        """View of lse or dlse as (*B, H, Lq)."""
        return array[None] if array is not None and self.rank == 2 else array

    def restore_rows(self, array: Any) -> Any:
        """View of a standard lse in the caller's shape."""
        return array[0] if self.rank == 2 else array

    def shape(self, standard: tuple[int, ...], rows: bool = False) -> tuple[int, ...]:
        """The caller's shape of a standard one; `rows` for lse and dlse."""
        if self.rank == 2:
            return standard[1:]
        if rows or not self.swaps:
            return standard
        *batch, heads, length, dim = standard
        return (*batch, length, heads, dim)
