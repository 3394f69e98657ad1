"""From timings to JSON to tables and plots, on timings that are made up."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import baselines, paper, paper_report, report, roofline, svg, timing
from bench import run as bench_run
from bench.baselines import Calls, Inputs, NotHere
from bench.cases import Case, sweep

# Milliseconds of made-up methods on every case.
SPEEDS = {"cuflash": 2.0, "cuflash portable": 3.0, "torch cuDNN": 2.5, "torch flash": 4.0}


class FakeTimer:
    """Says of every call what it was made to say."""

    def interleaved(self, calls: Any, rounds: int) -> dict[str, timing.Times]:
        return {
            name: timing.Times(tuple(call() * (1 + n / 100) for n in range(rounds)))
            for name, call in calls.items()
        }


def peer(milliseconds: float) -> Callable[[Case, Inputs], Calls]:
    def calls(case: Case, x: Inputs) -> Calls:
        return {"forward": lambda: milliseconds / 1e3, "backward": lambda: 2e-3 * milliseconds}

    return calls


def gone(case: Case, x: Inputs) -> Calls:
    raise ModuleNotFoundError("No module named 'jax'")


def short_only(case: Case, x: Inputs) -> Calls:
    if case.len_q > 4096:
        raise MemoryError("out of memory")
    return peer(30.0)(case, x)


def measured(todo: list[Case], directions: tuple[str, ...]) -> dict[str, Any]:
    peers = {name: peer(speed) for name, speed in SPEEDS.items()}
    peers |= {"JAX cuDNN": gone, "plain CuPy": short_only}
    made = lambda case: Inputs(*[np.zeros(1)] * 4)  # noqa: E731
    peak = roofline.Peak(1000.0, "made up")
    return paper.measure(todo, peers, directions, FakeTimer(), made, 10, peak)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """A whole run, as its JSON brings it back."""
    cases = [c for dtype in paper.FORMATS for c in sweep(dtype)]
    content = {
        "environment": {"command": "test", "date": "today", "commit": "abc"},
        "gpu": "made-up GPU",
        "peak": {"tflops": 1000.0, "source": "made up"},
        "bandwidth": 4.8e12,
        "sweep": measured(cases, ("forward", "backward")),
        "decode": measured(paper.decode_cases(), ("forward",)),
    }
    return json.loads(json.dumps(content))


def test_rows(found: dict[str, Any]) -> None:
    rows = found["sweep"]["rows"]
    # 36 sizes in two formats and directions; one method is absent, one fails on two of six lengths.
    assert len(rows) == 36 * 2 * 2 * 4 + 24 * 2 * 2
    row = next(
        r
        for r in rows
        if (r["method"], r["direction"], r["head_dim"], r["len_q"], r["causal"])
        == ("cuflash", "backward", 128, 8192, False)
    )
    assert row["us"] == pytest.approx(4000 * 1.045)
    flops = 2.5 * 4 * 2 * 16 * 8192**2 * 128
    assert row["tflops"] == pytest.approx(flops / (row["us"] * 1e-6) / 1e12)
    assert row["of_peak"] == pytest.approx(row["tflops"] / 1000)
    decode = found["decode"]["rows"][0]
    assert decode["gb_per_s"] == pytest.approx(
        paper.decode_cases()[0].bytes_moved() / (decode["us"] * 1e-6) / 1e9
    )


def test_tables(found: dict[str, Any]) -> None:
    text = paper_report.markdown(found)
    assert text.count("\n## ") == 2 * 2 * 2 + 3
    table = text.split("## bf16 forward, not causal\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0].split(" | ")[2:6] == list(SPEEDS)
    assert len(table) == 2 + 18
    line = next(line for line in table if line.startswith("| 128 | 8k |"))
    # 4 * 2 * 16 * 8192^2 * 128 operations in 2.09 ms; 1.25 times as fast as the faster rival.
    assert "| **526 ± 3 %** |" in line and line.endswith("| - | 1.25 |")
    assert "* fp16 backward: at least as fast in 36 of 36 cells, 1.25 to 1.25 times" in text
    assert re.search(r"\* JAX cuDNN \(84 cases, .*No module named 'jax'", text)
    assert re.search(r"\* plain CuPy \(\d+ cases, bf16 d64 full b2 h32 L8192 the first\)", text)
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert line.count("|") == line.count(" |") + 1


def test_plots(found: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x-paper.json"
    path.write_text(json.dumps(found))
    assert paper_report.main([str(path)]) == 0
    names = {made.name for made in tmp_path.glob("*.svg")}
    assert names == {
        f"x-paper-{kind}.svg"
        for kind in ("bf16-forward", "bf16-backward", "fp16-forward", "fp16-backward", "decode")
    }
    root = ElementTree.fromstring((tmp_path / "x-paper-bf16-forward.svg").read_text())
    tag = "{http://www.w3.org/2000/svg}"
    bars = [r for g in root.iter(f"{tag}g") for r in g.iter(f"{tag}rect")]
    assert len(bars) == 36 * 4 + 24
    texts = {t.text for t in root.iter(f"{tag}text")}
    assert {*SPEEDS, "head dim 256, causal", "16k", "526"} <= texts
    # Twice the speed, twice the height: cuflash beside torch flash.
    heights = [float(bar.get("height", "0")) for bar in bars[20:25]]
    assert heights[0] == pytest.approx(2 * heights[3], rel=0.01)
    assert (tmp_path / "x-paper.md").read_text() == paper_report.markdown(found)


def test_a_run_without_a_gpu_has_nothing_to_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    path.write_text('{"no_gpu": "none here"}')
    assert paper_report.main([str(path)]) == 1
    assert "none here" in capsys.readouterr().out


def test_what_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_run, "cupy_or_reason", lambda: (None, "not in this test"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert bench_run.main(["--suite", "paper"]) == 0
    text = capsys.readouterr().out
    assert "no GPU: not in this test" in text
    assert "bf16 d256 causal b1 h8 L16384" in text and "f16 d64 full b32 h32 L512" in text
    assert "h32/8 L1x131072" in text
    assert all(name in text for name in (*SPEEDS, "Triton", "JAX cuDNN", "plain CuPy"))
    (path,) = tmp_path.glob("*-paper-cpu.json")
    assert len(json.loads(path.read_text())["cases"]) == 84


def test_a_run_that_breaks_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "multiProcessorCount": 132}
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    fake = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(id=0),
            runtime=SimpleNamespace(getDeviceProperties=lambda ordinal: properties),
        ),
        get_default_memory_pool=lambda: pool,
    )

    def ours(case: Case, x: Inputs) -> Calls:
        if case.head_dim == 128 and case.heads == 16:  # of the sweep
            raise RuntimeError("a fault")
        return peer(2.0)(case, x)

    peers = {"cuflash": ours, "torch flash": peer(1.0)}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "GpuTimer", lambda cupy: FakeTimer())
    monkeypatch.setattr(baselines, "make_inputs", lambda case, cupy: Inputs(*[np.zeros(1)] * 4))
    monkeypatch.setattr(paper, "methods", lambda: peers)
    monkeypatch.setattr(bench_run, "cupy_or_reason", lambda: (fake, None))
    with pytest.raises(RuntimeError, match="a fault"):
        bench_run.main(["--suite", "paper", "--rounds", "3"])
    (path,) = tmp_path.glob("*-paper.json")
    found = json.loads(path.read_text())
    assert len(found["sweep"]["rows"]) == 12 * 2 * 2  # head dim 64, two directions, two methods
    assert len(found["decode"]["rows"]) == 12 * 2
    assert found["bandwidth"] == 4.8e12 and found["peak"]["tflops"] > 980
    assert (
        "bf16 forward: at least as fast in 0 of 12 cells, 0.50 to 0.50" in capsys.readouterr().out
    )
    assert path.with_suffix(".md").exists() and list(tmp_path.glob("*bf16-forward.svg"))


def test_what_a_peer_says_of_itself_is_no_error() -> None:
    case, x = sweep()[0], Inputs(*[None] * 4)

    def refuses(case: Case, x: Inputs) -> Calls:
        raise NotHere("nothing but one family here")

    def breaks(case: Case, x: Inputs) -> Calls:
        raise RuntimeError("launch failed")

    calls, missing = baselines.collect(case, x, {"cuflash portable": refuses, "other": breaks})
    assert not calls
    assert missing == {
        "cuflash portable": "nothing but one family here",
        "other": "RuntimeError: launch failed",
    }
    with pytest.raises(RuntimeError, match="launch failed"):  # ours must not fail unseen
        baselines.collect(case, x, {"cuflash": breaks})


def test_scale_of_axes() -> None:
    assert [svg.step(x) for x in (10, 49, 730, 0.9)] == [2, 10, 200, 0.2]
    assert svg.short(131072) == "128k"
    figure = svg.lines("t", [svg.Lines("p", "x", "y", {"a": [(1, 1), (100, 10)], "b": []})])
    assert ElementTree.fromstring(figure).tag.endswith("svg")
    assert figure.count("<circle") == 2


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("triton", "torch")),
    reason="Triton and PyTorch are not installed",
)
def test_triton_peer_computes_attention() -> None:
    command = [sys.executable, "-m", "tests.triton_interpreted"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
