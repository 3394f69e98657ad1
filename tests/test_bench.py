"""Do the measurements count and time what they say? On machines without a GPU too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cases, gpu_check, host, report, roofline, timing
from bench import run as bench_run
from cuflash import _plan


def test_operations_are_counted_like_the_papers() -> None:
    full = cases.Case(2, 16, 16, 8192, 8192, 128)
    assert full.flops("forward") == 4 * 2 * 16 * 8192**2 * 128
    assert full.flops("backward") == 2.5 * full.flops("forward")
    square = cases.Case(2, 16, 16, 8192, 8192, 128, causal=True)
    assert square.flops("forward") == full.flops("forward") / 2
    # 2048 rows at the end of 8192 keys see 7168 of them on average.
    late = cases.Case(1, 16, 16, 2048, 8192, 128, causal=True)
    assert late.flops("forward") == 4.0 * 16 * 2048 * 7168 * 128
    # One head of keys and values for four of queries; scores of every row in float32.
    few = cases.Case(1, 32, 8, 1, 4096, 128)
    assert few.bytes_moved() == 2 * (2 * 8 * 4096 * 128 + 2 * 32 * 128) + 4 * 32
    for case in cases.sweep():
        assert case.heads * case.head_dim == 2048
        assert case.batch * case.len_q == 16384


def test_peak_of_known_chips() -> None:
    h200 = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "clockRate": 1_980_000}
    found = roofline.peak({**h200, "multiProcessorCount": 132})
    assert found is not None
    assert found.tflops == pytest.approx(989.4, rel=1e-3)
    a100 = {"name": b"NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "clockRate": 1_410_000}
    found = roofline.peak({**a100, "multiProcessorCount": 108})
    assert found is not None
    assert found.tflops == pytest.approx(312, rel=1e-2)
    assert roofline.peak({**h200, "major": 10, "multiProcessorCount": 1}) is None


def test_clock_that_cuda_no_longer_tells() -> None:
    h200 = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "multiProcessorCount": 132}
    found = roofline.peak(h200)
    assert found is not None
    assert found.tflops == pytest.approx(989.4, rel=1e-3)
    assert roofline.peak({**h200, "name": b"another"}) is None


def test_median_and_spread() -> None:
    times = timing.Times(tuple(float(n) for n in range(1, 22)))
    assert times.median == 11
    assert times.spread == pytest.approx(8 / 11)


def test_python_time_per_call_is_measured_on_the_device_path() -> None:
    assert set(host.call_times("sm_80")) >= {"attention", "attention_backward", "pullback"}


def test_compile_times(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [s for s in _plan.all_specializations("sm_80") if s.variant == "linear"]
    monkeypatch.setattr(_plan, "all_specializations", lambda arch: specs[:1])
    (found,) = host.compile_times("sm_80", (specs[0].head_dim,))
    assert found["kernel"] == specs[0].name
    assert found["disk_s"] < found["cold_s"]


@pytest.mark.parametrize("command", [bench_run, gpu_check])
def test_commands_say_what_they_would_do(
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "cupy_or_reason", lambda: (None, "not in this test"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(host, "compile_times", lambda arch, dims: [])
    assert command.main([]) == 0
    text = capsys.readouterr().out
    assert "no GPU: not in this test" in text
    assert "would" in text
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["environment"]["config"]["cuflash"]
    assert content["host"]["calls"]["attention"]["us"] > 0
