"""What a step costs: seconds, and bytes at its largest."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np


def wait(xp: Any) -> None:
    """Until the GPU has done what it was given."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def seconds(step: Callable[[], Any], xp: Any) -> float:
    """Seconds that `step()` takes, the GPU's work included."""
    wait(xp)
    start = time.perf_counter()
    step()
    wait(xp)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any], xp: Any) -> int:
    """The most memory of arrays that `step()` holds at one time, beyond what there was before.

    Examples
    --------
    >>> peak_bytes(lambda: np.ones(10**6), np) // 10**6
    8
    """
    if xp is np:
        tracemalloc.start()  # NumPy reports its arrays to it
        try:
            step()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # The pool keeps what it once took from the device: it ends as large as it had to be.
    pool = xp.get_default_memory_pool()
    wait(xp)
    pool.free_all_blocks()
    before = pool.total_bytes()
    step()
    wait(xp)
    return int(pool.total_bytes() - before)


def cost(step: Callable[[], Any], xp: Any) -> tuple[float, int]:
    """Seconds and bytes of `step()`, which runs once or a few times."""
    if xp is not np:
        step()  # compiles its kernels
    sizes = []
    time = seconds(lambda: sizes.append(peak_bytes(step, xp)), xp)
    if time < 10:  # else once is enough, and being watched costs little beside it
        time = min(seconds(step, xp) for _ in range(3))
    return time, sizes[0]


def free_bytes(xp: Any) -> int:
    """Memory that arrays could still take."""
    if xp is np:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pool = xp.get_default_memory_pool()
    return int(xp.cuda.runtime.memGetInfo()[0] + pool.free_bytes())


def size(count: float) -> str:
    """A number of bytes to read.

    Examples
    --------
    >>> size(3 * 2**30), size(2**20 * 1.5)
    ('3.0 GiB', '1.5 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
