"""Random shapes, strides and options against the oracle, on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.case import Case, answer
from tests.machines import Emulator, Machine, Numpy

# The same draws on every run: CI must not fail by chance. `--hypothesis-seed` and more examples are for hunting.
COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
NUMPY = settings(max_examples=300, **COMMON)
EMULATOR = settings(max_examples=30, phases=[Phase.explicit, Phase.generate], **COMMON)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...], longest: int, widest: int) -> Case:
    """A call with any combination of options."""
    group, heads_kv = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2), (7, 1)]))
    bound = st.none() | st.sampled_from([0, 1, 63, 64, 65]) | st.integers(0, 2 * longest)
    length = st.sampled_from([1, 2, 63, 64, 65]) | st.integers(0, longest)
    dim = st.integers(1, widest)
    windowed = draw(st.booleans())
    return Case(
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.sampled_from([(), (1,), (2,), (2, 1), (1, 2), (0,)])),
        heads=group * heads_kv,
        heads_kv=heads_kv,
        len_q=draw(length),
        len_k=draw(length),
        head_dim=draw(dim),
        head_dim_v=draw(dim),
        causal=draw(st.booleans()),
        window=(draw(bound), draw(bound)) if windowed else None,
        q_offset=draw(st.none() | st.integers(-2 * longest, 2 * longest)),
        scale=draw(st.none() | st.sampled_from([0.0, -0.5, 1.0])),
        softcap=draw(st.none() | st.sampled_from([0.5, 20.0])),
        alibi=draw(st.sampled_from([None, None, "H", "BH"])),
        layout=draw(st.sampled_from(["HLD", "LHD"])),
        broadcast_kv=draw(st.booleans()),
        magnitude=draw(st.sampled_from([1.0, 4.0])),
        seed=draw(st.integers(0, 5)),
    )


def memory(draw: st.DrawFn, x: Any) -> Any:
    """`x` in memory of any axis order, padding, direction and alignment."""
    order = draw(st.permutations(range(x.ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -2])) for _ in range(x.ndim)]
    pad = [draw(st.sampled_from([0, 0, 1, 8])) for _ in range(x.ndim)]
    shape = [n * abs(s) + p for n, s, p in zip(x.shape, steps, pad, strict=True)]
    shift = draw(st.integers(0, 7))
    size = int(np.prod(shape)) + 8
    # Whatever lies beside the elements must not matter.
    flat = np.full(size, np.nan, x.dtype)[shift : shift + int(np.prod(shape))]
    dense = flat.reshape([shape[a] for a in order]).transpose(np.argsort(order))
    cut = tuple(
        slice(None, n * s, s) if s > 0 else slice(n * -s - 1, None, s)
        for n, s in zip(x.shape, steps, strict=True)
    )
    view = dense[cut][tuple(slice(0, n) for n in x.shape)]
    view[...] = x
    return view


@st.composite
def calls(draw: st.DrawFn, case: st.SearchStrategy[Case]) -> tuple[Case, list[Any], bool]:
    """A case, its q, k, v, dout in memory of any kind, and whether to be deterministic."""
    chosen = draw(case)
    data = replace(chosen, layout="HLD").data()
    arrays = []
    for x in (data.q, data.k, data.v, data.dout):
        x = np.swapaxes(x, -3, -2) if chosen.layout == "LHD" else x
        arrays.append(memory(draw, x))
    return chosen, arrays, draw(st.booleans())


def check(machine: Machine, call: tuple[Case, list[Any], bool]) -> None:
    """All that a call returns, by rule T; inputs unchanged."""
    case, (q, k, v, dout), deterministic = call
    want = answer(case)
    options = {**case.options(), "layout": case.layout}
    wrt = ("q", "k", "v")
    if want.data.alibi_slopes is not None:
        options["alibi_slopes"] = want.data.alibi_slopes
        wrt = (*wrt, "alibi_slopes")
    before = [x.copy() for x in (q, k, v, dout)]
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    run: dict[str, Any] = {"dlse": want.data.dlse, "wrt": wrt, "deterministic": deterministic}
    got = machine.backward(dout, q, k, v, out, lse, **run, **options)
    for a, b in zip((q, k, v, dout), before, strict=True):
        assert np.array_equal(
            a.view(np.uint16) if a.itemsize == 2 else a, b.view(np.uint16) if b.itemsize == 2 else b
        )
    grads = {name: getattr(got, name) for name in wrt}
    if case.layout == "LHD":
        out = np.swapaxes(out, -3, -2)
        grads |= {name: np.swapaxes(grads[name], -3, -2) for name in "qkv"}
    text = f"{machine.name}: {case!r} strides {[x.strides for x in (q, k, v, dout)]}"
    oracle.check_all(text, want.exact, want.honest, case.numpy_dtype, out=out, lse=lse, grads=grads)


@NUMPY
@given(calls(cases(Numpy.dtypes, 150, 40)))
def test_any_call_on_numpy_arrays(call: tuple[Case, list[Any], bool]) -> None:
    check(Numpy(), call)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Machine]:
    with Emulator() as machine:
        yield machine


# Head dims up to 64 meet every code path of the kernels but need only two sizes of them.
@EMULATOR
@given(call=calls(cases(("float16",), 140, 64)))
def test_any_call_in_the_emulator(emulator: Machine, call: tuple[Case, list[Any], bool]) -> None:
    check(emulator, call)


@pytest.mark.gpu
@settings(max_examples=300, **COMMON)
@given(call=calls(cases(("float16", "bfloat16"), 600, 256)))
def test_any_call_on_a_gpu(call: tuple[Case, list[Any], bool]) -> None:
    from tests.machines import Cupy

    check(Cupy(), call)
