"""Wrong input raises, before anything runs, and says which two things disagree (museum family P and api errors)."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import _cpu, _launch

BF16 = np.dtype(ml_dtypes.bfloat16)


def z(*shape: int, dtype: Any = "float16") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check comes before any computation."""

    def ran(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed before it was checked")

    for name in ("forward", "backward", "merge"):
        monkeypatch.setattr(_cpu, name, ran)
    monkeypatch.setattr(_launch.Step, "__call__", ran)


def arguments(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    """A right call, changed."""
    call: dict[str, Any] = {"q": z(2, 4, 6, 8), "k": z(2, 2, 5, 8), "v": z(2, 2, 5, 16), **changes}
    return [call.pop(name) for name in ("q", "k", "v")], call


def raised(kind: type[Exception], function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the error `function` raises: exactly `kind`, in three parts."""
    with pytest.raises(kind) as info:
        function(*args, **kwargs)
    assert type(info.value) is kind
    return str(info.value)


MASKED = np.ma.masked_array(z(2, 4, 6, 8), mask=False)
READ_ONLY = z(2, 4, 6, 16)
READ_ONLY.flags.writeable = False
WINDOW = "window left|window right|window"

# name: (changes, class, start of the message)
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # not an array
    "list": ({"q": [[1.0]]}, TypeError, "q is a list, not an array."),
    "none": ({"k": None}, TypeError, "k is None, not an array."),
    "number": ({"v": 1.0}, TypeError, "v is a float, not an array."),
    "numpy scalar": ({"v": np.float16(1)}, TypeError, "v is a float16, not an array."),
    "masked": ({"q": MASKED}, TypeError, "q is a masked array, and its mask would be ignored."),
    "slopes list": ({"alibi_slopes": [1, 2, 3, 4]}, TypeError, "alibi_slopes is a list, not"),
    "out list": ({"out": []}, TypeError, "out is a list, not an array."),
    # wrong dtype
    "ints": (
        {"q": z(2, 4, 6, 8, dtype="int32")},
        TypeError,
        "q is int32, which is not one of float16",
    ),
    "bools": ({"q": z(2, 4, 6, 8, dtype=bool)}, TypeError, "q is bool, which is not one of"),
    "complex": ({"q": z(2, 4, 6, 8, dtype="complex64")}, TypeError, "q is complex64, which"),
    "objects": ({"q": z(2, 4, 6, 8, dtype=object)}, TypeError, "q is object, which is not one of"),
    "bits": ({"q": z(2, 4, 6, 8, dtype="uint16")}, TypeError, "q is uint16, which is not one of"),
    "fp8": ({"q": z(2, 4, 6, 8, dtype=ml_dtypes.float8_e4m3fn)}, TypeError, "q is float8_e4m3fn, "),
    "swapped": ({"q": z(2, 4, 6, 8, dtype=">f2")}, TypeError, "q is byte-swapped float16, which"),
    "longdouble": ({"q": z(2, 4, 6, 8, dtype="g")}, TypeError, f"q is {np.dtype('g').name}, which"),
    "mixed k": ({"k": z(2, 2, 5, 8, dtype=BF16)}, TypeError, "k is bfloat16, and q is float16."),
    "mixed v": ({"v": z(2, 2, 5, 16, dtype="f4")}, TypeError, "v is float32, and q is float16."),
    "out dtype": (
        {"out": z(2, 4, 6, 16, dtype="f4")},
        TypeError,
        "out is float32, and q is float16.",
    ),
    "slopes dtype": (
        {"alibi_slopes": z(4, dtype="f8")},
        TypeError,
        "alibi_slopes is float64, and q",
    ),
    # shapes
    "rank 1": ({"q": z(8)}, ValueError, "q has 1 axes, and needs at least 2."),
    "rank 0": ({"q": z()}, ValueError, "q has 0 axes, and needs at least 2."),
    "rank of k": ({"k": z(2, 5, 8)}, ValueError, "k has 3 axes, and q has 4."),
    "rank of v": ({"v": z(1, 2, 2, 5, 8)}, ValueError, "v has 5 axes, and q has 4."),
    "head dim": ({"k": z(2, 2, 5, 16)}, ValueError, "k has head_dim 16, and q has head_dim 8."),
    "keys": ({"v": z(2, 2, 7, 16)}, ValueError, "v has 7 keys, and k has 5 keys."),
    "heads of v": ({"v": z(2, 4, 5, 16)}, ValueError, "v has 4 heads, and k has 2 heads."),
    "P/E7 6,4": (
        {"q": z(2, 6, 6, 8), "k": z(2, 4, 5, 8), "v": z(2, 4, 5, 8)},
        ValueError,
        "k has 4 heads, which does not divide the 6 heads of q.",
    ),
    "P/E7 4,6": (
        {"k": z(2, 6, 5, 8), "v": z(2, 6, 5, 8)},
        ValueError,
        "k has 6 heads, which does not divide the 4 heads of q.",
    ),
    "P/E7 4,0": (
        {"k": z(2, 0, 5, 8), "v": z(2, 0, 5, 8)},
        ValueError,
        "k has 0 heads, which does not divide the 4 heads of q.",
    ),
    "batch of k": ({"k": z(3, 2, 5, 8)}, ValueError, "k has 3 on batch axis 0, and q has 2."),
    "batch of q": (
        {"q": z(1, 4, 6, 8)},
        ValueError,
        "k has 2 on batch axis 0, and q has 1.",
    ),
    "D 0": ({"q": z(2, 4, 6, 0), "k": z(2, 2, 5, 0)}, ValueError, "q has head_dim 0, and needs"),
    "Dv 0": ({"v": z(2, 2, 5, 0)}, ValueError, "v has head_dim 0, and needs at least 1."),
    "slopes 3": (
        {"alibi_slopes": z(3)},
        ValueError,
        "alibi_slopes has shape (3,), and (4,) or (2, 4)",
    ),
    "slopes axes": (
        {"alibi_slopes": z(4, 2)},
        ValueError,
        "alibi_slopes has shape (4, 2), and (4,)",
    ),
    "slopes 0-d": (
        {"alibi_slopes": z()},
        ValueError,
        "alibi_slopes has shape (), and (4,) or (2, 4)",
    ),
    "out shape": (
        {"out": z(2, 4, 6, 8)},
        ValueError,
        "out has shape (2, 4, 6, 8), and (2, 4, 6, 16)",
    ),
    "out read-only": ({"out": READ_ONLY}, ValueError, "out is read-only."),
    "D13 out stride 0": (
        {"out": np.lib.stride_tricks.as_strided(z(16), (2, 4, 6, 16), (0, 0, 0, 2))},
        ValueError,
        "out has strides (0, 0, 0, 2) for shape (2, 4, 6, 16): elements share memory.",
    ),
    # values
    "causal int": ({"causal": 1}, TypeError, "causal is an int, not a bool."),
    "causal array": ({"causal": np.array([True])}, TypeError, "causal is a ndarray, not a bool."),
    "causal none": ({"causal": None}, TypeError, "causal is a NoneType, not a bool."),
    "return_lse int": ({"return_lse": 1}, TypeError, "return_lse is an int, not a bool."),
    "A9 window -1": (
        {"window": (-1, 0)},
        ValueError,
        "window left is -1, and must be >= 0 or None.",
    ),
    "A9 window -W": (
        {"window": (4, -4)},
        ValueError,
        "window right is -4, and must be >= 0 or None",
    ),
    "window float": ({"window": (1.0, 0)}, TypeError, "window left is a float, not an int."),
    "window bool": ({"window": (True, 0)}, TypeError, "window left is a bool, not an int."),
    "window int": ({"window": 3}, TypeError, "window is an int, not a pair."),
    "window str": ({"window": "12"}, TypeError, "window is a str, not a pair."),
    "window 3": ({"window": (1, 2, 3)}, ValueError, "window has 3 entries, and must have 2."),
    "offset float": ({"q_offset": 1.0}, TypeError, "q_offset is a float, not an int."),
    "offset bool": ({"q_offset": True}, TypeError, "q_offset is a bool, not an int."),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale is nan, which is not finite."),
    "scale inf": ({"scale": -np.inf}, ValueError, "scale is -inf, which is not finite."),
    "scale huge": ({"scale": 1e300}, ValueError, "scale is 1e+300, and float32 scores (of float16"),
    "scale str": ({"scale": "1"}, TypeError, "scale is a str, not a real number."),
    "scale bool": ({"scale": True}, TypeError, "scale is a bool, not a real number."),
    "scale complex": ({"scale": 1j}, TypeError, "scale is a complex, not a real number."),
    "scale array": ({"scale": np.ones(1)}, TypeError, "scale is a ndarray, not a real number."),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap is 0.0, and must be > 0."),
    "softcap -1": ({"softcap": -1}, ValueError, "softcap is -1.0, and must be > 0."),
    "softcap inf": ({"softcap": np.inf}, ValueError, "softcap is inf, which is not finite."),
    "softcap nan": ({"softcap": np.nan}, ValueError, "softcap is nan, which is not finite."),
    "softcap tiny": ({"softcap": 1e-300}, ValueError, "softcap is 1e-300, and float32 scores (of"),
    "softcap bool": ({"softcap": True}, TypeError, "softcap is a bool, not a real number."),
    "layout name": ({"layout": "BHLD"}, ValueError, "layout is 'BHLD', not one of ('HLD', 'LHD')."),
    "layout kind": ({"layout": 1}, TypeError, "layout is an int, not a str."),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_of_attention(name: str) -> None:
    changes, kind, start = CALLS[name]
    args, options = arguments(**changes)
    message = raised(kind, cuflash.attention, *args, **options)
    sentence, *seen, way_out = message.split("\n")
    assert sentence.startswith(start), message
    assert seen and all(line.startswith("  ") for line in seen), message
    assert way_out.startswith("  Way out: "), message


@pytest.mark.parametrize("name", [n for n in CALLS if "out" not in n and "return_lse" not in n])
def test_vjp_refuses_the_same(name: str) -> None:
    changes, kind, start = CALLS[name]
    args, options = arguments(**changes)
    assert raised(kind, cuflash.attention_vjp, *args, **options).startswith(start)


def test_a_call_that_was_right_does_not_excuse_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared calls are kept under their options; 1 == True == 1.0, but only one of them is right."""
    monkeypatch.undo()
    q = z(2, 4, 8)
    cuflash.attention(q, q, q, causal=True, window=(1, 0), q_offset=1, scale=1.0)
    for wrong in ({"causal": 1}, {"window": (True, 0)}, {"window": (1.0, 0)}, {"q_offset": True}):
        good = {"causal": True, "window": (1, 0), "q_offset": 1, "scale": 1.0}
        raised(TypeError, cuflash.attention, q, q, q, **{**good, **wrong})


def test_the_message_shows_the_arguments_as_seen() -> None:
    q, k, v = z(2, 1024, 32, 128), z(2, 2048, 5, 128), z(2, 2048, 5, 64)
    message = raised(ValueError, cuflash.attention, q, k, v, layout="LHD", causal=True)
    assert message == (
        "k has 5 heads, which does not divide the 32 heads of q.\n"
        "  q  (2, 1024, 32, 128) float16   (batch, len_q, heads, head_dim)\n"
        "  k  (2, 2048, 5, 128) float16   (batch, len_k, heads_kv, head_dim)\n"
        "  v  (2, 2048, 5, 64) float16   (batch, len_k, heads_kv, head_dim_v)\n"
        "  causal=True, layout='LHD'\n"
        '  Way out: heads of k and v must divide those of q; layout="LHD" reads (L, H, D).'
    )


@pytest.mark.parametrize("option", ["attn_mask", "dropout", "is_causal", "Causal"])
def test_K11_an_unknown_option_is_never_ignored(option: str) -> None:
    args, _ = arguments()
    with pytest.raises(TypeError, match=option):
        cuflash.attention(*args, **{option: None})


# ---- out=


def test_P3_out_must_not_overlap_the_inputs() -> None:
    fused = z(3, 2, 4, 6, 8)
    q, k, v = fused
    message = raised(ValueError, cuflash.attention, q, k, v, out=q)
    assert message.startswith("out shares memory with q.")
    shifted = fused.reshape(-1)[4 : 4 + q.size].reshape(q.shape)
    assert raised(ValueError, cuflash.attention, q, k, v, out=shifted).startswith("out shares")
    assert raised(ValueError, cuflash.attention, q, k, v, out=v[:, ::-1]).startswith("out shares")


def test_P3_out_may_lie_between_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices of one fused array interleave but share no element."""
    monkeypatch.undo()
    fused = np.zeros((2, 6, 4, 4, 8), np.float32)  # batch, L, (q k v out), H, D
    fused[:, :, :3] = np.random.default_rng(0).standard_normal((2, 6, 3, 4, 8))
    q, k, v, out = (fused[:, :, n] for n in range(4))
    expected = cuflash.attention(q.copy(), k.copy(), v.copy(), layout="LHD")
    assert cuflash.attention(q, k, v, layout="LHD", out=out) is out
    assert np.array_equal(out, expected)


# ---- backward


def backward_arguments(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    call: dict[str, Any] = {
        "dout": z(2, 4, 6, 16),
        "q": z(2, 4, 6, 8),
        "k": z(2, 2, 5, 8),
        "v": z(2, 2, 5, 16),
        "out": z(2, 4, 6, 16),
        "lse": z(2, 4, 6, dtype="f4"),
        **changes,
    }
    return [call.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")], call


SAME = z(2, 4, 6, 8)
BACKWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "L7 lse none": ({"lse": None}, TypeError, "lse is None, not an array."),
    "lse dtype": ({"lse": z(2, 4, 6)}, TypeError, "lse is float16, and float32 is needed."),
    "lse shape": (
        {"lse": z(2, 6, 4, dtype="f4")},
        ValueError,
        "lse has shape (2, 6, 4), and (2, 4, 6)",
    ),
    "dlse shape": ({"dlse": z(6, dtype="f4")}, ValueError, "dlse has shape (6,), and (2, 4, 6)"),
    "dlse dtype": ({"dlse": z(2, 4, 6)}, TypeError, "dlse is float16, and float32 is needed."),
    "dout shape": (
        {"dout": z(2, 4, 6, 8)},
        ValueError,
        "dout has shape (2, 4, 6, 8), and (2, 4, 6, 16)",
    ),
    "dout dtype": (
        {"dout": z(2, 4, 6, 16, dtype="f4")},
        TypeError,
        "dout is float32, and q is float16.",
    ),
    "out shape": (
        {"out": z(1, 4, 6, 16)},
        ValueError,
        "out has shape (1, 4, 6, 16), and (2, 4, 6, 16)",
    ),
    "wrt unknown": (
        {"wrt": ("q", "x")},
        ValueError,
        "wrt names 'x', which is no argument of this call.",
    ),
    "wrt bias": ({"wrt": ("bias",)}, ValueError, "wrt names 'bias', and bias was not given."),
    "wrt not given": (
        {"wrt": ("alibi_slopes",)},
        ValueError,
        "wrt names 'alibi_slopes', and alibi_slopes was not given.",
    ),
    "wrt str": ({"wrt": "q"}, TypeError, "wrt is a str, not a tuple of names."),
    "wrt none": ({"wrt": None}, TypeError, "wrt is a NoneType, not a tuple of names."),
    "wrt ints": ({"wrt": (0,)}, TypeError, "wrt holds an int, not only names."),
    "deterministic": ({"deterministic": 1}, TypeError, "deterministic is an int, not a bool."),
    "dq shape": (
        {"dq": z(2, 4, 6, 16)},
        ValueError,
        "dq has shape (2, 4, 6, 16), and (2, 4, 6, 8)",
    ),
    "dk shape": ({"dk": z(2, 4, 5, 8)}, ValueError, "dk has shape (2, 4, 5, 8), and (2, 2, 5, 8)"),
    "dv dtype": ({"dv": z(2, 2, 5, 16, dtype="f4")}, TypeError, "dv is float32, and q is float16."),
    "dq unasked": (
        {"dq": z(2, 4, 6, 8), "wrt": ("k",)},
        ValueError,
        "dq was given, and wrt does not name 'q'.",
    ),
    "dq is q": ({"dq": SAME, "q": SAME}, ValueError, "dq shares memory with q."),
    "causal": ({"causal": 0}, TypeError, "causal is an int, not a bool."),
    "scale": ({"scale": np.inf}, ValueError, "scale is inf, which is not finite."),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_wrong_calls_of_attention_backward(name: str) -> None:
    changes, kind, start = BACKWARD[name]
    args, options = backward_arguments(**changes)
    message = raised(kind, cuflash.attention_backward, *args, **options)
    assert message.startswith(start), message
    assert re.search(r"\n  Way out: .+$", message), message


def test_gradient_buffers_must_not_overlap_each_other() -> None:
    both = z(2, 2, 5, 8)
    args, options = backward_arguments(v=z(2, 2, 5, 8), dout=z(2, 4, 6, 8), out=z(2, 4, 6, 8))
    message = raised(ValueError, cuflash.attention_backward, *args, **options, dk=both, dv=both)
    assert message.startswith("dk shares memory with dv.")


# ---- merge


@pytest.mark.parametrize(
    ("outs", "lses", "kind", "start"),
    [
        ([], [], ValueError, "outs has 0 parts, and lses has 0."),
        ([z(2, 3, 8)], [], ValueError, "outs has 1 parts, and lses has 0."),
        (z(2), 3, TypeError, "lses is an int, not a sequence of arrays."),
        ([z(2, 3, 8)], [[0.0]], TypeError, "lses[0] is a list, not an array."),
        ([z(2, 3, 8)], [z(2, 3)], TypeError, "lses[0] is float16, and float32 is needed."),
        ([z(2, 3, 8)], [z(3, 2, dtype="f4")], ValueError, "lses[0] has shape (3, 2), and (2, 3)"),
        (
            [z(2, 3, 8), z(2, 3, 4)],
            [z(2, 3, dtype="f4")] * 2,
            ValueError,
            "outs[1] has shape (2, 3, 4), and (2, 3, 8)",
        ),
        (
            [z(2, 3, 8), z(2, 3, 8, dtype=BF16)],
            [z(2, 3, dtype="f4")] * 2,
            TypeError,
            "outs[1] is bfloat16, and float16 is needed.",
        ),
        ([z(8)], [z(dtype="f4")], ValueError, "outs[0] has 1 axes, and needs at least 2."),
        ([z(2, 3, 8, dtype=int)], [z(2, 3)], TypeError, "outs[0] is int64, which is not one of"),
    ],
)
def test_wrong_calls_of_merge(outs: Any, lses: Any, kind: type[Exception], start: str) -> None:
    message = raised(kind, cuflash.merge_attention, outs, lses)
    assert message.startswith(start), message


def test_merge_refuses_an_out_laid_out_otherwise() -> None:
    part = z(2, 3, 3)
    lse = z(2, 3, dtype="f4")
    message = raised(ValueError, cuflash.merge_attention, [part], [lse], out=part.swapaxes(1, 2))
    assert message.startswith("out shares memory with outs[0], which is not laid out the same.")
