"""Wrong calls of attention_varlen raise before anything runs (museum H and P)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.machines import Emulator
from tests.test_errors import nothing_runs, raised, z

__all__ = ["nothing_runs"]  # the fixture that fails when anything computes before it is checked


def cu(*ends: int, dtype: Any = "int32") -> np.ndarray:
    return np.array(ends, dtype)


PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "H7 float": (
        {"cu_q": cu(0, 6, dtype="f4")},
        TypeError,
        "cu_seqlens_q is float32, and must be int32 or int64.",
    ),
    "H7 uint32": (
        {"cu_k": cu(0, 5, dtype="u4")},
        TypeError,
        "cu_seqlens_k is uint32, and must be int32 or int64.",
    ),
    "H7 bool": ({"cu_q": cu(0, 1, dtype=bool)}, TypeError, "cu_seqlens_q is bool, and must be"),
    "H7 swapped": (
        {"cu_q": cu(0, 6, dtype=">i4")},
        TypeError,
        "cu_seqlens_q is byte-swapped int32, and must be int32 or int64.",
    ),
    "H7 list": ({"cu_q": [0, 6]}, TypeError, "cu_seqlens_q is a list, not an array."),
    "H7 none": ({"cu_k": None}, TypeError, "cu_seqlens_k is None, not an array."),
    "H7 0-d": (
        {"cu_q": np.array(0, np.int32)},
        ValueError,
        "cu_seqlens_q has shape (), and must be (batch + 1,).",
    ),
    "H7 two axes": (
        {"cu_q": z(2, 2, dtype="i4")},
        ValueError,
        "cu_seqlens_q has shape (2, 2), and must be (batch + 1,).",
    ),
    "H7 nothing": (
        {"cu_q": z(0, dtype="i4")},
        ValueError,
        "cu_seqlens_q has shape (0,), and must be (batch + 1,).",
    ),
    "H7 counts": (
        {"cu_q": cu(0, 3, 6)},
        ValueError,
        "cu_seqlens_q is for 2 sequences, and cu_seqlens_k for 1.",
    ),
    "H7 start": (
        {"cu_q": cu(1, 6)},
        ValueError,
        "cu_seqlens_q starts at 1, and must start at 0.",
    ),
    "H7 decreasing": (
        {"cu_q": cu(0, 4, 3, 6), "cu_k": cu(0, 1, 2, 5)},
        ValueError,
        "cu_seqlens_q decreases from 4 to 3 at entry 2.",
    ),
    "H11 -1": (
        {"cu_q": cu(0, 6, -1), "cu_k": cu(0, 5, 5)},
        ValueError,
        "cu_seqlens_q decreases from 6 to -1 at entry 2.",
    ),
    "H7 end": (
        {"cu_k": cu(0, 7)},
        ValueError,
        "cu_seqlens_k ends at 7, and the arrays have 5 rows.",
    ),
    "H7 end of int64": (
        {"cu_k": cu(0, 2**32 + 5, dtype="i8")},
        ValueError,
        "cu_seqlens_k ends at 4294967301, and the arrays have 5 rows.",
    ),
    "H5 too small": (
        {"max_seqlen_q": 5},
        ValueError,
        "max_seqlen_q is 5, and cu_seqlens_q has a sequence of 6.",
    ),
    "H5 negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1, and must be >= 0."),
    "H5 float": ({"max_seqlen_q": 6.0}, TypeError, "max_seqlen_q is a float, not an int."),
    "H5 bool": ({"max_seqlen_q": True}, TypeError, "max_seqlen_q is a bool, not an int."),
    "axes": (
        {"q": z(1, 4, 6, 8), "k": z(1, 2, 5, 8), "v": z(1, 2, 5, 16)},
        ValueError,
        "q has 4 axes, and packed sequences have 3.",
    ),
    "two axes": (
        {"q": z(6, 8), "k": z(5, 8), "v": z(5, 16)},
        ValueError,
        "q has 2 axes, and packed sequences have 3.",
    ),
    "mask": (
        {"mask": z(6, 4, dtype=bool)},
        ValueError,
        "mask has shape (6, 4), and must broadcast to (1, 4, 6, 5).",
    ),
    "bias": (
        {"bias": z(2, 1, 1, 1)},
        ValueError,
        "bias has shape (2, 1, 1, 1), and must broadcast to (1, 4, 6, 5).",
    ),
    "dropout": ({"dropout_p": 1.0, "seed": 1}, ValueError, "dropout_p is 1.0, and must be in"),
    "heads": ({"k": z(3, 5, 8), "v": z(3, 5, 16)}, ValueError, "k has 3 heads, which does not"),
}


def packed_arguments(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    call: dict[str, Any] = {
        **{"q": z(4, 6, 8), "k": z(2, 5, 8), "v": z(2, 5, 16), "cu_q": cu(0, 6), "cu_k": cu(0, 5)},
        **changes,
    }
    return [call.pop(name) for name in ("q", "k", "v", "cu_q", "cu_k")], call


@pytest.mark.parametrize("name", PACKED)
def test_wrong_calls_of_attention_varlen(name: str) -> None:
    changes, kind, start = PACKED[name]
    args, options = packed_arguments(**changes)
    message = raised(kind, cuflash.attention_varlen, *args, **options)
    sentence, *seen, way_out = message.split("\n")
    assert sentence.startswith(start), message
    assert seen and all(line.startswith("  ") for line in seen), message
    assert way_out.startswith("  Way out: "), message
    assert raised(kind, cuflash.attention_varlen_vjp, *args, **options).startswith(start)


@pytest.mark.parametrize("name", PACKED)
def test_wrong_calls_of_attention_varlen_backward(name: str) -> None:
    changes, kind, start = PACKED[name]
    (q, k, v, cu_q, cu_k), options = packed_arguments(**changes)
    out, lse = z(*q.shape[:-1], v.shape[-1]), z(*q.shape[:-1], dtype="f4")
    args = (out, q, k, v, out.copy(), lse, cu_q, cu_k)
    message = raised(kind, cuflash.attention_varlen_backward, *args, **options)
    assert message.startswith(start), message


@pytest.mark.parametrize("name", PACKED)
def test_a_device_refuses_packed_calls_before_any_launch(name: str) -> None:
    changes, kind, start = PACKED[name]
    with Emulator() as machine:
        args, options = packed_arguments(**changes)
        assert raised(kind, machine.varlen, *args, **options).startswith(start)
        assert not machine.device.launches


@pytest.mark.parametrize("option", ["attn_mask", "block_table", "seqused_k", "max_seqlen"])
def test_K11_an_unknown_option_is_never_ignored(option: str) -> None:
    args, _ = packed_arguments()
    with pytest.raises(TypeError, match=option):
        cuflash.attention_varlen(*args, **{option: None})
