"""Block masks on devices: their arrays and tile maps are made once per device and kept as long as the
mask lives.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash._device import Device

if TYPE_CHECKING:
    from cuflash._blockmask import BlockMask

_mirrors: weakref.WeakKeyDictionary[BlockMask, dict[Any, Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def on_device(
    device: Device,
    blocks: BlockMask,
    lead: tuple[int, ...],
    maps: Any,
    make: Callable[[Any, Any], Any],
) -> tuple[Any, Any, Any]:
    """Slots, bits (None without partial blocks) and tile maps of a mask.

    Parameters
    ----------
    lead
        Leading extents that the kernels expect.
    maps
        Hashable description of the tile maps.
    make
        `make(slots, bits)` makes them.
    """
    with _lock:
        mirror = _mirrors.setdefault(blocks, {})
    key = device.key, lead
    arrays = mirror.get(key)
    fresh = arrays is None
    if arrays is None:
        slots = np.broadcast_to(blocks.slots, (*lead, *blocks.slots.shape[-2:]))
        arrays = upload(device, slots), upload(device, blocks.bits)
    found = mirror.get((key, maps))
    if found is None:
        found = make(*arrays)
        fresh = True
    if fresh:
        # Later calls may come on other streams, which must not overtake these copies.
        if device.xp is not np:
            device.xp.cuda.get_current_stream().synchronize()
        mirror[key], mirror[key, maps] = arrays, found
    return (*arrays, found)


def upload(device: Device, host: np.ndarray) -> Any:
    """A copy on the device; None for an empty array."""
    if host.size == 0:
        return None
    array = device.empty(host.shape, host.dtype)
    array[...] = device.xp.asarray(np.ascontiguousarray(host))
    return array
