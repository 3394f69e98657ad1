"""The short way of a warm call with arrays that need no conversion, by a stand-in for CuPy's arrays."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash import _arrays, _packed_bounds, _prepare
from tests.test_errors import raised


class Array:
    """As much of a `cupy.ndarray` as adoption looks at."""

    ndim = 3

    def __init__(self, gpu: int = 0, shape: tuple[int, ...] = (2, 40, 16)) -> None:
        self.shape, self.dtype = shape, np.dtype("float16")
        self.data = SimpleNamespace(device_id=gpu)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.data.device_id

    def __dlpack__(self) -> None: ...

    def get(self) -> Any:
        raise AssertionError("reading from a GPU waits for it")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = ModuleType("cupy"), ModuleType("cuflash._cupy_device")
    fake.ndarray = Array
    device.device_of = lambda array: ("device", array.data.device_id)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cuflash._cupy_device", device)
    monkeypatch.setattr(sys.modules["cuflash"], "_cupy_device", device, raising=False)


def adopt(*arrays: Any) -> Any:
    objects = (*arrays, *(None,) * (len(_prepare.FORWARD_ARRAYS) - len(arrays)))
    return _arrays.adopt(_prepare.FORWARD_ARRAYS, objects, 3, dict)


@pytest.mark.usefixtures("cupy")
def test_arrays_of_one_gpu_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arrays, "_adopt_one", None)  # would be called
    q, k, v = Array(1), Array(1), Array(1)
    arrays, device = adopt(q, k, v)
    assert arrays[:3] == (q, k, v)
    assert device == ("device", 1)


@pytest.mark.usefixtures("cupy")
def test_what_is_not_so_simple_is_looked_at() -> None:
    message = raised(ValueError, adopt, Array(0), Array(0), Array(1))
    assert message.startswith("v is on cuda:1, q is on cuda:0.")
    message = raised(TypeError, adopt, Array(), Array())
    assert message.startswith("v is None, not an array.")
    message = raised(TypeError, adopt, Array(), Array(), Array(), np.ones(3, bool))
    assert message.startswith("mask is a NumPy array, q is a CUDA array.")


@pytest.mark.usefixtures("cupy")
def test_stated_bounds_read_nothing() -> None:
    q, k = Array(), Array(shape=(2, 60, 16))
    given = (q, k, Array(), Array())
    assert _packed_bounds.bounds_of(given, (30, 100), "HLD", False) == (30, 60)
    assert _packed_bounds.bounds_of(given, (30, 100), "HLD", True) == (30, 100)
    assert _packed_bounds.bounds_of(given, (30, 100), "LHD", False) == (2, 2)
    message = raised(ValueError, _packed_bounds.bounds_of, given, (30, -1), "HLD", False)
    assert message.startswith("max_seqlen_k is -1")
    message = raised(ValueError, _packed_bounds.bounds_of, given, (1, 1), "LDH", False)
    assert message.startswith("layout is 'LDH'")
