"""The seam between cuflash and whatever runs its kernels.

Everything below a Plan that touches a device goes through this protocol: allocate, take an address,
build and launch a kernel. There are two implementations: CuPy (`_cupy_device.py`) and, for machines
without a GPU, the PTX emulator of the test-suite. Argument checks, planning, workspaces and launch
configuration are therefore the same code on both.

Users never see this seam: CuPy arrays select the device that holds them. Tests route NumPy arrays
to another device for the length of a `with use_device(device):` block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cuflash._compile import Specialization
    from cuflash._tensor_maps import Layout


@dataclass(frozen=True, slots=True)
class Limits:
    """The figures of a GPU that planning depends on.

    Parameters
    ----------
    sm_count : int
        Streaming multiprocessors.
    shared_memory : int
        Bytes of shared memory one block may opt in to.
    l2_bytes : int
        Size of the second-level cache; decides how many heads are walked together.
    """

    sm_count: int
    shared_memory: int
    l2_bytes: int


class Kernel(Protocol):
    """A loaded kernel: call it to launch on the current stream."""

    def __call__(self, grid: int, block: int, shared_memory: int, params: bytes) -> None:
        """Launch `grid` blocks of `block` threads; `params` are the bytes of its one argument."""


class Device(Protocol):
    """What everything below a Plan may ask of the machine that runs it.

    Attributes
    ----------
    name : str
        For messages: "NVIDIA H200", "emulated sm_80".
    arch : str
        What kernels are compiled for: "sm_80", "sm_90a".
    key : Any
        Hashable identity; loaded kernels and prepared calls are cached per key.
    limits : Limits
        Figures used in planning.
    xp : module
        `numpy` or `cupy`: only for views (reshape, transpose, broadcast) and copies.
    """

    name: str
    arch: str
    key: Any
    limits: Limits
    xp: Any

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Uninitialised C-ordered array on this device."""

    def pointer(self, array: Any) -> int:
        """Address of the array's first element."""

    def load(self, spec: Specialization) -> Kernel:
        """Compile (or find compiled) and load; raises CompileError."""

    def tensor_map(self, pointer: int, layout: Layout) -> bytes:
        """The 128 bytes that tell the copy engine of sm_90 where an array lies."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Make this the current device while allocating and launching."""


_override: ContextVar[Device | None] = ContextVar("cuflash_device", default=None)


@contextlib.contextmanager
def use_device(device: Device) -> Iterator[Device]:
    """Send NumPy arrays to `device` instead of the CPU backend inside the block (for tests)."""
    token = _override.set(device)
    try:
        yield device
    finally:
        _override.reset(token)


def device_override() -> Device | None:
    """The device chosen by an enclosing `use_device`, or None."""
    return _override.get()
