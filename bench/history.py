"""`python -m bench.run --suite history`: experiments that others have published, run again.

(a) with dropout on one size, standard against flash; (b) attention of GPT-2 medium; (c) memory over
length; (d) time over the density of a block mask; (e) forward + backward over length. Each prints the
published figure, its source and its GPU, and ours beside it. Without a GPU: what would run, and what a
CPU can measure or count of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import history_cpu, history_gpu, published, report, svg
from bench.history_cases import DENSITIES, DROPOUT, DROPOUT_P, GPT2, LENGTHS, SWEEP, TRIALS


@dataclass(frozen=True, slots=True)
class Table:
    """One experiment's result.

    Parameters
    ----------
    name, what : str
    sources : tuple of Published
    head : tuple of str
    rows : sequence of tuple of str
    numbers : dict
        The same for the JSON.
    """

    name: str
    what: str
    sources: tuple[published.Published, ...]
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"({self.name}) {self.what}\n"
            + "".join(f"    published: {source}\n" for source in self.sources)
            + report.table(self.head, self.rows)
            + "\n"
        )


def number(value: float | None, form: str = ".3g") -> str:
    """A number, or "-"."""
    return "-" if value is None else f"{value:{form}}"


def over(first: float | None, second: float | None) -> float | None:
    """first / second where both are known."""
    return None if first is None or not second else first / second


def dropout(ours: dict[str, Any]) -> Table:
    """(a): seconds of ten trials."""
    theirs = published.DROPOUT_SECONDS
    rows = []
    for name in ("standard", "flash"):
        what = {"standard": "matmul, softmax, dropout, matmul", "flash": "flash / cuflash"}[name]
        rows.append((what, number(theirs[name], ".4f"), number(ours.get(name), ".4f")))
    ratio = over(theirs["standard"], theirs["flash"])
    mine = over(ours.get("standard"), ours.get("flash"))
    rows.append(("times as fast", number(ratio, ".2f"), number(mine, ".2f")))
    case = DROPOUT
    what = (
        f"batch {case.batch}, {case.heads} heads, L {case.len_q}, d {case.head_dim}, fp16, dropout "
        f"{DROPOUT_P}, forward, {TRIALS} trials: seconds"
    )
    return Table(
        "a", what, (published.DROPOUT,), ("", "published", "here"), rows + extra(ours), ours
    )


def gpt2(ours: dict[str, Any]) -> Table:
    """(b): milliseconds of forward + backward."""
    theirs = published.GPT2_MILLISECONDS
    rows = []
    for name in ("standard", "flash"):
        what = {"standard": "matmul, softmax, matmul", "flash": "flash / cuflash"}[name]
        rows.append((what, number(theirs[name], ".1f"), number(ours.get(name), ".2f")))
    ratio = over(theirs["standard"], theirs["flash"])
    mine = over(ours.get("standard"), ours.get("flash"))
    rows.append(("times as fast", number(ratio, ".1f"), number(mine, ".1f")))
    what = (
        f"GPT-2 medium: batch {GPT2.batch}, {GPT2.heads} heads, L {GPT2.len_q}, d {GPT2.head_dim}, "
        "forward + backward: milliseconds"
    )
    return Table("b", what, (published.GPT2,), ("", "published", "here"), rows + extra(ours), ours)


def extra(ours: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was counted or measured beside the times."""
    return [(name, "", value) for name, value in ours.get("notes", {}).items()]


def memory(ours: dict[str, Any]) -> Table:
    """(c): megabytes by length."""
    theirs = published.MEMORY_MB
    rows = []
    for length in LENGTHS:
        mine = ours["rows"].get(length, {})
        rows.append(
            (
                svg.short(length),
                number(theirs["standard"].get(length), ".0f"),
                number(theirs["flash"].get(length), ".0f"),
                number(published.SAVINGS.get(length), ".1f"),
                number(mine.get("standard"), ".1f"),
                number(mine.get("flash"), ".1f"),
                number(over(mine.get("standard"), mine.get("flash")), ".1f"),
                *((number(ours["counted_mb"][length], ".0f"),) if "counted_mb" in ours else ()),
            )
        )
    head: tuple[str, ...]
    head = ("L", "standard", "FlashAttention", "saving", "plain here", "cuflash here", "saving")
    what = f"memory of forward + backward in MB over length; here {ours['what']}"
    if "counted_mb" in ours:
        head = (*head, "counted")
        what += f"; counted: {ours['counted_what']}"
    return Table("c", what, (published.MEMORY, published.SAVING), head, rows, ours)


