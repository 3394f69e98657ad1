"""`python -m bench.run`: how fast, beside whom, and how far from what the machine could do.

On a GPU: every case forward and backward by cuflash and each peer that can be imported; all methods
take turns in every round, the L2 cache is flushed before every measurement, medians are reported.
Without one: what would run, and what a CPU can measure of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bench import baselines, cases, history, host, paper, report, roofline, timing
from cuflash._system import cupy_or_reason

HEAD = ("case", "method", "direction", "us", "+-%", "TFLOP/s", "% peak", "cuflash x")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    suites = [*sorted(cases.SUITES), "history", "paper"]
    parser.add_argument("--suite", choices=suites, default="quick")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--arch", default="sm_80", help="to compile for, without a GPU")
    parser.add_argument("--plot", metavar="FILE", help="also draw TFLOP/s over length (matplotlib)")
    options = parser.parse_args(arguments)
    if options.suite in ("history", "paper"):
        suite = history if options.suite == "history" else paper
        return suite.main(*cupy_or_reason(), options)
    todo = cases.SUITES[options.suite](options.dtype)

    found: dict[str, Any] = {"environment": report.environment()}
    cupy, reason = cupy_or_reason()
    if cupy is None:
        found["no_gpu"] = reason
        found["host"] = without_gpu(todo, options.arch, str(reason))
    else:
        found |= on_gpu(cupy, todo, options.rounds)
        if options.plot:
            plot(found["rows"], options.plot)
    print(f"\nkept in {report.write('run' if cupy else 'run-cpu', found)}")
    return 0


def on_gpu(cupy: Any, todo: Sequence[cases.Case], rounds: int) -> dict[str, Any]:
    """Times of every case and method."""
    peak = roofline.peak(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id))
    if peak:
        print(f"peak {peak.tflops:.0f} TFLOP/s = {peak.source}")
    timer = timing.GpuTimer(cupy)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for case in tqdm(todo, unit="case", leave=False):
        calls, absent = baselines.collect(case, baselines.make_inputs(case, cupy))
        missing |= absent
        for direction, methods in calls.items():
            times = timer.interleaved(methods, rounds)
            rows += [row(case, direction, name, t, times, peak) for name, t in times.items()]
        cupy.get_default_memory_pool().free_all_blocks()
    print(report.table(HEAD, map(shown, rows)))
    for name, why in missing.items():
        print(f"not measured: {name} ({why})")
    return {"peak": peak and {"tflops": peak.tflops, "source": peak.source},
            "clocks_after": timing.clocks(), "missing": missing, "rows": rows}  # fmt: skip


def row(
    case: cases.Case,
    direction: str,
    method: str,
    times: timing.Times,
    all_times: dict[str, timing.Times],
    peak: roofline.Peak | None,
) -> dict[str, Any]:
    """One measurement; `ratio`: how many times as long as cuflash."""
    flops = case.flops(direction) if "+" not in direction else 3.5 * case.flops("forward")
    tflops = flops / times.median / 1e12
    base = all_times.get("cuflash")
    return {
        "case": case.name,
        "head_dim": case.head_dim,
        "len_q": case.len_q,
        "causal": case.causal,
        "direction": direction,
        "method": method,
        "us": times.median * 1e6,
        "spread": times.spread,
        "tflops": tflops,
        "of_peak": tflops / peak.tflops if peak else None,
        "ratio": times.median / base.median if base else None,
        "all_us": [seconds * 1e6 for seconds in times.seconds],
    }


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as printed."""
    of_peak = "" if row["of_peak"] is None else f"{100 * row['of_peak']:.0f}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    numbers = (f"{row['us']:.1f}", f"{100 * row['spread']:.0f}", f"{row['tflops']:.1f}")
    return (row["case"], row["method"], row["direction"], *numbers, of_peak, ratio)


def without_gpu(todo: Sequence[cases.Case], arch: str, reason: str) -> dict[str, Any]:
    """Say what is missing, and measure what is not."""
    print(f"no GPU: {reason}\nOn a GPU this would time, forward and backward:")
    for case in todo:
        print(f"  {case.name}   {case.flops('forward') / 1e12:.2f} TFLOP forward")
    print(
        f"by {', '.join(baselines.PEERS)} (those that can be imported).\n\nWhat a CPU can measure:"
    )
    calls = host.call_times(arch)
    rows = [(name, "", f"{t['us']:.1f}", f"{t['fastest_us']:.1f}") for name, t in calls.items()]
    print(report.table(("Python per warm call", "", "us", "fastest"), rows))
    compiles = host.compile_times(arch, (64, 128))
    rows = [
        (c["kernel"], arch, *(f"{c[k] * 1e3:.1f}" for k in ("cold_s", "cold_cpu_s", "disk_s")))
        for c in compiles
    ]
    print("\n" + report.table(("compiling", "", "cold ms", "of CPU", "cached ms"), rows))
    return {"arch": arch, "calls": calls, "compiles": compiles}


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """TFLOP/s over length, a panel per head dim, direction and mask."""
    import matplotlib.pyplot as plt

    panels = sorted({(r["direction"], r["head_dim"], r["causal"]) for r in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = [r for r in rows if (r["direction"], r["head_dim"], r["causal"]) == panel]
        for method in dict.fromkeys(r["method"] for r in mine):
            points = sorted((r["len_q"], r["tflops"]) for r in mine if r["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(title=f"{panel[0]} d{panel[1]} {'causal' if panel[2] else 'full'}")
        axis.set(xlabel="length", ylabel="TFLOP/s", xscale="log")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
