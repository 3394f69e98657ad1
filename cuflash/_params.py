"""What a kernel receives: NumPy structs with the layout of kernels_cu/params.cuh (a test compares
every offset).

A struct starts with its pointers. Everything after them depends on the Problem and the Plan only,
so a prepared call packs it once and a warm call only puts new pointers in front.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

MAX_BATCH_AXES = 4

STRIDES = np.dtype([("batch", "i8", (MAX_BATCH_AXES,)), ("head", "i8"), ("row", "i8")], align=True)

SHAPE = np.dtype(
    [("batch_extent", "i4", (MAX_BATCH_AXES,))]
    + [(name, "i4") for name in ("batch", "heads", "heads_kv", "group")]
    + [(name, "i4") for name in ("len_q", "len_k", "head_dim", "head_dim_v")]
    + [("band_low", "i4"), ("band_high", "i4"), ("q_offset", "i4")]
    + [("scale", "f4"), ("softcap", "f4"), ("flags", "i4")],
    align=True,
)

SCHEDULE = np.dtype(
    [("tiles", "i4"), ("heads_per_section", "i4"), ("longest_last", "i4")], align=True
)

FLAG_Q_VECTOR = 1
FLAG_K_VECTOR = 2
FLAG_V_VECTOR = 4
FLAG_OUT_VECTOR = 8
FLAG_DOUT_VECTOR = 16
FLAG_DQ_VECTOR = 32
FLAG_DK_VECTOR = 64
FLAG_DV_VECTOR = 128
FLAG_SLOPES_16BIT = 256
VECTOR_FLAGS = {
    "q": FLAG_Q_VECTOR,
    "k": FLAG_K_VECTOR,
    "v": FLAG_V_VECTOR,
    "out": FLAG_OUT_VECTOR,
    "dout": FLAG_DOUT_VECTOR,
    "dq": FLAG_DQ_VECTOR,
    "dk": FLAG_DK_VECTOR,
    "dv": FLAG_DV_VECTOR,
}


def _struct(pointers: Sequence[str], strides: Sequence[str], *tail: str) -> np.dtype:
    """A params struct: pointers, then strides, then Shape and Schedule and any further ints."""
    fields: list[tuple] = [(name, "u8") for name in pointers]
    fields += [(f"{name}_strides", STRIDES) for name in strides]
    fields += [("shape", SHAPE), ("schedule", SCHEDULE)]
    fields += [(name, "i4") for name in tail]
    return np.dtype(fields, align=True)


FORWARD_POINTERS = ("q", "k", "v", "out", "lse", "alibi_slopes")
FORWARD = _struct(FORWARD_POINTERS, ("q", "k", "v", "out", "slope"))

BACKWARD_POINTERS = (
    *("q", "k", "v", "out", "dout", "lse", "dlse", "alibi_slopes"),
    *("dq", "dk", "dv", "dslopes"),
    *("lse_log2", "delta", "dq_accum", "slope_partial"),
)
BACKWARD = _struct(
    BACKWARD_POINTERS,
    ("q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv", "slope", "dslope"),
)

MERGE_MAX_PARTS = 32
MERGE = np.dtype(
    [
        ("outs", "u8", (MERGE_MAX_PARTS,)),
        ("lses", "u8", (MERGE_MAX_PARTS,)),
        ("out", "u8"),
        ("lse", "u8"),
        ("rows", "i8"),
        ("parts", "i4"),
        ("head_dim_v", "i4"),
        ("out_strides", STRIDES),
        ("batch_extent", "i4", (MAX_BATCH_AXES,)),
        ("heads", "i4"),
        ("len_q", "i4"),
        ("outs_are_float", "i4"),
        ("out_is_float", "i4"),
    ],
    align=True,
)

STRUCTS = {"ForwardParams": FORWARD, "BackwardParams": BACKWARD, "MergeParams": MERGE}


class Packer:
    """The bytes of one params struct, with the pointers left open.

    Parameters
    ----------
    values : numpy structured scalar
        The struct with everything but the pointers filled in.
    pointers : int
        How many 8-byte pointers lead the struct.
    """

    __slots__ = ("_pointers", "_tail")

    def __init__(self, values: np.ndarray, pointers: int) -> None:
        self._pointers = struct.Struct(f"<{pointers}Q")
        self._tail = values.tobytes()[8 * pointers :]

    def __call__(self, *pointers: int) -> bytes:
        return self._pointers.pack(*pointers) + self._tail
