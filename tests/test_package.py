"""Does what users install contain what it needs? sdist, wheel from the sdist, and the source tree
itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cuflash

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels_cu").iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_wheel_is_pure_and_carries_the_kernels(built: tuple[Path, Path]) -> None:
    _, wheel = built
    assert wheel.name == f"cuflash-{cuflash.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    prefix = "cuflash/kernels_cu/"
    assert sorted(n.removeprefix(prefix) for n in names if n.startswith(prefix)) == KERNELS
    modules = {path.name for path in (ROOT / "cuflash").glob("*.py")}
    assert modules <= {n.removeprefix("cuflash/") for n in names}
    assert "cuflash/py.typed" in names
    assert not [n for n in names if not n.startswith(("cuflash/", "cuflash-"))]


def test_sdist_can_run_the_tests(built: tuple[Path, Path]) -> None:
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"kernels_cu/{name}" for name in KERNELS} <= names
    for needed in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".ci/run",
        ".clang-format",
        "tests/conftest.py",
        "tests/data/registers.json",
        "bench/run.py",
        "examples/minilm.py",
    ):
        assert needed in names, needed


def test_the_installed_wheel_finds_its_kernels(built: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = built
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import numpy, cuflash; from cuflash import _compile; print(cuflash.__file__);"
        "print(_compile.ROOT); print(_compile.digest());"
        "print(cuflash.attention(*numpy.ones((3, 2, 4))).sum())"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, folder, digest, total = done.stdout.split()
    assert Path(module).is_relative_to(site)
    assert Path(folder) == site / "cuflash" / "kernels_cu"
    from cuflash import _compile

    assert digest == _compile.digest()  # the same kernels, so the same cache entries
    assert float(total) == 8.0


def test_versions_agree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.M)[1] == cuflash.__version__  # type: ignore[index]
    assert f"## {cuflash.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_needs_neither_cupy_nor_tqdm() -> None:
    code = "import sys, cuflash; print([m for m in ('cupy', 'tqdm', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_python_style(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuda_style() -> None:
    sources = [str(path) for path in sorted((ROOT / "kernels_cu").rglob("*.cuh"))]
    tool = Path(sys.executable).with_name("clang-format")
    done = subprocess.run(
        [str(tool), "--dry-run", "-Werror", *sources], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
