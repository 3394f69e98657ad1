"""Attention calls as data: one dataclass for a case, named lists for suites, one way to check a case.

    for case in cases.CORE: cases.check(machine, case)

runs the public API on a `Machine` (NumPy, the emulator, a GPU) and compares everything that comes back with the float64
oracle by rule T. The exact results of a case are computed once per process, whatever runs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from tests.case import DTYPES, Answer, Case, Data, answer, arranged, check, standard
from tests.covering import covering, covering_options, covering_variants, pairwise
from tests.option_data import BIASES, MASKS
from tests.scores import LIBRARY

__all__ = [
    "BATCHES",
    "CORE",
    "DTYPES",
    "EDGE",
    "GQA",
    "HEAD_DIMS",
    "MAGNITUDES",
    "OFFSETS",
    "OPTIONS",
    "SCORES",
    "SUITES",
    "WINDOWS",
    "ZERO",
    "Answer",
    "Case",
    "Data",
    "answer",
    "arranged",
    "check",
    "covering",
    "covering_options",
    "covering_variants",
    "in_dtype",
    "pairwise",
    "standard",
    "window_values",
    "windows",
]

# ---- suites. float16 unless said; `in_dtype` puts a suite into another dtype.


def in_dtype(suite: Sequence[Case], dtype: str) -> list[Case]:
    """The same cases in another dtype."""
    return [replace(case, dtype=dtype) for case in suite]


# One of everything, small enough for any machine.
CORE = [
    Case(dtype=dtype, len_q=n, len_k=m, causal=causal)
    for dtype in DTYPES
    for n, m in ((64, 64), (113, 203))
    for causal in (False, True)
]

# Lengths around nothing, one, and tile edges, with queries both fewer and more than keys.
LENGTHS = [
    *((1, 1), (1, 2), (2, 1), (5, 2), (2, 5), (17, 17), (63, 65), (65, 63), (64, 128), (128, 64)),
    *((1, 257), (257, 1), (113, 127), (129, 129), (127, 255), (192, 33)),
]
EDGE = [
    Case(len_q=n, len_k=m, heads=1, head_dim=32, causal=causal)
    for n, m in LENGTHS
    for causal in (False, True)
]

# Zeros: right shapes, no fault. Exact by definition, so one dtype tells.
ZERO = [
    Case(batch=(0,)),
    Case(batch=(2, 0, 3)),
    Case(len_q=0, len_k=5),
    Case(len_q=5, len_k=0),
    Case(len_q=0, len_k=0),
    Case(len_q=5, len_k=0, causal=True),
    Case(batch=(), len_q=3, len_k=0, alibi="H"),
    Case(heads=0, heads_kv=0, len_q=3, len_k=4),
]

# Every kind of head dim: tiny, odd, off the fragment, off the swizzle, the largest; D != Dv both ways.
DIMS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 32, 33, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256)
DIM_PAIRS = ((64, 128), (128, 64), (192, 128), (64, 1), (40, 72), (8, 256), (1, 256), (256, 8))
HEAD_DIMS = [Case(len_q=65, len_k=77, head_dim=d) for d in DIMS] + [
    Case(len_q=65, len_k=77, heads=4, heads_kv=2, head_dim=d, head_dim_v=dv) for d, dv in DIM_PAIRS
]

# Groups that are no power of two, one kv head, many heads on one query row.
HEADS = ((8, 1), (8, 2), (6, 1), (6, 2), (7, 1), (9, 3), (12, 2), (28, 4), (5, 5), (17, 1))
GQA = [
    Case(heads=h, heads_kv=kv, len_q=n, len_k=m, head_dim=16, causal=causal)
    for (h, kv), (n, m), causal in zip(
        itertools.chain(HEADS, HEADS),
        itertools.cycle(((37, 101), (1, 65), (127, 62))),
        itertools.chain([True] * len(HEADS), [False] * len(HEADS)),
        strict=False,
    )
]


def window_values(length: int, tile: int = 64) -> tuple[int, ...]:
    """Widths where windows go wrong: nothing, one, around a tile, around the whole sequence, huge."""
    return (0, 1, tile - 1, tile, tile + 1, length - 1, length, length + 7, 10**6)


def windows(length: int = 200, tile: int = 64) -> list[Case]:
    """Every window value on either side alone, on both sides, and with causal; lengths differ by turns."""
    base = Case(heads=1, len_q=length, len_k=length, head_dim=32)
    result = []
    for n, w in enumerate(window_values(length, tile)):
        other = (length, length - 63, length + 65)[n % 3]
        for window, causal in (
            ((w, None), False),
            ((None, w), False),
            ((w, w), False),
            ((w, 0), True),
        ):
            result.append(replace(base, window=window, causal=causal, len_k=other))
    return result


WINDOWS = windows()

# The diagonal pushed out of the matrix on either side, beyond 32 bits too.
OFFSETS = [
    Case(heads=1, len_q=70, len_k=200, head_dim=32, causal=True, q_offset=offset, window=window)
    for offset in (
        0,
        1,
        -1,
        63,
        64,
        65,
        130,
        -69,
        -70,
        199,
        200,
        10**6,
        -(10**6),
        2**31 + 5,
        -(2**40),
    )
    for window in (None, (17, 5))
]

# Scores: scale of either sign and none, softcap, ALiBi, and all of them.
SCORES = [
    Case(len_q=97, len_k=130, head_dim=40, heads=4, heads_kv=2, causal=True, **options)
    for options in (
        {"scale": 0.0},
        {"scale": -0.2},
        {"scale": 1.0},
        {"softcap": 1.0},
        {"softcap": 30.0, "magnitude": 5.0},
        {"alibi": "H"},
        {"alibi": "BH", "batch": (2,)},
        {"alibi": "H", "softcap": 5.0, "scale": -0.3, "window": (40, 3), "q_offset": 7},
        {"alibi": "BH", "batch": (2, 1), "scale": 0.0, "softcap": 2.0},
    )
]

# Soft to one-hot softmax, and all-positive data whose scores have a large common part.
MAGNITUDES = [
    Case(len_q=129, len_k=190, head_dim=64, magnitude=m, shift=shift, causal=causal)
    for m in (1.0, 3.0, 5.0, 20.0)
    for shift, causal in ((0.25, False), (1.5, True))
]

# Leading axes and shared keys.
BATCHES = [
    Case(
        batch=batch,
        broadcast_kv=shared,
        len_q=33,
        len_k=47,
        heads=4,
        heads_kv=2,
        head_dim=24,
        layout=layout,
    )
    for batch, shared, layout in (
        ((), False, "HLD"),
        ((), False, "LHD"),
        ((3,), False, "LHD"),
        ((3,), True, "HLD"),
        ((2, 3), False, "HLD"),
        ((2, 3), True, "LHD"),
        ((2, 1, 2), True, "HLD"),
    )
]

# Every mask, bias, score function, sinks and dropout alone; lengths off the tiles, groups of three heads.
_OPTION = Case(batch=(2,), heads=3, heads_kv=1, len_q=70, len_k=137, head_dim=64)
OPTIONS = [
    *(replace(_OPTION, mask=kind, block=(32, 48)) for kind in MASKS),
    *(replace(_OPTION, bias=code) for code in BIASES),
    replace(_OPTION, bias="1H1k", bias_dtype="float32"),
    replace(_OPTION, bias="qk", bias_dtype="float32", bias_inf=True),
    *(replace(_OPTION, score_mod=name) for name in LIBRARY),
    replace(_OPTION, sinks="own"),
    replace(_OPTION, sinks="float32", causal=True, q_offset=-20),
    *(replace(_OPTION, dropout=p) for p in (0.1, 0.5, 0.9)),
]

SUITES: dict[str, list[Case]] = {
    "core": CORE,
    "edge": EDGE,
    "zero": ZERO,
    "head_dims": HEAD_DIMS,
    "gqa": GQA,
    "windows": WINDOWS,
    "offsets": OFFSETS,
    "scores": SCORES,
    "magnitudes": MAGNITUDES,
    "batches": BATCHES,
    "options": OPTIONS,
}
