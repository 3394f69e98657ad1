"""Wrong score functions, and wrong calls of dropout_mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cuflash
from tests.test_errors import arguments, nothing_runs, raised, z
from tests.test_errors_options import score

__all__ = ["nothing_runs"]  # the fixture that fails when anything computes before it is checked


# ---- dropout_mask


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"dropout_p": 1.0}, ValueError, ("dropout_p", "1.0", "[0, 1)")),
        ({"dropout_p": -1}, ValueError, ("dropout_p", "-1", "[0, 1)")),
        ({"dropout_p": "0.5"}, TypeError, ("dropout_p", "str")),
        ({"seed": -1}, ValueError, ("seed", "-1", "2**64")),
        ({"seed": 2**64}, ValueError, ("seed", "18446744073709551616", "2**64")),
        ({"seed": None}, TypeError, ("seed",)),
        ({"seed": 0.5}, TypeError, ("seed", "float")),
        ({"shape": (3,)}, ValueError, ("shape", "1", "2")),
        ({"shape": (1, 2, 3, -4)}, ValueError, ("shape", "-4")),
        ({"shape": (1, 2, 3, 4.0)}, TypeError, ("shape", "float")),
    ],
    ids=str,
)
def test_wrong_calls_of_dropout_mask(
    changes: dict[str, Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    call = {"seed": 1, "dropout_p": 0.5, "shape": (1, 2, 3, 4), **changes}
    message = raised(kind, cuflash.dropout_mask, *call.values())
    assert all(word in message.split("\n")[0] for word in words), message
    assert "\n  Way out: " in message


# ---- score functions

SCORES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "unknown name": (lambda: score("s + w[h]"), ValueError, ("w",)),
    "misspelt": (lambda: score("s - dcay[h]", decay=z(4, dtype="f4")), ValueError, ("dcay",)),
    "unused": (lambda: score("s", decay=z(4, dtype="f4")), ValueError, ("decay",)),
    "taken": (lambda: score("s + h", h=1.0), ValueError, ("h",)),
    "no code": (lambda: score(""), ValueError, ()),
    "not text": (lambda: cuflash.ScoreMod(3), TypeError, ("int",)),
    "not a mapping": (lambda: cuflash.ScoreMod("s", [1]), TypeError, ("list",)),
    "list": (lambda: score("s + w[h]", w=[1.0, 2.0]), TypeError, ("w", "list")),
    "text": (lambda: score("s + w", w="1"), TypeError, ("w", "str")),
    "name": (lambda: cuflash.ScoreMod("s", {"2w": 1.0}), ValueError, ("2w",)),
    "fn": (lambda: cuflash.ScoreMod("s", fn=3), TypeError, ("fn", "int")),
}


@pytest.mark.parametrize("name", SCORES)
def test_wrong_score_functions(name: str) -> None:
    """Found when it is made, or at the latest by the call; always before anything runs."""
    make, kind, words = SCORES[name]

    def call() -> None:
        args, _ = arguments()
        cuflash.attention(*args, score_mod=make())

    message = raised(kind, call)
    assert all(word in message.split("\n")[0] for word in words), message
    assert "\n  Way out: " in message
