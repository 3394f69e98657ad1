"""The code blocks of a page: run them, compare what they print, or write it into the page.

The blocks of a page share their names, from top to bottom. A plain block right behind a Python
block is what it prints; a block without one prints nothing. The first line of a block may say what
it needs: "```python needs=torch" is run where torch is installed, "```python gpu" where a GPU is.

    python -m docs.blocks            # run all pages; exit status 1 when one prints something else
    python -m docs.blocks --write    # run them and put what they print into the pages
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
PAGES = ("README.md", "guide.md", "migrating.md", "architecture.md")
_BLOCK = re.compile(r"^```python(.*)\n((?:.*\n)*?)^```\n(?:\n?^```\n((?:.*\n)*?)^```$)?", re.M)


class Block(NamedTuple):
    """A Python block of a page.

    Attributes
    ----------
    line : int
        Of its first line of code, counted from 1.
    code : str
    needs : tuple of str
        Packages, and "gpu".
    printed : str
        What the page says it prints.
    span : tuple of int
        Where the block with its output is in the text.
    """

    line: int
    code: str
    needs: tuple[str, ...]
    printed: str
    span: tuple[int, int]


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page, in order.

    Examples
    --------
    >>> (block,) = blocks('''
    ... ```python needs=torch
    ... print(1)
    ... ```
    ... ```
    ... 1
    ... ```
    ... ''')
    >>> block.line, block.code, block.needs, block.printed
    (3, 'print(1)\\n', ('torch',), '1\\n')
    """
    found = []
    for match in _BLOCK.finditer(text):
        needs = tuple(word.removeprefix("needs=") for word in match[1].split())
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(line, match[2], needs, match[3] or "", match.span()))
    return found


def missing(block: Block, gpu: bool = False) -> list[str]:
    """What a block needs and this machine has not."""
    return [
        name
        for name in block.needs
        if not (gpu if name == "gpu" else importlib.util.find_spec(name) is not None)
    ]


@contextlib.contextmanager
def namespace(page: Path) -> Iterator[dict[str, Any]]:
    """The names that the blocks of a page share.

    They are those of a module that can be imported, as compilers of other libraries expect.
    """
    module = types.ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module
    try:
        yield vars(module)
    finally:
        del sys.modules[module.__name__]


def run(block: Block, names: dict[str, Any], page: Path) -> str:
    """Execute a block in `names` and return what it printed; tracebacks show the page's lines."""
    out = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        if block.needs:  # warnings of other libraries are theirs
            warnings.simplefilter("ignore")
        exec(code, names)
    return out.getvalue()


def rewritten(page: Path, gpu: bool = False) -> str:
    """The page with what its blocks print now; those that cannot run here stay as they are."""
    text = page.read_text(encoding="utf-8")
    parts, end = [], 0
    with namespace(page) as names:
        for block in blocks(text):
            printed = block.printed if missing(block, gpu) else run(block, names, page)
            words = "".join(f" {n if n == 'gpu' else f'needs={n}'}" for n in block.needs)
            parts += [text[end : block.span[0]], f"```python{words}\n{block.code}```\n"]
            parts += [f"```\n{printed}```" if printed else ""]
            end = block.span[1]
    return "".join(parts) + text[end:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all pages; 0 when they say what their blocks print, or say it now."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="change the pages")
    parser.add_argument("--gpu", action="store_true", help="run blocks that need a GPU")
    options = parser.parse_args(arguments)
    changed = 0
    for page in (FOLDER / name for name in PAGES):
        text = rewritten(page, options.gpu)
        if text != page.read_text(encoding="utf-8"):
            changed += 1
            print(f"{page.name}: {'written' if options.write else 'prints something else'}")
            if options.write:
                page.write_text(text, encoding="utf-8")
    return 1 if changed and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
