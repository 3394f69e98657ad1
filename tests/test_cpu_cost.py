"""What the NumPy backend costs: its claims about O(L) memory and about speed, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash import _cpu, _cpu_backward, _cpu_forward
from cuflash._blockmask import BlockMask
from cuflash._dropout import Dropout
from cuflash._options import Options
from tests.cases import Case
from tests.dense import Warp

ROOT = Path(__file__).resolve().parents[1]


def peak_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes allocated at once during a call, results included; and the results."""
    tracemalloc.start()
    result = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 2), ("bfloat16", 16)])
def test_memory_beside_the_results(
    dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(H, L, D) = (8, 4096, 64): 8 MB of results, and a tenth of the 512 MB of scores would already be too much.

    Each thread has buffers of its own: backward has one per head, forward as many as allowed.
    """
    for module in (_cpu_forward, _cpu_backward):
        monkeypatch.setattr(module, "threads_for", lambda items, pairs: min(items, threads))
    data = Case(dtype=dtype, batch=(), heads=8, len_q=4096, len_k=4096).data()
    options = Options(0.125, 0, None, 0)
    result = np.dtype(data.q.dtype).itemsize * data.q.size
    peak, (out, lse) = peak_of(lambda: _cpu.forward(data.q, data.k, data.v, options))
    assert peak - result < (16e6 if threads == 2 else 64e6)
    given = data.dout, data.q, data.k, data.v, out, lse
    peak, _ = peak_of(lambda: _cpu.backward(*given, options))
    assert peak - 3 * result < (24e6 if threads == 2 else 64e6)


def test_memory_is_linear_in_keys_and_groups_share_them() -> None:
    """32 heads on one kv head of 65536 keys: repeated K and V would be 537 MB, the scores 134 MB."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((32, 16, 32), dtype=np.float32)
    k = rng.standard_normal((1, 65536, 32), dtype=np.float32)
    peak, _ = peak_of(lambda: _cpu.forward(q, k, k, Options(0.2, 65520, None, 0)))
    assert peak < 8e6


def test_memory_with_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's mask (17 MB) and bias are read in place, a vector's gradient needs no Lq x Lk array, and no weight,
    random word or derivative outlives its tile."""
    for module in (_cpu_forward, _cpu_backward):
        monkeypatch.setattr(module, "threads_for", lambda items, pairs: 1)
    heads, length = 4, 4096
    data = Case(dtype="float32", batch=(), heads=heads, len_q=length, len_k=length).data()
    rng = np.random.default_rng(0)
    blocks = BlockMask.from_blocks(rng.random((heads, 32, 32)) < 0.2, shape=(length, length))
    options = Options(
        0.125,
        0,
        None,
        0,
        mask=np.broadcast_to(rng.random((length, length)) < 0.5, (heads, length, length)),
        blocks=blocks,
        bias=rng.standard_normal((heads, 1, length), dtype=np.float32),
        sinks=np.zeros(heads, np.float32),
        dropout=Dropout.of(0.2, 1),
        score_mod=Warp({"gain": np.ones(heads), "table": np.ones(100)}),
    )
    peak, (out, lse) = peak_of(lambda: _cpu.forward(data.q, data.k, data.v, options))
    assert peak - data.q.nbytes < 16e6
    given = data.dout, data.q, data.k, data.v, out, lse
    wrt = ("q", "k", "v", "bias", "sinks", "gain", "table")
    peak, _ = peak_of(lambda: _cpu.backward(*given, options, wrt=wrt))
    assert peak - 3 * data.q.nbytes < 24e6


def test_gradient_of_a_bias_is_summed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """(B, H) = (8, 2) units share a bias of 33 MB: one sum of its size, not one per unit."""
    for module in (_cpu_forward, _cpu_backward):
        monkeypatch.setattr(module, "threads_for", lambda items, pairs: min(items, 2))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((8, 2, 2048, 8), dtype=np.float32)
    bias = rng.standard_normal((2, 2048, 2048), dtype=np.float32)
    options = Options(0.3, 0, bias=bias)
    out, lse = _cpu.forward(q, q, q, options)
    peak, grads = peak_of(lambda: _cpu.backward(out, q, q, q, out, lse, options, wrt=("bias",)))
    assert grads["bias"].shape == bias.shape
    assert peak < bias.nbytes + 16e6


SPEED = """
    import json, time
    import numpy as np
    from cuflash import _cpu, _cpu_backward, _cpu_forward
    from cuflash._blockmask import BlockMask
    from cuflash._options import Options

    def plain(q, k, v, scale):
        s = q @ k.swapaxes(-1, -2) * scale
        e = np.exp(s - s.max(-1, keepdims=True))
        return (e / e.sum(-1, keepdims=True)) @ v

    def seconds(call, times):
        best = []
        for _ in range(times):
            start = time.process_time()
            call()
            best.append(time.process_time() - start)
        return min(best)

    def qkv(*shape):
        rng = np.random.default_rng(0)
        return [rng.standard_normal(shape, dtype=np.float32) for _ in range(3)]

    scale = np.float32(0.125)
    few = np.random.default_rng(1).random((8, 32, 32)) < 1 / 16
    sparse = BlockMask.from_blocks(few, shape=(4096, 4096))
    half = np.random.default_rng(2).random((4096, 4096)) < 0.5
    long, short = qkv(8, 4096, 64), qkv(64, 8, 32, 32)
    print(json.dumps({
        "plain": seconds(lambda: plain(*long, scale), 1),
        "full": seconds(lambda: _cpu.forward(*long, Options(0.125, 0)), 2),
        "causal": seconds(lambda: _cpu.forward(*long, Options(0.125, 0, None, 0)), 2),
        "window": seconds(lambda: _cpu.forward(*long, Options(0.125, 0, 128, 0)), 2),
        "blocks": seconds(lambda: _cpu.forward(*long, Options(0.125, 0, blocks=sparse)), 2),
        "mask": seconds(lambda: _cpu.forward(*long, Options(0.125, 0, mask=half)), 2),
        "short_plain": seconds(lambda: plain(*short, scale), 5),
        "short": seconds(lambda: _cpu.forward(*short, Options(0.125, 0)), 5),
    }))
"""


def test_speed_against_the_plain_formula() -> None:
    """Measured: half the plain formula's time, causal half of that. CPU seconds of one thread, so that others' load
    on the machine does not count; and a margin, since a shared cache does."""
    env = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SPEED)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    times = json.loads(run.stdout)
    assert times["full"] < times["plain"], times
    assert times["causal"] < 0.8 * times["full"], times
    assert times["window"] < 0.3 * times["full"], times
    assert times["blocks"] < 0.35 * times["full"], times
    assert times["mask"] < 1.5 * times["full"], times
    assert times["short"] < 2.0 * times["short_plain"], times
