"""Merging partial results on the device: kernels_cu/merge.cuh, 32 parts at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash import _dtypes, _params
from cuflash._candidates import ELEMENTS
from cuflash._compile import Specialization
from cuflash._device import Device
from cuflash._errors import UnsupportedError
from cuflash._views import OrderedEmpty, contiguous_view, kernel_view, merge_axes

WARPS = 4


def specialization(arch: str, element: str) -> Specialization:
    """The merge kernel of one element type."""
    constants = (("WARPS", WARPS), ("MIN_BLOCKS", 1))
    return Specialization("merge", arch, element, 0, 0, "", constants=constants)


def merge(
    device: Device, outs: Sequence[Any], lses: Sequence[Any], out: Any | None
) -> tuple[Any, Any]:
    """Merge parts; every out is (*B, H, Lq, Dv), every lse (*B, H, Lq)."""
    first = outs[0]
    shape = tuple(first.shape)
    with device.activate():
        if out is None:
            out = OrderedEmpty(shape, first)(device, first.dtype)
        if 0 in shape[:-1]:
            return out, device.empty(shape[:-1], lses[0].dtype)
        xp = device.xp
        outs = [xp.ascontiguousarray(part) for part in outs]
        lses = [xp.ascontiguousarray(part) for part in lses]
        while len(outs) > _params.MERGE_MAX_PARTS:
            # A tree of partial results in the type of lse: rounding to the element type happens once, at the end.
            size = _params.MERGE_MAX_PARTS
            groups = range(0, len(outs), size)
            level = [
                _merge_once(device, outs[g : g + size], lses[g : g + size], None, first.dtype)
                for g in groups
            ]
            outs, lses = [part for part, _ in level], [part for _, part in level]
        return _merge_once(device, outs, lses, out, first.dtype)


def _merge_once(
    device: Device, outs: Sequence[Any], lses: Sequence[Any], out: Any | None, dtype: np.dtype
) -> tuple[Any, Any]:
    """One launch over at most 32 contiguous parts, into `out` or a new array of the type of lse."""
    row = _dtypes.BY_NUMPY[dtype]
    shape = tuple(outs[0].shape)
    lse = device.empty(shape[:-1], row.lse)
    if out is None:
        out = device.empty(shape, row.lse)
    view = kernel_view(out)
    extents, merged = merge_axes(shape[:-3], {"out": view.strides[:-3]})
    copied = view.copied or len(extents) > _params.MAX_BATCH_AXES
    if copied:
        view = contiguous_view(shape)
        extents, merged = merge_axes(shape[:-3], {"out": view.strides[:-3]})
    target = device.empty(shape, out.dtype) if copied else out
    pad = _params.MAX_BATCH_AXES - len(extents)
    struct = np.zeros((), _params.MERGE)
    struct["outs"][: len(outs)] = [device.pointer(part) for part in outs]
    struct["lses"][: len(lses)] = [device.pointer(part) for part in lses]
    struct["out"], struct["lse"] = device.pointer(target), device.pointer(lse)
    rows = math.prod(shape[:-1])
    struct["rows"], struct["parts"], struct["head_dim_v"] = rows, len(outs), shape[-1]
    struct["out_strides"]["batch"] = [0] * pad + merged["out"]
    struct["out_strides"]["head"], struct["out_strides"]["row"] = view.strides[-3:-1]
    struct["batch_extent"] = [1] * pad + extents
    struct["heads"], struct["len_q"] = shape[-3], shape[-2]
    struct["outs_are_float"] = outs[0].dtype == row.lse
    struct["out_is_float"] = out.dtype == row.lse
    if row.name == "bfloat16" and device.arch == "sm_75":
        raise UnsupportedError(
            "no kernel for merge_attention · bfloat16 · sm_75.\n"
            "  merge        bfloat16 needs sm_80 or newer\n"
            "  Nearest supported: float16, or NumPy arrays (CPU backend)."
        )
    kernel = device.load(specialization(device.arch, ELEMENTS[row.name]))
    kernel(-(-rows // WARPS), WARPS * 32, 0, struct.tobytes())
    if copied:
        out[...] = target
    return out, lse
