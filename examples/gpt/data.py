"""A real text that every machine with Python has: the standard library of the interpreter that runs.

Nothing is copied into this repository; the files are read where Python's own licence (PSF) put them.
"docs" is Python's manual as `help()` shows it and the docstrings of all modules, "source" is the
modules themselves. Tokens are bytes.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Folders of the standard library that are not documentation or are not Python's.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
TEST_SHARE = 10  # one document of so many is kept for the test


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Attributes
    ----------
    train, test : uint8 array (bytes,)
        Whole documents each, and no paragraph in both.
    """

    train: np.ndarray
    test: np.ndarray

    @property
    def digest(self) -> str:
        """What tells one text from another."""
        return hashlib.sha256(self.train.tobytes() + b"\0" + self.test.tobytes()).hexdigest()[:16]

    @property
    def unigram_entropy(self) -> float:
        """Nats per byte of the test part to one who knows how often each byte is in it.

        No model that ignores the bytes before can do better.
        """
        share = np.bincount(self.test, minlength=256) / len(self.test)
        share = share[share > 0]
        return float(-(share * np.log(share)).sum())

    def batch(self, rows: int, length: int, *key: int) -> tuple[np.ndarray, np.ndarray]:
        """Random windows of the train part: tokens and the token after each, (rows, length).

        They are a function of `key` alone, so that a resumed run sees what it would have seen.
        """
        starts = np.random.default_rng(key).integers(0, len(self.train) - length, size=rows)
        return _windows(self.train, starts, length)

    def test_batches(
        self, count: int, rows: int, length: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Windows spread evenly over the test part, always the same."""
        starts = np.linspace(0, len(self.test) - length - 1, count * rows).astype(np.int64)
        for some in np.split(starts, count):
            yield _windows(self.test, some, length)


def corpus(text: str, length: int) -> Corpus:
    """The text of that name, split.

    Parameters
    ----------
    text : str
        "docs", "source", or the path of a file.
    length : int
        Bytes that each part must exceed.

    Returns
    -------
    Corpus
        One document in ten is test; of a file, its last tenth.

    Raises
    ------
    ValueError
        A part is too short.
    """
    if text in ("docs", "source"):
        documents = [*_without_repeats(_manual() if text == "docs" else _sources())]
        test = documents[TEST_SHARE - 1 :: TEST_SHARE]
        train = [each for place, each in enumerate(documents) if (place + 1) % TEST_SHARE]
        parts = ["\n\n".join(part).encode() for part in (train, test)]
    else:
        content = Path(text).read_bytes()
        cut = len(content) - len(content) // TEST_SHARE
        parts = [content[:cut], content[cut:]]
    shortest = min(map(len, parts))
    if shortest <= length:
        raise ValueError(
            f"A part of the text has {shortest} bytes, and a window is {length + 1} long.\n"
            f"  text={text!r}: {len(parts[0])} bytes to train, {len(parts[1])} to test\n"
            "  Way out: a longer text (--text FILE), or a shorter --context."
        )
    return Corpus(*(np.frombuffer(part, dtype=np.uint8) for part in parts))


def _manual() -> Iterator[str]:
    """The topics of `help()`, then the docstrings of each module."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for source in _sources():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in some modules
            tree = ast.parse(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        text = "\n\n".join(filter(None, found))
        if text:
            yield text


def _sources() -> Iterator[str]:
    """The modules of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not LEFT_OUT.intersection(path.relative_to(root).parts)
    ]
    for path in tqdm(paths, desc="reading the text", unit="file", leave=False, disable=None):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few are in other encodings


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Documents without the paragraphs that came before: a test of memory is no test."""
    seen: set[str] = set()
    for document in documents:
        fresh = []
        for paragraph in re.split(r"\n\s*\n", document.strip("\n")):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh)


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets) as indices."""
    windows = text[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]
