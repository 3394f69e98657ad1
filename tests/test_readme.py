"""Does README tell the truth? Its example is run, its commands and names are looked up."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
from pathlib import Path

import cuflash

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_example_prints_what_it_says() -> None:
    code, printed = re.findall(r"^```python\n(.*?)^```\n+```\n(.*?)^```$", README, re.M | re.S)[0]
    assert len(code.splitlines()) == 8
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == printed


def test_two_commands_set_up() -> None:
    run, test = blocks("sh")
    assert len(run.splitlines()) == len(test.splitlines()) == 1
    assert run.endswith(".venv/bin/python -m cuflash\n")
    assert ".venv/bin/python -m pytest" in test
    for command in (run, test):
        assert command.startswith("python3 -m venv .venv && ")
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_ci_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 '(.*?)' README.md", script)
    assert pattern is not None
    lines = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert lines == blocks("sh")[1].splitlines()


def test_every_option_is_in_the_table() -> None:
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.M))
    given = set(inspect.signature(cuflash.attention_vjp).parameters)
    # Arguments that are arrays to return or to write to, or what to differentiate.
    assert table == given - {"q", "k", "v", "wrt", "return_lse", "out"}


def test_every_public_name_is_shown() -> None:
    for name in cuflash.__all__:
        if not name.startswith("__") and name != "CompileError":
            assert name in README, name


def test_every_path_exists() -> None:
    for path in re.findall(r"\b(?:cuflash|tests|examples|bench|kernels_cu)/[\w/.]*", README):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_no_speed_is_claimed() -> None:
    # Until results of a real GPU are committed.
    if not list((ROOT / "bench" / "results").glob("*.json")):
        assert not re.search(r"\d\s*(TFLOP|times faster|x faster|GB/s)", README)
