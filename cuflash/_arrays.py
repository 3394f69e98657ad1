"""Where arrays live, what is known of one without reading it, and whether two share memory.

NumPy arrays, CuPy arrays and everything that can be seen as a CuPy array without a copy (DLPack,
`__cuda_array_interface__`) meet here and nowhere else. CuPy is imported when the first CUDA array
arrives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash._device import Device, device_override
from cuflash._errors import Seen, UnsupportedError, kind_of

# DLPack device types whose memory a CUDA kernel can read: kDLCUDA, kDLCUDAManaged.
_DLPACK_CUDA = (2, 13)
# Effort for the exact test whether two interleaved arrays share an element; what is harder counts
# as sharing.
_OVERLAP_WORK = 100_000


class Meta(NamedTuple):
    """What the checks may know of an array: everything but its contents and its exact address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0  # address modulo 16; 0 where alignment makes no difference
    writable: bool = True

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def empty(self) -> bool:
        return 0 in self.shape

    def swapped(self, first: int, second: int) -> Meta:
        """With two axes exchanged."""
        shape, strides = list(self.shape), list(self.strides)
        shape[first], shape[second] = shape[second], shape[first]
        strides[first], strides[second] = strides[second], strides[first]
        return self._replace(shape=tuple(shape), strides=tuple(strides))

    def expanded(self) -> Meta:
        """With a leading axis of extent 1."""
        return self._replace(shape=(1, *self.shape), strides=(0, *self.strides))

    def span(self) -> tuple[int, int]:
        """First and one-past-last byte relative to element 0; (0, 0) for an empty array."""
        if self.empty:
            return 0, 0
        steps = [(n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)]
        return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + self.itemsize

    def overlaps_itself(self) -> bool:
        """False only when each axis steps over all faster ones, so that no two elements meet."""
        if self.empty:
            return False
        axes = sorted(
            (abs(step), n) for n, step in zip(self.shape, self.strides, strict=True) if n > 1
        )
        reach = self.itemsize
        for step, n in axes:
            if step < reach:
                return True
            reach += step * (n - 1)
        return False


def address_of(array: Any) -> int:
    """Address of element 0, in host or device memory."""
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0]
    return array.data.ptr


def signature(array: Any, on_device: bool) -> tuple[Any, ...]:
    """Hashable metadata, in the order of Meta's fields; all that a prepared call depends on."""
    offset = address_of(array) % 16 if on_device else 0
    # CuPy has no read-only arrays.
    writable = array.flags.writeable if isinstance(array, np.ndarray) else True
    return array.shape, array.strides, array.dtype, offset, writable


# ---- adoption


def adopt(
    names: Sequence[str],
    objects: Sequence[Any],
    required: int,
    options: Callable[[], Mapping[str, Any]],
) -> tuple[Sequence[Any], Device | None]:
    """NumPy or CuPy arrays that share the memory of `objects`, and the device they run on.

    Parameters
    ----------
    names, objects
        Arguments; None for those not given.
    required
        How many of them, from the first, must be given.
    options
        Makes the option values by name, for messages.

    Returns
    -------
    arrays, device
        `device` is None for the CPU backend.

    Raises
    ------
    TypeError
        Something is no array, or NumPy and CUDA arrays are mixed.
    ValueError
        CUDA arrays of several GPUs.
    """
    kind = type(objects[0])
    for place, array in enumerate(objects):
        if type(array) is not kind and (array is not None or place < required):
            break
    else:  # nearly every call: arrays of one kind, nothing to convert
        if kind is np.ndarray:
            return objects, device_override()
        if is_cupy(kind) and _on_one_gpu(objects):
            from cuflash import _cupy_device

            return objects, _cupy_device.device_of(objects[0])
    seen = Seen(dict(zip(names, objects, strict=True)), options())
    if any(isinstance(x, np.ndarray) for x in objects):
        # Before CuPy is asked for anything: it may be absent, or without a driver.
        sides = {name: _side_of(x) for name, x in zip(names, objects, strict=True)}
        _check_homes({name: side for name, side in sides.items() if side is not None}, seen)
    arrays = [
        None if x is None and place >= required else _adopt_one(name, x, seen)
        for place, (name, x) in enumerate(zip(names, objects, strict=True))
    ]
    homes = {name: home_of(x) for name, x in zip(names, arrays, strict=True) if x is not None}
    _check_homes(homes, seen)
    if isinstance(arrays[0], np.ndarray):
        return arrays, device_override()
    from cuflash import _cupy_device

    return arrays, _cupy_device.device_of(arrays[0])


