"""Are calls timed in turn, after a flush, on whichever stream they run? On a device of made-up clocks."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

import cuflash
from bench import portable, timing
from bench.host import NullDevice
from cuflash import _plan
from cuflash._device import use_device


class FakeCupy:
    """CuPy's events on a clock that calls move on; remembers what was asked of the device."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, [""]
        self.cuda = self
        self.runtime = self
        self.uint8 = "u1"

    def Event(self) -> Any:
        return _Event(self)

    def Device(self) -> Any:
        return self

    id = 0

    def synchronize(self) -> None:
        self.seen.append("synchronize")

    def getDeviceProperties(self, ordinal: int) -> dict[str, int]:
        return {"l2CacheSize": 50 << 20}

    def get_elapsed_time(self, begin: Any, end: Any) -> float:
        return (end.at - begin.at) * 1e3

    def empty(self, count: int, dtype: Any) -> Any:
        return _Flush(self, count)


class _Event:
    def __init__(self, cupy: FakeCupy) -> None:
        self.cupy, self.at = cupy, 0.0

    def record(self) -> None:
        self.at = self.cupy.now

    def synchronize(self) -> None:
        self.cupy.seen.append("wait")


class _Flush:
    def __init__(self, cupy: FakeCupy, count: int) -> None:
        self.cupy, self.count = cupy, count

    def __len__(self) -> int:
        return self.count

    def fill(self, value: int) -> None:
        self.cupy.now += 1.0  # what a flush takes is nobody's time
        if self.cupy.seen[-1] != "flush":
            self.cupy.seen.append("flush")


def test_calls_take_turns_and_slow_ones_fewer() -> None:
    cupy = FakeCupy()
    timer = timing.GpuTimer(cupy)
    counts = dict.fromkeys(("a", "b", "slow"), 0)

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            counts[name] += 1
            cupy.now += seconds
            cupy.seen.append(name)

        return run

    calls = {"a": call("a", 0.001), "b": call("b", 0.002), "slow": call("slow", 0.1)}
    times = timer.interleaved(calls, rounds=8)
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 8, "b": 8, "slow": 2}
    assert times["a"].median == pytest.approx(0.001)
    assert times["slow"].median == pytest.approx(0.1)
    assert counts == {"a": 11, "b": 11, "slow": 5}
    text = " ".join(cupy.seen)
    assert text.endswith("flush a wait flush b wait flush a wait flush b wait")


def test_calls_on_another_stream_are_timed_from_idle_to_idle() -> None:
    cupy = FakeCupy()
    begun: list[int] = []
    waited: list[int] = []

    def start() -> int:
        begun.append(len(begun))
        return begun[-1]

    call = timing.OwnStream(start, waited.append, repeats=4)
    assert timing.GpuTimer(cupy).once(call) >= 0
    assert begun == [0, 1, 2, 3] and waited == [3]
    assert cupy.seen[-2:] == ["flush", "synchronize"]


def test_portable_twin_of_hopper() -> None:
    hopper, ampere = NullDevice("sm_90a"), NullDevice("sm_80")
    twin = portable.portable_of(hopper)
    assert twin.arch == "sm_90" and twin.key != hopper.key and twin.limits == hopper.limits
    assert portable.has_another(hopper) and not portable.has_another(ampere)
    assert portable.portable_of(hopper) is twin
    kernels = {spec.kernel for spec in _plan.all_specializations("sm_90")}
    assert kernels and not any("sm90" in kernel for kernel in kernels)


def test_seen_as_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash import _cupy_device

    hopper = NullDevice("sm_90a")
    monkeypatch.setattr(_cupy_device, "device_of", lambda array: hopper)
    with contextlib.suppress(ZeroDivisionError), portable.portable():
        assert _cupy_device.device_of(None).arch == "sm_90"
        raise ZeroDivisionError
    assert _cupy_device.device_of(None) is hopper


def test_the_same_call_runs_on_either_family() -> None:
    q = np.empty((8, 16, 2048, 128), np.float16)  # never touched
    hopper = NullDevice("sm_90a")
    for device, family in ((hopper, "sm90"), (portable.portable_of(hopper), "")):
        with use_device(device):
            forward = cuflash.explain(q, q, q).plan.launches
            backward = cuflash.explain(q, q, q, backward=True).plan.launches
        names = [launch.spec.kernel for launch in (*forward, *backward)]
        found = [name for name in names if "sm90" in name]
        assert found == (["forward_sm90", "backward_sm90"] if family else [])
        assert {launch.spec.arch for launch in forward} == {"sm_90a" if family else "sm_90"}
