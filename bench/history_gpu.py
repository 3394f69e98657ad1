"""What `--suite history` measures on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

import cuflash
from bench import baselines, timing
from bench.history_cases import (
    DENSITIES,
    DROPOUT,
    DROPOUT_P,
    GPT2,
    LENGTHS,
    MEMORY,
    SPARSE,
    SWEEP,
    TRIALS,
    attend,
    patterns,
)
from cuflash import _plain


def measure(cupy: Any, rounds: int, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of the experiments by letter."""
    timer = timing.GpuTimer(cupy)
    ways: dict[str, Callable[[Any, Any, int], dict[str, Any]]] = {
        **{"a": dropout, "b": gpt2, "c": memory, "d": density, "e": speeds}
    }
    found = {}
    for name in tqdm(wanted, unit="experiment", leave=False, disable=None):
        found[name] = ways[name](cupy, timer, rounds)
        cupy.get_default_memory_pool().free_all_blocks()
    return found


def dropout(cupy: Any, timer: Any, rounds: int) -> dict[str, Any]:
    """(a): seconds of ten trials, of matmul-softmax-dropout-matmul and of cuflash."""
    x = baselines.make_inputs(DROPOUT, cupy)
    rng = cupy.random.default_rng(0)

    def standard() -> Any:
        _, _, weights = _plain.forward(cupy, x.q, x.k, x.v, False)
        weights *= rng.random(weights.shape, dtype=cupy.float32) >= DROPOUT_P
        weights /= 1 - DROPOUT_P
        return weights @ x.v

    def flash() -> Any:
        return cuflash.attention(x.q, x.k, x.v, dropout_p=DROPOUT_P, seed=1)

    times = timer.interleaved({"standard": standard, "flash": flash}, rounds)
    return {name: TRIALS * time.median for name, time in times.items()}


def gpt2(cupy: Any, timer: Any, rounds: int) -> dict[str, Any]:
    """(b): milliseconds of forward + backward."""
    x = baselines.make_inputs(GPT2, cupy)

    def standard() -> Any:
        out, _, weights = _plain.forward(cupy, x.q, x.k, x.v, False)
        return _plain.backward(cupy, x.dout, x.q, x.k, x.v, out, weights)

    def flash() -> Any:
        return cuflash.attention_vjp(x.q, x.k, x.v)[1](x.dout)

    times = timer.interleaved({"standard": standard, "flash": flash}, rounds)
    return {name: 1e3 * time.median for name, time in times.items()}


def memory(cupy: Any, timer: Any, rounds: int) -> dict[str, Any]:
    """(c): megabytes that forward + backward takes from the pool, inputs left out."""
    pool = cupy.get_default_memory_pool()

    def megabytes(step: Callable[[], Any]) -> float | None:
        pool.free_all_blocks()
        before = pool.total_bytes()
        try:
            step()
        except cupy.cuda.memory.OutOfMemoryError:
            return None
        return float(pool.total_bytes() - before) / 1e6

    rows: dict[int, dict[str, float | None]] = {}
    for length in LENGTHS:
        x = baselines.make_inputs(replace(MEMORY, len_q=length, len_k=length), cupy)

        def standard(x: Any = x) -> None:
            out, _, weights = _plain.forward(cupy, x.q, x.k, x.v, False)
            _plain.backward(cupy, x.dout, x.q, x.k, x.v, out, weights)

        def flash(x: Any = x) -> None:
            results = cuflash.attention_vjp(
                x.q, x.k, x.v
            )  # out lives until the end, as in training
            results[1](x.dout)

        rows[length] = {"standard": megabytes(standard), "flash": megabytes(flash)}
        del x, standard, flash
    shape = f"batch {MEMORY.batch}, {MEMORY.heads} heads, d {MEMORY.head_dim}, fp16"
    return {"what": f"{shape}: what CuPy's pool took beside the inputs", "rows": rows}


def density(cupy: Any, timer: Any, rounds: int) -> dict[str, Any]:
    """(d): times of block masks over the dense time."""
    x = baselines.make_inputs(SPARSE, cupy)
    rows = []
    for share in DENSITIES:
        for name, mask in patterns(SPARSE.len_q, share).items():
            calls, dense = attend(SPARSE, x, mask=mask), attend(SPARSE, x)
            row: dict[str, Any] = {"pattern": name, "density": mask.density}
            row["visible"] = float(mask.visible_tiles(128, 64).mean())
            for direction, call in calls.items():
                times = timer.interleaved({"sparse": call, "dense": dense[direction]}, rounds)
                row[direction] = times["sparse"].median / times["dense"].median
                row[f"{direction}_us"] = times["sparse"].median * 1e6
            rows.append(row)
    what = (
        f"batch {SPARSE.batch}, {SPARSE.heads} heads, L {SPARSE.len_q}, d {SPARSE.head_dim}, fp16"
    )
    return {"what": f"{what}, blocks of 128", "rows": rows}


def speeds(cupy: Any, timer: Any, rounds: int) -> dict[str, Any]:
    """(e): TFLOP/s of forward + backward."""
    rows = {}
    for case in SWEEP:
        x = baselines.make_inputs(case, cupy)
        seconds = sum(
            timer.interleaved({"": call}, rounds)[""].median for call in attend(case, x).values()
        )
        rows[case.name] = 3.5 * case.flops("forward") / seconds / 1e12
    return {"rows": rows}
