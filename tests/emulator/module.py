"""Loads PTX into the emulator and launches its kernels, with the checks that a driver and a device would make."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from . import build
from .errors import BY_CODE, LaunchError
from .memory import Memory
from .translate import Kernel, Translation, translate

_LOCK = threading.Lock()  # the runtime runs one launch at a time
_COLUMNS = (
    "executed",
    "wavefronts",
    "ideal_wavefronts",
    "sectors",
    "shared_bytes",
    "global_bytes",
    "lanes",
)


class _Request(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("static_shared", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("race", ctypes.c_uint32),
        ("uninitialised", ctypes.c_uint32),
        ("counters", ctypes.c_uint32),
        ("nsites", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("sites", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("params_bytes", ctypes.c_uint64),
        ("ranges", ctypes.c_void_p),
        ("nranges", ctypes.c_uint64),
        ("counts", ctypes.c_void_p),
    ]


class _Result(ctypes.Structure):
    _fields_ = [
        ("error", ctypes.c_int32),
        ("site", ctypes.c_uint32),
        ("switches", ctypes.c_uint64),
        ("message", ctypes.c_char * 8192),
    ]


@dataclass(frozen=True)
class Limits:
    """What the emulated device allows in a launch (defaults: the largest of any supported GPU)."""

    shared_memory: int = 232448
    threads: int = 1024
    grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)
    cluster: int = 16


@dataclass
class Line:
    """Counts of one CUDA source line (or of the whole launch)."""

    instructions: Counter[str] = field(default_factory=Counter)  # warp instructions by full opcode
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sectors: int = 0
    shared_bytes: int = 0
    global_bytes: int = 0

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond the least possible number."""
        return self.wavefronts - self.ideal_wavefronts


@dataclass
class Counters(Line):
    """What a launch did. Without `counters=True` only `switches` is filled.

    Attributes
    ----------
    lines : dict of (file name, line) to Line
    switches : int
        Switches between threads (a measure of the emulator's own work).
    """

    lines: dict[tuple[str, int], Line] = field(default_factory=dict)
    switches: int = 0

    def count(self, prefix: str) -> int:
        """Warp instructions whose opcode begins with `prefix`, such as "mma" or "ld.global"."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))


class Module:
    """A PTX module, translated, compiled and loaded.

    Parameters
    ----------
    ptx : str
        PTX text from NVRTC or nvcc.
    memory : Memory, optional
        The device memory kernels may access; a new, empty one by default (see `Module.memory`).

    Raises
    ------
    Unsupported
        The PTX holds something that the emulator does not know.

    Examples
    --------
    >>> module = Module(Nvrtc().ptx(source))
    >>> x = module.memory.empty(32, np.float32)
    >>> module.launch("kernel", (1,), (32,), 0, [x, np.int32(32)])
    """

    def __init__(self, ptx: str, memory: Memory | None = None) -> None:
        self.memory = memory if memory is not None else Memory()
        self.translation: Translation = translate(ptx)
        self._runtime = build.runtime()[0]
        self._library = build.kernel_library(self.translation.source)
        self._variables = [
            (ctypes.addressof(ctypes.c_char.in_dll(self._library, f"g_{name}")), max(size, 1))
            for name, size in self.translation.variables.items()
        ]

    @property
    def kernels(self) -> dict[str, Kernel]:
        """The module's kernels by name."""
        return self.translation.kernels

    def launch(
        self,
        name: str,
        grid: Any,
        block: Any,
        shared_memory: int = 0,
        params: Any = (),
        *,
        cluster: Any = None,
        seed: int = 0,
        race: bool = True,
        uninitialised: bool = True,
        counters: bool = False,
        workers: int = 1,
        limits: Limits | None = None,
    ) -> Counters:
        """Run a kernel to its end.

        Parameters
        ----------
        name : str
            Kernel.
        grid, block : int or tuple of up to 3 int
        shared_memory : int
            Bytes of dynamic shared memory.
        params : list, bytes, or np.void
            Kernel parameters. In a list: arrays (their address is passed, and they are registered),
            NumPy scalars including structured ones, bytes, and Python ints for pointers. Bytes or one
            structured scalar: the kernel's only parameter.
        cluster : tuple of int, optional
            Blocks that run together; by default what the kernel demands.
        seed : int
            0 runs threads in order, others in a random order that depends on the seed.
        race, uninitialised : bool
            Look for data races, and for reads of shared memory that was never written.
        counters : bool
            Count instructions, wavefronts and sectors.
        workers : int
            Must be 1; parallelism is by processes.
        limits : Limits, optional

        Returns
        -------
        Counters

        Raises
        ------
        LaunchError
            The launch does not fit the kernel or the device.
        EmulatorError
            One of its other subclasses when the kernel does something wrong.
        """
        if workers != 1:
            raise ValueError("the emulator runs on one host thread; run several processes instead")
        kernel = self.kernels.get(name)
        if kernel is None:
            raise LaunchError(f"no kernel {name!r}; the module has {', '.join(self.kernels)}")
        shape = _Shape(
            _triple(grid), _triple(block), _triple(cluster or kernel.required_cluster or 1)
        )
        _check_launch(kernel, shape, shared_memory, limits or Limits())
        packed, keep = _pack(kernel, params, self.memory)
        with _LOCK:
            return self._run(
                kernel, shape, shared_memory, packed, keep, seed, race, uninitialised, counters
            )

    def _run(
        self, kernel, shape, shared_memory, packed, keep, seed, race, uninitialised, counters
    ) -> Counters:
        sites = self.translation.sites
        counts = np.zeros((len(sites), len(_COLUMNS)), np.uint64)
        start = packed.ctypes.data
        extra = [(a, a + n, False) for a, n in self._variables] + [
            (start, start + packed.nbytes, True)
        ]
        ranges = self.memory.table(extra)
        request = _Request(
            shape.grid,
            shape.block,
            shape.cluster,
            kernel.static_shared,
            kernel.static_shared + shared_memory,
            seed,
            race,
            uninitialised,
            counters,
            len(sites),
            0,
            ctypes.addressof(ctypes.c_char.in_dll(self._library, "emu_sites")),
            ctypes.cast(getattr(self._library, f"kernel_{kernel.name}"), ctypes.c_void_p),
            packed.ctypes.data,
            packed.nbytes,
            ranges.ctypes.data,
            len(ranges),
            counts.ctypes.data,
        )
        result = _Result()
        if 0 not in shape.grid:
            self._runtime.emu_launch(ctypes.byref(request), ctypes.byref(result))
        del keep
        if result.error:
            raise BY_CODE[result.error](
                f"kernel {kernel.name}: {result.message.decode(errors='replace')}"
            )
        return (
            self._counters(counts, int(result.switches))
            if counters
            else Counters(switches=int(result.switches))
        )

    def _counters(self, counts: np.ndarray, switches: int) -> Counters:
        lines: dict[tuple[str, int], Line] = defaultdict(Line)
        total = Counters(switches=switches)
        for index in np.flatnonzero(counts.any(axis=1)):
            site, row = (
                self.translation.sites[index],
                dict(zip(_COLUMNS, counts[index].tolist(), strict=True)),
            )
            key = (PurePath(site.location.file).name, site.location.line)
            for target in (lines[key], total):
                target.instructions[site.opcode] += row["executed"]
                for column in (
                    "wavefronts",
                    "ideal_wavefronts",
                    "sectors",
                    "shared_bytes",
                    "global_bytes",
                ):
                    setattr(target, column, getattr(target, column) + row[column])
        total.lines = dict(lines)
        return total


