"""Tables and plots of a run of `--suite paper`, from its JSON and nothing else.

    python -m bench.paper_report bench/results/<date>-paper.json

writes `.md` and one `.svg` per number format and direction beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import svg

Row = dict[str, Any]
# The two whose faster one is what a cell is held against.
RIVALS = ("torch cuDNN", "torch flash")
SHORT = {"bfloat16": "bf16", "float16": "fp16"}


def groups(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def methods_of(rows: Iterable[Row]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(row["method"] for row in rows))


def ratio(cell: Sequence[Row]) -> float | None:
    """How many times as fast as the faster rival cuflash is; None where one of them is missing."""
    times = {row["method"]: row["us"] for row in cell}
    rivals = [times[name] for name in RIVALS if name in times]
    return min(rivals) / times["cuflash"] if rivals and "cuflash" in times else None


def table(
    rows: Sequence[Row], value: str, label: Callable[[Row], Sequence[str]], head: Sequence[str]
) -> str:
    """A Markdown table: a line per size, a column per method, the best of a line in bold."""
    names = methods_of(rows)
    lines = [[*head, *names, "cuflash / faster rival"]]
    lines.append(["---"] * len(head) + ["---:"] * (len(names) + 1))
    for cell in groups(rows, "batch", "heads", "head_dim", "len_q", "len_k").values():
        found = {row["method"]: row for row in cell}
        best = max(row[value] for row in cell)
        texts = []
        for name in names:
            row = found.get(name)
            if row is None:
                texts.append("-")
                continue
            number = f"{row[value]:.0f} ± {100 * row['spread']:.0f} %"
            texts.append(f"**{number}**" if row[value] == best else number)
        against = ratio(cell)
        lines.append([*label(cell[0]), *texts, "-" if against is None else f"{against:.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(found: dict[str, Any]) -> str:
    """The whole report."""
    gpu, peak = found["gpu"], found.get("peak")
    environment = found["environment"]
    parts = [
        f"# Attention on {gpu}",
        f"`{environment['command']}`, {environment['date']}, commit {environment['commit']}.",
    ]
    if peak:
        parts.append(f"Peak {peak['tflops']:.0f} TFLOP/s = {peak['source']}.")
    parts.append(
        "TFLOP/s by the papers' count: 4 b h Lq Lk d forward, half of it causal, 2.5 times as many "
        "backward. Medians; ± is half the range of the middle four fifths. Last column: how many "
        f"times as fast as the faster of {' and '.join(RIVALS)}."
    )
    for (dtype, direction, causal), rows in groups(
        found["sweep"]["rows"], "dtype", "direction", "causal"
    ).items():
        kind = "causal" if causal else "not causal"
        parts.append(f"## {SHORT[dtype]} {direction}, {kind}")
        label = lambda row: (str(row["head_dim"]), svg.short(row["len_q"]))  # noqa: E731
        parts.append(table(rows, "tflops", label, ("d", "L")))
    if found["decode"]["rows"]:
        parts.append("## Few queries against many keys, GB/s")
        if found.get("bandwidth"):
            parts.append(f"The memory's data sheet: {found['bandwidth'] / 1e9:.0f} GB/s.")
        parts.append(table(found["decode"]["rows"], "gb_per_s", decode_label, ("b", "Lq", "Lk")))
    return "\n\n".join([*parts, *summary(found), *not_measured(found)]) + "\n"


def decode_label(row: Row) -> tuple[str, ...]:
    """Batch, queries and keys."""
    return str(row["batch"]), str(row["len_q"]), svg.short(row["len_k"])


def summary(found: dict[str, Any]) -> list[str]:
    """In how many cells cuflash is at least as fast as the faster rival."""
    lines = []
    for (dtype, direction), rows in groups(found["sweep"]["rows"], "dtype", "direction").items():
        cells = groups(rows, "head_dim", "causal", "len_q").values()
        ratios = [r for r in map(ratio, cells) if r is not None]
        if ratios:
            won = sum(r >= 1 for r in ratios)
            lines.append(
                f"* {SHORT[dtype]} {direction}: at least as fast in {won} of {len(ratios)} cells, "
                f"{min(ratios):.2f} to {max(ratios):.2f} times as fast"
            )
    return ["## Against the faster rival", "\n".join(lines)] if lines else []


def not_measured(found: dict[str, Any]) -> list[str]:
    """Methods that are missing, once per reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for part in ("sweep", "decode"):
        for gap in found[part]["missing"]:
            reasons.setdefault((gap["method"], gap["why"]), []).append(gap["case"])
    lines = []
    for (method, why), cases in reasons.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases, {cases[0]} the first"
        lines.append(f"* {method} ({where}): {' '.join(why.split())}")
    return ["## Not measured", "\n".join(lines)] if lines else []


def plots(found: dict[str, Any]) -> dict[str, str]:
    """SVG figures by name: one per number format and direction, and one of decoding."""
    made = {}
    for (dtype, direction), rows in groups(found["sweep"]["rows"], "dtype", "direction").items():
        panels = []
        for (dim, causal), mine in groups(rows, "head_dim", "causal").items():
            kind = "causal" if causal else "not causal"
            panels.append(panel(mine, f"head dim {dim}, {kind}", "tflops", length_label))
        title = f"Attention {direction}, {SHORT[dtype]}, {found['gpu']}"
        made[f"{SHORT[dtype]}-{direction}"] = svg.bars(title, panels, "TFLOP/s")
    if found["decode"]["rows"]:
        panels = [
            panel(mine, f"batch {batch}, {svg.short(keys)} keys", "gb_per_s", queries_label)
            for (batch, keys), mine in groups(found["decode"]["rows"], "batch", "len_k").items()
        ]
        made["decode"] = svg.bars(f"Few queries, many keys, {found['gpu']}", panels, "GB/s")
    return made


def length_label(row: Row) -> str:
    """Of a group of bars in the sweep."""
    return svg.short(row["len_q"])


def queries_label(row: Row) -> str:
    """Of a group of bars in decoding."""
    return f"{row['len_q']} queries"


def panel(rows: Sequence[Row], title: str, value: str, label: Callable[[Row], str]) -> svg.Bars:
    """Bars of some rows, a group per label."""
    labels = list(dict.fromkeys(map(label, rows)))
    series = {}
    for name in methods_of(rows):
        values = {label(row): row[value] for row in rows if row["method"] == name}
        series[name] = [values.get(at) for at in labels]
    return svg.Bars(title, labels, series)


def write_beside(path: Path, found: dict[str, Any]) -> list[Path]:
    """Write tables and plots beside the JSON; returns the paths."""
    made = [path.with_suffix(".md")]
    made[0].write_text(markdown(found), encoding="utf-8")
    for name, figure in plots(found).items():
        made.append(path.with_name(f"{path.stem}-{name}.svg"))
        made[-1].write_text(figure, encoding="utf-8")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a run that was kept."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper_report", description=__doc__)
    parser.add_argument("json", type=Path, help="of a run of --suite paper on a GPU")
    options = parser.parse_args(arguments)
    found = json.loads(options.json.read_text())
    if "sweep" not in found:
        print(f"{options.json} holds no measurements ({found.get('no_gpu', 'another suite')})")
        return 1
    for made in write_beside(options.json, found):
        print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
