"""The published experiments: are figures, sizes and counts those that were published?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from bench import (
    cases,
    history,
    history_cases,
    history_cpu,
    history_gpu,
    published,
    report,
    timing,
)
from bench import run as bench_run


def test_every_experiment_is_printed_beside_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_run, "cupy_or_reason", lambda: (None, "not in this test"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(history_cpu, "LONGEST", 512)
    monkeypatch.setattr(history_cpu, "DENSE", replace(history_cpu.DENSE, len_q=1024, len_k=1024))
    small = replace(history_cpu.DROPOUT, len_q=256, len_k=256)
    monkeypatch.setattr(history_cpu, "DROPOUT", small)
    assert bench_run.main(["--suite", "history"]) == 0
    text = capsys.readouterr().out
    for letter, figures in {
        "a": ("1.0446", "0.3437", "3.04", "; T4; "),
        "b": ("41.7", "7.3", "5.7", "; A100; "),
        "c": ("17024", "13384", "20.3", "A100 40GB"),
        "d": ("random", "butterfly", "band + global"),
        "e": ("176", "203", "A100 80GB SXM4"),
    }.items():
        part = text.split(f"\n({letter}) ")[1].split("\n\n")[0]
        assert "    published: " in part
        assert all(figure in part for figure in figures), (letter, part)
    (path,) = tmp_path.glob("*-history-cpu.json")
    content = json.loads(path.read_text())
    assert set(content["experiments"]) == set("abcde")
    assert len(list(tmp_path.glob("*.svg"))) == 2


def test_ours_stand_beside_theirs() -> None:
    table = str(history.dropout({"standard": 0.5, "flash": 0.1}))
    assert "1.0446 0.5000" in " ".join(table.split())
    assert table.splitlines()[-1].split()[-2:] == ["3.04", "5.00"]
    rows = {case.name: 100.0 + n for n, case in enumerate(history_cases.SWEEP)}
    lines = str(history.speeds({"rows": rows})).splitlines()
    assert lines[-1].split()[-2:] == ["189", "123.0"]
    found = {128: {"standard": 40.0, "flash": 10.0}}
    line = str(history.memory({"what": "here", "rows": found})).splitlines()[4]
    assert line.split() == ["128", "36", "22", "1.5", "40.0", "10.0", "4.0"]


def test_published_figures_agree_with_each_other() -> None:
    standard, flash = published.MEMORY_MB["standard"], published.MEMORY_MB["flash"]
    for length, saving in published.SAVINGS.items():  # of two publications
        assert standard[length] / flash[length] == pytest.approx(saving, rel=0.1)
    assert len(flash) == 10 and max(flash) == 65536
    ratio = published.DROPOUT_SECONDS["standard"] / published.DROPOUT_SECONDS["flash"]
    assert ratio == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("density", history_cases.DENSITIES)
def test_masks_have_their_density(density: float) -> None:
    masks = history_cases.patterns(4096, density)
    assert masks["random"].density == pytest.approx(density, abs=0.02)
    blocks = masks["random"].visible_tiles(128, 128)[0]
    assert len(set(np.asarray(blocks).reshape(32, 32).sum(axis=1).tolist())) == 1
    if "band + global" in masks:
        assert abs(masks["band + global"].density - density) < 0.06


def test_counted_memory_is_what_is_allocated() -> None:
    case = replace(history_cases.MEMORY, len_q=1024, len_k=1024)
    pairs = 16 * 8 * 1024
    results = 4 * pairs * 64 * 2 + pairs * 4  # out, dq, dk, dv in float16; lse
    counted = history_cpu.allocated(case)
    # Beside them dQ is summed in float32, and every row has a number of its own or two.
    assert results + pairs * 64 * 4 <= counted <= results + pairs * (64 * 4 + 16)
    double = history_cpu.allocated(replace(case, len_q=2048, len_k=2048))
    assert double == pytest.approx(2 * counted, rel=0.01)


def test_dropout_of_the_two_ways_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(history_cpu.DROPOUT, len_q=128, len_k=128)
    monkeypatch.setattr(history_cpu, "DROPOUT", small)
    notes: dict[str, Any] = history_cpu.dropout()["notes"]
    assert float(notes["largest difference of the two results"]) < 1e-5


def test_calls_of_a_case_are_attention_and_its_gradient() -> None:
    case = replace(history_cpu.DENSE, len_q=64, len_k=64, causal=True)
    x = history_cpu.inputs(case)
    calls = history_cases.attend(case, x)
    out, lse = calls["forward"]()
    want, pullback = cuflash.attention_vjp(x.q, x.k, x.v, causal=True)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(calls["backward"]().q, pullback(x.dout).q)
    assert lse.shape == (1, 1, 64)


class FakeCupy:
    """NumPy under CuPy's names, as far as the suite goes."""

    float32 = np.float32

    class OutOfMemoryError(MemoryError):
        pass

    def __init__(self) -> None:
        self.random, self.cuda, self.memory = self, self, self
        self.taken = 0

    def default_rng(self, seed: int) -> Any:
        return np.random.default_rng(seed)

    def get_default_memory_pool(self) -> Any:
        return self

    def free_all_blocks(self) -> None:
        self.taken = 0

    def total_bytes(self) -> int:
        self.taken += 1_000_000
        return self.taken

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class CountingTimer:
    """Runs every call once; each takes as many milliseconds as there are in its round."""

    def interleaved(self, calls: Any, rounds: int) -> dict[str, timing.Times]:
        for call in calls.values():
            call()
        return {name: timing.Times((n * 1e-3,)) for n, name in enumerate(calls, 1)}


def test_what_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, on NumPy arrays: the calls are right, and the tables can be made of them."""

    def small(case: cases.Case, length: int) -> cases.Case:
        return replace(case, batch=1, heads=2, heads_kv=2, len_q=length, len_k=length)

    for name, length in (("DROPOUT", 64), ("GPT2", 64), ("MEMORY", 64), ("SPARSE", 4096)):
        case = small(getattr(history_gpu, name), length)
        monkeypatch.setattr(history_gpu, name, replace(case, head_dim=16, heads=1, heads_kv=1))
    monkeypatch.setattr(history_gpu, "SWEEP", [small(history_cases.SWEEP[0], 64)])
    monkeypatch.setattr(history_gpu, "LENGTHS", (64, 128))
    monkeypatch.setattr(history_gpu, "DENSITIES", (0.25,))
    monkeypatch.setattr(timing, "GpuTimer", lambda cupy: CountingTimer())
    found = history_gpu.measure(FakeCupy(), 3, sorted(history.EXPERIMENTS))
    assert found["a"] == {"standard": pytest.approx(0.01), "flash": pytest.approx(0.02)}
    assert found["b"] == {"standard": pytest.approx(1.0), "flash": pytest.approx(2.0)}
    assert found["c"]["rows"] == {
        64: {"standard": 1.0, "flash": 1.0},
        128: {"standard": 1.0, "flash": 1.0},
    }
    assert {row["pattern"] for row in found["d"]["rows"]} >= {"random", "band + global"}
    assert all(row["forward"] == 0.5 for row in found["d"]["rows"])
    (speed,) = found["e"]["rows"].values()
    assert speed == pytest.approx(3.5 * history_gpu.SWEEP[0].flops("forward") / 2e-3 / 1e12)
    for name, numbers in found.items():
        assert f"({name}) " in str(history.EXPERIMENTS[name](numbers))
    assert set(history.plots(found)) == {"memory", "density"}
