"""Do the recipes run? Every block of docs/recipes.md is executed, in order within its recipe.

A block's first line says what it needs: "```python gpu needs=numba" is run with --gpu where Numba
is installed. What cannot run is reported as skipped, with the reason.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
# Warnings of other libraries are theirs.
FOREIGN = ("thinc", "jax", "torch", "numba")


class Block(NamedTuple):
    """One fenced block."""

    recipe: str
    line: int
    gpu: bool
    needs: tuple[str, ...]
    code: str


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page in order."""
    found = []
    for match in re.finditer(r"^```python(.*)\n((?:.*\n)*?)^```$", text, re.M):
        words = match[1].split()
        needs = tuple(word.removeprefix("needs=") for word in words if word.startswith("needs="))
        assert set(words) <= {"gpu", *(f"needs={name}" for name in needs)}, words
        recipe = re.findall(r"^## (.*)$", text[: match.start()], re.M)[-1]
        line = text[: match.start()].count("\n") + 1
        found.append(Block(recipe, line, "gpu" in words, needs, match[2]))
    return found


BLOCKS = blocks(PAGE.read_text(encoding="utf-8"))
RECIPES = list(dict.fromkeys(block.recipe for block in BLOCKS))


def run(block: Block, names: dict[str, Any]) -> None:
    """Execute a block; tracebacks name the page and its lines."""
    code = compile("\n" * block.line + block.code, str(PAGE), "exec")
    with warnings.catch_warnings():
        if set(block.needs) & set(FOREIGN):
            warnings.simplefilter("ignore")
        exec(code, names)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def of(recipe: str) -> list[Block]:
    return [block for block in BLOCKS if block.recipe == recipe]


def skip_without(blocks: list[Block]) -> None:
    absent = {name for block in blocks for name in block.needs if not installed(name)}
    if absent:
        pytest.skip(f"{', '.join(sorted(absent))} not installed")


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if any(not (b.gpu or b.needs) for b in of(r))]
)
def test_recipe(recipe: str) -> None:
    """What needs neither a GPU nor another library."""
    names: dict[str, Any] = {"__name__": recipe}
    for block in of(recipe):
        if not (block.gpu or block.needs):
            run(block, names)


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if any(b.needs and not b.gpu for b in of(r))]
)
def test_recipe_with_its_library(recipe: str) -> None:
    """What needs no GPU."""
    names: dict[str, Any] = {"__name__": recipe}
    mine = [block for block in of(recipe) if not block.gpu]
    skip_without(mine)
    for block in mine:
        run(block, names)


def test_every_block_is_python() -> None:
    """Those that cannot run here, too."""
    for block in BLOCKS:
        compile(block.code, str(PAGE), "exec")


@pytest.mark.gpu
@pytest.mark.small_gpu
@pytest.mark.parametrize("recipe", [r for r in RECIPES if any(b.gpu for b in of(r))])
def test_recipe_on_a_gpu(recipe: str) -> None:
    names: dict[str, Any] = {"__name__": recipe}
    skip_without(of(recipe))
    for block in of(recipe):
        run(block, names)


def with_stand_ins(recipe: str, **modules: Any) -> dict[str, Any]:
    """Run the CPU blocks of a recipe with stand-ins for the libraries it names."""
    names: dict[str, Any] = {"__name__": recipe}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for block in of(recipe):
            if not block.gpu:
                run(block, names)
    return names


def test_numba_recipe_without_numba() -> None:
    """Uncompiled, the function means the same."""
    names = with_stand_ins("Numba", numba=SimpleNamespace(njit=lambda function: function))
    assert names["out"].shape == (2, 6, 4)


def test_fused_recipe_without_fusing() -> None:
    def fuse() -> Callable[[Any], Any]:
        return lambda function: function

    names = with_stand_ins("Fused neighbours", cupy=SimpleNamespace(fuse=fuse))
    assert names["y"].shape == (2, 6, 4)


def test_a_block_that_fails_is_seen() -> None:
    (block,) = blocks("## Wrong\n\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(block, {})
    assert error.traceback[-1].lineno == 3  # counted from 0: the page's fourth line


def test_every_recipe_runs_something_without_a_gpu() -> None:
    assert len(RECIPES) == 7
    for recipe in RECIPES:
        assert any(not block.gpu for block in of(recipe)), recipe
