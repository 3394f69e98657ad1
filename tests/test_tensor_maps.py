"""Tensor maps without a GPU: what is passed to the driver, and when a map is made anew."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cuflash import _params, _tensor_maps
from cuflash._launch_maps import layout_of
from cuflash._tensor_maps import Layout
from cuflash._views import View, Views

LAYOUT = Layout("bfloat16", (96, 50, 8, 3), (192, 9600, 76800), (64, 32, 1, 1))
POINTER = 0x7F0000001000


class Driver:
    """Stands in for cuTensorMapEncodeTiled; writes the number of the call into the map."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0

    def __call__(self, *arguments: Any) -> int:
        address, kind, rank, pointer, dims, strides, box, steps, *modes = arguments
        lists = (list(dims), list(strides), list(box), list(steps))
        self.calls.append((address, kind, rank, pointer, *lists, *modes))
        ctypes.memset(address, len(self.calls), _tensor_maps.BYTES)
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    stand_in = Driver()
    monkeypatch.setattr(_tensor_maps, "_driver_function", lambda: stand_in)
    _tensor_maps.encoded.cache_clear()
    yield stand_in
    _tensor_maps.encoded.cache_clear()


def test_arguments_of_the_driver(driver: Driver) -> None:
    """In the order of cuda.h: map, type, rank, address, extents, strides, box, steps, then four enums."""
    assert _tensor_maps.encoded(POINTER, LAYOUT) == b"\1" * 128
    ((address, *rest),) = driver.calls
    assert address % 128 == 0  # what cuda.h of CUDA 13 declares; 64 before
    assert rest == [
        9,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        4,
        POINTER,
        [96, 50, 8, 3],
        [192, 9600, 76800],  # one less than extents: the innermost stride is the element
        [64, 32, 1, 1],
        [1, 1, 1, 1],
        0,  # CU_TENSOR_MAP_INTERLEAVE_NONE
        3,  # CU_TENSOR_MAP_SWIZZLE_128B
        3,  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
        0,  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: zeros
    ]


def test_types_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit extents and strides, 32-bit boxes: a wrong width would read as other numbers."""

    class Library:
        def __init__(self, name: str) -> None:
            self.cuTensorMapEncodeTiled = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)

    monkeypatch.setattr(_tensor_maps.ctypes, "CDLL", Library)
    function = _tensor_maps._driver_function.__wrapped__()
    sizes = [ctypes.sizeof(kind) for kind in function.argtypes]
    assert sizes == [8, 4, 4, 8, 8, 8, 8, 8, 4, 4, 4, 4]
    elements = [kind._type_ for kind in function.argtypes[4:8]]
    assert elements == [ctypes.c_uint64] * 2 + [ctypes.c_uint32] * 2
    assert function.restype is ctypes.c_int


def test_equal_maps_are_made_once(driver: Driver) -> None:
    first = _tensor_maps.encoded(POINTER, LAYOUT)
    assert _tensor_maps.encoded(POINTER, Layout(*LAYOUT)) == first
    assert len(driver.calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "float16"},
        {"dims": (96, 49, 8, 3)},
        {"strides": (192, 9600, 76816)},
        {"box": (64, 16, 1, 1)},
        {"swizzle": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_array_at_a_used_address_gets_its_own_map(
    driver: Driver, change: dict[str, Any]
) -> None:
    """As when the pool hands the memory of a freed array to one of another shape."""
    first = _tensor_maps.encoded(POINTER, LAYOUT)
    assert _tensor_maps.encoded(POINTER, LAYOUT._replace(**change)) != first
    assert _tensor_maps.encoded(POINTER + 256, LAYOUT) != first
    assert _tensor_maps.encoded(POINTER, LAYOUT) == first
    assert len(driver.calls) == 3


def test_the_cache_is_bounded(driver: Driver) -> None:
    bound = _tensor_maps.encoded.cache_info().maxsize
    assert bound is not None
    for n in range(bound + 10):
        _tensor_maps.encoded(POINTER + 16 * n, LAYOUT)
    assert _tensor_maps.encoded.cache_info().currsize == bound
    calls = len(driver.calls)
    _tensor_maps.encoded(POINTER + 16 * (bound + 9), LAYOUT)  # the newest is there
    assert len(driver.calls) == calls
    _tensor_maps.encoded(POINTER, LAYOUT)  # the oldest is not
    assert len(driver.calls) == calls + 1


def test_a_refusal_of_the_driver_is_an_error_and_not_kept(driver: Driver) -> None:
    driver.status = 1
    with pytest.raises(RuntimeError, match=r"returned 1 for an array at 0x7f0000001000.*box="):
        _tensor_maps.encoded(POINTER, LAYOUT)
    driver.status = 0
    assert _tensor_maps.encoded(POINTER, LAYOUT)


def test_rank_1_has_no_strides(driver: Driver) -> None:
    _tensor_maps.encoded(POINTER, Layout("float32", (100,), (), (32,), 0))
    assert driver.calls[0][4:7] == ([100], [0], [32])


def test_axes_of_extent_one_have_strides_that_fit_the_others() -> None:
    """Nothing steps along them, and a driver that compares strides with each other finds nothing to refuse."""

    asked: Any = SimpleNamespace(dtype="float16", batch=(1, 3))
    rows: Any = Views(asked, {"q": View((1, 3, 1, 50, 40), (0, 9000, 0, 60, 1), False)})
    found = layout_of(asked, rows, "q", 64)
    assert found.dims == (40, 50, 1, 3, 1)
    assert found.strides == (120, 6000, 18000, 54000)
    single: Any = Views(asked, {"q": View((1, 3, 1, 1, 40), (0, 9000, 0, 0, 1), False)})
    assert layout_of(asked, single, "q", 64).strides == (80, 80, 18000, 54000)


def test_maps_in_params_lie_where_kernels_declare_them() -> None:
    struct = _params.FORWARD_SM90
    for name in ("q_map", "k_map", "v_map", "out_map"):
        kind, offset = struct.fields[name][:2]
        assert kind.itemsize == _tensor_maps.BYTES and offset % _tensor_maps.ALIGNMENT == 0
    assert struct.itemsize % _tensor_maps.ALIGNMENT == 0
