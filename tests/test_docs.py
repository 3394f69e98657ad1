"""Does the documentation tell the truth? Its code runs, prints what it says, and what it names exists."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cuflash
from docs import blocks, reference

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs"
ALL = sorted(FOLDER.glob("*.md"))


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


# ---- the pages' own code


def check(name: str, gpu: bool) -> None:
    """Run a page's blocks in order; those that cannot run here say why, as a skip at the end."""
    path, skipped = FOLDER / name, []
    with blocks.namespace(path) as names:
        for block in blocks.blocks(path.read_text(encoding="utf-8")):
            if absent := blocks.missing(block, gpu):
                skipped.append(f"line {block.line}: no {' and no '.join(absent)}")
            else:
                assert blocks.run(block, names, path) == block.printed, f"{name}:{block.line}"
    if skipped:
        pytest.skip("all other blocks passed; " + "; ".join(skipped))


@pytest.mark.parametrize("name", blocks.PAGES)
def test_blocks_print_what_the_page_says(name: str, request: pytest.FixtureRequest) -> None:
    check(name, gpu=bool(request.config.getoption("--gpu")))


@pytest.mark.parametrize("name", blocks.PAGES)
def test_every_block_is_python(name: str) -> None:
    """Those that cannot run here, too."""
    for block in blocks.blocks((FOLDER / name).read_text(encoding="utf-8")):
        compile(block.code, name, "exec")


def test_every_page_is_run_by_somebody() -> None:
    # recipes.md has a runner of its own, reference.md is made from docstrings.
    assert {path.name for path in ALL} == {*blocks.PAGES, "recipes.md", "reference.md"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_every_fence_is_known(path: Path) -> None:
    """A block in a language that nobody runs, or that a typing error hides, would be a gap."""
    fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.M)
    assert len(fences) % 2 == 0
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        assert closing == ""
        assert opening.split(" ")[0] in ("", "python", "text", "pycon"), opening
    found = len(blocks.blocks(path.read_text(encoding="utf-8")))
    assert found == sum(fence.startswith("python") for fence in fences)


# ---- the runner


GOOD = (
    "# Title\n\n```python\nprint(1)\nx = 2\n```\n```\n1\n```\n\ntext\n\n```python\nprint(x)\n```\n"
)


def test_runner_compares_and_writes(tmp_path: Path) -> None:
    path = page(tmp_path, GOOD)
    assert blocks.rewritten(path) == GOOD + "```\n2\n```"
    path.write_text(blocks.rewritten(path) + "\n")
    assert blocks.rewritten(path) == path.read_text()
    first, second = blocks.blocks(path.read_text())
    assert (first.line, first.printed) == (4, "1\n")
    assert (second.line, second.printed) == (14, "2\n")


def test_runner_shows_the_line_of_a_failure(tmp_path: Path) -> None:
    path = page(tmp_path, "one\n\n```python\nx = 1\nassert x == 2\n```\n")
    with blocks.namespace(path) as names, pytest.raises(AssertionError) as error:
        blocks.run(blocks.blocks(path.read_text())[0], names, path)
    assert error.traceback[-1].lineno == 4  # counted from 0


def test_a_page_that_prints_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page(tmp_path, GOOD.replace("```\n1\n```", "```\n7\n```"))
    monkeypatch.setattr(blocks, "FOLDER", tmp_path)
    monkeypatch.setattr(blocks, "PAGES", ("page.md",))
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path)
    assert blocks.main([]) == 1
    with pytest.raises(AssertionError, match=r"page\.md:4"):
        check("page.md", gpu=False)
    assert blocks.main(["--write"]) == 0
    assert blocks.main([]) == 0


def test_what_is_missing_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "```python gpu needs=no_such_package\n1 / 0\n```\n"
    page(tmp_path, text)
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="line 2: no gpu and no no_such_package"):
        check("page.md", gpu=False)
    assert blocks.rewritten(tmp_path / "page.md") == text


def test_examples_of_the_runner() -> None:
    result = doctest.testmod(blocks)
    assert result.attempted and not result.failed


# ---- the reference


def test_reference_is_what_the_docstrings_make() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        "python -m docs.reference --write"
    )
    command = [sys.executable, "-m", "docs.reference"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_reference_holds_every_public_name() -> None:
    shown = {thing.__name__ for things in reference.PARTS.values() for thing in things}
    public = {name for name in cuflash.__all__ if not name.startswith("__")}
    assert public <= shown


def test_reference_holds_every_parameter() -> None:
    text = reference.PAGE.read_text(encoding="utf-8")
    for things in reference.PARTS.values():
        for thing in filter(inspect.isfunction, things):
            part = text.split(f"\n### {thing.__name__}\n")[1].split("\n### ")[0]
            described = set(re.findall(r"\w+", " ".join(re.findall(r"^\* \*\*`(.*)`", part, re.M))))
            assert set(inspect.signature(thing).parameters) <= described, thing.__name__


def test_sessions_of_the_reference() -> None:
    """Sessions of one entry share their names, as in the docstring they come from."""
    text, ran = reference.PAGE.read_text(encoding="utf-8"), 0
    for part in re.split(r"^#{3,4} ", text, flags=re.M)[1:]:
        name = part.splitlines()[0]
        code = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", part, re.M | re.S))
        names: dict[str, Any] = {}
        session = doctest.DocTestParser().get_doctest(code, names, name, str(reference.PAGE), 0)
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(session)
        assert not runner.failures, name
        ran += runner.tries
    assert ran == text.count("\n>>> ") - text.count("# doctest: +SKIP") > 100


def test_sections_of_a_docstring() -> None:
    text = reference.rendered(
        "Sum.\n\nParameters\n----------\nx : array (*B, L)\n    What.\n\nReturns\n-------\nint\n\n"
        "Notes\n-----\nSee [1]_::\n\n    1 0\n\nExamples\n--------\n>>> 1\n1\n\nAnd:\n\n>>> 2\n2"
    )
    assert "\n".join(text).split("\n\n") == [
        "Sum.",
        "**Parameters**",
        "* **`x`** : array (\\*B, L)\n  What.",
        "**Returns**",
        "* **`int`**",
        "**Notes**",
        "See [1]:",
        "```text\n1 0\n```",
        "**Examples**",
        "```pycon\n>>> 1\n1\n```",
        "And:",
        "```pycon\n>>> 2\n2\n```",
    ]


# ---- what pages name


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, target


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_files_and_options_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`(?:examples|docs|cuflash|kernels_cu|tests|bench)/[\w./]+`", text):
        assert (ROOT / name.strip("`")).exists(), name
    for module in re.findall(r"python -m ([\w.]+)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


def test_list_of_examples_is_whole() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", text, re.M))
    assert listed == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_no_speed_is_claimed() -> None:
    """Until results of a GPU are committed."""
    if not list((ROOT / "bench" / "results").glob("*.json")):
        for path in ALL:
            assert not re.search(
                r"\d\s*(TFLOP|times faster|x faster|GB/s)", path.read_text(encoding="utf-8")
            ), path.name
