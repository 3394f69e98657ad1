"""Options of a call that are neither arrays nor part of what its plan depends on by value: a block
mask, a score expression, a seed given as a number.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cuflash._errors import Seen, kind_of

if TYPE_CHECKING:
    from cuflash._blockmask import BlockMask
    from cuflash._scoremod import ScoreMod


class Extra(NamedTuple):
    """What a call carries beside its arrays and its option values."""

    blocks: BlockMask | None = None
    score_mod: ScoreMod | None = None
    seed: int | None = None

    @property
    def key(self) -> Any:
        """Hashable; what a prepared call depends on. The seed's value and the pattern do not matter."""
        blocks = self.blocks
        pattern = None
        if blocks is not None:
            pattern = blocks.shape, blocks.block_size, blocks.slots.shape, blocks.bits.shape
        modifier = None if self.score_mod is None else self.score_mod.key
        return pattern, modifier, self.seed is not None

    @property
    def told(self) -> dict[str, Any]:
        """What of it was given, by argument name, for messages."""
        told = {"mask": self.blocks, "score_mod": self.score_mod, "seed": self.seed}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def score_arrays(self) -> dict[str, Any]:
        """Parameter arrays of the score expression by name."""
        return {} if self.score_mod is None else dict(self.score_mod.arrays)


NOTHING = Extra()


def split(mask: Any, seed: Any, score_mod: Any) -> tuple[Any, Any, Extra]:
    """The mask and the seed if they are arrays (else None), and everything that is not.

    Raises
    ------
    TypeError, ValueError
        A score_mod that is no ScoreMod; a seed out of range.
    """
    if mask is None and seed is None and score_mod is None:
        return None, None, NOTHING
    # Here, so that importing the package does not wait for what few calls use.
    from cuflash._blockmask import BlockMask

    if score_mod is not None:
        _check_score_mod(score_mod)
    blocks = mask if isinstance(mask, BlockMask) else None
    number = _number(seed)
    return (
        None if blocks is not None else mask,
        seed if number is None else None,
        Extra(blocks, score_mod, number),
    )


def _check_score_mod(score_mod: Any) -> None:
    from cuflash._scoremod import ScoreMod

    if not isinstance(score_mod, ScoreMod):
        raise Seen({}, {"score_mod": score_mod}).error(
            TypeError,
            f"score_mod is {kind_of(score_mod)}, not a ScoreMod.",
            'cuflash.ScoreMod("s - decay[h] * abs(i - j)", {"decay": decay}).',
        )


def _number(seed: Any) -> int | None:
    """The seed if it is an integer; None if there is none or it may be an array."""
    if seed is None or (hasattr(seed, "shape") and not isinstance(seed, np.generic)):
        return None
    way_out = "an int from 0 to 2**64 - 1, or a uint64 array of one element on the arrays' device."
    seen = Seen({}, {"seed": seed})
    if isinstance(seed, (bool, np.bool_)):
        raise seen.error(TypeError, f"seed is {kind_of(seed)}, not an int.", way_out)
    try:
        number = operator.index(seed)
    except TypeError:
        raise seen.error(TypeError, f"seed is {kind_of(seed)}, not an int.", way_out) from None
    if not 0 <= number < 2**64:
        raise seen.error(ValueError, f"seed is {number}, and must be in [0, 2**64).", way_out)
    return number
