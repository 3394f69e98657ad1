"""Attention calls as data: one dataclass for a case, named lists for suites, one way to check a case.

    for case in cases.CORE: cases.check(machine, case)

runs the public API on a `Machine` (NumPy, the emulator, a GPU) and compares everything that comes back with the float64
oracle by rule T. The exact results of a case are computed once per process, whatever runs it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import ml_dtypes
import numpy as np

from tests import oracle

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Data:
    """The arrays of a case, in the order (*B, H, L, D)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    alibi_slopes: np.ndarray | None


@dataclass(frozen=True)
class Case:
    """One call, arrays included: equal cases have equal arrays.

    Parameters
    ----------
    heads_kv, head_dim_v
        None: as `heads`, `head_dim`.
    broadcast_kv
        k and v have batch axes of extent 1.
    alibi
        None, "H" (slopes of shape (heads,)) or "BH" (one per batch and head).
    magnitude
        Factor on q and k: 1 gives a soft softmax, 20 nearly one-hot rows and logits in the hundreds.
    shift
        Mean of all arrays in units of their spread: zero mean would make relative errors mean little.
    """

    dtype: str = "float16"
    batch: tuple[int, ...] = (1,)
    heads: int = 2
    heads_kv: int | None = None
    len_q: int = 128
    len_k: int = 128
    head_dim: int = 64
    head_dim_v: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None
    layout: str = "HLD"
    broadcast_kv: bool = False
    magnitude: float = 1.0
    shift: float = 0.25
    seed: int = 0

    def __str__(self) -> str:
        """Readable and complete: what differs from the defaults, after the extents."""
        kv, dim_v = self.heads_kv or self.heads, self.head_dim_v or self.head_dim
        parts = [
            self.dtype,
            "b" + "x".join(map(str, self.batch)),
            f"h{self.heads}" + (f"/{kv}" if kv != self.heads else ""),
            f"l{self.len_q}x{self.len_k}",
            f"d{self.head_dim}" + (f"/{dim_v}" if dim_v != self.head_dim else ""),
        ]
        shown = {"dtype", "batch", "heads", "heads_kv", "len_q", "len_k", "head_dim", "head_dim_v"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in shown and value != field.default:
                text = (
                    ""
                    if value is True
                    else "_".join(map(str, value))
                    if isinstance(value, tuple)
                    else str(value)
                )
                parts.append(field.name + text)
        return "-".join(parts)

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public functions that are no arrays; defaults are left out."""
        names = ("causal", "window", "q_offset", "scale", "softcap")
        defaults = {field.name: field.default for field in fields(self)}
        return {n: getattr(self, n) for n in names if getattr(self, n) != defaults[n]}

    def data(self) -> Data:
        """The arrays; the same ones every time."""
        rng = np.random.default_rng([self.seed, self.len_q, self.len_k, self.head_dim, self.heads])
        heads_kv = self.heads if self.heads_kv is None else self.heads_kv
        dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        batch_kv = (1,) * len(self.batch) if self.broadcast_kv else self.batch
        wide = np.float64 if self.dtype == "float64" else np.float32

        def normal(*shape: int, factor: float = 1.0) -> np.ndarray:
            # float32 throughout, so that a case of many dtypes has the same numbers but for rounding.
            x = rng.standard_normal(shape, dtype=np.float32) + np.float32(self.shift)
            return (x * np.float32(factor)).astype(self.numpy_dtype)

        q = normal(*self.batch, self.heads, self.len_q, self.head_dim, factor=self.magnitude)
        k = normal(*batch_kv, heads_kv, self.len_k, self.head_dim, factor=self.magnitude)
        v = normal(*batch_kv, heads_kv, self.len_k, dim_v)
        dout = normal(*self.batch, self.heads, self.len_q, dim_v)
        dlse = rng.standard_normal((*self.batch, self.heads, self.len_q)).astype(wide)
        slopes = None
        if self.alibi is not None:
            shape = (self.heads,) if self.alibi == "H" else (*self.batch, self.heads)
            slopes = (0.02 + 0.3 * rng.random(shape)).astype(np.float32)
        return Data(q, k, v, dout, dlse, slopes)


@dataclass(frozen=True)
class Answer:
    """What a case should give, and what the plain formula in its dtype gives."""

    data: Data
    exact: oracle.Exact
    honest: dict[str, np.ndarray]


@functools.lru_cache(maxsize=32)
def answer(case: Case, dlse: bool = True) -> Answer:
    """The oracle's word on a case. Layout does not matter to it."""
    if case.layout != "HLD":
        return answer(replace(case, layout="HLD"), dlse)
    data = case.data()
    options = case.options()
    if data.alibi_slopes is not None:
        options["alibi_slopes"] = data.alibi_slopes
    arrays = data.q, data.k, data.v, data.dout
    given = data.dlse if dlse else None
    exact = oracle.exact(*arrays, dlse=given, **options)
    return Answer(data, exact, oracle.low_precision(*arrays, dlse=given, **options))


def arranged(x: np.ndarray, layout: str) -> np.ndarray:
    """(*B, H, L, n) as a contiguous array in `layout`."""
    return np.ascontiguousarray(np.swapaxes(x, -2, -3)) if layout == "LHD" else x


def standard(x: Any, layout: str) -> Any:
    """An array in `layout` as a view (*B, H, L, n)."""
    return x if x is None or layout == "HLD" else np.swapaxes(x, -2, -3)


def check(
    machine: Any,
    case: Case,
    *,
    gradients: bool = True,
    dlse: bool = True,
    deterministic: bool = False,
) -> None:
    """Run a case through the public API on a `tests.machines.Machine` and compare all it returns by rule T."""
    want = answer(case, dlse)
    data, options = want.data, case.options()
    if case.layout != "HLD":
        options["layout"] = case.layout
    if data.alibi_slopes is not None:
        options["alibi_slopes"] = data.alibi_slopes
    q, k, v, dout = (arranged(x, case.layout) for x in (data.q, data.k, data.v, data.dout))
    out, lse = machine.attention(q, k, v, **options, return_lse=True)
    grads = {}
    if gradients:
        wrt = ("q", "k", "v") if data.alibi_slopes is None else ("q", "k", "v", "alibi_slopes")
        got = machine.backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dlse=data.dlse if dlse else None,
            wrt=wrt,
            deterministic=deterministic,
            **options,
        )
        grads = {n: getattr(got, n) for n in wrt}
        grads |= {n: standard(grads[n], case.layout) for n in ("q", "k", "v")}
    oracle.check_all(
        f"{getattr(machine, 'name', machine)}: {case!r}",
        want.exact,
        want.honest,
        case.numpy_dtype,
        out=standard(out, case.layout),
        lse=lse,
        grads=grads,
    )


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
}


