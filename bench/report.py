"""What a result must carry to mean anything later: machine, versions, commit, date, command."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cuflash

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
RESULTS_VARIABLE = "CUFLASH_BENCH_RESULTS"  # another folder, for steps that run as processes


def results() -> Path:
    """Where results go."""
    return Path(os.environ.get(RESULTS_VARIABLE) or RESULTS)


def environment() -> dict[str, Any]:
    """Facts about this run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": commit(),
        "config": dataclasses.asdict(cuflash.show_config()),
    }


def commit() -> str | None:
    """The commit of the checkout, with "+" when files differ from it; None outside of one."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def path_for(name: str) -> Path:
    """Where results of now are to be kept: <date>-<name>.json."""
    folder = results()
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return folder / f"{stamp}-{name}.json"


def write(name: str, content: dict[str, Any]) -> Path:
    """Keep results as <date>-<name>.json."""
    return write_to(path_for(name), content)


def write_to(path: Path, content: dict[str, Any]) -> Path:
    """Write results as JSON; returns the path."""
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned, numbers to the right."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
