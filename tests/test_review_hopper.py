"""Corners of Hopper's kernels, their launches and the split forward that a review found wrong."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash import _tensor_maps
from cuflash._launch_maps import layout_of
from cuflash._views import View, Views
from tests.machines import HALVES, Emulator, Numpy, normal

RNG = np.random.default_rng(90)
LAYOUT = _tensor_maps.Layout("float16", (64, 50), (128,), (64, 64))


def launched(machine: Any) -> list[str]:
    return [name for name, *_ in machine.device.launches]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "heads_kv"), [(8, 2), (3, 1)])
def test_one_query_broadcast_along_its_heads(heads: int, heads_kv: int, dtype: str) -> None:
    """Heads of a group taken for rows would be rows of stride 0, which a tensor map cannot have: all but the
    first were read as zeros.
    """
    one = normal(RNG, 2, 1, 1, 64, dtype=dtype)
    k, v = (normal(RNG, 2, heads_kv, 300, 64, dtype=dtype) for _ in range(2))
    q = np.broadcast_to(one, (2, heads, 1, 64))
    with Emulator("sm_90a") as machine:
        out = machine.attention(q, k, v)
        dense = machine.attention(q.copy(), k, v)
        assert len(launched(machine)) == 2
    want = Numpy().attention(*(x.astype("f8") for x in (q, k, v)))
    step = np.finfo("f2").eps if dtype == "float16" else 2.0**-7
    np.testing.assert_allclose(out.astype("f8"), want, rtol=2 * step, atol=2 * step)
    np.testing.assert_allclose(dense.astype("f8"), want, rtol=2 * step, atol=2 * step)


def test_rows_that_do_not_step_have_no_map() -> None:
    """Planning refuses them; were it to forget, the launch would not read zeros in their place."""

    asked: Any = SimpleNamespace(dtype="float16", batch=())
    still: Any = Views(asked, {"q": View((2, 5, 64), (64, 0, 1), False)})
    with pytest.raises(AssertionError, match="rows step"):
        layout_of(asked, still, "q", 64)
    single: Any = Views(asked, {"q": View((2, 1, 64), (64, 0, 1), False)})
    assert layout_of(asked, single, "q", 64).dims[:3] == (64, 1, 2)


def padded(x: np.ndarray) -> np.ndarray:
    """The same numbers in rows that begin on 16-byte boundaries."""
    room = np.full((*x.shape[:-1], -(-x.shape[-1] // 8) * 8), np.nan, x.dtype)
    room[..., : x.shape[-1]] = x
    return room[..., : x.shape[-1]]


@pytest.mark.parametrize("head_dim", [36, 40])
def test_gradients_of_arrays_that_another_one_has_copied(head_dim: int) -> None:
    """Three batch axes that lse's odd order keeps apart: copies have dense rows, of 72 bytes in one case."""
    batch = 2, 1, 2, 2
    q, k, v, dout = (padded(normal(RNG, *batch, 2, n, head_dim)) for n in (20, 30, 30, 20))
    out, lse = Numpy().attention(q, k, v, return_lse=True)
    odd = np.empty(lse.shape[::-1], lse.dtype).transpose()
    odd[...] = lse
    want = Numpy().backward(dout, q, k, v, out, lse)
    with Emulator("sm_90a") as machine:
        got = machine.backward(dout, q, k, v, out, odd)
        hopper = any(name.startswith("backward_sm90") for name in launched(machine))
        assert hopper == (head_dim % 8 == 0)
        machine.device.launches.clear()
        machine.backward(*(x[0, 0] for x in (dout, q, k, v, out, lse)))
        assert any(name.startswith("backward_sm90") for name in launched(machine))
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(mine.astype("f8"), theirs.astype("f8"), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("sink", [np.nan, np.inf, -np.inf, 2.0])
def test_rows_without_keys_are_zero_beside_any_sink_when_keys_are_shared_out(sink: float) -> None:
    """The part that has the sink then has its logit for lse, and NaN of that made the merged row NaN."""
    q = normal(RNG, 2, 5, 64)
    k, v = (normal(RNG, 2, 1100, 64) for _ in range(2))
    sinks = np.array([sink, 1], np.float32)
    with Emulator("sm_80") as machine:
        out, lse = machine.attention(
            q, k, v, causal=True, q_offset=-2, sinks=sinks, return_lse=True
        )
        assert any("_split" in name for name in launched(machine))
    assert not out[:, :2].any()
    np.testing.assert_allclose(lse[:, :2], np.repeat(sinks[:, None], 2, 1), rtol=1e-6)
    assert np.isfinite(lse[1]).all() and out[1, 2:].all()


def test_a_thread_without_a_context_gets_one_before_its_first_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory from the pool and a prepared call bind no context; the driver then refuses with 201."""
    cupy = pytest.importorskip("cupy")
    from cuflash._cupy_device import CupyDevice

    bound = threading.local()

    def encode(*_: Any) -> int:
        return 0 if getattr(bound, "context", False) else 201

    def free(pointer: int) -> None:
        assert pointer == 0
        bound.context = True

    monkeypatch.setattr(_tensor_maps, "_driver_function", lambda: encode)
    monkeypatch.setattr(cupy.cuda.runtime, "free", free)
    _tensor_maps.encoded.cache_clear()
    found = []
    device = object.__new__(CupyDevice)
    thread = threading.Thread(target=lambda: found.append(device.tensor_map(1 << 20, LAYOUT)))
    thread.start()
    thread.join()
    _tensor_maps.encoded.cache_clear()
    assert [len(words) for words in found] == [_tensor_maps.BYTES]
