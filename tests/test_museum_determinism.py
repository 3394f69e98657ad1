"""Museum families G and M: the same bits on any schedule, thread or stream; others' bugs by number."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.machines import Cupy, Emulator, Machine, Numpy, check_forward, normal, same_bits


def arrays(seed: int, length: int = 70, batch: int = 1, factor: float = 1.0) -> tuple[Any, ...]:
    """q, k, v, dout in float16."""
    rng = np.random.default_rng(seed)
    q, dout = (normal(rng, batch, 4, length, 32, factor=factor) for _ in range(2))
    k, v = (normal(rng, batch, 2, length + 60, 32, factor=factor) for _ in range(2))
    return q, k, v, dout


def everything(machine: Machine, q: Any, k: Any, v: Any, dout: Any, **options: Any) -> list[Any]:
    """out, lse and all gradients, deterministic."""
    slopes = options.get("alibi_slopes")
    wrt = ("q", "k", "v") if slopes is None else ("q", "k", "v", "alibi_slopes")
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    grads = machine.backward(dout, q, k, v, out, lse, deterministic=True, wrt=wrt, **options)
    return [out, lse, *(getattr(grads, name) for name in wrt)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (20, 5)},
    {"causal": True, "q_offset": -10},
    {"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4], np.float32), "softcap": 5.0, "causal": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_G3_G9_equal_bits_on_every_call(backend: Machine, options: dict[str, Any]) -> None:
    """Other addresses, and another call with other shapes and options in between."""
    q, k, v, dout = arrays(3, factor=3)
    want = everything(backend, q, k, v, dout, **options)
    for shift in range(3):
        keep = np.empty(1000 + shift * 8)
        again = everything(backend, *(x.copy() for x in (q, k, v, dout)), **options)
        assert all(map(same_bits, want, again))
        everything(backend, q[:, :, :33], k, v, dout[:, :, :33], window=(shift, 1))
        del keep


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_G1_no_schedule_of_threads_changes_a_bit(options: dict[str, Any]) -> None:
    """A missing barrier shows as a difference between orders in which the emulator runs its threads."""
    q, k, v, dout = arrays(1, factor=3)
    results = []
    for seed in (0, 1, 2):
        with Emulator(seed=seed) as machine:
            results.append(everything(machine, q, k, v, dout, **options))
    for again in results[1:]:
        assert all(map(same_bits, results[0], again))


@pytest.mark.gpu
def test_G1_many_repeats_on_a_gpu() -> None:
    rng = np.random.default_rng(2)
    with Cupy() as machine:
        put = machine.put
        q, dout = (put(normal(rng, 15, 4, 2048, 128, factor=3)) for _ in range(2))
        k, v = (put(normal(rng, 15, 4, 128, 128, factor=3)) for _ in range(2))
        want = everything(machine, q, k, v, dout)
        for _ in range(50):
            assert all(map(same_bits, want, everything(machine, q, k, v, dout)))


def test_forward_does_not_touch_its_inputs(backend: Machine) -> None:
    q, k, v, dout = arrays(4)
    before = [x.copy() for x in (q, k, v, dout)]
    everything(backend, q, k, v, dout, causal=True)
    assert all(map(same_bits, (q, k, v, dout), before))


def test_M_threads_may_call_at_once() -> None:
    """Prepared calls are shared by threads; each gets its own result."""
    cases = [arrays(n, length=5 + n) for n in range(8)]
    want = [everything(Numpy(), *case, causal=True) for case in cases]
    cuflash._prepare.forget()
    wrong: list[int] = []

    def work(start: int) -> None:
        for turn in range(24):
            n = (start + turn) % len(cases)
            got = everything(Numpy(), *cases[n], causal=True)
            if not all(map(same_bits, got, want[n])):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_M11_each_device_has_its_own_prepared_calls() -> None:
    """The key of a prepared call names the device: a kernel loaded on one is never launched on another."""
    q, k, v, _ = arrays(11)
    with Emulator("sm_80") as first:
        check_forward(first, q, k, v)
        launched = len(first.device.launches)
        with Emulator("sm_75") as second:
            check_forward(second, q, k, v)
            assert second.device.launches and len(first.device.launches) == launched
        check_forward(first, q, k, v)
        assert len(first.device.launches) > launched
    assert cuflash.attention(q, k, v).shape == q.shape


def test_M13_a_launch_that_fails_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shared memory than a block may have is an error of the call, not silence."""
    from tests.emulator.errors import LaunchError

    q, k, v, _ = arrays(13)
    with Emulator() as machine:
        machine.attention(q, k, v)
        launch = cuflash._launch.run

        def greedy(steps: Any, pointers: Any) -> None:
            launch([replace(step, shared_memory=10**6) for step in steps], pointers)

        monkeypatch.setattr(cuflash._launch, "run", greedy)
        with pytest.raises(LaunchError):
            machine.attention(q, k, v)


