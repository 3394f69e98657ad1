"""Wrong masks, biases, sinks, seeds and score functions raise before anything runs (museum P, K, J)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.machines import Emulator
from tests.test_errors import BF16, arguments, backward_arguments, nothing_runs, raised, z

__all__ = ["nothing_runs"]  # the fixture that fails when anything computes before it is checked


def blocks(*lead: int, shape: tuple[int, int] = (6, 5), size: int = 16) -> Any:
    """A BlockMask of ones; (2, 4, 6, 5) is what the calls here take."""
    counts = -(-shape[0] // size), -(-shape[1] // size)
    return cuflash.BlockMask.from_blocks(
        np.ones((*lead, *counts), bool), block_size=size, shape=shape
    )


def score(code: str, **params: Any) -> Any:
    return cuflash.ScoreMod(code, params)


# name: (changes as a function, so that nothing is made at import; class; start of the message).
# The call is q (2, 4, 6, 8), k (2, 2, 5, 8), v (2, 2, 5, 16) in float16.
Wrong = tuple[Callable[[], dict[str, Any]], type[Exception], str]
CALLS: dict[str, Wrong] = {
    # K7, J: masks
    "K7 mask float": (lambda: {"mask": z(6, 5)}, TypeError, "mask is float16, not bool."),
    "K7 mask uint8": (lambda: {"mask": z(6, 5, dtype="u1")}, TypeError, "mask is uint8, not bool."),
    "K7 mask int": (lambda: {"mask": z(6, 5, dtype="i8")}, TypeError, "mask is int64, not bool."),
    "mask list": (lambda: {"mask": [[True]]}, TypeError, "mask is a list, not an array."),
    "mask bool": (lambda: {"mask": True}, TypeError, "mask is a bool, not an array."),
    "mask str": (lambda: {"mask": "causal"}, TypeError, "mask is a str, not an array."),
    "mask keys": (
        lambda: {"mask": z(6, 6, dtype=bool)},
        ValueError,
        "mask has shape (6, 6), and must broadcast to (2, 4, 6, 5).",
    ),
    "mask turned": (
        lambda: {"mask": z(5, 6, dtype=bool)},
        ValueError,
        "mask has shape (5, 6), and must broadcast to (2, 4, 6, 5).",
    ),
    "mask heads": (
        lambda: {"mask": z(2, 1, 1, dtype=bool)},
        ValueError,
        "mask has shape (2, 1, 1), and must broadcast to (2, 4, 6, 5).",
    ),
    "mask axes": (
        lambda: {"mask": z(1, 2, 4, 6, 5, dtype=bool)},
        ValueError,
        "mask has shape (1, 2, 4, 6, 5), and must broadcast to (2, 4, 6, 5).",
    ),
    "mask nothing": (
        lambda: {"mask": z(0, 5, dtype=bool)},
        ValueError,
        "mask has shape (0, 5), and must broadcast to (2, 4, 6, 5).",
    ),
    "J5 block mask queries": (
        lambda: {"mask": blocks(shape=(7, 5))},
        ValueError,
        "mask is a BlockMask of 7 queries and 5 keys, and the call has 6 and 5.",
    ),
    "J5 block mask keys": (
        lambda: {"mask": blocks(shape=(6, 20))},
        ValueError,
        "mask is a BlockMask of 6 queries and 20 keys, and the call has 6 and 5.",
    ),
    "J5 block mask turned": (
        lambda: {"mask": blocks().T},
        ValueError,
        "mask is a BlockMask of 5 queries and 6 keys, and the call has 6 and 5.",
    ),
    "J5 block mask heads": (
        lambda: {"mask": blocks(3)},
        ValueError,
        "mask is a BlockMask for (*batch, heads) = (3,), and the call has (2, 4).",
    ),
    "J5 block mask batch": (
        lambda: {"mask": blocks(3, 4)},
        ValueError,
        "mask is a BlockMask for (*batch, heads) = (3, 4), and the call has (2, 4).",
    ),
    "J5 block mask axes": (
        lambda: {"mask": blocks(2, 2, 4)},
        ValueError,
        "mask is a BlockMask for (*batch, heads) = (2, 2, 4), and the call has (2, 4).",
    ),
    "J5 block mask of kv heads": (
        lambda: {"mask": blocks(2, 2)},
        ValueError,
        "mask is a BlockMask for (*batch, heads) = (2, 2), and the call has (2, 4).",
    ),
    # K: bias, sinks
    "K11 bias bool": (
        lambda: {"bias": z(6, 5, dtype=bool)},
        TypeError,
        "bias is bool, and q is float16.",
    ),
    "K3 bias bfloat16": (
        lambda: {"bias": z(6, 5, dtype=BF16)},
        TypeError,
        "bias is bfloat16, and q is float16.",
    ),
    "K3 bias float64": (
        lambda: {"bias": z(6, 5, dtype="f8")},
        TypeError,
        "bias is float64, and q is float16.",
    ),
    "bias int": (
        lambda: {"bias": z(6, 5, dtype="i4")},
        TypeError,
        "bias is int32, and q is float16.",
    ),
    "bias list": (lambda: {"bias": [0.0]}, TypeError, "bias is a list, not an array."),
    "bias number": (lambda: {"bias": 0.5}, TypeError, "bias is a float, not an array."),
    "bias block mask": (
        lambda: {"bias": blocks()},
        TypeError,
        "bias is a BlockMask, not an array.",
    ),
    "bias keys": (
        lambda: {"bias": z(6, 4)},
        ValueError,
        "bias has shape (6, 4), and must broadcast to (2, 4, 6, 5).",
    ),
    "bias kv heads": (
        lambda: {"bias": z(2, 6, 5)},
        ValueError,
        "bias has shape (2, 6, 5), and must broadcast to (2, 4, 6, 5).",
    ),
    "bias batch": (
        lambda: {"bias": z(3, 4, 6, 5)},
        ValueError,
        "bias has shape (3, 4, 6, 5), and must broadcast to (2, 4, 6, 5).",
    ),
    "bias axes": (
        lambda: {"bias": z(1, 1, 1, 6, 5)},
        ValueError,
        "bias has shape (1, 1, 1, 6, 5), and must broadcast to (2, 4, 6, 5).",
    ),
    "sinks shape": (lambda: {"sinks": z(2)}, ValueError, "sinks has shape (2,), and (4,) is"),
    "sinks axes": (lambda: {"sinks": z(2, 4)}, ValueError, "sinks has shape (2, 4), and (4,) is"),
    "sinks 0-d": (lambda: {"sinks": z()}, ValueError, "sinks has shape (), and (4,) is needed."),
    "sinks dtype": (
        lambda: {"sinks": z(4, dtype="f8")},
        TypeError,
        "sinks is float64, and q is float16.",
    ),
    "sinks list": (lambda: {"sinks": [1.0] * 4}, TypeError, "sinks is a list, not an array."),
    # dropout
    "p 1": (
        lambda: {"dropout_p": 1.0, "seed": 1},
        ValueError,
        "dropout_p is 1.0, and must be in [0, 1).",
    ),
    "p int 1": (
        lambda: {"dropout_p": 1, "seed": 1},
        ValueError,
        "dropout_p is 1.0, and must be in [0, 1).",
    ),
    "p 1.5": (
        lambda: {"dropout_p": 1.5, "seed": 1},
        ValueError,
        "dropout_p is 1.5, and must be in [0, 1).",
    ),
    "p negative": (
        lambda: {"dropout_p": -0.1, "seed": 1},
        ValueError,
        "dropout_p is -0.1, and must be in [0, 1).",
    ),
    "p nan": (lambda: {"dropout_p": np.nan, "seed": 1}, ValueError, "dropout_p is nan, which is"),
    "p str": (lambda: {"dropout_p": "0.1"}, TypeError, "dropout_p is a str, not a real number."),
    "p bool": (lambda: {"dropout_p": True}, TypeError, "dropout_p is a bool, not a real number."),
    "p none": (lambda: {"dropout_p": None}, TypeError, "dropout_p is a NoneType, not a real"),
    "no seed": (
        lambda: {"dropout_p": 0.1},
        ValueError,
        "dropout_p is 0.1, and seed was not given.",
    ),
    "seed negative": (
        lambda: {"dropout_p": 0.1, "seed": -1},
        ValueError,
        "seed is -1, and must be in [0, 2**64).",
    ),
    "seed 2**64": (
        lambda: {"dropout_p": 0.1, "seed": 2**64},
        ValueError,
        "seed is 18446744073709551616, and must be in [0, 2**64).",
    ),
    "seed float": (
        lambda: {"dropout_p": 0.1, "seed": 1.0},
        TypeError,
        "seed is a float, not an int.",
    ),
    "seed bool": (
        lambda: {"dropout_p": 0.1, "seed": True},
        TypeError,
        "seed is a bool, not an int.",
    ),
    "seed int64": (
        lambda: {"dropout_p": 0.1, "seed": z(1, dtype="i8")},
        TypeError,
        "seed is an array of int64, not uint64.",
    ),
    "seed two": (
        lambda: {"dropout_p": 0.1, "seed": z(2, dtype="u8")},
        ValueError,
        "seed has shape (2,), and one element is needed.",
    ),
    "seed wrong without dropout": (lambda: {"seed": -1}, ValueError, "seed is -1, and must be in"),
    # score functions
    "score str": (lambda: {"score_mod": "s * 2"}, TypeError, "score_mod is a str, not a ScoreMod."),
    "score function": (
        lambda: {"score_mod": abs},
        TypeError,
        "score_mod is a builtin_function_or_method, not a ScoreMod.",
    ),
    "score dtype": (
        lambda: {"score_mod": score("s + w[h]", w=z(4, dtype="f8"))},
        TypeError,
        "score_mod parameter w is float64, and q is float16.",
    ),
    "score name taken": (
        lambda: {"score_mod": score("s + bias[h]", bias=z(4, dtype="f4"))},
        ValueError,
        "score_mod has a parameter 'bias', which is an argument of the call too.",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_options_of_attention(name: str) -> None:
    changes, kind, start = CALLS[name]
    args, options = arguments(**changes())
    message = raised(kind, cuflash.attention, *args, **options)
    sentence, *seen, way_out = message.split("\n")
    assert sentence.startswith(start), message
    assert seen and all(line.startswith("  ") for line in seen), message
    assert way_out.startswith("  Way out: "), message


@pytest.mark.parametrize("name", CALLS)
def test_backward_and_vjp_refuse_the_same(name: str) -> None:
    changes, kind, start = CALLS[name]
    args, options = arguments(**changes())
    assert raised(kind, cuflash.attention_vjp, *args, **options).startswith(start)
    args, options = backward_arguments(**changes())
    assert raised(kind, cuflash.attention_backward, *args, **options).startswith(start)


@pytest.mark.parametrize("name", CALLS)
def test_a_device_refuses_the_same_before_any_launch(name: str) -> None:
    changes, kind, start = CALLS[name]
    with Emulator() as machine:
        args, options = arguments(**changes())
        assert raised(kind, machine.attention, *args, **options).startswith(start)
        assert not machine.device.launches


def test_a_warm_call_does_not_excuse_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared calls are kept by what they depend on: masks of numbers and other patterns are not the same."""
    monkeypatch.undo()
    args, _ = arguments()
    good = {"mask": z(6, 5, dtype=bool), "dropout_p": 0.5, "seed": 1}
    cuflash.attention(*args, **good)
    cuflash.attention(*args, mask=blocks(4))
    for kind, wrong in (
        (TypeError, {"mask": z(6, 5, dtype="u1")}),
        (TypeError, {"seed": True}),
        (TypeError, {"seed": 1.0}),
        (TypeError, {"dropout_p": True}),
        (ValueError, {"seed": None}),
        (ValueError, {"mask": blocks(3)}),
    ):
        raised(kind, cuflash.attention, *args, **{**good, **wrong})


