"""Museum families N and O, environment and integer overflow: others' bugs under their numbers.

Keys of compiled kernels, the cache on disk and parameter structs have tests of their own
(test_cache.py, test_params.py, test_plan.py); here is what shows through the public API.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.machines import Cupy, Emulator, Machine, Numpy, normal, same_bits

FAR = 2**31 + 16  # elements: beyond 32 bits as an index and, times two, as a byte offset
# Not in Python's mmap module before 3.13.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


# ---- N: caches


def test_N1_no_call_is_served_by_anothers_kernel(backend: Machine) -> None:
    """Every pair of options, in an order that mixes them, gives what it gave when it came first."""
    rng = np.random.default_rng(1)
    q, dout = (normal(rng, 1, 2, 33, 32) for _ in range(2))
    k, v = (normal(rng, 1, 2, 40, 32) for _ in range(2))
    slopes = np.array([0.2, 0.4], np.float32)
    single: list[dict[str, Any]] = [
        {"causal": True},
        {"window": (5, 3)},
        {"q_offset": 2},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"alibi_slopes": slopes},
    ]
    pairs = [{**a, **b} for a, b in itertools.combinations(single, 2)]

    def run(options: dict[str, Any]) -> list[Any]:
        out, lse = backend.attention(q, k, v, return_lse=True, **options)
        grads = backend.backward(dout, q, k, v, out, lse, deterministic=True, **options)
        return [out, lse, *grads[:3]]

    cold = []
    for options in pairs:
        cuflash._prepare.forget()
        cold.append(run(options))
    for n in rng.permutation(len(pairs) * 2) % len(pairs):
        assert all(map(same_bits, run(pairs[n]), cold[n])), pairs[n]
    # An option that changes nothing here would make this test blind.
    assert all(not same_bits(cold[0][0], other[0]) for other in cold[1:])


def test_N5_a_cache_directory_that_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuflash import _cache, _compile, _launch_merge

    path = tmp_path / "occupied"
    path.write_text("not a folder")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(path))
    monkeypatch.setattr(_compile, "_built", {})
    monkeypatch.setattr(_cache, "_warned", set())
    with pytest.warns(RuntimeWarning, match="occupied"):
        cubin = _compile.build(_launch_merge.specialization("sm_80", "f16"))
    assert cubin[:4] == b"\x7fELF" and path.read_text() == "not a folder"


# ---- O: distances beyond 32 bits


@pytest.fixture
def far_memory() -> Iterator[np.ndarray]:
    """Sixteen GiB of addresses; only touched pages take memory."""
    memory = mmap.mmap(-1, 2**34, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    array = np.frombuffer(memory, np.float16)
    yield array
    del array


def far(memory: np.ndarray, slot: int, x: np.ndarray, axis: int) -> np.ndarray:
    """`x` with neighbours along `axis` FAR elements apart; each slot has addresses of its own."""
    strides = list(np.zeros(x.shape, x.dtype).strides)
    strides[axis] = FAR * x.itemsize
    base = memory.view(x.dtype)[slot * 2**16 // x.itemsize :]
    view = np.lib.stride_tricks.as_strided(base, x.shape, strides)
    view[...] = x
    return view


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_O3_O5_strides_beyond_32_bits(far_memory: np.ndarray, axis: int) -> None:
    """Batches, heads or rows 4 GiB apart, in every argument and every result at once."""
    check_far(Numpy(), far_memory, [axis] * 8, ("q", "k", "v"))


def test_O3_O5_strides_beyond_32_bits_in_kernels(far_memory: np.ndarray) -> None:
    """Another axis for each array, and forward alone: such a launch takes the emulator seconds."""
    with Emulator() as machine:
        check_far(machine, far_memory, [2, 1, 0, 1, 2, 0, 0, 0], ())


def check_far(machine: Machine, memory: np.ndarray, axes: list[int], wrt: tuple[str, ...]) -> None:
    """Arrays far apart along `axes` (q, k, v, dout, out, dq, dk, dv) give the bits of dense ones."""
    rng = np.random.default_rng(3)
    arrays = [normal(rng, 2, 2, 3, 16) for _ in range(4)]
    run: dict[str, Any] = {"wrt": wrt, "deterministic": True}
    want_out, want_lse = machine.attention(*arrays[:3], return_lse=True)
    results = [np.zeros_like(arrays[0])] * 4
    slots = zip(arrays + results, axes, strict=True)
    placed = [far(memory, n, x, axis) for n, (x, axis) in enumerate(slots)]
    q, k, v, dout, out = placed[:5]
    got, lse = cuflash.attention(q, k, v, out=out, return_lse=True)
    assert got is out and same_bits(out.copy(), want_out) and same_bits(lse, want_lse)
    if not wrt:
        return
    want = machine.backward(arrays[3], *arrays[:3], want_out, want_lse, **run)
    buffers = {"d" + n: x for n, x in zip("qkv", placed[5:], strict=True) if n in wrt}
    cuflash.attention_backward(dout, q, k, v, out, lse, **run, **buffers)
    for name in wrt:
        assert same_bits(buffers["d" + name].copy(), getattr(want, name))


def test_O3_positions_beyond_32_bits(backend: Machine) -> None:
    """Offsets and windows of any size are one clamped band in the end."""
    rng = np.random.default_rng(4)
    q, k, v = (normal(rng, 1, 2, 40, 32) for _ in range(3))
    for offset, left in ((2**31, 2**31), (2**33 + 7, 2**33), (-(2**31), 5), (2**62, 2**62 - 3)):
        options = {"q_offset": offset, "window": (left, None)}
        out, lse = backend.attention(q, k, v, return_lse=True, **options)
        gold, gold_lse = oracle.forward(q, k, v, **options)
        assert np.allclose(out.astype(float), gold, atol=2e-3)
        assert np.allclose(lse, gold_lse, atol=1e-5)


@pytest.mark.gpu
def test_O3_more_than_2_31_elements() -> None:
    """q, k, v of 4.3 GB each: the first, the last, and rows around every 32-bit boundary."""
    import cupy

    length, heads, dim = 262_144 + 5, 64, 128
    with Cupy() as machine:
        rng = cupy.random.default_rng(5)
        shape = (1, length, heads, dim)
        q, k, v = (rng.standard_normal(shape, dtype="f4").astype("f2") for _ in range(3))
        run: dict[str, Any] = {"causal": True, "window": (64, 0), "layout": "LHD"}
        (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True, **run)
        grads = pullback(out, None)
        row = heads * dim
        edges = [2**30 // row, 2**31 // row, 2**32 // row // 2, length - 70, 0]
        for start in (max(0, min(length - 140, edge - 70)) for edge in edges):
            rows = slice(start, start + 140)
            part = [machine.get(x[:, rows, :2].swapaxes(1, 2)) for x in (q, k, v, out)]
            gold, gold_lse = oracle.forward(*part[:3], causal=True, window=(64, 0))
            exact = oracle.backward(part[3], *part[:3], causal=True, window=(64, 0))
            whole = slice(0 if start == 0 else 65, 140)
            assert np.allclose(part[3][:, :, whole].astype(float), gold[:, :, whole], atol=4e-3)
            assert np.allclose(
                machine.get(lse[:, :2, rows])[:, :, whole], gold_lse[:, :, whole], atol=1e-4
            )
            dq = machine.get(grads.q[:, rows, :2].swapaxes(1, 2)).astype(float)
            assert np.allclose(dq[:, :, whole], exact["q"][:, :, whole], atol=4e-3)
