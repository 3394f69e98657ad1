"""CuPy without a GPU: its arrays live in host memory, its launches run in the emulator.

    python -m pytest --gpu -p tests.emulator.cupy_driver tests/test_kernels.py

runs, through CuPy itself, the tests that are meant for a GPU: the arrays, the memory pool, the streams,
the loading of modules and the packing of a launch's arguments are CuPy's own code; only what CuPy asks of
the CUDA runtime and driver is answered here. CuPy's parts call each other through tables of C functions
(`__pyx_capi__`, Cython's way), so two tables are rewritten before the rest of CuPy is imported.

Nothing is asynchronous, and cubins cannot be read: cuflash and CuPy hand over PTX instead (`_compile.build` is
replaced; CuPy has an environment variable). A kernel's mistake cannot leave C code as an exception, so it is
kept and fails the test at its end, as an error of a real launch shows at a later call.

Environment: CUFLASH_EMULATED_ARCH, "sm_80" by default, is the device that CuPy finds.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .cupy_machine import Machine

ARCH = os.environ.get("CUFLASH_EMULATED_ARCH", "sm_80")
_TYPES = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "intptr_t": ctypes.c_ssize_t,
    "size_t": ctypes.c_size_t,
    "uintmax_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "PyObject *": ctypes.py_object,
    "CUdevice": ctypes.c_int,
    "cudaMemcpyKind": ctypes.c_int,
}


def prototype(signature: str) -> tuple[Any, int, Any]:
    """(ctypes prototype, arguments that count, result in case of an error) of a Cython C function."""
    result, _, inside = signature.partition("(")
    words = [w.strip() for w in inside.rstrip(")").split(",")]
    kinds = [_TYPES.get(w, ctypes.c_void_p) for w in words if w != "void" and "__pyx" not in w]
    # What Cython adds: whether to skip a Python override, and a pointer to optional arguments.
    extra = [
        ctypes.c_int if "skip_dispatch" in w else ctypes.c_void_p for w in words if "__pyx" in w
    ]
    returned = _TYPES.get(result.strip(), ctypes.py_object)  # others are objects of Cython classes
    default = None if returned is ctypes.py_object else 0
    return ctypes.PYFUNCTYPE(returned, *kinds, *extra), len(kinds), default


def replace(module: Any, name: str, machine: Machine, answer: Callable) -> None:
    """Rewrite one function of a Cython module, for its C callers and for Python's."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = (
        ctypes.c_void_p,
        [ctypes.py_object],
    )
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    old = module.__pyx_capi__[name]
    signature = api.PyCapsule_GetName(old)
    kind, count, default = prototype(ctypes.string_at(signature).decode())
    guarded = machine.guarded(answer, default)
    finalizing = sys.is_finalizing
    function = kind(lambda *arguments: default if finalizing() else guarded(*arguments[:count]))
    # C code holds their addresses to the very end: CuPy frees memory after the interpreter's modules are gone.
    for kept in (old, function):
        api.Py_IncRef(ctypes.py_object(kept))
    address = ctypes.cast(function, ctypes.c_void_p)
    module.__pyx_capi__[name] = api.PyCapsule_New(address, signature, None)
    setattr(module, name, answer)


def install(machine: Machine) -> None:
    """Answer for the runtime and the driver; before CuPy is imported."""
    if "cupy" in sys.modules:
        raise RuntimeError("CuPy has been imported already")
    os.environ["CUPY_COMPILE_WITH_PTX"] = "1"
    # Not beside binaries that a real device might find.
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    # CUB's sums would be a library's own launches, which do not pass here.
    os.environ["CUPY_ACCELERATORS"] = ""
    from cupy_backends.cuda.api import driver, runtime

    machine.pointer_class = runtime.PointerAttributes
    for module, answers in zip((runtime, driver), machine.answers(), strict=True):
        for name, answer in answers.items():
            replace(module, name, machine, answer)
    _redirect_cuflash()


def _redirect_cuflash() -> None:
    """PTX instead of cubins, and tensor maps in the emulator's encoding."""
    from cupy_backends.cuda.api import driver

    from cuflash import _compile, _tensor_maps

    from . import device
    from .tensormap import tensor_map

    kinds = {number: name for name, number in _tensor_maps.TYPES.items()}
    spans = {number: span for span, number in _tensor_maps.SWIZZLES.items()}

    def encode(
        out: int, kind: int, rank: int, pointer: int, dims: Any, strides: Any, box: Any, steps: Any,
        *words: int,
    ) -> int:  # fmt: skip
        text = tensor_map(
            pointer, kinds[kind], dims[:rank], strides[: rank - 1], box[:rank],
            swizzle=spans[words[1]], element_strides=steps[:rank],
        ).tobytes()  # fmt: skip
        ctypes.memmove(out, text, len(text))
        return 0

    # By the generation of NVRTC that this CuPy would use.
    major = driver.get_build_version() // 1000
    _compile.build = lambda spec: device.ptx(spec, major).encode()
    _tensor_maps._driver_function = lambda: encode


MACHINE = Machine(ARCH)
install(MACHINE)


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """A test fails with what went wrong inside its launches."""
    MACHINE.faults.clear()
    yield
    if MACHINE.faults:
        raise MACHINE.faults[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU for its size, and what does not run through CuPy."""
    kept = [item for item in items if _small(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _small(item: pytest.Item) -> bool:
    if item.get_closest_marker("small_gpu") is not None:
        return True
    identity = getattr(getattr(item, "callspec", None), "id", "")
    return "cupy" in identity.split("-") and "wide_backend" not in item.fixturenames