def density(ours: dict[str, Any]) -> Table:
    """(d): time over the share of blocks that is kept."""
    rows = []
    for row in ours["rows"]:
        ideal = row["density"]
        rows.append(
            (
                row["pattern"],
                f"{ideal:.3f}",
                number(row.get("visible"), ".3f"),
                number(row.get("forward"), ".3f"),
                number(row.get("backward"), ".3f"),
            )
        )
    head = ("pattern", "kept share", "tiles visited", "forward, x dense", "backward, x dense")
    what = f"time of a block mask, in times of the dense call; here {ours['what']}"
    return Table("d", what, (published.SPARSE,), head, rows, ours)


def speeds(ours: dict[str, Any]) -> Table:
    """(e): TFLOP/s of forward + backward."""
    rows = []
    for case in SWEEP:
        place = published.FA2_LENGTHS.index(case.len_q)
        theirs = published.FA2_TFLOPS[case.head_dim, case.causal][place]
        mine = ours["rows"].get(case.name)
        rows.append((case.name, "", number(theirs, ".0f"), number(mine, ".1f")))
    head = ("case", "", "FlashAttention-2", "cuflash here")
    what = "forward + backward, heads * d = 2048, batch * L = 16384: TFLOP/s"
    return Table("e", what, (published.FA2,), head, rows, ours)


EXPERIMENTS: dict[str, Callable[[dict[str, Any]], Table]] = {
    "a": dropout,
    "b": gpt2,
    "c": memory,
    "d": density,
    "e": speeds,
}


def plots(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """(c) and (d) as figures."""
    made = {}
    if "c" in found:
        series: dict[str, list[tuple[float, float]]] = {
            f"{name} (published)": list(row.items()) for name, row in published.MEMORY_MB.items()
        }
        for name, label in (("standard", "plain here"), ("flash", "cuflash here")):
            series[label] = [
                (x, row[name]) for x, row in found["c"]["rows"].items() if row.get(name)
            ]
        panel = svg.Lines("", "length", "MB", series)
        made["memory"] = svg.lines("Memory of forward + backward", [panel], 1)
    if "d" in found:
        series = {"in proportion": [(s, s) for s in DENSITIES]}
        for row in found["d"]["rows"]:
            for direction in ("forward", "backward"):
                if row.get(direction):
                    at = row["density"], row[direction]
                    series.setdefault(f"{row['pattern']} {direction}", []).append(at)
        panel = svg.Lines("", "share of blocks kept", "x dense", series)
        made["density"] = svg.lines("Time over the density of a block mask", [panel], 1)
    return made


def main(cupy: Any, reason: str | None, options: argparse.Namespace) -> int:
    """Run the experiments, print and keep them."""
    found: dict[str, Any] = {"environment": report.environment()}
    if cupy is None:
        print(f"no GPU: {reason}\nOn a GPU all of this would run; a CPU measures and counts:\n")
        found["no_gpu"] = reason
        measured = history_cpu.measure(sorted(EXPERIMENTS))
    else:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        found["gpu"] = properties["name"].decode()
        print(f"here: {found['gpu']}\n")
        measured = history_gpu.measure(cupy, options.rounds, sorted(EXPERIMENTS))
    for name, numbers in measured.items():
        print(EXPERIMENTS[name](numbers))
    found["experiments"] = measured
    path = report.write("history" if cupy else "history-cpu", found)
    for made in draw(path, measured):
        print(f"drawn in {made}")
    print(f"kept in {path}")
    return 0


def draw(path: Path, measured: dict[str, dict[str, Any]]) -> list[Path]:
    """Write the figures beside the JSON."""
    made = []
    for name, figure in plots(measured).items():
        made.append(path.with_name(f"{path.stem}-{name}.svg"))
        made[-1].write_text(figure, encoding="utf-8")
    return made
