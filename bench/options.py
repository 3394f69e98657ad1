"""`python -m bench.options`: what each option costs beside the plain call, on a GPU.

Targets of the project: a bias of shape (H, Lq, Lk) at most 1.35 times the plain forward; a block mask
of density s at most 1.15 s + 0.03 of the dense time, forward and backward. Without a GPU: what would
run, and the tiles that a block mask leaves to visit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

import cuflash
from bench import report, timing
from cuflash import BlockMask
from cuflash._system import cupy_or_reason

HEADS, LENGTH, HEAD_DIM, BLOCK = 16, 8192, 128, 128
DENSITIES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
HEAD = ("option", "direction", "us", "+-%", "x plain", "at most")
BIAS_LIMIT = 1.35


def density_limit(density: float) -> float:
    """Share of the dense time that a block mask may take."""
    return 1.15 * density + 0.03


def pattern(density: float, length: int = LENGTH) -> BlockMask:
    """Blocks of which every row and every column of blocks has the same share, in no order."""
    n = length // BLOCK
    order = np.random.default_rng(0).permutation(n)
    circulant = (order[:, None] + order[None, :]) % n < round(density * n)
    return BlockMask.from_blocks(circulant, block_size=BLOCK, shape=(length, length))


def options(xp: Any) -> dict[str, tuple[dict[str, Any], float | None]]:
    """Option sets by name, each with the most it may cost in times of the plain call."""
    rng = np.random.default_rng(0)

    def array(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> Any:
        return xp.asarray(rng.standard_normal(shape, dtype=np.float32).astype(dtype))

    found: dict[str, tuple[dict[str, Any], float | None]] = {
        "bias (H, Lq, Lk) bf16": ({"bias": array(HEADS, LENGTH, LENGTH)}, BIAS_LIMIT),
        "bias (H, 1, Lk) float32": ({"bias": array(HEADS, 1, LENGTH, dtype=np.float32)}, None),
        "mask (Lq, Lk), half True": (
            {"mask": xp.asarray(rng.random((LENGTH, LENGTH)) < 0.5)},
            None,
        ),
        "dropout 0.17": ({"dropout_p": 0.17, "seed": 1}, None),
        "sinks": ({"sinks": array(HEADS, dtype=np.float32)}, None),
        "softcap": ({"softcap": 30.0}, None),
        "ALiBi": ({"alibi_slopes": array(HEADS, dtype=np.float32)}, None),
        "score_mod": (
            {
                "score_mod": cuflash.ScoreMod(
                    "s - decay[h] * abs(i - j)", {"decay": array(HEADS, dtype=np.float32)}
                )
            },
            None,
        ),
    }
    for density in DENSITIES:
        limit = density_limit(density)
        found[f"blocks of density {density:g}"] = {"mask": pattern(density)}, limit
    return found


def calls(q: Any, dout: Any, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Forward and backward with one set of options."""
    out, lse = cuflash.attention(q, q, q, return_lse=True, **given)
    return {
        "forward": lambda: cuflash.attention(q, q, q, return_lse=True, **given),
        "backward": lambda: cuflash.attention_backward(dout, q, q, q, out, lse, **given),
    }


def on_gpu(cupy: Any, rounds: int) -> list[dict[str, Any]]:
    """Every option, interleaved with the plain call."""
    rng, timer = cupy.random.default_rng(0), timing.GpuTimer(cupy)
    shape = (1, HEADS, LENGTH, HEAD_DIM)
    q, dout = (
        rng.standard_normal(shape, dtype=cupy.float32).astype(ml_dtypes.bfloat16) for _ in range(2)
    )
    rows = []
    for name, (given, limit) in tqdm(options(cupy).items(), unit="option", leave=False):
        mine, plain = calls(q, dout, given), calls(q, dout, {})
        for direction in mine:
            times = timer.interleaved(
                {"option": mine[direction], "plain": plain[direction]}, rounds
            )
            ratio = times["option"].median / times["plain"].median
            us, spread = times["option"].median * 1e6, times["option"].spread
            bound = limit if direction == "forward" or name.startswith("blocks") else None
            rows.append(
                {
                    **{"option": name, "direction": direction, "us": us, "spread": spread},
                    **{"ratio": ratio, "limit": bound, "all_us": times["option"].seconds},
                }
            )
        cupy.get_default_memory_pool().free_all_blocks()
    return rows


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as printed."""
    limit = "" if row["limit"] is None else f"{row['limit']:.3f}"
    numbers = f"{row['us']:.1f}", f"{100 * row['spread']:.0f}", f"{row['ratio']:.3f}"
    return (row["option"], row["direction"], *numbers, limit)


def without_gpu() -> list[dict[str, Any]]:
    """The share of tiles that each block mask leaves, for the kernels' own tile sizes."""
    rows = []
    for density in DENSITIES:
        mask = pattern(density)
        for tile in ((128, 64), (64, 128)):
            visible = float(mask.visible_tiles(*tile).mean())
            rows.append({"density": density, "tile": list(tile), "visible": visible})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    chosen = parser.parse_args(arguments)
    found: dict[str, Any] = {"environment": report.environment()}
    cupy, reason = cupy_or_reason()
    if cupy is None:
        found |= {"no_gpu": reason, "tiles": without_gpu()}
        print(f"no GPU: {reason}\nTiles that a block mask leaves to visit, of {LENGTH}^2 pairs:")
        rows = [
            (f"{r['density']:g}", "x".join(map(str, r["tile"])), f"{r['visible']:.4f}")
            for r in found["tiles"]
        ]
        print(report.table(("density", "tile", "visible"), rows))
    else:
        found["rows"] = on_gpu(cupy, chosen.rounds)
        print(report.table(HEAD, map(shown, found["rows"])))
    print(f"\nkept in {report.write('options' if cupy else 'options-cpu', found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
