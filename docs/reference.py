"""The API reference: every public name's docstring as one page of Markdown.

python -m docs.reference            # exit status 1 when reference.md is not what this makes
python -m docs.reference --write    # make it
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cuflash
from cuflash._explain import Explanation
from cuflash._gradient import Gradients, Pullback
from cuflash._warmup import Warmed

PAGE = Path(__file__).resolve().parent / "reference.md"

# Title -> what stands under it, in the order of a reader's needs.
PARTS: dict[str, list[Any]] = {
    "The call": [cuflash.attention, cuflash.attention_vjp, cuflash.attention_backward],
    "Packed sequences": [
        cuflash.attention_varlen,
        cuflash.attention_varlen_vjp,
        cuflash.attention_varlen_backward,
    ],
    "Joining, dropout": [cuflash.merge_attention, cuflash.dropout_mask],
    "Masks and scores": [cuflash.BlockMask, cuflash.ScoreMod],
    "Looking inside, compiling ahead": [cuflash.explain, cuflash.warmup, cuflash.show_config],
    "Errors": [cuflash.UnsupportedError, cuflash.CompileError],
    "What functions return": [Gradients, Pullback, Explanation, Warmed],
}
_FIELDS = {"Parameters", "Attributes", "Returns", "Raises", "See Also"}


def sections(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of a docstring in NumPy style; the first title is ""."""
    lines, title, body = docstring.splitlines(), "", list[str]()
    number = 0
    while number < len(lines):
        line = lines[number]
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if line and following == "-" * len(line):
            yield title, body
            title, body, number = line, [], number + 2
        else:
            body.append(line)
            number += 1
    yield title, body


def fields(lines: list[str]) -> Iterator[str]:
    """Entries "name : type" with their indented description, as a list."""
    name, words = "", list[str]()
    for line in [*lines, "end"]:
        if line and not line.startswith(" "):
            if name:
                heading, _, kind = name.partition(" : ")
                yield f"* **`{heading}`**" + (f" : {starred(kind)}" if kind else "")
                text = inspect.cleandoc("\n".join(["", *words])).strip()
                yield from (f"  {starred(part)}".rstrip() for part in text.splitlines())
            name, words = line, []
        else:
            words.append(line)


def starred(text: str) -> str:
    """Shapes such as (*B, H) with their star as a star, which two of would make italics."""
    return re.sub(r"(?<!`)\(\*B", r"(\\*B", text)


def prose(lines: list[str]) -> Iterator[str]:
    """Paragraphs; what follows "::" becomes a block, [1]_ a plain [1]."""
    literal = False
    for line in lines:
        if literal and line and not line.startswith("    "):
            literal = False
            yield "```\n"
        line = re.sub(r"\[(\d+)\]_", r"[\1]", re.sub(r"^\.\. \[(\d+)\]", r"* [\1]", line))
        if line.endswith("::"):
            yield line.removesuffix(":")
            yield "\n```text"
            literal = True
        elif not literal:
            yield starred(line)
        elif line:
            yield line.removeprefix("    ")
    if literal:
        yield "```"


def examples(lines: list[str]) -> Iterator[str]:
    """Sessions in blocks, the words between them as they are."""
    inside = False
    for line in lines:
        if line.startswith(">>>") and not inside:
            inside = True
            yield "```pycon"
        elif inside and not line:
            inside = False
            yield "```"
        yield line
    if inside:
        yield "```"


def rendered(docstring: str) -> Iterator[str]:
    """A docstring as Markdown."""
    for title, lines in sections(inspect.cleandoc(docstring).replace("\\\n", "")):
        if title:
            yield f"\n**{title}**\n"
        body = (
            fields(lines)
            if title in _FIELDS
            else examples(lines)
            if title == "Examples"
            else prose(lines)
        )
        yield "\n".join(body).strip("\n")


class _Name:
    """Prints as what a caller would write."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def named(default: Any) -> Any:
    """A module's repr is its path on this machine; its name is the same on all."""
    return _Name(default.__name__) if inspect.ismodule(default) else default


def signature(thing: Any, name: str) -> str:
    """The call, one argument per line when it is long; without annotations, which the text gives."""
    found = inspect.signature(thing)
    plain = [
        p.replace(annotation=inspect.Parameter.empty, default=named(p.default))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    lines, line = [], name + "("
    for part in re.split(r"(?<=,) (?![^()]*\))", text[1:-1]):
        if len(line) + len(part) > 110:
            lines.append(line.rstrip())
            line = " " * (len(name) + 1)
        line += part + " "
    return "\n".join([*lines, line.rstrip() + ")"])


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties with a docstring, those of bases too."""
    for name in sorted(n for n in dir(owner) if not n.startswith("_") or n == "__call__"):
        found = inspect.getattr_static(owner, name)
        if isinstance(found, property):
            yield name, found
        elif isinstance(found, classmethod | staticmethod) or inspect.isfunction(found):
            yield name, getattr(owner, name)


def entry(thing: Any) -> Iterator[str]:
    """A function or a class with its members."""
    name = thing.__name__
    yield f"\n### {name}\n"
    if inspect.isfunction(thing) or thing is cuflash.ScoreMod:
        yield f"```text\n{signature(thing, name)}\n```\n"
    yield from rendered(thing.__doc__ or "")
    if not inspect.isclass(thing) or issubclass(thing, tuple | Exception):
        return
    for member, found in members(thing):
        if not found.__doc__:
            continue
        if isinstance(found, property):
            yield f"\n#### {name}.{member}\n"
        else:
            yield f"\n#### {name}.{member}\n\n```text\n{signature(found, member)}\n```\n"
        yield from rendered(found.__doc__)


def page() -> str:
    """The whole page."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python -m docs.reference --write`; the examples are run by the tests.",
        "",
        "| | |",
        "|---|---|",
    ]
    for title, things in PARTS.items():
        links = ", ".join(f"[`{x.__name__}`](#{x.__name__.lower()})" for x in things)
        lines.append(f"| {title} | {links} |")
    for title, things in PARTS.items():
        lines.append(f"\n## {title}")
        for thing in things:
            lines += entry(thing)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/reference.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
    print("reference.md is up to date" if same else "out of date: python -m docs.reference --write")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
