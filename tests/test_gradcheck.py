"""The gradient check checks: it passes on every machine, and each kind of wrong gradient makes it fail."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
import gradcheck
from tests.machines import Emulator

CASES = {case.name: case for case in gradcheck.cases()}


def test_command_finds_all_gradients_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert gradcheck.main([]) == 0
    text = capsys.readouterr().out
    for name in (*CASES, "transformer of two layers"):
        assert re.search(rf"^{re.escape(name)} +\de-\d\d  ok ", text, re.M), name
    assert "WRONG" not in text


@pytest.mark.gpu
def test_command_on_a_gpu() -> None:
    assert gradcheck.main(["--device", "cupy"]) == 0


def test_every_differentiable_input_is_in_a_case() -> None:
    names = {name for case in CASES.values() for name in case.wrt}
    assert names == {"q", "k", "v", "bias", "alibi_slopes", "sinks", "table", "decay"}
    assert CASES["everything"].wrt == tuple(CASES["everything"].arrays)
    assert set(CASES["everything"].wrt) == names


@pytest.mark.parametrize("seed", [1, 2])
def test_other_data_and_directions(seed: int) -> None:
    for case in gradcheck.cases(seed):
        for name, error in case.errors(seed=seed).items():
            assert error < gradcheck.ALLOWED, (case.name, name)


# ---- float64 kernels in the emulator


# Each option alone is in the tests of the wide kernels, by rule T.
BRIEF = ("lse alone", "packed sequences", "everything")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in BRIEF else pytest.mark.thorough) for n in CASES],
)
def test_kernels(name: str) -> None:
    with Emulator("sm_80") as machine:
        errors = CASES[name].errors()
        assert machine.device.launches  # by kernels, and not by the CPU backend
    assert max(errors.values()) < gradcheck.ALLOWED, errors


@pytest.mark.thorough
def test_transformer_by_kernels() -> None:
    with Emulator("sm_80"):
        errors = gradcheck.transformer_errors(names=("x", "0.qkv", "0.slopes", "1.sinks"))
    assert max(errors.values()) < gradcheck.ALLOWED, errors


# ---- can it fail?


def tampered(monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Any], Any]) -> None:
    """From now on the gradient `name` of every call has been through `spoil`."""
    for function in ("attention_vjp", "attention_varlen_vjp"):
        whole = getattr(cuflash, function)

        def wrong(*arrays: Any, whole: Any = whole, **options: Any) -> Any:
            result, pullback = whole(*arrays, **options)

            def spoiled(dout: Any, dlse: Any = None) -> Any:
                grads = pullback(dout, dlse)
                params = {
                    key: spoil(x) if key == name else x
                    for key, x in (grads.score_params or {}).items()
                }
                found = getattr(grads, name, None)
                changed = {} if found is None else {name: spoil(found)}
                return grads._replace(score_params=params, **changed)

            return result, spoiled

        monkeypatch.setattr(cuflash, function, wrong)


def one_element(x: np.ndarray) -> np.ndarray:
    """Off by a millionth of the whole gradient in a single place."""
    x = x.copy()
    x.flat[x.size // 2] += 1e-5 * np.linalg.norm(x)
    return x


SPOILERS = [one_element, np.zeros_like, np.negative, lambda x: x * np.nan, lambda x: x * (1 + 1e-6)]
NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks", "table", "decay")


@pytest.mark.parametrize("spoil", SPOILERS, ids=["one", "zero", "sign", "nan", "factor"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_gradient_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Any], Any]
) -> None:
    tampered(monkeypatch, name, spoil)
    concerned = [case for case in CASES.values() if name in case.wrt]
    assert concerned
    for case in concerned:
        errors = case.errors()
        assert not errors.pop(name) < gradcheck.ALLOWED, case.name
        assert max(errors.values()) < gradcheck.ALLOWED, case.name


@pytest.mark.parametrize("spoil", [one_element, lambda x: x * np.nan], ids=["one", "nan"])
def test_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: Any
) -> None:
    tampered(monkeypatch, "k", spoil)
    assert gradcheck.main([]) == 1
    text = capsys.readouterr().out
    assert len(re.findall(" WRONG ", text)) == len(CASES) + 1


def test_a_loss_that_does_not_move_is_no_success() -> None:
    x = np.ones(3)
    assert gradcheck.relative_error(lambda _: 1.0, {"x": x}, "x", np.zeros(3)) == np.inf


def test_examples() -> None:
    result = doctest.testmod(gradcheck)
    assert result.attempted and not result.failed
