"""Covering lists: every pair of values of any two factors meets in some case, with few cases."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tests.case import DTYPES, Case
from tests.option_data import BIASES, MASKS
from tests.scores import LIBRARY


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
    return [_case(row, seed) for seed, row in enumerate(pairwise({**FACTORS, **changed}))]


def _case(row: Mapping[str, Any], seed: int) -> Case:
    row = dict(row)
    for names in (("len_q", "len_k"), ("head_dim", "head_dim_v"), ("heads", "heads_kv")):
        values = row.pop({"len_q": "lengths", "head_dim": "dims"}.get(names[0], names[0]))
        row |= zip(names, values, strict=True)
    return Case(seed=seed, **row)


# The second table: masks, biases and the rest beside all that they must live with.
OPTION_FACTORS: dict[str, Sequence[Any]] = {
    "mask": [None, *MASKS],
    "bias": [None, *BIASES],
    "score_mod": [None, *LIBRARY],
    "lengths": [(1, 1), (1, 130), (64, 64), (65, 33), (33, 129), (17, 5), (100, 191)],
    "dims": [(64, 64), (40, 72), (5, 5), (128, 128), (32, 33)],
    "window": [None, (0, 0), (17, None), (64, 3)],
    "dtype": DTYPES,
    "heads": [(2, 2), (6, 2), (7, 1)],
    "batch": [(2,), (), (2, 2)],
    "sinks": [None, "own", "float32"],
    "dropout": [0.0, 0.17, 0.6],
    "block": [(64, 64), (16, 48), (128, 32)],
    "q_offset": [None, 0, -9],
    "alibi": [None, "H", "BH"],
    "bias_dtype": ["own", "float32"],
    "bias_inf": [False, True],
    "causal": [False, True],
    "scale": [None, -0.3],
    "softcap": [None, 3.0],
    "magnitude": [1.0, 3.0],
    "layout": ["HLD", "LHD"],
    "broadcast_kv": [False, True],
}


def covering_options(**changed: Sequence[Any]) -> list[Case]:
    """Cases that cover all pairs of `OPTION_FACTORS`, some of them replaced."""
    return [_case(row, seed) for seed, row in enumerate(pairwise({**OPTION_FACTORS, **changed}))]


# What a kernel is compiled for: few variants whose pairs all meet, each run with many numbers.
VARIANT_FACTORS: dict[str, Sequence[Any]] = {
    "mask": [None, "tiles", "blocks_partial"],
    "bias": [None, "BHqk"],
    "score_mod": [None, "table"],
    "sinks": [None, "own"],
    "dropout": [0.0, 0.17],
}
SAME_KERNEL = {
    "tiles": ["tiles", "dense", "rows", "keys", "heads"],
    "blocks_partial": ["blocks_partial", "blocks", "blocks_shared"],
    "BHqk": BIASES,
    0.17: [0.17, 0.6],
    "own": ["own", "float32"],
}


def covering_variants(**changed: Sequence[Any]) -> list[Case]:
    """As `covering_options` with few combinations of what kernels are compiled for.

    All pairs of `VARIANT_FACTORS` meet, and all pairs of the other factors; values that run on one
    kernel take turns.
    """
    rest = {n: x for n, x in OPTION_FACTORS.items() if n not in VARIANT_FACTORS} | changed
    variants = pairwise(VARIANT_FACTORS)
    rows = pairwise({name: values for name, values in rest.items() if len(values) > 1})
    fixed = {name: values[0] for name, values in rest.items() if len(values) == 1}
    result = []
    for seed in range(max(len(rows), 2 * len(variants))):
        compiled, turn = variants[seed % len(variants)], seed // len(variants)
        chosen = {}
        for name, value in compiled.items():
            values = SAME_KERNEL.get(value, [value])
            chosen[name] = values[(turn + seed) % len(values)]
        result.append(_case({**fixed, **rows[seed % len(rows)], **chosen}, seed))
    return result
