"""What every backend must know about one call besides its arrays, in one frozen value.

The public functions take `causal`, `window`, `q_offset=None`, `scale=None`; a backend should not
have to resolve any of these again, lest two backends resolve them differently. Here `causal` is
already part of `right`, defaults are filled in, and only what changes the arithmetic is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, slots=True)
class Options:
    """The resolved options of one attention call.

    Parameters
    ----------
    scale
        Factor on `q @ k.T`; any finite float, 0 and negative included.
    q_offset
        Row i sits at position `d = i + q_offset` of the key axis. A plain Python int, of any size.
    left, right
        Row i sees keys `d - left <= j <= d + right`; None leaves that side open. `causal` has
        become `right = min(right, 0)`.
    softcap
        `s = softcap * tanh(s / softcap)` right after scaling, or None.
    alibi_slopes
        Array broadcastable to `(*B, H)`, or None: adds `-slope * abs(d - j)` after the softcap.
    deterministic
        Gradients bitwise equal run to run. The NumPy backend always is.
    """

    scale: float
    q_offset: int
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    alibi_slopes: Any = None
    deterministic: bool = False
