"""Which of a kernel's compile-time options a call needs: the last words of every kernel's name.

Options are orthogonal: the score (linear, shaped, general), the mask (none beyond the band, a boolean
array, a block mask), a bias, a score expression, sinks, dropout, packed sequences. Whatever is a
number stays a run-time value, so equal variants share one binary for all lengths and probabilities.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cuflash import _dtypes

if TYPE_CHECKING:
    from cuflash._problem import Problem

MASKS = {
    "": "mask::Band",
    "dense": "mask::Mapped<mask::Dense>",
    "blocks": "mask::Mapped<mask::Blocks>",
}
# Of the rows of a group of heads.
GROUP_MASKS = {
    "": "mask::GroupBand",
    "dense": "mask::Mapped<mask::OfGroup<mask::Dense>, mask::GroupBand>",
    "blocks": "mask::Mapped<mask::OfGroup<mask::Blocks>, mask::GroupBand>",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """The compile-time options of one kernel.

    Parameters
    ----------
    score : {"linear", "shaped", "general"}
        linear: scaled products, every row on a 16-byte boundary. shaped: also soft cap, ALiBi, any
        scale, any rows. general: also bias and score expression.
    mask : {"", "dense", "blocks"}
    bias, sinks, dropout, packed : bool
    expression : str
        Generated source of the score expression; "" for none.
    grouped : bool
        Rows of a tile are those of all query heads that share k and v.
    """

    score: str = "linear"
    mask: str = ""
    bias: bool = False
    sinks: bool = False
    dropout: bool = False
    packed: bool = False
    expression: str = ""
    grouped: bool = False

    @property
    def name(self) -> str:
        """ "linear", "general_bias_blocks_dropout"."""
        digest = hashlib.sha256(self.expression.encode()).hexdigest()[:8] if self.expression else ""
        words = [
            self.score,
            "bias" if self.bias else "",
            f"mod{digest}" if digest else "",
            self.mask,
            "sinks" if self.sinks else "",
            "dropout" if self.dropout else "",
            "packed" if self.packed else "",
            "grouped" if self.grouped else "",
        ]
        return "_".join(word for word in words if word)

    @property
    def plain(self) -> bool:
        """Nothing beyond a band, a scale, a soft cap and ALiBi."""
        return self == Variant(self.score) and self.score != "general"

    @property
    def types(self) -> tuple[tuple[str, str], ...]:
        """Members of Config that are types."""
        modifier = "ScoreExpression<Element>" if self.expression else "score::Unmodified"
        rows = ", score::SlopedRows<Element>" if self.grouped else ""
        score = {
            "linear": "<Element::Real>",
            "shaped": f"<Element::Real{rows}>",
            "general": f"<Element, {str(self.bias).lower()}, {modifier}{rows}>",
        }[self.score]
        masks = GROUP_MASKS if self.grouped else MASKS
        return ("Mask", masks[self.mask]), ("Score", f"score::{self.score.capitalize()}{score}")

    @property
    def constants(self) -> tuple[tuple[str, bool], ...]:
        """Members of Config that are numbers."""
        return (
            ("VECTOR_ONLY", self.score == "linear"),
            ("SINKS", self.sinks),
            ("DROPOUT", self.dropout),
            ("PACKED", self.packed),
            *(("GROUPED", True),) * self.grouped,
        )

    def without_sinks(self) -> Variant:
        """For backward, whose kernels find the sinks in lse."""
        return replace(self, sinks=False)


def variant_of(problem: Problem) -> Variant:
    """What a Problem needs."""
    score = "linear" if is_linear(problem) else "shaped"
    if problem.bias is not None or problem.expression:
        score = "general"
    return Variant(
        score=score,
        mask="" if problem.mask is None else problem.mask.kind,
        bias=problem.bias is not None,
        sinks=problem.sinks,
        dropout=problem.dropout_p > 0,
        packed=problem.packed is not None,
        expression=problem.expression,
    )


def is_linear(problem: Problem) -> bool:
    """True when the fast score serves: plain scaled products, every row on a 16-byte boundary."""
    row = _dtypes.BY_NAME[problem.dtype]
    per_chunk = 16 // row.numpy.itemsize
    return (
        problem.softcap is None
        and not problem.alibi
        and float(row.lse.type(problem.scale)) != 0.0
        and problem.head_dim % per_chunk == 0
        and problem.head_dim_v % per_chunk == 0
        and all(operand.aligned for _, operand in problem.operands)
    )
