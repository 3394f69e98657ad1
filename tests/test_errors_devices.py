"""What only a device, or an array of another library, can be refused for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.machines import Machine
from tests.test_errors import BF16, nothing_runs, raised, z

__all__ = ["nothing_runs"]  # the fixture that fails when anything computes before it is checked


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 3, 300), "float32", "head_dim 300 > 256"),
        ((2, 3, 257), "float64", "head_dim 257 > 256"),
        ((2, 3, 257), "float16", "head_dim 257 > 256"),
        ((2, 3, 1000), "bfloat16", "head_dim 1000 > 256"),
    ],
)
def test_P5_without_a_kernel(
    device_backend: Machine, shape: tuple[int, ...], dtype: str, reason: str
) -> None:
    x = np.zeros(shape, BF16 if dtype == "bfloat16" else dtype)
    message = raised(cuflash.UnsupportedError, device_backend.attention, x, x, x)
    assert message.startswith(f"no kernel for forward · {dtype} · head_dim {shape[-1]} · sm_")
    assert reason in message
    assert "\n  Nearest supported: " in message
    lse = np.zeros(shape[:-1], np.float64 if dtype == "float64" else np.float32)
    message = raised(cuflash.UnsupportedError, device_backend.backward, x, x, x, x, x, lse)
    assert message.startswith(f"no kernel for backward · {dtype} · head_dim {shape[-1]} · sm_")


def test_elements_between_addresses_are_refused_on_a_device(device_backend: Machine) -> None:
    """A load from half an element would kill the CUDA context of the whole process."""
    odd = np.zeros(2 * 3 * 8 * 2 + 1, np.uint8)[1:].view(np.float16).reshape(2, 3, 8)
    good = np.zeros((2, 3, 8), np.float16)
    message = raised(ValueError, device_backend.attention, odd, good, good)
    assert message.startswith("q has elements of 2 bytes at addresses that are no multiple of 2")


def test_error_classes() -> None:
    assert issubclass(cuflash.UnsupportedError, NotImplementedError)
    assert issubclass(cuflash.CompileError, RuntimeError)


def test_mixed_numpy_and_cuda_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash import _arrays

    q = z(2, 3, 8)
    monkeypatch.setattr(_arrays, "_adopt_one", lambda name, x, seen: x)
    homes = {id(q): "numpy"}
    monkeypatch.setattr(_arrays, "home_of", lambda x: homes.get(id(x), "cuda:0"))

    class Elsewhere:
        shape, dtype = (2, 3, 8), np.dtype("float16")

    message = raised(TypeError, cuflash.attention, q, Elsewhere(), q)
    assert message.startswith("k is a CUDA array, q is a NumPy array.")
    homes.clear()
    q2 = Elsewhere()
    homes[id(q2)] = "cuda:1"
    message = raised(ValueError, cuflash.attention, Elsewhere(), q2, Elsewhere())
    assert message.startswith("k is on cuda:1, q is on cuda:0.")


def test_cuda_arrays_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    class OnGpu:
        shape, dtype = (2, 3, 8), np.dtype("float16")

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {}

    monkeypatch.setitem(sys.modules, "cupy", None)
    x = OnGpu()
    message = raised(cuflash.UnsupportedError, cuflash.attention, x, x, x)
    assert message.startswith("q is an OnGpu in CUDA memory, and CuPy cannot be imported")
    assert 'pip install "cuflash[cuda12]"' in message


def test_arrays_of_other_libraries_in_host_memory() -> None:
    class Tensor:
        def __dlpack__(self) -> None: ...

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    x = Tensor()
    message = raised(TypeError, cuflash.attention, x, x, x)
    assert message.startswith("q is a Tensor outside CUDA memory, not a NumPy array.")
