"""Kernels of Hopper that read arrays by tensor maps: the maps are put behind their params at every launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cuflash._compile import Specialization
from cuflash._device import Device, Kernel
from cuflash._params import BACKWARD_SM90, FORWARD_SM90, MAX_BATCH_AXES
from cuflash._plan_values import Plan
from cuflash._problem import Problem
from cuflash._tensor_maps import BYTES, Layout
from cuflash._views import Views

SLAB_COLUMNS = 64  # 128 bytes: a row of the swizzle
BATCH_AXES = 2  # of a map, beside columns, rows and heads
MAX_STRIDE = 2**40  # bytes


def most_batch_axes(plan: Plan) -> int:
    """Batch axes that kernels of a Plan can step along."""
    mapped = any(launch.spec.kernel.endswith("_sm90") for launch in plan.launches)
    return BATCH_AXES if mapped else MAX_BATCH_AXES


def layout_of(problem: Problem, views: Views, name: str, rows: int) -> Layout:
    """How a kernel reads an array: slabs of 64 columns and `rows` rows of one head.

    Axes of which there is only one, or along which the array is broadcast, have extent 1: their
    coordinate is always 0.
    """
    view, itemsize = views.views[name], 2
    assert len(views.extents) <= BATCH_AXES, "planned for arrays with fewer"
    # Boxes count rows on, so there is no map of one row that stands for many.
    assert view.shape[-2] == 1 or view.strides[-2] > 0, "planned for arrays whose rows step"
    extents = [1] * BATCH_AXES + views.extents
    steps = [0] * BATCH_AXES + views.batch[name]
    outer = zip(
        (*view.shape[-2:-4:-1], *extents[: -BATCH_AXES - 1 : -1]),
        (*view.strides[-2:-4:-1], *steps[: -BATCH_AXES - 1 : -1]),
        strict=True,
    )
    # Nobody steps along an axis of extent 1, but the driver wants a stride: as if it lay behind the axis before.
    axes: list[tuple[int, int]] = []
    packed = -(-view.shape[-1] * itemsize // 16) * 16
    for n, step in outer:
        axes.append((n, step * itemsize) if n > 1 and step else (1, packed))
        packed = min(axes[-1][0] * axes[-1][1], MAX_STRIDE - 16)
    return Layout(
        kind=problem.dtype,
        dims=(view.shape[-1], *(n for n, _ in axes)),
        strides=tuple(step for _, step in axes),
        box=(SLAB_COLUMNS, rows, *[1] * (len(axes) - 1)),
    )


class MappedKernel:
    """A kernel whose params end with tensor maps.

    Parameters
    ----------
    device : Device
    kernel : Kernel
    size : int
        Bytes of the params with the maps.
    maps : sequence of (int, Layout)
        For each map: which of the pointers that the params begin with it is of, and how that array lies.
    """

    def __init__(
        self, device: Device, kernel: Kernel, size: int, maps: Sequence[tuple[int, Layout]]
    ) -> None:
        self._device, self._kernel, self._maps = device, kernel, tuple(maps)
        self._room = size - len(self._maps) * BYTES
        self._pointers = struct.Struct(f"<{1 + max(place for place, _ in self._maps)}Q").unpack_from

    def __call__(self, grid: int, block: int, shared_memory: int, params: bytes) -> None:
        """See `cuflash._device.Kernel`."""
        pointers, make = self._pointers(params), self._device.tensor_map
        maps = [make(pointers[place], layout) for place, layout in self._maps]
        whole = b"".join((params.ljust(self._room, b"\0"), *maps))
        self._kernel(grid, block, shared_memory, whole)


def mapped_backward(
    device: Device, kernel: Kernel, problem: Problem, views: Views, block_q: int, block_k: int
) -> MappedKernel:
    """backward_sm90 with its four maps; places as in BackwardParams."""
    rows = {"q": (0, block_q), "k": (1, block_k), "v": (2, block_k), "dout": (4, block_q)}
    maps = [(place, layout_of(problem, views, n, count)) for n, (place, count) in rows.items()]
    return MappedKernel(device, kernel, BACKWARD_SM90.itemsize, maps)


def mapped_forward(
    device: Device, kernel: Kernel, problem: Problem, views: Views, spec: Specialization
) -> MappedKernel:
    """forward_sm90 with its four maps; places as in ForwardParams. A warpgroup stores its 64 rows."""
    block_q, block_k = spec.constant("BLOCK_Q"), spec.constant("BLOCK_K")
    rows = {"q": (0, block_q), "k": (1, block_k), "v": (2, block_k), "out": (3, 64)}
    maps = [(place, layout_of(problem, views, n, count)) for n, (place, count) in rows.items()]
    return MappedKernel(device, kernel, FORWARD_SM90.itemsize, maps)