# ---- a covering list: every pair of values of any two factors meets in some case


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows that take every pair of values of every two factors; the same list every time.

    Greedy: start each row from a pair not yet covered, then give every other factor the value that covers most of the
    remaining pairs with what the row has already, the least used one among equals.
    """
    names = list(factors)
    left = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    used = [[0] * len(factors[name]) for name in names]
    rows = []
    while left:
        a, x, b, y = min(left)
        row = {a: x, b: y}
        for c in range(len(names)):
            if c in row:
                continue
            gains = [
                sum(((d, row[d], c, z) if d < c else (c, z, d, row[d])) in left for d in row)
                for z in range(len(factors[names[c]]))
            ]
            row[c] = min(range(len(gains)), key=lambda z: (-gains[z], used[c][z], z))
        for (c, x), (d, y) in itertools.combinations(sorted(row.items()), 2):
            left.discard((c, x, d, y))
        for c, x in row.items():
            used[c][x] += 1
        rows.append({names[c]: factors[names[c]][x] for c, x in sorted(row.items())})
    return rows


FACTORS: dict[str, Sequence[Any]] = {
    "lengths": [(1, 1), (1, 130), (64, 64), (65, 33), (33, 129), (100, 100), (17, 5), (128, 191)],
    "dims": [(32, 32), (64, 64), (5, 5), (40, 72), (128, 128), (96, 33), (1, 8), (111, 111)],
    "heads": [(2, 2), (6, 2), (7, 1), (3, 3)],
    "window": [None, (0, 0), (17, None), (None, 20), (64, 3), (10**6, 10**6)],
    "dtype": DTYPES,
    "batch": [(2,), (), (2, 2)],
    "causal": [False, True],
    "q_offset": [None, 0, 40, -9],
    "scale": [None, -0.3, 0.0],
    "softcap": [None, 3.0],
    "alibi": [None, "H", "BH"],
    "magnitude": [1.0, 3.0, 5.0],
    "layout": ["HLD", "LHD"],
    "broadcast_kv": [False, True],
}


def covering(**changed: Sequence[Any]) -> list[Case]:
    """Cases that cover all pairs of `FACTORS`, some of them replaced (`dtype=("float16",)` for kernels)."""
    result = []
    for seed, row in enumerate(pairwise({**FACTORS, **changed})):
        (len_q, len_k), (dim, dim_v), (heads, heads_kv) = (
            row.pop(n) for n in ("lengths", "dims", "heads")
        )
        result.append(
            Case(
                len_q=len_q,
                len_k=len_k,
                head_dim=dim,
                head_dim_v=dim_v,
                heads=heads,
                heads_kv=heads_kv,
                seed=seed,
                **row,
            )
        )
    return result
