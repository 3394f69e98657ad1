"""Runs a form's case where the tests run: in the emulator, or on a GPU with CuPy. Both see the same
inputs.

Each runner compiles all forms of a group as one translation unit, once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .form import Case, Form, MapOf, Output, unit_source

_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OPTIONS = ("-std=c++17", "-lineinfo")


def architecture(group: str) -> str:
    """ "sm_90a_wgmma" -> "90a"."""
    return group.split("_")[1]


class Runner(Protocol):
    """Anything that can launch a form."""

    device: str  # name of the hardware, empty for the emulator

    def supports(self, form: Form) -> bool:
        """True when the form's architecture runs here."""

    def run(self, form: Form, case: Case) -> list[np.ndarray]:
        """Launch once; returns the outputs in argument order."""


def arguments(
    case: Case, place: Callable[[np.ndarray], Any], encode: Callable[[MapOf, Any], Any]
) -> tuple[list[Any], list[Any]]:
    """Kernel arguments and, among them, the placed outputs.

    Parameters
    ----------
    case : Case
    place : callable
        Array -> its device copy.
    encode : callable
        (map description, device copy of its buffer) -> 128 bytes.
    """
    placed = {
        id(a): place(a.initial if isinstance(a, Output) else a)
        for a in case.arguments
        if isinstance(a, (Output, np.ndarray))
    }
    values = [
        encode(a, placed[id(a.buffer)]) if isinstance(a, MapOf) else placed.get(id(a), a)
        for a in case.arguments
    ]
    return values, [placed[id(a)] for a in case.arguments if isinstance(a, Output)]


class EmulatorRunner:
    """Launches in the emulator.

    Parameters
    ----------
    forms : sequence of Form
    seed : int
        Chooses the schedule.
    ptx : dict, optional
        Group -> PTX to use instead of compiling the forms (tests plant mistakes there).
    """

    device = ""

    def __init__(
        self, forms: Sequence[Form], seed: int = 0, ptx: dict[str, str] | None = None
    ) -> None:
        self._forms = forms
        self._modules: dict[str, Any] = {}
        self._ptx = dict(ptx or {})
        self.seed = seed

    def supports(self, form: Form) -> bool:
        return True

    def module(self, group: str) -> Any:
        """The translated group."""
        from tests.emulator.module import Module
        from tests.emulator.nvrtc import Nvrtc

        if group not in self._modules:
            if group not in self._ptx:
                source = unit_source([f for f in self._forms if f.group == group])
                self._ptx[group] = Nvrtc().ptx(
                    source, f"compute_{architecture(group)}", OPTIONS, name=f"{group}.cu"
                )
            self._modules[group] = Module(self._ptx[group])
        return self._modules[group]

    def run(self, form: Form, case: Case) -> list[np.ndarray]:
        from tests.emulator.tensormap import tensor_map

        module = self.module(form.group)

        def encode(m: MapOf, buffer: np.ndarray) -> np.void:
            return tensor_map(
                buffer.ctypes.data,
                m.kind,
                m.dims,
                m.strides,
                m.box,
                swizzle=m.swizzle,
                fill_nan=m.fill_nan,
            )

        values, outputs = arguments(case, module.memory.copy, encode)
        module.launch(form.name, form.cluster, form.block, form.shared, values, seed=self.seed)
        return outputs


class GpuRunner:
    """Launches on the current CUDA device through CuPy, from a cubin that NVRTC makes for exactly
    that architecture."""

    def __init__(self, forms: Sequence[Form]) -> None:
        import cupy

        self.device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        self._forms = forms
        self._modules: dict[str, Any] = {}

    def supports(self, form: Form) -> bool:
        """True when the device can run the form's architecture."""
        import cupy

        major, minor = (int(x) for x in divmod(int(cupy.cuda.Device().compute_capability), 10))
        needed = architecture(form.group)
        if needed.endswith("a"):
            return f"{major}{minor}a" == needed
        return 10 * major + minor >= int(needed)

    def module(self, group: str) -> Any:
        """The loaded group, compiled for exactly this device (for sm_90a with its extensions)."""
        import cupy

        from tests.emulator.nvrtc import Nvrtc

        if group not in self._modules:
            source = unit_source([f for f in self._forms if f.group == group])
            capability = cupy.cuda.Device().compute_capability
            arch = capability + ("a" if architecture(group).endswith("a") else "")
            # Of CuPy's own generation, which the driver serves: there may be no other.
            compiler = Nvrtc(cupy.cuda.driver.get_build_version() // 1000)
            cubin = compiler.cubin(source, f"sm_{arch}", OPTIONS, name=f"{group}.cu")
            self._modules[group] = cupy.cuda.function.Module()
            self._modules[group].load(cubin)
        return self._modules[group]

    def run(self, form: Form, case: Case) -> list[np.ndarray]:
        import cupy

        def place(array: np.ndarray) -> Any:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            return cupy.asarray(raw)

        def encode(m: MapOf, buffer: Any) -> np.ndarray:
            return encode_tensor_map(buffer.data.ptr, m)

        values, outputs = arguments(case, place, encode)
        kernel = self.module(form.group).get_function(form.name)
        if form.shared > 48 * 1024:
            set_attribute = cupy.cuda.driver.funcSetAttribute
            set_attribute(kernel.ptr, _MAX_DYNAMIC_SHARED_MEMORY, form.shared)
        kernel((form.cluster,), (form.block,), tuple(values), form.shared)
        shapes = [a.initial for a in case.arguments if isinstance(a, Output)]
        return [
            cupy.asnumpy(o).view(s.dtype).reshape(s.shape)
            for o, s in zip(outputs, shapes, strict=True)
        ]


_DRIVER_TYPES = {
    "uint8": 0,
    "uint16": 1,
    "uint32": 2,
    "int32": 3,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}
_DRIVER_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}


def encode_tensor_map(pointer: int, m: MapOf) -> np.ndarray:
    """The driver's encoding of a tensor map.

    Raises
    ------
    RuntimeError
        cuTensorMapEncodeTiled refused the arguments.
    """
    rank = len(m.dims)
    space = (ctypes.c_uint64 * 32)()
    address = -(-ctypes.addressof(space) // 128) * 128  # what cuda.h of CUDA 13 declares; 64 before
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    status = encode(
        ctypes.c_void_p(address),
        ctypes.c_int(_DRIVER_TYPES[m.kind]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*m.dims),
        (ctypes.c_uint64 * max(rank - 1, 1))(*m.strides),
        (ctypes.c_uint32 * rank)(*m.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(0),
        ctypes.c_int(_DRIVER_SWIZZLE[m.swizzle]),
        ctypes.c_int(0),
        ctypes.c_int(m.fill_nan),
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled returned {status} for {m}")
    # CuPy passes an array of one element by value
    return np.frombuffer(ctypes.string_at(address, 128), "V128")
