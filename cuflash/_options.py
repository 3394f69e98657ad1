"""What every backend must know about one call besides its arrays, in one frozen value.

The public functions take `causal`, `window`, `q_offset=None`, `scale=None`; a backend should not
have to resolve any of these again, lest two backends resolve them differently. Here `causal` is
already part of `right`, defaults are filled in, and only what changes the arithmetic is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._dropout import Dropout

if TYPE_CHECKING:
    from ._blockmask import BlockMask
    from ._scoremod import ScoreMod


@dataclass(frozen=True, eq=False, slots=True)
class Options:
    """The resolved options of one attention call.

    Parameters
    ----------
    scale
        Factor on `q @ k.T`; any finite float, 0 and negative included.
    q_offset
        Row i sits at position `d = i + q_offset` of the key axis. A plain Python int, of any size.
        None, for packed sequences only: len_k - len_q of each.
    left, right
        Row i sees keys `d - left <= j <= d + right`; None leaves that side open. `causal` has
        become `right = min(right, 0)`.
    softcap
        `s = softcap * tanh(s / softcap)` right after scaling, or None.
    alibi_slopes
        Array broadcastable to `(*B, H)`, or None: adds `-slope * abs(d - j)` after the bias.
    deterministic
        Gradients bitwise equal run to run. The NumPy backend always is.
    mask
        bool array broadcastable to `(*B, H, Lq, Lk)`, True = may attend; any strides; or None.
    blocks
        The same as a BlockMask, or None.
    bias
        Array broadcastable to `(*B, H, Lq, Lk)` in its own shape, added after `score_mod`; or None.
    sinks
        (H,): one more logit per head in the softmax's denominator; or None.
    score_mod
        ScoreMod that is applied after the softcap, its parameters arrays of the call's backend; or
        None.
    dropout
        Dropout of the softmax's weights; or None.

    For packed sequences (*B) is their number, and mask and bias are indexed within the sequence.
    """

    scale: float
    q_offset: int | None
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    alibi_slopes: Any = None
    deterministic: bool = False
    mask: Any = None
    blocks: BlockMask | None = None
    bias: Any = None
    sinks: Any = None
    score_mod: ScoreMod | None = None
    dropout: Dropout | None = None
