"""How time is taken: CUDA events, a flushed L2 cache, methods in turn, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

HEAD_START = 300e-6  # seconds that Python may take for a call; autograd's take most
FASTEST_MEMORY = 5e12  # bytes per second; on slower memory the head start is longer
SLOW = 8


@dataclass(frozen=True, slots=True)
class Times:
    """Repeated measurements of one call.

    Parameters
    ----------
    seconds : tuple of float
        Sorted.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle measurement."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range of the middle four fifths, relative to the median."""
        cut = len(self.seconds) // 10
        inner = self.seconds[cut : len(self.seconds) - cut]
        return (inner[-1] - inner[0]) / 2 / self.median


@dataclass(frozen=True, slots=True)
class OwnStream:
    """A call on a stream that CuPy's events do not see: timed by the clock, from idle to idle.

    Parameters
    ----------
    start : callable
        Gives the device the work of one call and returns what to wait for.
    wait : callable
        Takes that and returns when the work is done.
    repeats : int
        Calls behind one another, so that waiting for the last is a small share.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    repeats: int = 10

    def __call__(self) -> None:
        for _ in range(self.repeats - 1):
            self.start()
        self.wait(self.start())


class GpuTimer:
    """Times calls on CuPy's current stream.

    Parameters
    ----------
    cupy : module
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        l2 = int(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["l2CacheSize"])
        # Written before every measurement: nothing of the inputs is left in the cache. As often as
        # keeps the device busy while Python prepares the call: what is timed is the device's work.
        self._flush = cupy.empty(max(1, 2 * l2), dtype=cupy.uint8)
        self._fills = max(1, min(32, int(HEAD_START * FASTEST_MEMORY / len(self._flush))))

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds on the device of one call."""
        events = self._cupy.cuda.Event
        begin, end = events(), events()
        for _ in range(self._fills):
            self._flush.fill(0)
        if isinstance(call, OwnStream):
            self._cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) / call.repeats
        begin.record()
        call()
        end.record()
        end.synchronize()
        return self._cupy.cuda.get_elapsed_time(begin, end) / 1e3

    def interleaved(
        self, calls: Mapping[str, Callable[[], Any]], rounds: int = 20
    ) -> dict[str, Times]:
        """Every method once per round, so that clocks and heat are the same for all.

        One that is many times slower than the fastest takes part in every fourth round.
        """
        first = {}
        for name, call in calls.items():
            for _ in range(2):
                call()
            first[name] = self.once(call)
        slow = {name for name in calls if first[name] > SLOW * min(first.values())}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name, call in calls.items():
                if number % 4 == 0 or name not in slow:
                    taken[name].append(self.once(call))
        return {name: Times(tuple(sorted(seconds))) for name, seconds in taken.items()}


def host_seconds(call: Callable[[], Any], repeats: int = 7, loops: int = 200) -> Times:
    """Seconds of CPU time one call costs, from loops long enough to be measured."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(loops):
            call()
        taken.append((time.process_time() - start) / loops)
    return Times(tuple(sorted(taken)))


def clocks() -> dict[str, float] | None:
    """SM clock (MHz), power (W) and temperature now, when NVML can be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, 0),
        }
    except Exception:
        return None  # optional, and it fails in as many ways as there are drivers
