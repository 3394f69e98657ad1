"""Does the run on a GPU keep to its time, and survive its steps?"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_check, gpu_steps, report
from bench.gpu_check import PYTHON, Step


def step(name: str, code: str, minutes: float = 1, part: str = "tests", missing: str = "") -> Step:
    return Step(name, (PYTHON, "-c", code), minutes, "", part, missing)


def test_a_failing_step_is_recorded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = gpu_check.run(step("fails", "print('seen'); raise SystemExit(3)"), log)
    assert (result["status"], result["exit"]) == ("FAILED", 3)
    assert result["tail"] == "seen\n"
    expected = replace(step("short", "raise SystemExit(3)"), passes=(0, 3))
    assert gpu_check.run(expected, tmp_path / "other")["status"] == "passed"
    crash = replace(step("crash", "1 / 0"), passes=(0, 1))
    assert gpu_check.run(crash, tmp_path / "other")["status"] == "FAILED"
    assert "===== fails: " in log.read_text() and log.read_text().endswith("===== FAILED\n")


def test_what_is_not_there_is_recorded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = gpu_check.run(step("absent", "", missing="not installed"), log)
    assert (result["status"], result["exit"]) == ("not run: not installed", None)
    nowhere = Step("nowhere", ("/nonexistent/program",), 1, "")
    assert gpu_check.run(nowhere, log)["status"].startswith("not run: [Errno 2]")
    late = gpu_check.run(step("late", "print('no')"), log, seconds=1)
    assert late["status"] == "not run: no time left in its portion" and late["tail"] == ""


def test_a_step_out_of_time_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    start = time.perf_counter()
    result = gpu_check.run(step("slow", code), tmp_path / "log", seconds=3)
    assert time.perf_counter() - start < 30
    assert result["status"].startswith("stopped after 0.1 min") and result["exit"] is None
    assert "begun" in result["tail"]
    for _ in range(100):
        if not running(int(pid.read_text())):
            return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and waiting for somebody to ask


def test_later_steps_run_and_every_step_is_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(report.RESULTS_VARIABLE, str(tmp_path))
    look = (
        f"import glob, json; (path,) = glob.glob({str(tmp_path / '*.json')!r}); "
        "print(json.load(open(path))['steps'][0]['status'])"
    )
    todo = [step("one", "raise SystemExit(1)"), step("two", look, part="bench")]
    results = gpu_check.run_all(todo, {"tests": 1, "bench": 1}, "all")
    assert [result["status"] for result in results] == ["FAILED", "passed"]
    assert results[1]["tail"] == "FAILED\n"
    (path,) = tmp_path.glob("*-gpu-check-all.json")
    content = json.loads(path.read_text())
    assert content["steps"] == results
    assert (tmp_path / content["log"]).read_text().count("=====") == 4
    assert "one ... FAILED" in capsys.readouterr().out


def test_portions() -> None:
    assert 24 <= sum(gpu_check.PARTS.values()) <= 26
    assert all(minutes < 10 for minutes in gpu_check.PARTS.values())
    whole = gpu_check.chosen(None, None)
    assert list(dict.fromkeys(s.part for s in whole)) == list(gpu_check.PARTS)
    assert gpu_check.budgets("tests", None) == {"tests": gpu_check.PORTION}
    assert gpu_check.PORTION < 10
    assert gpu_check.budgets(None, 50)["tests"] == 2 * gpu_check.PARTS["tests"]
    for part in (*gpu_check.PARTS, *gpu_check.EXTRA_PARTS):
        mine = gpu_check.chosen(part, None)
        assert mine and {s.part for s in mine} == {part}
    assert [s.name for s in gpu_check.chosen("bench", ["paper"])] == ["paper"]
    assert [s.name for s in gpu_check.chosen(None, ["compile"])] == ["compile"]
    names = [s.name for s in gpu_steps.steps()]
    assert len(names) == len(set(names))


def test_commands_exist() -> None:
    root = report.ROOT
    for one in gpu_steps.steps():
        words = one.command[1:] if one.command[0] == PYTHON else one.command
        if words[0] == "-m" and words[1] != "pytest":
            assert importlib.util.find_spec(words[1]) is not None
        elif words[0].startswith("examples/") and not one.missing:
            assert (root / words[0]).exists()
        for word in words:
            if word.startswith("tests/"):
                assert (root / word).exists()
    for code in (gpu_steps.SANITIZED, gpu_steps.MEMORY):
        compile(code, "step", "exec")


def test_sanitizer_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    program = tmp_path / "cuda_sanitizer_api" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    found: Any = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("a toolkit's comes first")
    prefix, missing = gpu_steps.find_sanitizer()
    assert missing == "" and os.access(prefix[0], os.X_OK)
    assert prefix[1:] == ("--injection-path", str(tmp_path / "cuda_sanitizer_api" / "lib"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu_steps.find_sanitizer()[1].startswith("not installed: pip install nvidia-cuda-sanit")


def test_sanitized_cases_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy in CuPy's place: are the calls right?"""
    import numpy

    fake = SimpleNamespace(
        random=numpy.random, arange=numpy.arange, asarray=numpy.asarray,
        cuda=SimpleNamespace(
            set_allocator=lambda allocator: None,
            Device=lambda: SimpleNamespace(synchronize=lambda: None),
        ),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", fake)
    exec(gpu_steps.SANITIZED.replace("keep.get()", "keep"), {})
