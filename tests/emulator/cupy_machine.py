"""What a CUDA runtime and driver answer, out of host memory and the emulator: see `cupy_driver.py`.

Work is done when it is submitted, or recorded while a graph is captured. What a driver would refuse is refused:
dynamic shared memory that a function was not allowed, memory or modules asked for during a capture, waiting then.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .device import KIB, SHARED_MEMORY
from .memory import Memory
from .module import Limits, Module

MIB = KIB * KIB
_TO_HOST = 2  # cudaMemcpyKind
# CUfunction_attribute
_MAX_THREADS, _SHARED, _DYNAMIC_SHARED = 0, 1, 8


class Function:
    """A loaded kernel and what has been set about it."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.kernel = module.kernels[name]
        # A launch gets no more than 48 KiB unless the function has been allowed more.
        self.dynamic_shared = 48 * KIB - self.kernel.static_shared


class Machine:
    """What the runtime and the driver know: memory, modules, streams."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.memory = Memory()
        self.blocks: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.modules: dict[int, Module] = {}
        self.functions: dict[int, Function] = {}
        self.handles = itertools.count(0x1000, 0x10)
        self.launches: list[str] = []
        self.waits: list[str] = []  # what would have made the host wait for the device
        self.capture: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.faults: list[BaseException] = []
        self.seed = 1
        self.pointer_class: Any = None  # CuPy's, known once its runtime module is

    # ---- memory

    def malloc(self, size: int) -> int:
        """Filled with 0xFF, with nobody's bytes on both sides."""
        self.not_captured("malloc")
        block = self.memory.empty((max(size, 1),), np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def host(self, size: int, _flags: int = 0) -> int:
        """Pinned memory; kernels may not touch it."""
        block = np.empty(max(size, 1), np.uint8)
        self.pinned[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, pointer: int) -> None:
        if pointer:
            (self.blocks if pointer in self.blocks else self.pinned).pop(pointer)

    def memory_type(self, pointer: int) -> int:
        """cudaMemoryType: 0 unknown, 1 host, 2 device."""
        for kind, blocks in ((1, self.pinned), (2, self.blocks)):
            if any(0 <= pointer - start < len(block) for start, block in blocks.items()):
                return kind
        return 0

    def pointer_attributes(self, pointer: int) -> Any:
        return self.pointer_class(0, pointer, pointer, self.memory_type(pointer))

    # ---- code

    def load(self, image: bytes) -> int:
        if not image.lstrip().startswith(b"//"):
            raise ValueError(f"not PTX: {image[:16]!r}")
        self.not_captured("moduleLoadData")
        handle = next(self.handles)
        self.modules[handle] = Module(image.rstrip(b"\0").decode(), self.memory)
        return handle

    def function(self, module: int, name: str) -> int:
        handle = next(self.handles)
        self.functions[handle] = Function(self.modules[module], name)
        return handle

    def set_attribute(self, function: int, attribute: int, value: int) -> None:
        found = self.functions[function]
        if attribute == _DYNAMIC_SHARED:
            most = SHARED_MEMORY[self.arch] - found.kernel.static_shared
            if not 0 <= value <= most:
                raise ValueError(f"{value} bytes of dynamic shared memory, {most} at most")
            found.dynamic_shared = value

    def attribute(self, attribute: int, function: int) -> int:
        found = self.functions[function]
        return {
            _MAX_THREADS: found.kernel.max_threads,
            _SHARED: found.kernel.static_shared,
            _DYNAMIC_SHARED: found.dynamic_shared,
        }.get(attribute, 0)

    def launch(self, handle: int, *numbers: int) -> None:
        """cuLaunchKernel: three grid and three block extents, shared bytes, stream, arguments, extra."""
        grid, block, (shared, _stream, arguments, extra) = numbers[:3], numbers[3:6], numbers[6:10]
        if extra:
            raise NotImplementedError("arguments in `extra`")
        found = self.functions[handle]
        if shared > found.dynamic_shared:
            raise ValueError(
                f"{found.name}: {shared} bytes of dynamic shared memory, {found.dynamic_shared} allowed"
            )
        sizes = [size for _, size in found.kernel.parameters]
        # One address per argument, and no sizes: those are the kernel's to know.
        addresses = (ctypes.c_void_p * len(sizes)).from_address(arguments) if sizes else ()
        values = [ctypes.string_at(a, size) for a, size in zip(addresses, sizes, strict=True)]
        limits = Limits(shared_memory=SHARED_MEMORY[self.arch])
        self.launches.append(found.name)
        run = functools.partial(
            found.module.launch,
            found.name,
            grid,
            block,
            shared,
            values,
            seed=self.seed,
            limits=limits,
        )
        self.submit(run)

    # ---- order

    def submit(self, work: Callable[[], Any]) -> None:
        """Now, or when the graph is launched that is being captured."""
        if self.capture is None:
            work()
        else:
            self.capture.append(work)

    def wait(self, name: str) -> None:
        """The host would stop here."""
        self.waits.append(name)
        self.not_captured(name)

    def not_captured(self, name: str) -> None:
        if self.capture is not None:
            raise RuntimeError(f"{name} while a graph is captured")

    def copy(self, to: int, source: int, size: int, kind: int, *stream: int) -> None:
        """cudaMemcpy, and with a stream cudaMemcpyAsync."""
        if kind == _TO_HOST or not stream:
            self.wait("copy to the host" if kind == _TO_HOST else "memcpy")
        self.submit(lambda: ctypes.memmove(to, source, size))

    def fill(self, to: int, value: int, size: int, *_stream: int) -> None:
        """cudaMemset and cudaMemsetAsync."""
        self.submit(lambda: ctypes.memset(to, value & 0xFF, size))

    def begin_capture(self, _stream: int, _mode: int = 0) -> None:
        self.not_captured("streamBeginCapture")
        self.capture = []

    def end_capture(self, _stream: int) -> int:
        handle = next(self.handles)
        self.graphs[handle], self.capture = self.capture or [], None
        return handle

    def launch_graph(self, graph: int, _stream: int) -> None:
        for work in self.graphs[graph]:
            work()

    def properties(self, _ordinal: int) -> dict[str, Any]:
        number = int(re.sub(r"\D", "", self.arch))
        return {
            "name": f"emulated {self.arch}".encode(),
            "major": number // 10,
            "minor": number % 10,
            "multiProcessorCount": 4,
            "sharedMemPerBlock": 48 * KIB,
            "sharedMemPerBlockOptin": SHARED_MEMORY[self.arch],
            "l2CacheSize": 64 * KIB,
            "totalGlobalMem": 1024 * MIB,
            "maxThreadsPerBlock": 1024,
            "maxThreadsPerMultiProcessor": 2048,
            "regsPerBlock": 64 * KIB,
            "warpSize": 32,
            "clockRate": 1_000_000,
            "memoryClockRate": 1_000_000,
            "memoryBusWidth": 64,
            "pciBusID": 0,
            "pciDeviceID": 0,
            "pciDomainID": 0,
            "ECCEnabled": 0,
        }

    def device_attribute(self, attribute: int, _ordinal: int) -> int:
        number = int(re.sub(r"\D", "", self.arch))
        # cudaDevAttrComputeCapabilityMajor, ...Minor, MultiProcessorCount, MaxThreadsPerBlock
        return {75: number // 10, 76: number % 10, 16: 4, 1: 1024}.get(attribute, 0)

    def answers(self) -> tuple[dict[str, Callable], dict[str, Callable]]:
        """Function names of CuPy's runtime and driver modules -> what answers them."""

        def nothing(*_: Any) -> None:
            return None

        def handle(*_: Any) -> int:
            return next(self.handles)

        runtime = {
            **dict.fromkeys(
                ["setDevice", "_ensure_context", "check_status", "eventDestroy", "eventRecord"],
                nothing,
            ),
            **dict.fromkeys(["streamDestroy", "streamWaitEvent"], nothing),
            **{
                name: functools.partial(lambda name, *_: self.wait(name), name)
                for name in ("deviceSynchronize", "eventSynchronize", "streamSynchronize")
            },
            **dict.fromkeys(["deviceEnablePeerAccess", "_deviceEnsurePeerAccess"], nothing),
            **dict.fromkeys(["eventCreate", "eventCreateWithFlags"], handle),
            **dict.fromkeys(
                ["streamCreate", "streamCreateWithFlags", "streamCreateWithPriority"], handle
            ),
            **dict.fromkeys(["eventQuery", "streamQuery"], lambda *_: 0),
            "eventElapsedTime": lambda *_: 1.0,
            "memGetInfo": lambda: (512 * MIB, 1024 * MIB),
            "getDeviceProperties": self.properties,
            "deviceGetAttribute": self.device_attribute,
            "getDevice": lambda: 0,
            "getDeviceCount": lambda: 1,
            "driverGetVersion": lambda: 12090,
            "runtimeGetVersion": lambda: 12090,
            "deviceCanAccessPeer": lambda *_: 0,
            "malloc": self.malloc,
            "mallocAsync": lambda size, _stream: self.malloc(size),
            "hostAlloc": self.host,
            "pointerGetMemoryType": self.memory_type,
            "pointerGetAttributes": self.pointer_attributes,
            "free": self.free,
            "freeAsync": lambda pointer, _stream: self.free(pointer),
            "freeHost": self.free,
            "memcpy": self.copy,
            "memcpyAsync": self.copy,
            "memset": self.fill,
            "memsetAsync": self.fill,
            "streamBeginCapture": self.begin_capture,
            "streamEndCapture": self.end_capture,
            "streamIsCapturing": lambda _: int(self.capture is not None),
            "graphInstantiate": lambda graph: graph,
            "graphLaunch": self.launch_graph,
            "graphUpload": nothing,
            "graphDestroy": nothing,
            "graphExecDestroy": nothing,
        }
        driver = {
            "moduleLoadData": self.load,
            "moduleUnload": lambda handle: self.modules.pop(handle, None) and None,
            "moduleGetFunction": self.function,
            "funcSetAttribute": self.set_attribute,
            "funcGetAttribute": self.attribute,
            "launchKernel": self.launch,
            "ctxGetCurrent": lambda: 1,
            "ctxGetDevice": lambda: 0,
        }
        return runtime, driver

    def guarded(self, answer: Callable, default: Any) -> Callable:
        """`answer`, whose exceptions are kept: C code between here and the caller cannot pass them on."""

        def answering(*arguments: Any) -> Any:
            try:
                return answer(*arguments)
            except BaseException as error:
                self.faults.append(error)
                return default

        return answering
