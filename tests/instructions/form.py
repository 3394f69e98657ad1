"""What a conformance form is, so that each instruction file only states its kernel, its inputs and
its reference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Kernels are batched into one translation unit per group: front-end and C++ compile time dominate,
# not the kernels.
PRELUDE = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
typedef int i32; typedef unsigned long long u64; typedef long long i64;
struct alignas(64) TensorMap { u64 words[16]; };
static __device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
extern __shared__ __align__(1024) u8 smem[];
"""


@dataclass(eq=False)
class Output:
    """A buffer the kernel writes.

    Parameters
    ----------
    initial : ndarray
        Contents before the launch; `blank` makes one filled with 0xFF bytes so that an unwritten
        element shows.
    """

    initial: np.ndarray


def blank(shape: int | tuple[int, ...], dtype: Any) -> Output:
    """An output buffer whose bytes are all 0xFF."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return Output(array)


@dataclass(frozen=True, eq=False)
class MapOf:
    """A tensor-map argument over one of the case's buffers.

    Parameters
    ----------
    buffer : ndarray or Output
        The mapped buffer; must itself be an argument of the case.
    kind : str
        Element type as cuTensorMapEncodeTiled names it, in lower case: "float16", "float32", ...
    dims : tuple of int
        Extents, innermost first.
    strides : tuple of int
        Byte strides of every axis but the innermost.
    box : tuple of int
        Box extents, innermost first.
    swizzle : int
        0, 32, 64 or 128: the span in bytes.
    fill_nan : bool
        Elements outside the tensor read as NaN instead of zero.
    """

    buffer: Any
    kind: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    fill_nan: bool = False


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one launch and what it must produce.

    Parameters
    ----------
    arguments : sequence
        In kernel order: ndarray (input), Output, MapOf, or a NumPy scalar passed by value.
    expected : sequence of ndarray
        One per Output, in argument order.
    tolerance : sequence
        One per Output, absolute, broadcastable to it; None means bitwise equal (NaN anywhere NaN is
        expected).
    """

    arguments: Sequence[Any]
    expected: Sequence[np.ndarray]
    tolerance: Sequence[Any] = ()

    def digest(self) -> str:
        """Hash of every input, so that a golden file is never compared with other inputs."""
        h = hashlib.sha256()
        for a in self.arguments:
            data = a.initial if isinstance(a, Output) else a
            if isinstance(data, MapOf):
                text = (data.kind, data.dims, data.strides, data.box, data.swizzle, data.fill_nan)
                h.update(repr(text).encode())
            else:
                h.update(np.ascontiguousarray(data).tobytes())
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class Form:
    """One instruction form.

    Parameters
    ----------
    name : str
        Kernel symbol, test id and golden file name.
    group : str
        Translation unit it belongs to; a group has one architecture.
    parameters : str
        Parameter list of the kernel in CUDA.
    body : str
        Body of the kernel; `lane` and `thread` are predefined.
    make : callable
        rng -> Case.
    block : int
        Threads of a block.
    shared : int
        Dynamic shared memory in bytes.
    cluster : int
        Blocks launched, all of one cluster.
    functions : tuple of str
        Device functions; each text is written once per unit.
    """

    name: str
    group: str
    parameters: str
    body: str
    make: Callable[[np.random.Generator], Case]
    block: int = 32
    shared: int = 0
    cluster: int = 1
    functions: tuple[str, ...] = ()

    def source(self) -> str:
        """CUDA text of this kernel."""
        cluster = f"__cluster_dims__({self.cluster}, 1, 1) " if self.cluster > 1 else ""
        return (
            f'extern "C" __global__ void {cluster}__launch_bounds__({self.block}, 1) '
            f"{self.name}({self.parameters}) {{\n"
            "    const u32 thread = threadIdx.x, lane = threadIdx.x & 31;\n"
            f"    (void)thread; (void)lane;\n{self.body}\n}}\n"
        )

    def case(self) -> Case:
        """The form's fixed random case (the same on every machine and run)."""
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")
        return self.make(np.random.default_rng(seed))


def unit_source(forms: Sequence[Form]) -> str:
    """One translation unit with the kernels of `forms`."""
    functions = dict.fromkeys(text for form in forms for text in form.functions)
    return PRELUDE + "".join(functions) + "\n".join(f.source() for f in forms)


def operands(template: str, count: int, start: int = 0) -> str:
    """`{%start, ...}`: a braced list of asm operands; `template` is formatted with each number."""
    return "{" + ", ".join(template.format(i) for i in range(start, start + count)) + "}"


def constraints(kind: str, name: str, count: int) -> str:
    """`"kind"(name[0]), ...` for an asm statement."""
    return ", ".join(f'"{kind}"({name}[{i}])' for i in range(count))


def mismatch(actual: np.ndarray, expected: np.ndarray, tolerance: Any) -> str | None:
    """None when `actual` agrees with `expected`, else a sentence with the worst position and both
    values.

    `tolerance` None demands equal bits; NaN is equal to any NaN, because its payload is
    unspecified.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"{actual.dtype}{actual.shape} where {expected.dtype}{expected.shape} was expected"
    if actual.dtype.kind in "iub":
        bad = actual != expected
        excess = bad.astype(np.float64)
    else:
        a, e = actual.astype(np.float64), expected.astype(np.float64)
        both_nan = np.isnan(a) & np.isnan(e)
        bits = np.dtype(f"u{actual.dtype.itemsize}")
        if tolerance is None:
            bad = (actual.view(bits) != expected.view(bits)) & ~both_nan
            excess = bad.astype(np.float64)
        else:
            with np.errstate(invalid="ignore"):
                distance = np.where(a == e, 0.0, np.abs(a - e))
            excess = np.where(both_nan, 0.0, distance) - np.broadcast_to(tolerance, a.shape)
            bad = ~(excess <= 0)
            excess = np.where(np.isnan(excess), np.inf, excess)
    if not bad.any():
        return None
    worst = np.unravel_index(int(np.argmax(np.where(bad, excess, -np.inf))), bad.shape)
    where = ", ".join(str(int(i)) for i in worst)
    limit = (
        "exactly"
        if tolerance is None
        else f"within {np.broadcast_to(tolerance, bad.shape)[worst]:.3g}"
    )
    return (
        f"{int(bad.sum())} of {bad.size} elements differ; worst at [{where}]: {actual[worst]!r}, "
        f"expected {expected[worst]!r} {limit}"
    )
