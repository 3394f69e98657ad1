"""The portable family on a GPU that has a faster one: for comparisons, and for nothing else.

Which family runs follows from the architecture a device compiles for. sm_90a, the one with wgmma
and TMA, is needed by the Hopper family alone; on the same GPU, compiled for sm_90, every Hopper
candidate refuses and the portable one is left.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any


@functools.cache
def portable_of(device: Any) -> Any:
    """A second view of a device, for which plans and binaries are those of the portable family."""
    twin = copy.copy(device)
    twin.arch = device.arch.rstrip("af")
    twin.key = (*device.key, "portable")  # prepared calls are kept per key
    return twin


def has_another(device: Any) -> bool:
    """Whether a device would run anything but the portable family."""
    return portable_of(device).arch != device.arch


@contextlib.contextmanager
def seen_as(view: Callable[[Any], Any]) -> Iterator[None]:
    """CuPy arrays in calls of cuflash inside of this block run on `view(device)`."""
    from cuflash import _cupy_device

    names = vars(_cupy_device)
    of: Callable[[Any], Any] = names["device_of"]
    names["device_of"] = lambda array: view(of(array))
    try:
        yield
    finally:
        names["device_of"] = of


def portable() -> contextlib.AbstractContextManager[None]:
    """CuPy arrays in calls of cuflash inside of this block run on the portable family."""
    return seen_as(portable_of)