@dataclass(frozen=True)
class _Shape:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]


def _triple(x: Any) -> tuple[int, int, int]:
    values = (int(x),) if np.isscalar(x) else tuple(int(v) for v in x)
    if not 1 <= len(values) <= 3:
        raise LaunchError(f"{x!r} is no launch dimension")
    return (*values, 1, 1)[:3]


def _check_launch(kernel: Kernel, shape: _Shape, shared_memory: int, limits: Limits) -> None:
    threads = int(np.prod(shape.block, dtype=np.int64))
    if (
        not 1 <= threads <= min(kernel.max_threads, limits.threads)
        or shape.block[2] > 64
        or min(shape.block) < 1
    ):
        raise LaunchError(
            f"block {shape.block}: {kernel.name} takes at most {min(kernel.max_threads, limits.threads)} threads"
        )
    if kernel.required_block and (*kernel.required_block, 1, 1)[:3] != shape.block:
        raise LaunchError(f"block {shape.block}: {kernel.name} demands {kernel.required_block}")
    if any(not 1 <= n <= most for n, most in zip(shape.grid, limits.grid, strict=True)):
        raise LaunchError(f"grid {shape.grid} is outside 1 .. {limits.grid}")
    if any(g % c for g, c in zip(shape.grid, shape.cluster, strict=True)):
        raise LaunchError(f"grid {shape.grid} is no multiple of the cluster {shape.cluster}")
    if int(np.prod(shape.cluster)) > limits.cluster:
        raise LaunchError(f"cluster {shape.cluster} has more than {limits.cluster} blocks")
    total = kernel.static_shared + shared_memory
    if shared_memory < 0 or total > limits.shared_memory:
        raise LaunchError(
            f"{total} bytes of shared memory; the device has {limits.shared_memory} per block"
        )


def _pack(kernel: Kernel, params: Any, memory: Memory) -> tuple[np.ndarray, list[Any]]:
    """Parameter block as bytes, and what must stay alive during the launch."""
    if isinstance(params, (bytes, np.void)) or (
        isinstance(params, np.ndarray) and params.dtype.fields
    ):
        params = [params]
    params = list(params)
    if len(params) != len(kernel.parameters):
        raise LaunchError(
            f"{kernel.name} takes {len(kernel.parameters)} parameters, {len(params)} were given"
        )
    # 64-byte aligned, as __grid_constant__ tensor maps need
    raw = np.zeros(max(kernel.parameter_bytes, 1) + 64, np.uint8)
    start = -raw.ctypes.data % 64
    block = raw[start : start + max(kernel.parameter_bytes, 1)]
    keep: list[Any] = [raw]
    for index, ((offset, size), value) in enumerate(zip(kernel.parameters, params, strict=True)):
        data = _bytes_of(value, memory, keep)
        if (
            isinstance(value, (int, np.ndarray))
            and len(data) != size
            and not getattr(value, "dtype", np.dtype(int)).fields
        ):
            raise LaunchError(
                f"parameter {index} of {kernel.name} has {size} bytes, a pointer has 8: pass a NumPy scalar"
            )
        if len(data) != size:
            raise LaunchError(
                f"parameter {index} of {kernel.name} has {size} bytes, {len(data)} were given"
            )
        block[offset : offset + size] = np.frombuffer(data, np.uint8)
    return block, keep


def _bytes_of(value: Any, memory: Memory, keep: list[Any]) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, (int, np.ndarray)) and not isinstance(value, bool):
        if isinstance(value, np.ndarray):
            if value.dtype.fields and value.ndim == 0:
                return value.tobytes()
            keep.append(value)
            memory.register(value)
            value = value.__array_interface__["data"][0]
        return int(value).to_bytes(8, "little")
    return np.asarray(value).tobytes()