def test_M15_an_error_midway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a result: MemoryError, inputs intact, and the next call is right."""
    q, k, v, _ = arrays(15)
    before = [x.copy() for x in (q, k, v)]
    with Emulator() as machine:
        allocate = machine.device.empty

        def full(shape: Any, dtype: Any) -> Any:
            raise MemoryError

        machine.device.empty = full
        with pytest.raises(MemoryError):
            machine.attention(q, k, v)
        machine.device.empty = allocate
        check_forward(machine, q, k, v)
    assert all(map(same_bits, (q, k, v), before))


# ---- what only a GPU can show


@pytest.fixture
def gpu() -> Any:
    with Cupy() as machine:
        yield machine


@pytest.mark.gpu
def test_G7_M5_temporaries_live_until_the_kernels_ran(gpu: Machine) -> None:
    """Without the memory pool a freed workspace is unmapped at once."""
    import cupy

    q, k, v, dout = arrays(7)
    want = everything(gpu, q, k, v, dout)
    with cupy.cuda.using_allocator(None):
        for _ in range(5):
            assert all(map(same_bits, want, everything(gpu, q, k, v, dout)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["stream", "non-blocking", "external", "per-thread"])
def test_M3_any_stream(gpu: Machine, kind: str) -> None:
    import cupy

    q, k, v, dout = arrays(5)
    want = everything(gpu, q, k, v, dout)
    owner = cupy.cuda.Stream()
    stream = {
        "stream": cupy.cuda.Stream(),
        "non-blocking": cupy.cuda.Stream(non_blocking=True),
        "external": cupy.cuda.ExternalStream(owner.ptr),
        "per-thread": cupy.cuda.Stream.ptds,
    }[kind]
    with stream:
        got = everything(gpu, q, k, v, dout)
        stream.synchronize()
    assert all(map(same_bits, want, got))


@pytest.mark.gpu
def test_M7_M9_a_captured_call_replays_on_another_stream(gpu: Machine) -> None:
    import cupy

    host = arrays(7)
    q, k, v, dout = map(gpu.put, host)
    want = everything(gpu, *host, causal=True)
    everything(gpu, *arrays(8), causal=True)
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    results = [cupy.empty(x.shape, x.dtype) for x in want]
    with first:
        cuflash.attention_vjp(q, k, v, causal=True, deterministic=True)[1](dout)
        first.synchronize()
        first.begin_capture()
        out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
        grads = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
        for into, made in zip(results, (out, lse, *grads[:3]), strict=True):
            into[...] = made
        graph = first.end_capture()
    for array in results:
        array.fill(0)
    cupy.cuda.Device().synchronize()
    graph.launch(second)
    second.synchronize()
    assert all(map(same_bits, want, map(gpu.get, results)))


@pytest.mark.gpu
def test_P7_no_call_leaks(gpu: Machine) -> None:
    import cupy

    q, k, v, dout = map(gpu.put, arrays(9))
    pool = cupy.get_default_memory_pool()

    def call() -> None:
        cuflash.attention_vjp(q, k, v, causal=True)[1](dout)
        with pytest.raises(ValueError, match="heads"):
            cuflash.attention(q[:, :3], k, v)

    call()
    used = pool.used_bytes()
    for _ in range(200):
        call()
    assert pool.used_bytes() == used


@pytest.mark.gpu
def test_other_libraries_arrays_are_taken_without_a_copy(gpu: Machine) -> None:
    """Anything with `__cuda_array_interface__` or CUDA `__dlpack__`; results are CuPy arrays."""
    import cupy

    q, k, v, _ = map(gpu.put, arrays(10))
    want = cuflash.attention(q, k, v)

    class Interface:
        def __init__(self, array: Any) -> None:
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    class Dlpack:
        def __init__(self, array: Any) -> None:
            self.__dlpack__ = array.__dlpack__
            self.__dlpack_device__ = array.__dlpack_device__

    for wrap in (Interface, Dlpack):
        got = cuflash.attention(wrap(q), wrap(k), v)
        assert isinstance(got, cupy.ndarray) and same_bits(gpu.get(got), gpu.get(want))
        buffer = cupy.zeros_like(want)
        given = wrap(buffer)
        assert cuflash.attention(q, k, v, out=given) is given
        assert same_bits(gpu.get(buffer), gpu.get(want))


@pytest.mark.gpu
def test_mixed_numpy_and_cupy(gpu: Machine) -> None:
    q, k, v, _ = arrays(10)
    with pytest.raises(TypeError, match=r"k is a CUDA array, q is a NumPy array\."):
        cuflash.attention(q, gpu.put(k), v)
