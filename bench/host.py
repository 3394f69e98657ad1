"""What a CPU alone can measure: how long compiling takes, and what Python costs per call.

The launch is replaced by nothing; checks, planning, allocation and packing of parameters are those
of a real call. Arrays are CuPy's where CuPy is installed, over memory of the host that nobody reads:
NumPy takes a microsecond to tell an address, which is most of what a call then costs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import cuflash
from bench.timing import host_seconds
from cuflash import _compile, _plan, _prepare
from cuflash._device import Limits, use_device
from cuflash._gradient import Pullback

HOPPER = ("forward_sm90", "backward_sm90")


class NullDevice:
    """A device on which everything happens but the launch; see `cuflash._device.Device`.

    Memory comes from a pool, as CuPy's does: asking the operating system for megabytes would cost
    more than all else.
    """

    name = "no device"
    limits = Limits(sm_count=132, shared_memory=227 * 1024, l2_bytes=50 << 20)

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.xp: Any = np
        self.key = ("null", arch)
        self._pool: dict[Any, Any] = {}

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to switch."""
        return contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Host memory, the same for every request of one kind."""
        found = self._pool.get((shape, dtype))
        if found is None:
            found = self._pool[shape, dtype] = np.empty(shape, dtype)
        return found

    def pointer(self, array: Any) -> int:
        """Its address."""
        return array.__array_interface__["data"][0]

    def load(self, spec: _compile.Specialization) -> Callable[..., None]:
        """A kernel that does nothing."""
        return _launch_nothing

    def tensor_map(self, pointer: int, layout: Any) -> bytes:
        """As large as a real one; making those takes the driver a microsecond."""
        return bytes(128)


def _launch_nothing(grid: int, block: int, shared_memory: int, params: bytes) -> None:
    return None


class NullCupyDevice(NullDevice):
    """The same for CuPy arrays."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        import cupy

        class Unfilled(cupy.ndarray):
            """An array that what would fill it leaves as it is."""

            def __setitem__(self, where: Any, value: Any) -> None:
                return None

        self.xp, self._unfilled = cupy, Unfilled

    def array(self, shape: tuple[int, ...], dtype: Any, kind: Any = None) -> Any:
        """A CuPy array over host memory."""
        memory = self.xp.cuda.memory
        host = np.empty(int(np.prod(shape)) * np.dtype(dtype).itemsize + 16, np.uint8)
        address = -(-host.ctypes.data // 16) * 16
        owner = memory.UnownedMemory(address, host.nbytes, host, 0)
        pointer = memory.MemoryPointer(owner, 0)
        return (kind or self.xp.ndarray)(shape, dtype, memptr=pointer)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """See NullDevice."""
        found = self._pool.get((shape, dtype))
        if found is None:
            # Results of packed sequences are filled before they are written.
            kind = self._unfilled if len(shape) < 4 else None
            found = self._pool[shape, dtype] = self.array(shape, dtype, kind)
        return found

    def pointer(self, array: Any) -> int:
        """Its address."""
        return array.data.ptr


@contextlib.contextmanager
def arrays_without_gpu(arch: str) -> Iterator[Callable[..., Any]]:
    """What makes arrays of a shape and dtype, with which calls come to a device that does nothing."""
    try:
        from cuflash import _cupy_device
    except ImportError:
        with use_device(NullDevice(arch)):
            yield np.zeros
        return
    device = NullCupyDevice(arch)

    def device_of(array: Any) -> NullDevice:
        return device

    with mock.patch.object(_cupy_device, "device_of", device_of):
        yield device.array
    _prepare.forget()


def loop() -> None:
    """Some Python, to compare machines and loads by."""
    found = {}
    for i in range(200):
        found[i & 7] = (i, str(i))


def call_times(arch: str) -> dict[str, dict[str, float]]:
    """Microseconds of Python per warm call, by kind of call."""
    with arrays_without_gpu(arch) as array:
        bf16 = ml_dtypes.bfloat16
        q, out, result = (array((2, 16, 256, 128), bf16) for _ in range(3))
        token, cache = array((2, 16, 1, 128), bf16), array((2, 4, 4096, 128), bf16)
        packed, ends = array((16, 512, 128), bf16), array((3,), np.int32)
        lse = array((2, 16, 256), np.float32)
        pullback = Pullback(
            cuflash.attention_backward,
            (q, q, q, result, lse),
            {"causal": True, "wrt": ("q", "k", "v")},
        )
        most: dict[str, Any] = {"max_seqlen_q": 512, "max_seqlen_k": 512}
        calls: dict[str, Callable[[], Any]] = {
            "(a fixed loop)": loop,
            "attention": lambda: cuflash.attention(q, q, q, causal=True),
            "attention out=": lambda: cuflash.attention(q, q, q, causal=True, out=out),
            "attention layout=LHD": lambda: cuflash.attention(q, q, q, layout="LHD"),
            "attention, one query": lambda: cuflash.attention(token, cache, cache),
            "attention_varlen": lambda: cuflash.attention_varlen(
                packed, packed, packed, ends, ends, **most
            ),
            "attention_backward": lambda: cuflash.attention_backward(q, q, q, q, result, lse),
            "pullback": lambda: pullback(q),
        }
        found = {}
        for name, call in calls.items():
            call()
            times = host_seconds(call)
            found[name] = {"us": times.median * 1e6, "fastest_us": times.seconds[0] * 1e6}
    return found


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A cache directory of its own, and nothing remembered in memory."""
    before = os.environ.get("CUFLASH_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUFLASH_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["CUFLASH_CACHE_DIR"]
            else:
                os.environ["CUFLASH_CACHE_DIR"] = before


def compile_times(arch: str, head_dims: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds of wall time to build a kernel: cold (wall and CPU), from the
    disk cache."""
    specs = [
        spec
        for spec in _plan.all_specializations(arch)
        if spec.element == "f16"
        and spec.head_dim in head_dims
        and spec.head_dim == spec.head_dim_v
        and spec.kernel in ("forward", "backward_dkdv", "backward_dq", *HOPPER)
        and spec.variant in ("linear", "accumulate_linear")
    ]
    _compile.digest()
    found = []
    with empty_cache():
        for spec in specs:
            _compile._built.clear()
            cpu = time.process_time()
            cold = _wall(spec)
            cpu = time.process_time() - cpu
            _compile._built.clear()
            disk = _wall(spec)
            found.append({"kernel": spec.name, "cold_s": cold, "cold_cpu_s": cpu, "disk_s": disk})
    _compile._built.clear()
    return found


def _wall(spec: _compile.Specialization) -> float:
    start = time.perf_counter()
    _compile.build(spec)
    return time.perf_counter() - start
