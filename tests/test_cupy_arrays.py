"""CuPy arrays as users bring them: memory, streams, graphs, other libraries' arrays.

With `--gpu` on a GPU; in every run of the tests on CuPy itself with the emulator under it (test_cupy_emulated.py).
"""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash

pytestmark = [pytest.mark.gpu, pytest.mark.small_gpu]


@pytest.fixture
def cupy() -> Any:
    import cupy

    return cupy


def host_arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


Q, K, V = host_arrays((2, 4, 45, 64), (2, 2, 70, 64), (2, 2, 70, 64))


def close(x: Any, want: np.ndarray, atol: float = 4e-3) -> bool:
    return np.allclose(x.get().astype(np.float64), want.astype(np.float64), atol=atol, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_there_and_back(cupy: Any, dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    host = [x.astype(kind) for x in (Q, K, V)]
    arrays = [cupy.asarray(x) for x in host]
    (out, lse), pullback = cuflash.attention_vjp(*arrays, causal=True, return_lse=True)
    assert isinstance(out, cupy.ndarray) and out.dtype == kind and out.shape == Q.shape
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    grads = pullback(cupy.ones_like(out), None)
    (want, want_lse), host_pullback = cuflash.attention_vjp(*host, causal=True, return_lse=True)
    want_grads = host_pullback(np.ones_like(want), None)
    atol = 6e-2 if dtype == "bfloat16" else 8e-3 if dtype == "float16" else 1e-5
    assert close(out, want, atol) and np.allclose(lse.get(), want_lse, atol=2e-3)
    for name in "qkv":
        got = getattr(grads, name)
        assert isinstance(got, cupy.ndarray) and got.dtype == kind
        assert close(got, getattr(want_grads, name), 4 * atol)


def test_strided_views_and_out(cupy: Any) -> None:
    """A packed projection's slices, heads behind rows, and a result in given memory."""
    (packed,) = host_arrays((2, 33, 3, 4, 64), seed=1)
    q, k, v = np.moveaxis(packed, 2, 0)
    want = cuflash.attention(q, k, v, layout="LHD")
    on_device = cupy.asarray(packed)
    room = cupy.zeros((2, 33, 4, 80), np.float16)
    out = room[..., 8:72]
    result = cuflash.attention(*cupy.moveaxis(on_device, 2, 0), layout="LHD", out=out)
    assert result is out and close(out, want)
    assert not room[..., :8].any() and not room[..., 72:].any()


def test_arrays_of_other_libraries(cupy: Any) -> None:
    """DLPack and __cuda_array_interface__ are seen without a copy; results are CuPy's."""

    class ByDlpack:
        def __init__(self, x: Any) -> None:
            self.x = x

        def __dlpack__(self, **options: Any) -> Any:
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.x.__dlpack_device__()

    class ByInterface:
        def __init__(self, x: Any) -> None:
            self.__cuda_array_interface__ = x.__cuda_array_interface__

    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    want = cuflash.attention(*arrays)
    for wrap in (ByDlpack, ByInterface):
        out = cuflash.attention(*map(wrap, arrays))
        assert isinstance(out, cupy.ndarray) and cupy.array_equal(out, want)
        mixed = cuflash.attention(arrays[0], wrap(arrays[1]), arrays[2])
        assert cupy.array_equal(mixed, want)


def test_host_and_device_do_not_mix(cupy: Any) -> None:
    q = cupy.asarray(Q)
    with pytest.raises(TypeError, match="k is a NumPy array, q is a CUDA array"):
        cuflash.attention(q, K, V)
    with pytest.raises(TypeError, match="a CUDA array"):
        cuflash.attention(Q, K, cupy.asarray(V))


def test_options_on_the_device(cupy: Any) -> None:
    """Every array option as a CuPy array, and its gradient as one."""
    rng = np.random.default_rng(3)
    slopes = rng.uniform(0.1, 0.5, 4).astype(np.float32)
    bias = rng.standard_normal((4, 45, 70)).astype(np.float16)
    sinks = rng.standard_normal(4).astype(np.float32)
    mask = rng.random((2, 1, 45, 70)) < 0.7
    named = {"alibi_slopes": slopes, "bias": bias, "sinks": sinks, "mask": mask}
    wrt = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
    run = {"dropout_p": 0.1, "wrt": wrt}
    host, host_pullback = cuflash.attention_vjp(Q, K, V, seed=7, **run, **named)
    named = {name: cupy.asarray(x) for name, x in named.items()}
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    seed = cupy.asarray([7], np.uint64)
    out, pullback = cuflash.attention_vjp(*arrays, seed=seed, **run, **named)
    assert close(out, host, 8e-3)
    grads, want = pullback(cupy.ones_like(out)), host_pullback(np.ones_like(host))
    for name in wrt:
        got, expected = getattr(grads, name), getattr(want, name)
        assert isinstance(got, cupy.ndarray)
        scale = float(np.abs(expected.astype(np.float64)).max())
        assert close(got, expected, 2e-2 * max(scale, 1)), name


def test_block_masks_and_score_expressions(cupy: Any) -> None:
    lengths = (45, 70)
    mask = cuflash.BlockMask.sliding_window((32, 16), shape=lengths, block_size=16)
    decay = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    code = "s - decay[h] * abs(i - j)"
    run = {"mask": mask, "wrt": ("q", "decay")}
    mod = cuflash.ScoreMod(code, {"decay": decay})
    want, host_pullback = cuflash.attention_vjp(Q, K, V, score_mod=mod, **run)
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    mod = cuflash.ScoreMod(code, {"decay": cupy.asarray(decay)})
    out, pullback = cuflash.attention_vjp(*arrays, score_mod=mod, **run)
    assert close(out, want)
    got = pullback(cupy.ones_like(out)).score_params["decay"]
    expected = host_pullback(np.ones_like(want)).score_params["decay"]
    assert np.allclose(got.get(), expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def test_packed_sequences_without_waiting(cupy: Any, waits: list[str]) -> None:
    q, k, v = host_arrays((4, 100, 64), (2, 90, 64), (2, 90, 64), seed=2)
    ends_q, ends_k = np.array([0, 40, 40, 97], np.int32), np.array([0, 30, 50, 90], np.int32)
    want, host_pullback = cuflash.attention_varlen_vjp(q, k, v, ends_q, ends_k, causal=True)
    want_grads = host_pullback(np.ones_like(want))
    arrays = [cupy.asarray(x) for x in (q, k, v, ends_q, ends_k)]
    ones = cupy.ones_like(arrays[0])
    waits.clear()
    out, pullback = cuflash.attention_varlen_vjp(
        *arrays, causal=True, max_seqlen_q=57, max_seqlen_k=40
    )
    grads = pullback(ones)
    assert not waits
    assert close(out[:, :97], want[:, :97])
    assert close(grads.k, want_grads.k, 3e-2) and close(grads.q, want_grads.q, 3e-2)


def test_a_call_does_not_wait(cupy: Any, waits: list[str]) -> None:
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    dout = cupy.ones_like(arrays[0])
    waits.clear()
    _, pullback = cuflash.attention_vjp(*arrays, causal=True)
    pullback(dout)
    assert not waits


@pytest.fixture
def waits() -> list[str]:
    """What made the host wait, where that is known."""
    import sys

    driver = sys.modules.get("tests.emulator.cupy_driver")
    return driver.MACHINE.waits if driver is not None else []


def test_streams_and_graphs(cupy: Any) -> None:
    """A captured call runs again on what its arrays hold by then."""
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    out = cupy.empty(Q.shape, np.float16)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        cuflash.attention(*arrays, out=out)
        stream.synchronize()
        once = out.copy()
        stream.begin_capture()
        cuflash.attention(*arrays, out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
        assert cupy.array_equal(out, once)
        cupy.negative(arrays[2], out=arrays[2])
        graph.launch(stream)
        stream.synchronize()
        assert cupy.array_equal(out, -once)


def test_another_thread(cupy: Any) -> None:
    """A thread whose first CUDA call is this one."""
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    want, found = cuflash.attention(*arrays), []
    thread = threading.Thread(target=lambda: found.append(cuflash.attention(*arrays)))
    thread.start()
    thread.join()
    assert cupy.array_equal(found[0], want)


def test_merge_and_dropout_mask(cupy: Any) -> None:
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    want, want_lse = cuflash.attention(*arrays, return_lse=True)
    halves = [(arrays[1][..., s, :], arrays[2][..., s, :]) for s in (slice(0, 31), slice(31, 70))]
    parts = [cuflash.attention(arrays[0], k, v, return_lse=True) for k, v in halves]
    out, lse = cuflash.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    assert cupy.allclose(out, want, atol=2e-3) and cupy.allclose(lse, want_lse, atol=1e-5)
    mine = cuflash.dropout_mask(3, 0.25, (2, 4, 20, 30), xp=cupy)
    assert np.array_equal(mine.get(), cuflash.dropout_mask(3, 0.25, (2, 4, 20, 30)))


def test_decoding(cupy: Any) -> None:
    """One query, many keys: shared out to blocks and merged."""
    q, k, v = host_arrays((1, 8, 1, 64), (1, 2, 1300, 64), (1, 2, 1300, 64), seed=4)
    out, lse = cuflash.attention(*map(cupy.asarray, (q, k, v)), return_lse=True)
    want, want_lse = cuflash.attention(q, k, v, return_lse=True)
    assert close(out, want, 1e-3) and np.allclose(lse.get(), want_lse, atol=1e-3)


def test_explain_and_warmup(cupy: Any) -> None:
    arrays = [cupy.asarray(x) for x in (Q, K, V)]
    text = str(cuflash.explain(*arrays, causal=True))
    assert cupy.cuda.runtime.getDeviceProperties(0)["name"].decode() in text or "sm_" in text
    cuflash.warmup([(Q.shape, K.shape, V.shape)], dtype="float16", progress=False)
