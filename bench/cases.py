"""What is measured: sizes, and how many floating-point operations each one counts as.

Counting follows the FlashAttention papers, so that numbers can be compared: two products forward,
five backward, and only the pairs that causal rows see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One size.

    Parameters
    ----------
    batch, heads, heads_kv, len_q, len_k, head_dim : int
    dtype : str
    causal : bool
    """

    batch: int
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    head_dim: int
    dtype: str = "bfloat16"
    causal: bool = False

    @property
    def name(self) -> str:
        """ "bf16 d128 causal b2 h16 L8192"."""
        short = {"bfloat16": "bf16", "float16": "f16"}.get(self.dtype, self.dtype)
        heads = f"h{self.heads}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads else "")
        length = f"L{self.len_q}" + (f"x{self.len_k}" if self.len_k != self.len_q else "")
        kind = "causal" if self.causal else "full"
        return f"{short} d{self.head_dim} {kind} b{self.batch} {heads} {length}"

    def flops(self, direction: str) -> float:
        """Operations counted for "forward" or "backward"."""
        keys: float = self.len_k
        if self.causal:
            # The mean number of keys a row sees, bottom-right aligned.
            keys = (max(0, self.len_k - self.len_q) + self.len_k) / 2
        forward = 4.0 * self.batch * self.heads * self.len_q * keys * self.head_dim
        return forward * (2.5 if direction == "backward" else 1.0)

    def bytes_moved(self) -> float:
        """The least that forward reads and writes: keys and values once per head of theirs, queries and results."""
        item = 2 if self.dtype in ("bfloat16", "float16") else 4
        rows = 2 * self.heads_kv * self.len_k + 2 * self.heads * self.len_q
        return float(
            self.batch * rows * self.head_dim * item + 4 * self.batch * self.heads * self.len_q
        )


def sweep(dtype: str = "bfloat16") -> list[Case]:
    """The papers' sweep: heads * head_dim = 2048, batch * length = 16384."""
    return [
        Case(16384 // length, 2048 // dim, 2048 // dim, length, length, dim, dtype, causal)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    ]


def quick(dtype: str = "bfloat16") -> list[Case]:
    """The sizes that acceptance is stated for."""
    return [
        Case(2, 2048 // dim, 2048 // dim, 8192, 8192, dim, dtype, causal)
        for dim in (64, 128)
        for causal in (False, True)
    ]


def grouped(dtype: str = "bfloat16") -> list[Case]:
    """Grouped-query attention as in 8- and 70-billion parameter models."""
    return [
        Case(1, 32, 8, 8192, 8192, 128, dtype, True),
        Case(1, 64, 8, 8192, 8192, 128, dtype, True),
        Case(1, 32, 8, 2048, 8192, 128, dtype, True),
    ]


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "quick": quick,
    "sweep": sweep,
    "grouped": grouped,
}
