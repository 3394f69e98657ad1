"""Tensor maps without a driver: checks what cuTensorMapEncodeTiled checks and writes the emulator's
own 128 bytes.

The hardware's encoding is opaque, so the emulator has one of its own (`TensorMap` in
runtime/hopper_state.h). The limits are those of the driver: a map that this function refuses would
be refused on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAGIC = 0x50414D524F534E54
# name -> (bytes per element, ElementType of the runtime)
ELEMENTS = {
    "uint8": (1, 0), "uint16": (2, 0), "uint32": (4, 5), "int32": (4, 4), "uint64": (8, 0), "int64": (8, 0),
    "float16": (2, 1), "float32": (4, 3), "float64": (8, 6), "bfloat16": (2, 2), "tfloat32": (4, 3),
}  # fmt: skip
LAYOUT = np.dtype(
    [
        ("magic", "u8"), ("base", "u8"), ("dim", "u8", 5), ("stride", "u8", 4), ("box", "u2", 5),
        ("rank", "u1"), ("element_bytes", "u1"), ("type", "u1"), ("swizzle", "u1"),
        ("fill_nan", "u1"), ("reserved", "u1", 25),
    ]
)  # fmt: skip
assert LAYOUT.itemsize == 128


def tensor_map(
    pointer: int,
    kind: str,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: int = 0,
    element_strides: Sequence[int] | None = None,
    fill_nan: bool = False,
) -> np.void:
    """Describe a tensor in global memory to the emulated copy engine.

    Parameters
    ----------
    pointer : int
        Address of the first element.
    kind : str
        Element type: "float16", "bfloat16", "float32", ... (CUtensorMapDataType in lower case).
    dims : sequence of int
        Extents in elements, innermost first; 1 to 5 of them.
    strides : sequence of int
        Byte strides of every axis but the innermost.
    box : sequence of int
        Extents of the box that one instruction moves, innermost first.
    swizzle : int
        0, 32, 64 or 128: span of the swizzle in bytes.
    element_strides : sequence of int, optional
        Must be all 1.
    fill_nan : bool
        Fill elements outside the tensor with NaN instead of zero.

    Returns
    -------
    numpy.void
        128 bytes to pass to a kernel by value.

    Raises
    ------
    ValueError
        A limit of cuTensorMapEncodeTiled is broken; the message has the figures.
    NotImplementedError
        Legal, but the emulator does not model it.
    """
    if kind not in ELEMENTS:
        raise ValueError(f"element type {kind!r} is none of {', '.join(ELEMENTS)}")
    size, number = ELEMENTS[kind]
    _check_tensor(pointer, dims, strides)
    _check_box(size, dims, box, swizzle)
    if fill_nan and "float" not in kind:
        raise ValueError(f"NaN fill needs a floating-point element type, not {kind}")
    if element_strides is not None and tuple(element_strides) != (1,) * len(dims):
        raise NotImplementedError(
            f"element strides {tuple(element_strides)}: the emulator only knows 1"
        )
    out = np.zeros((), LAYOUT)
    rank = len(dims)
    out["magic"], out["base"], out["rank"] = MAGIC, pointer, rank
    out["dim"][:rank], out["stride"][: rank - 1], out["box"][:rank] = dims, strides, box
    out["element_bytes"], out["type"], out["swizzle"], out["fill_nan"] = (
        size,
        number,
        swizzle,
        fill_nan,
    )
    return out[()]


def _check_tensor(pointer: int, dims: Sequence[int], strides: Sequence[int]) -> None:
    if not 1 <= len(dims) <= 5:
        raise ValueError(f"a tensor map has rank 1 to 5, not {len(dims)}")
    if len(strides) != len(dims) - 1:
        raise ValueError(f"rank {len(dims)} needs {len(dims) - 1} strides, not {len(strides)}")
    if pointer % 16:
        raise ValueError(f"global address {pointer:#x} is not a multiple of 16")
    for i, n in enumerate(dims):
        if not 1 <= n <= 2**32:
            raise ValueError(f"dims[{i}] = {n} is not in 1 .. 2^32")
    for i, s in enumerate(strides):
        if s % 16 or not 0 < s < 2**40:
            raise ValueError(
                f"strides[{i}] = {s} bytes is not a positive multiple of 16 below 2^40"
            )


def _check_box(size: int, dims: Sequence[int], box: Sequence[int], swizzle: int) -> None:
    if len(box) != len(dims):
        raise ValueError(f"box has {len(box)} extents for rank {len(dims)}")
    for i, n in enumerate(box):
        if not 1 <= n <= 256:
            raise ValueError(f"box[{i}] = {n} is not in 1 .. 256")
    inner = box[0] * size
    if inner % 16:
        raise ValueError(f"a box row of {inner} bytes is not a multiple of 16")
    if swizzle not in (0, 32, 64, 128):
        raise ValueError(f"swizzle {swizzle} is none of 0, 32, 64, 128")
    if swizzle and inner > swizzle:
        raise ValueError(f"a box row of {inner} bytes is wider than the swizzle span of {swizzle}")
    if swizzle and inner < swizzle:
        raise NotImplementedError(
            f"a box row of {inner} bytes in a swizzle span of {swizzle}: its pitch is not documented"
        )
