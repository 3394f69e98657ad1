"""Museum family A, masking and alignment: bugs of other libraries as recipes, under their numbers."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest

from tests import oracle
from tests.machines import Machine, check_forward, check_gradients, dtype_of, normal

PRINT_COLUMNS = 32


def printed(machine: Machine, len_q: int, len_k: int, **options: Any) -> np.ndarray:
    """The mask that a call applies: zero scores and one-hot values make row i = mask row i / its sum.

    Values are one-hot in slices of 32 columns, so that every number of keys uses the same kernel.
    """
    dtype = dtype_of(machine.exact)
    q, k = np.zeros((1, len_q, 8), dtype), np.zeros((1, len_k, 8), dtype)
    hot = np.eye(len_k, -(-len_k // PRINT_COLUMNS) * PRINT_COLUMNS, dtype=dtype)
    slices = np.split(hot, hot.shape[1] // PRINT_COLUMNS, axis=1)
    parts = [machine.attention(q, k, part[None], **options)[0] for part in slices]
    return np.concatenate(parts, axis=1)[:, :len_k].astype(np.float64)


def check_mask(machine: Machine, len_q: int, len_k: int, **options: Any) -> None:
    """The printed mask is the oracle's, zeros exactly and weights to one rounding."""
    seen = oracle.visible(len_q, len_k, **options)
    rows = printed(machine, len_q, len_k, **options)
    case = (machine.name, len_q, len_k, options)
    assert np.array_equal(rows != 0, seen), (case, (rows != 0).astype(int), seen.astype(int))
    weight = 1 / np.maximum(1, seen.sum(axis=1, keepdims=True))
    step = 2.0**-10 if machine.exact == "float16" else 2.0**-51
    assert np.all(
        np.abs(rows - weight)[seen] <= (step * np.broadcast_to(weight, rows.shape))[seen]
    ), case


@pytest.mark.parametrize(
    ("len_q", "len_k", "rows"),
    [
        (2, 5, ["11110", "11111"]),
        (5, 2, ["00", "00", "00", "10", "11"]),
        (3, 3, ["100", "110", "111"]),
    ],
)
def test_A1_causal_is_bottom_right(
    backend: Machine, len_q: int, len_k: int, rows: list[str]
) -> None:
    mask = (printed(backend, len_q, len_k, causal=True) != 0).astype(int)
    assert ["".join(map(str, row)) for row in mask] == rows


def test_A1_the_mask_printer(backend: Machine) -> None:
    for len_q, len_k in itertools.product((1, 2, 5, 63, 64, 65, 129), repeat=2):
        check_mask(backend, len_q, len_k, causal=True)
        check_mask(backend, len_q, len_k)


def test_A3_backward_is_aligned_as_forward(backend: Machine) -> None:
    rng = np.random.default_rng(3)
    q, dout = normal(rng, 1, 4, 37, 32), normal(rng, 1, 4, 37, 32)
    k, v = normal(rng, 1, 2, 101, 32), normal(rng, 1, 2, 101, 32)
    check_gradients(backend, q, k, v, dout, causal=True)
    check_gradients(backend, q, k, v, dout, causal=True, q_offset=0)


def test_A4_backward_heeds_the_flag(backend: Machine) -> None:
    rng = np.random.default_rng(4)
    q, k, v, dout = (normal(rng, 1, 2, 70, 32) for _ in range(4))
    with_mask = check_gradients(backend, q, k, v, dout, causal=True)
    without = check_gradients(backend, q, k, v, dout, causal=False)
    for a, b in zip(with_mask[:3], without[:3], strict=True):
        assert np.abs(a.astype(np.float64) - b.astype(np.float64)).max() > 0.1


@pytest.mark.parametrize("window", [(0, 0), (2, 0), (0, 2), (3, 1), (8, 8), (9, None), (None, 0)])
def test_A5_windows_are_inclusive(backend: Machine, window: tuple[int | None, int | None]) -> None:
    check_mask(backend, 9, 9, window=window)
    check_mask(backend, 9, 9, window=window, causal=True)
    if window == (0, 0):
        assert np.array_equal(printed(backend, 9, 9, window=window), np.eye(9))
    if window == (2, 0):
        counts = (printed(backend, 9, 9, window=window) != 0).sum(axis=1)
        assert counts.tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]


def test_A6_equal_masks_give_equal_results(backend: Machine) -> None:
    """Causal can be asked for in many ways; all must pass against the same exact result."""
    rng = np.random.default_rng(6)
    n = 200
    q, k, v = (normal(rng, 1, 1, n, 32) for _ in range(3))
    ways: list[dict[str, Any]] = [
        {"causal": True},
        {"window": (None, 0)},
        {"window": (n, 0)},
        {"window": (n - 1, 0)},
        {"window": (10**6, 0)},
        {"window": (10**30, 0)},
        {"causal": True, "window": (n, 7)},
        {"causal": True, "q_offset": 0},
    ]
    lses = [check_forward(backend, q, k, v, **way)[1] for way in ways]
    assert all(np.allclose(lse, lses[0], rtol=1e-5, atol=1e-5) for lse in lses)


