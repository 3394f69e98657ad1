"""Three machines behind one fixture: the CPU backend, an emulated GPU, and with `--gpu` a real one.

A test that takes `backend` is written once, calls `cuflash` as a user does, and runs on each of
them. `wide_backend` leaves the emulator out, for sizes it cannot run in seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Products here are small: threads of BLAS would mostly wait for each other, and for other tests' threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from tests.machines import Cupy, Emulator, Machine, Numpy


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="also run on the CUDA device, through CuPy")
    parser.addoption(
        "--thorough", action="store_true", help="also more of what shorter tests cover, for minutes"
    )
    parser.addoption(
        "--record-goldens",
        action="store_true",
        help="with --gpu: keep what the device computes for each instruction form under tests/golden",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        leave_out(config, items, "thorough")
    if not config.getoption("--gpu"):
        leave_out(config, items, "gpu")


def leave_out(config: pytest.Config, items: list[pytest.Item], marker: str) -> None:
    """Deselect what has a marker; pytest counts it in its last line."""
    gone = [item for item in items if item.get_closest_marker(marker) is not None]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item.get_closest_marker(marker) is None]


_CUPY = pytest.param(Cupy, id="cupy", marks=pytest.mark.gpu)
_EMULATOR = pytest.param(Emulator, id="emulator")
_NUMPY = pytest.param(Numpy, id="numpy")


@pytest.fixture(params=[_NUMPY, _EMULATOR, _CUPY])
def backend(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Every machine."""
    with request.param() as machine:
        yield machine


@pytest.fixture(params=[_NUMPY, _EMULATOR])
def host_backend(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Machines whose memory is the host's, for tests that look at the bytes around an array."""
    with request.param() as machine:
        yield machine


@pytest.fixture(params=[_NUMPY, _CUPY])
def wide_backend(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Every machine but the emulator, whose minutes these sizes would take."""
    with request.param() as machine:
        yield machine


@pytest.fixture(params=[_EMULATOR, _CUPY])
def device_backend(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Machines that run kernels."""
    with request.param() as machine:
        yield machine
