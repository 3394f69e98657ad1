"""Do the peers compute what cuflash computes? Those that run on a CPU, where they are installed."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any

import numpy as np
import pytest

import cuflash
from bench import baselines
from bench.baselines import Inputs
from bench.cases import Case

CASES = (
    Case(2, 4, 4, 40, 40, 32, "bfloat16", True),
    Case(1, 4, 2, 24, 40, 32, "bfloat16"),  # JAX has no float16 products on a CPU
)


def needs(name: str) -> Any:
    installed = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not installed, reason=f"{name} is not installed")


PEERS = [
    pytest.param("torch math", marks=needs("torch")),
    pytest.param("torch flash", marks=needs("torch")),
    pytest.param("JAX XLA", marks=needs("jax")),
    pytest.param("plain CuPy"),
]


class NumpyAsCupy:
    """NumPy under CuPy's name."""

    float32 = np.float32

    class random:
        default_rng = staticmethod(np.random.default_rng)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", PEERS)
def test_peer_agrees(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)
    x = baselines.make_inputs(case, NumpyAsCupy)
    if name == "plain CuPy" and case.heads != case.heads_kv:
        with pytest.raises(baselines.NotHere, match="grouped"):
            baselines.PEERS[name](case, x)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries without a GPU
        calls = baselines.PEERS[name](case, x)
        results = {direction: run(call) for direction, call in calls.items()}
    assert set(results) == {"forward", "backward"}
    out, lse = cuflash.attention(x.q, x.k, x.v, causal=case.causal, return_lse=True)
    grads = cuflash.attention_backward(x.dout, x.q, x.k, x.v, out, lse, causal=case.causal)
    swap = name.startswith("JAX")  # its layout is (batch, length, heads, head dim)
    compare(first(results["forward"]), out, swap)
    for got, want in zip(results["backward"][:3], grads[:3], strict=True):
        compare(got, want, swap)


def run(call: Any) -> Any:
    """The results of a call, also of one on a stream of its own."""
    if not hasattr(call, "start"):
        return call()
    call()  # as it is timed
    return call.start()


def first(results: Any) -> Any:
    return results[0] if isinstance(results, tuple) else results


def compare(got: Any, want: np.ndarray, swap: bool) -> None:
    if hasattr(got, "detach"):
        got = got.detach().float().numpy()
    got = np.asarray(got, np.float32)
    got = got.swapaxes(1, 2) if swap else got
    assert got.shape == want.shape
    exact = want.astype(np.float32)
    assert abs(got - exact).max() <= 0.03 * abs(exact).max()  # of 16-bit numbers


def test_inputs_have_the_shapes_of_their_case() -> None:
    x = baselines.make_inputs(CASES[1], NumpyAsCupy)
    assert isinstance(x, Inputs)
    assert [a.shape for a in x] == [(1, 4, 24, 32), (1, 2, 40, 32), (1, 2, 40, 32), (1, 4, 24, 32)]
    assert all(a.dtype.name == "bfloat16" for a in x)