# ---- gradients

BACKWARD: dict[str, Wrong] = {
    "bias not given": (
        lambda: {"wrt": ("bias",)},
        ValueError,
        "wrt names 'bias', and bias was not given.",
    ),
    "sinks not given": (
        lambda: {"wrt": ("q", "sinks")},
        ValueError,
        "wrt names 'sinks', and sinks was not given.",
    ),
    "mask has no gradient": (
        lambda: {"wrt": ("mask",), "mask": z(6, 5, dtype=bool)},
        ValueError,
        "wrt names 'mask', which is no argument of this call.",
    ),
    "unknown parameter": (
        lambda: {"wrt": ("decay",), "score_mod": score("s * w[h]", w=z(4, dtype="f4"))},
        ValueError,
        "wrt names 'decay', which is no argument of this call.",
    ),
    "number": (
        lambda: {"wrt": ("cap",), "score_mod": score("s * cap", cap=2.0)},
        ValueError,
        "wrt names 'cap', which is a number, and only arrays have gradients.",
    ),
    "dbias shape": (
        lambda: {"bias": z(4, 1, 5), "wrt": ("bias",), "dbias": z(4, 6, 5)},
        ValueError,
        "dbias has shape (4, 6, 5), and (4, 1, 5) is needed.",
    ),
    "dbias dtype": (
        lambda: {"bias": z(4, 1, 5), "wrt": ("bias",), "dbias": z(4, 1, 5, dtype="f4")},
        TypeError,
        "dbias is float32, and float16 is needed.",
    ),
    "dbias unasked": (
        lambda: {"bias": z(4, 1, 5), "dbias": z(4, 1, 5)},
        ValueError,
        "dbias was given, and wrt does not name 'bias'.",
    ),
    "D13 dbias stride 0": (
        lambda: {
            "bias": z(4, 6, 5),
            "wrt": ("bias",),
            "dbias": np.lib.stride_tricks.as_strided(z(5), (4, 6, 5), (0, 0, 2)),
        },
        ValueError,
        "dbias has strides (0, 0, 2) for shape (4, 6, 5): elements share memory.",
    ),
    "no seed": (lambda: {"dropout_p": 0.5}, ValueError, "dropout_p is 0.5, and seed was not given"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_wrong_options_of_attention_backward(name: str) -> None:
    changes, kind, start = BACKWARD[name]
    args, options = backward_arguments(**changes())
    message = raised(kind, cuflash.attention_backward, *args, **options)
    assert message.startswith(start), message
    assert "\n  Way out: " in message


def test_dbias_must_not_overlap_what_is_read() -> None:
    bias = z(2, 4, 6, 5)
    for shared in (bias, bias[:, ::-1]):
        args, options = backward_arguments(bias=bias, dbias=shared, wrt=("bias",))
        message = raised(ValueError, cuflash.attention_backward, *args, **options)
        assert message.startswith("dbias shares memory with bias.")