def test_A7_a_window_alone_is_a_mask(backend: Machine) -> None:
    rng = np.random.default_rng(7)
    q, k, v = (normal(rng, 1, 1, 64, 32) for _ in range(3))
    wide, _ = check_forward(backend, q, k, v, window=(0, 31))
    narrow, _ = check_forward(backend, q, k, v, window=(0, 0))
    assert np.array_equal(narrow, v)
    assert not np.allclose(wide.astype(float), narrow.astype(float), atol=0.1)


@pytest.mark.parametrize(("len_q", "len_k"), [(76, 1), (34, 1), (146, 1), (146, 2)])
def test_A11_far_more_queries_than_keys(backend: Machine, len_q: int, len_k: int) -> None:
    """Tiles above the diagonal were not masked at the end of the keys either."""
    rng = np.random.default_rng(11)
    q, dout = (normal(rng, 1, 1, len_q, 32, factor=3) for _ in range(2))
    k, v = (normal(rng, 1, 1, len_k, 32, factor=3) for _ in range(2))
    check_forward(backend, q, k, v, causal=True)
    check_gradients(backend, q, k, v, dout, causal=True)


@pytest.mark.parametrize(
    "q_offset", [None, 0, 37, 130, 131, -3, -69, -70, 199, 200, 10**12, -(10**12)]
)
def test_A13_every_alignment(backend: Machine, q_offset: int | None) -> None:
    check_mask(backend, 70, 200, causal=True, q_offset=q_offset)
    check_mask(backend, 70, 200, window=(40, 3), q_offset=q_offset)


@pytest.mark.parametrize("side", ["left", "right", "both", "causal"])
def test_windows_at_tile_edges(backend: Machine, side: str) -> None:
    """Widths nothing, one, around a tile, around the whole length; fewer, as many, more keys."""
    length = 130
    for width in (0, 1, 63, 64, 65, length - 1, length, length + 7):
        options: dict[str, Any] = {
            "left": {"window": (width, None)},
            "right": {"window": (None, width)},
            "both": {"window": (width, width)},
            "causal": {"window": (width, width), "causal": True},
        }[side]
        for len_k in (length - 35, length, length + 35):
            check_mask(backend, length, len_k, **options)


def test_A15_a_window_costs_what_it_sees(wide_backend: Machine) -> None:
    rng = np.random.default_rng(15)
    on_cpu = wide_backend.name == "numpy"
    # Time of this process, not of whatever else the machine is doing; a GPU's work is in no process.
    clock = time.process_time if on_cpu else time.perf_counter
    dtype = "float32" if on_cpu else "float16"
    q, k, v = (wide_backend.put(normal(rng, 1, 8192, 16, dtype=dtype)) for _ in range(3))

    def seconds(**options: Any) -> float:
        times = []
        for _ in range(5):
            start = clock()
            wide_backend.attention(q, k, v, causal=True, **options)
            times.append(clock() - start)
        return min(times)

    assert seconds(window=(128, 0)) <= 0.25 * seconds()


def test_A15_a_window_launches_no_more_work(device_backend: Machine) -> None:
    """Tiles that the window hides are not visited: the garbage in them changes nothing."""
    rng = np.random.default_rng(16)
    q, k, v = (normal(rng, 1, 1, 200, 32) for _ in range(3))
    expected = device_backend.attention(q[:, :, 150:], k, v, window=(10, 0))
    k, v = k.copy(), v.copy()
    k[:, :, :64], v[:, :, :64] = np.nan, np.inf
    assert np.array_equal(device_backend.attention(q[:, :, 150:], k, v, window=(10, 0)), expected)


def test_A17_alibi_of_one_row_is_alibi_of_all(backend: Machine) -> None:
    """Decoding the last row equals the last row of the whole, distances included."""
    rng = np.random.default_rng(17)
    q = normal(rng, 1, 2, 65, 32)
    k, v = (normal(rng, 1, 2, 150, 32) for _ in range(2))
    slopes = np.array([0.3, 0.05], np.float32)
    full, full_lse = check_forward(backend, q, k, v, alibi_slopes=slopes, causal=True)
    last, last_lse = check_forward(backend, q[:, :, -1:], k, v, alibi_slopes=slopes, causal=True)
    assert np.allclose(last.astype(float), full[:, :, -1:].astype(float), atol=1e-3)
    assert np.allclose(last_lse, full_lse[:, :, -1:], atol=1e-5)
