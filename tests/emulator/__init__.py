"""A CPU stand-in for the GPU: runs the PTX that NVRTC makes of our kernels, and checks what a GPU would not tell."""

from .errors import (
    AsyncMisuse,
    DataRace,
    Deadlock,
    Divergence,
    EmulatorError,
    LaunchError,
    Misaligned,
    OutOfBounds,
    Trap,
    Uninitialised,
    Unsupported,
)
from .memory import Memory
from .module import Counters, Limits, Module
from .nvrtc import CompileError, Nvrtc

__all__ = [
    "AsyncMisuse",
    "CompileError",
    "Counters",
    "DataRace",
    "Deadlock",
    "Divergence",
    "EmulatorError",
    "LaunchError",
    "Limits",
    "Memory",
    "Misaligned",
    "Module",
    "Nvrtc",
    "OutOfBounds",
    "Trap",
    "Uninitialised",
    "Unsupported",
]
