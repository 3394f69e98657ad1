"""What a kernel receives: NumPy structs with the layout of kernels_cu/params.cuh (a test compares
every offset).

A struct starts with its pointers. Everything after them depends on the Problem and the Plan only,
so a prepared call packs it once and a warm call only puts new pointers in front.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_BATCH_AXES = 4

STRIDES = np.dtype([("batch", "i8", (MAX_BATCH_AXES,)), ("head", "i8"), ("row", "i8")], align=True)

SHAPE = np.dtype(
    [("batch_extent", "i4", (MAX_BATCH_AXES,))]
    + [(name, "i4") for name in ("batch", "heads", "heads_kv", "group")]
    + [(name, "i4") for name in ("len_q", "len_k", "head_dim", "head_dim_v")]
    + [("band_low", "i4"), ("band_high", "i4"), ("q_offset", "i4")]
    + [("scale", "f4"), ("softcap", "f4"), ("flags", "i4")]
    + [("scale_f64", "f8"), ("softcap_f64", "f8")],
    align=True,
)

SCHEDULE = np.dtype(
    [(name, "i4") for name in ("tiles", "heads_per_section", "longest_last", "splits")], align=True
)

FLAG_Q_VECTOR = 1
FLAG_K_VECTOR = 2
FLAG_V_VECTOR = 4
FLAG_OUT_VECTOR = 8
FLAG_DOUT_VECTOR = 16
FLAG_DQ_VECTOR = 32
FLAG_DK_VECTOR = 64
FLAG_DV_VECTOR = 128
FLAG_SLOPES_ELEMENT = 256
FLAG_BIAS_ELEMENT = 512
FLAG_SINKS_ELEMENT = 1024
FLAG_DBIAS_ELEMENT = 2048
FLAG_ALIGN_END = 4096
REDUCED_HEAD = 16
REDUCED_ROW = 32
REDUCED_KEY = 64
MAX_SCORE_ARRAYS = 8
MAX_SCORE_SCALARS = 8
MAX_SCORE_AXES = 4
MAX_WORK_TABLES = 5
# 8-byte words of one exact sum, by the bytes of its terms (exact_sum.cuh).
SUM_WORDS = {4: 11, 8: 74}
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


# ---- options that only some kernels read

PAIR_STRIDES = np.dtype(
    [("batch", "i8", (MAX_BATCH_AXES,)), ("head", "i8"), ("row", "i8"), ("key", "i8")], align=True
)
MASK = np.dtype(
    [("strides", PAIR_STRIDES), ("map_batch", "i8", (MAX_BATCH_AXES,))]
    + [(name, "i8") for name in ("map_head", "map_offset", "map_plane")]
    + [(name, "i4") for name in ("map_words", "block_q", "block_k", "bit_words")],
    align=True,
)
DROPOUT = np.dtype([("threshold", "u4"), ("factor", "f4"), ("factor_f64", "f8")], align=True)
SCORE_MOD = np.dtype(
    [("extents", "i4", (MAX_SCORE_ARRAYS, MAX_SCORE_AXES)), ("element_arrays", "i4")], align=True
)
PACKED = np.dtype([("total_q", "i8"), ("work_offset", "i8")], align=True)
OPTION_POINTERS = (
    *("mask", "mask_bits", "mask_map", "bias", "sinks", "seed_at", "seed", "sequences", "work"),
    *(f"score_arrays[{n}]" for n in range(MAX_SCORE_ARRAYS)),
    *(f"score_scalars[{n}]" for n in range(MAX_SCORE_SCALARS)),
)
OPTION_VALUES = np.dtype(
    [
        ("mask", MASK),
        ("bias", PAIR_STRIDES),
        ("dropout", DROPOUT),
        ("score", SCORE_MOD),
        ("packed", PACKED),
    ],
    align=True,
)
BIAS_GRADIENT = np.dtype(
    [("strides", PAIR_STRIDES), ("split_stride", "i8")]
    + [(name, "i4") for name in ("reduced", "splits", "tiles_q", "tiles_k")],
    align=True,
)


def _pointer_fields(names: Sequence[str]) -> list[tuple]:
    """8-byte members; "name[0]", "name[1]", ... are one array."""
    counts = Counter(name.partition("[")[0] for name in names)
    return [(n, "u8") if count == 1 else (n, "u8", (count,)) for n, count in counts.items()]


def _struct(
    pointers: Sequence[str],
    strides: Sequence[str],
    last_pointers: Sequence[str] = (),
    last: Sequence[tuple] = (),
) -> np.dtype:
    """A params struct: pointers, then strides, Shape, Schedule and the values of the options."""
    fields = _pointer_fields(pointers)
    fields.append(("options", np.dtype(_pointer_fields(OPTION_POINTERS), align=True)))
    fields += _pointer_fields(last_pointers)
    fields += [(f"{name}_strides", STRIDES) for name in strides]
    fields += [("shape", SHAPE), ("schedule", SCHEDULE), ("values", OPTION_VALUES), *last]
    return np.dtype(fields, align=True)


_FORWARD_POINTERS = ("q", "k", "v", "out", "lse", "alibi_slopes")
FORWARD_POINTERS = (*_FORWARD_POINTERS, *OPTION_POINTERS)
FORWARD = _struct(_FORWARD_POINTERS, ("q", "k", "v", "out", "slope"))

# Tensor maps lie behind everything else; see kernels_cu/params.cuh.
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


def with_maps(struct: np.dtype, names: Sequence[str]) -> np.dtype:
    """A params struct followed by tensor maps."""
    first = -(-struct.itemsize // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    assert struct.fields is not None and struct.names is not None
    fields = [(name, *struct.fields[name][:2]) for name in struct.names]
    map_type = np.dtype((np.void, _MAP_BYTES))
    fields += [(f"{name}_map", map_type, first + n * _MAP_BYTES) for n, name in enumerate(names)]
    found, formats, offsets = zip(*fields, strict=True)
    size = first + len(names) * _MAP_BYTES
    return np.dtype({"names": found, "formats": formats, "offsets": offsets, "itemsize": size})


FORWARD_SM90 = with_maps(FORWARD, ("q", "k", "v", "out"))

_BACKWARD_POINTERS = (
    *("q", "k", "v", "out", "dout", "lse", "dlse", "alibi_slopes"),
    *("dq", "dk", "dv", "dslopes"),
    *("lse_log2", "delta", "dq_accum", "slope_partial", "dq_turns"),
)
_GRADIENT_POINTERS = (
    *("dbias", "dsinks_partial"),
    *(f"score_grads[{n}]" for n in range(MAX_SCORE_ARRAYS)),
)
BACKWARD_POINTERS = (*_BACKWARD_POINTERS, *OPTION_POINTERS, *_GRADIENT_POINTERS)
BACKWARD = _struct(
    _BACKWARD_POINTERS,
    ("q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv", "slope", "dslope"),
    _GRADIENT_POINTERS,
    [("dbias_values", BIAS_GRADIENT)],
)

BACKWARD_SM90 = with_maps(BACKWARD, ("q", "k", "v", "dout"))

SCORE_SUMS_POINTERS = (
    *(f"words[{n}]" for n in range(MAX_SCORE_ARRAYS)),
    *(f"grads[{n}]" for n in range(MAX_SCORE_ARRAYS)),
)
SCORE_SUMS = np.dtype(
    _pointer_fields(SCORE_SUMS_POINTERS)
    + [("elements", "i8", (MAX_SCORE_ARRAYS,)), ("element_grads", "i4")],
    align=True,
)

MASK_TILES_POINTERS = ("mask", "mask_bits", "map")
MASK_TILES = np.dtype(
    _pointer_fields(MASK_TILES_POINTERS)
    + [("values", MASK), ("batch_extent", "i4", (MAX_BATCH_AXES,))]
    + [(n, "i4") for n in ("heads", "len_q", "len_k", "tile_q", "tile_k", "by_keys", "tile_rows")]
    + [("group", "i4")],
    align=True,
)

WORK_TABLE = np.dtype(
    [
        ("offset", "i8"),
        ("capacity", "i8"),
        ("tile", "i4"),
        ("by_keys", "i4"),
        ("longest_last", "i4"),
    ],
    align=True,
)
PACKED_PLAN_POINTERS = ("cu_q", "cu_k", "sequences", "work")
PACKED_PLAN = np.dtype(
    _pointer_fields(PACKED_PLAN_POINTERS)
    + [(name, "i8") for name in ("stride_q", "stride_k", "total_q", "total_k")]
    + [(name, "i4") for name in ("wide_q", "wide_k", "batch", "max_q", "max_k", "tables")]
    + [("table", WORK_TABLE, (MAX_WORK_TABLES,))],
    align=True,
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

STRUCTS = {
    "ForwardParams": FORWARD,
    "ForwardSm90Params": FORWARD_SM90,
    "BackwardParams": BACKWARD,
    "BackwardSm90Params": BACKWARD_SM90,
    "MergeParams": MERGE,
    "MaskTilesParams": MASK_TILES,
    "ScoreSumsParams": SCORE_SUMS,
    "PackedPlanParams": PACKED_PLAN,
}


class Packer:
    """The bytes of one params struct, with the pointers left open.

    Parameters
    ----------
    values : numpy structured scalar
        The struct with everything but the pointers filled in.
    pointers : int
        How many of its leading 8-byte pointers each call gives; the others stay as they are.
    maps : int
        How many tensor maps at its end each call gives.
    """

    __slots__ = ("head", "tail")

    def __init__(self, values: np.ndarray, pointers: int, maps: int = 0) -> None:
        self.head = struct.Struct(f"<{pointers}Q").pack
        self.tail = values.tobytes()[8 * pointers : values.itemsize - maps * _MAP_BYTES]

    def __call__(self, *pointers: int) -> bytes:
        return self.head(*pointers) + self.tail
