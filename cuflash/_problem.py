"""Is this call well formed, and what exactly is asked?

A Problem is one attention call without its arrays: extents, memory layout, options, all checked. It is frozen and hashable, so
planning is a function of it and can be cached.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operand:
    """The memory layout of one array, in the order (*B, H, L, D) whatever the caller's layout was.

    Parameters
    ----------
    shape : tuple of int
        Extents. Batch axes may be 1 where the Problem's are larger (broadcast).
    strides : tuple of int
        Byte strides, same order; 0 on broadcast axes.
    aligned : bool
        True when the last axis is contiguous and every row starts on a 16-byte boundary.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """One checked attention call.

    Parameters
    ----------
    direction : {"forward", "backward"}
    dtype : str
        "float16", "bfloat16", "float32" or "float64".
    batch : tuple of int
        Extents of the leading axes.
    heads, heads_kv, len_q, len_k, head_dim, head_dim_v : int
    scale : float
    q_offset : int
        Position of query row 0 on the key axis.
    left, right : int or None
        Row at position d sees keys d - left .. d + right; causal is already in `right`.
    softcap : float or None
    alibi : bool
    deterministic : bool
    wrt : tuple of str
        Gradients wanted, in canonical order; empty in forward.
    operands : tuple of (name, Operand)
        Layout of every array of the call.
    """

    direction: str
    dtype: str
    batch: tuple[int, ...]
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    q_offset: int
    left: int | None
    right: int | None
    softcap: float | None = None
    alibi: bool = False
    deterministic: bool = False
    wrt: tuple[str, ...] = ()
    operands: tuple[tuple[str, Operand], ...] = ()