def is_cupy(kind: type) -> bool:
    """Whether this is the type of CuPy's arrays, which nobody can have before CuPy is imported."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and kind is cupy.ndarray


def _on_one_gpu(arrays: Sequence[Any]) -> bool:
    """Whether one GPU holds all of these CuPy arrays; None is anywhere."""
    return len({array.data.device_id for array in arrays if array is not None}) == 1


def _side_of(x: Any) -> str | None:
    """ "numpy", "cuda", or None for what is no array."""
    if isinstance(x, np.ndarray):
        return "numpy"
    return "cuda" if _in_cuda_memory(x) else None


def _in_cuda_memory(x: Any) -> bool:
    """Whether x offers CUDA memory.

    DLPack is asked first: it tells the device without raising, which `__cuda_array_interface__` of
    a PyTorch tensor with a history does not.
    """
    if _has_dlpack(x):
        return int(x.__dlpack_device__()[0]) in _DLPACK_CUDA
    return not isinstance(x, type) and hasattr(x, "__cuda_array_interface__")


def _has_dlpack(x: Any) -> bool:
    """Whether x can be asked for its device; the class of an array, passed by mistake, cannot."""
    return not isinstance(x, type) and hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")


def _check_homes(homes: Mapping[str, str], seen: Seen) -> None:
    first_name, first = next(iter(homes.items()))
    for name, home in homes.items():
        if home == first:
            continue
        if "numpy" in (home, first):
            word = {True: "a NumPy array", False: "a CUDA array"}
            raise seen.error(
                TypeError,
                f"{name} is {word[home == 'numpy']}, {first_name} is {word[first == 'numpy']}.",
                "move all arrays to one side, with cupy.asarray or cupy.asnumpy.",
            )
        raise seen.error(
            ValueError,
            f"{name} is on {home}, {first_name} is on {first}.",
            "copy all arrays to one GPU.",
        )


def home_of(array: Any) -> str:
    """ "numpy" or "cuda:0"."""
    return "numpy" if isinstance(array, np.ndarray) else f"cuda:{array.data.device_id}"


def _adopt_one(name: str, x: Any, seen: Seen) -> Any:
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise seen.error(
                TypeError,
                f"{name} is a masked array, and its mask would be ignored.",
                "pass x.filled(...).",
            )
        return np.asarray(x)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return x
    if _in_cuda_memory(x):
        cupy = _import_cupy(name, x, seen)
        return cupy.from_dlpack(x) if _has_dlpack(x) else cupy.asarray(x)
    if _has_dlpack(x):
        raise seen.error(
            TypeError,
            f"{name} is {kind_of(x)} outside CUDA memory, not a NumPy array.",
            "numpy.from_dlpack(x) or numpy.asarray(x) for the CPU backend.",
        )
    raise seen.error(
        TypeError,
        f"{name} is {'None' if x is None else kind_of(x)}, not an array.",
        "numpy.asarray(x), or cupy.asarray(x) for a GPU.",
    )


def _import_cupy(name: str, x: Any, seen: Seen) -> Any:
    try:
        import cupy
    except ImportError as error:
        raise seen.error(
            UnsupportedError,
            f"{name} is {kind_of(x)} in CUDA memory, and CuPy cannot be imported ({error}).",
            'pip install "cuflash[cuda12]" or "cuflash[cuda13]".',
        ) from error
    return cupy


# ---- overlap


class _Memory:
    """Addresses in NumPy's clothes, so that `numpy.shares_memory` can judge device arrays too."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "shape": tuple(array.shape),
            "strides": tuple(array.strides),
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (address_of(array), False),
            "version": 3,
        }


def share_memory(first: Any, second: Any) -> bool:
    """True when two arrays have a byte in common; nothing is read."""
    if 0 in first.shape or 0 in second.shape:
        return False
    views = [x if isinstance(x, np.ndarray) else np.asarray(_Memory(x)) for x in (first, second)]
    try:
        # The stub knows only the two special values of max_work.
        return np.shares_memory(views[0], views[1], max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except getattr(np, "exceptions", np).TooHardError:
        return True
