"""What a machine without a GPU can measure or count of `--suite history`.

Memory and times are those of the NumPy backend on smaller sizes, and say so. What a GPU would need is
counted from the plans: the arrays that a call allocates.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

import cuflash
from bench.baselines import Inputs
from bench.cases import Case
from bench.history_cases import (
    DENSITIES,
    DROPOUT,
    DROPOUT_P,
    GPT2,
    LENGTHS,
    MEMORY,
    SWEEP,
    attend,
    patterns,
)
from bench.host import NullDevice
from cuflash import _plain
from cuflash._device import use_device

ARCH = "sm_80"  # whose plans are counted
LONGEST = 4096  # in NumPy
DENSE = Case(1, 1, 1, 4096, 4096, 64, "float32")


def measure(wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of the experiments by letter."""
    ways = {"a": dropout, "b": gpt2, "c": memory, "d": density, "e": speeds}
    return {name: ways[name]() for name in tqdm(wanted, leave=False, disable=None)}


def inputs(case: Case) -> Inputs:
    """NumPy arrays in float32."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.heads, case.len_q, case.head_dim)
    return Inputs(*(rng.standard_normal(shape, dtype=np.float32) for _ in range(4)))


def core_seconds(call: Callable[[], Any], repeats: int = 2) -> float:
    """Time of one core, which other work on the machine changes little; the best of a few."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def allocated(case: Case) -> int:
    """Bytes that forward + backward allocate on a GPU: results and the plans' workspace."""
    q = np.empty((case.batch, case.heads, case.len_q, case.head_dim), np.float16)  # never touched
    with use_device(NullDevice(ARCH)):
        plans = [
            cuflash.explain(q, q, q, backward=back, causal=case.causal).plan
            for back in (False, True)
        ]
    scratch = sum(
        math.prod(part.shape) * np.dtype(part.dtype).itemsize
        for plan in plans
        for part in plan.scratch
    )
    lse = 4 * q.size // case.head_dim
    return int(4 * q.nbytes + lse + scratch)  # out, dq, dk, dv


def matrices(case: Case) -> int:
    """Bytes of the plain formula's scores (float32) and weights (float16) in forward."""
    return case.batch * case.heads * case.len_q * case.len_k * 6


def counted(case: Case) -> dict[str, str]:
    """What a GPU would have to do and hold."""
    return {
        "TFLOP forward": f"{case.flops('forward') / 1e12:.3f}",
        "MB allocated by cuflash, forward + backward": f"{allocated(case) / 1e6:.0f}",
        "MB of scores and weights, plain forward": f"{matrices(case) / 1e6:.0f}",
    }


def dropout() -> dict[str, Any]:
    """(a): counts, and both ways in NumPy on one batch element and one head."""
    small = replace(DROPOUT, batch=1, heads=1, heads_kv=1)
    x = inputs(small)
    keep = cuflash.dropout_mask(1, DROPOUT_P, (1, 1, small.len_q, small.len_k))

    def standard() -> Any:
        _, _, weights = _plain.forward(np, x.q, x.k, x.v, False)
        return (weights * keep / np.float32(1 - DROPOUT_P)) @ x.v

    def flash() -> Any:
        return cuflash.attention(x.q, x.k, x.v, dropout_p=DROPOUT_P, seed=1)

    error = float(abs(standard() - flash()).max())
    notes = {f"{name} (counted)": value for name, value in counted(DROPOUT).items()}
    notes["ms of a core, one head, float32, NumPy, plain with a ready mask"] = (
        f"{1e3 * core_seconds(standard):.0f}"
    )
    notes["ms of a core, one head, float32, cuflash, mask drawn on the way"] = (
        f"{1e3 * core_seconds(flash):.0f}"
    )
    notes["largest difference of the two results"] = f"{error:.1e}"
    return {"notes": notes}


def gpt2() -> dict[str, Any]:
    """(b): counts."""
    notes = {f"{name} (counted)": value for name, value in counted(GPT2).items()}
    moved = GPT2.bytes_moved() * (1 + 2.5)  # backward: q, k, v, out, dout in, dq, dk, dv out
    notes["GB that must be read and written at least (counted)"] = f"{moved / 1e9:.1f}"
    return {"notes": notes}


def memory() -> dict[str, Any]:
    """(c): megabytes in NumPy, of one head in float32."""

    def megabytes(step: Callable[[], Any]) -> float:
        tracemalloc.start()  # NumPy reports its arrays to it
        try:
            step()
            return tracemalloc.get_traced_memory()[1] / 1e6
        finally:
            tracemalloc.stop()

    rows: dict[int, dict[str, float]] = {}
    for length in (n for n in LENGTHS if n <= LONGEST):
        x = inputs(replace(MEMORY, batch=1, heads=1, heads_kv=1, len_q=length, len_k=length))

        def standard(x: Inputs = x) -> None:
            out, _, weights = _plain.forward(np, x.q, x.k, x.v, False)
            _plain.backward(np, x.dout, x.q, x.k, x.v, out, weights)

        def flash(x: Inputs = x) -> None:
            results = cuflash.attention_vjp(
                x.q, x.k, x.v
            )  # out lives until the end, as in training
            results[1](x.dout)

        flash()  # what is kept from call to call is not this call's
        rows[length] = {"standard": megabytes(standard), "flash": megabytes(flash)}
    on_gpu = {n: allocated(replace(MEMORY, len_q=n, len_k=n)) / 1e6 for n in LENGTHS}
    return {
        "what": "one head of d 64 in NumPy, float32: peak beside the inputs",
        "rows": rows,
        "counted_mb": on_gpu,
        "counted_what": f"cuflash on {ARCH}, batch 16, 8 heads, fp16: results and workspace",
    }


def density() -> dict[str, Any]:
    """(d): tiles of the kernels, and times in NumPy."""
    x = inputs(DENSE)
    dense = {name: core_seconds(call) for name, call in attend(DENSE, x).items()}
    rows = []
    for share in DENSITIES:
        for name, mask in patterns(DENSE.len_q, share).items():
            row: dict[str, Any] = {"pattern": name, "density": mask.density}
            row["visible"] = float(mask.visible_tiles(128, 64).mean())
            for direction, call in attend(DENSE, x, mask=mask).items():
                row[direction] = core_seconds(call) / dense[direction]
            rows.append(row)
    what = f"one head, L {DENSE.len_q}, d {DENSE.head_dim}, float32, NumPy, time of one core; blocks of 128"
    return {"what": f"{what}; tiles of 128 x 64", "rows": rows}


def speeds() -> dict[str, Any]:
    """(e): nothing that a CPU can say; the table lists what would run."""
    return {"rows": {}, "tflop": {case.name: 3.5 * case.flops("forward") / 1e12 for case in SWEEP}}
