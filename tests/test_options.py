"""Masks, biases, sinks, dropout and score functions: alone, in all pairs, and what they must equal."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import cases, oracle
from tests.case import (
    Case,
    answer,
    check,
    gradients_by_name,
    names_of_gradients,
    public_options,
)
from tests.machines import Emulator, Machine, Numpy, same_bits
from tests.scores import LIBRARY

ALONE = [case for dtype in cases.DTYPES for case in cases.in_dtype(cases.OPTIONS, dtype)]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_each_option_alone_passes_rule_t(case: Case) -> None:
    """In every dtype on the NumPy backend; `test_kernels_options.py` has the kernels."""
    check(Numpy(), case)


@pytest.mark.parametrize("case", cases.covering_options(), ids=str)
def test_pairs_of_options_pass_rule_t(case: Case) -> None:
    """Every pair of values of any two options on the NumPy backend."""
    check(Numpy(), case, dlse=case.seed % 3 != 0)


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_numpy_twin_means_the_same_as_the_code(name: str, dtype: str) -> None:
    """`ScoreMod(code, params, fn=...)`: results do not depend on whether `fn` was given."""
    case = Case(dtype=dtype, batch=(2,), len_q=33, len_k=40, head_dim=16, score_mod=name)
    data, twin = answer(case).data, answer(case).data.score_mod
    assert twin is not None
    results = []
    for fn in (None, twin.fn):
        options = {"score_mod": cuflash.ScoreMod(twin.code, twin.params, fn=fn)}
        wrt = names_of_gradients(data)
        out, grads = Numpy().vjp(data.q, data.k, data.v, data.dout, wrt=wrt, **options)
        results.append((out, *gradients_by_name(grads, data, wrt).values()))
    tolerance = 1e-10 if dtype == "float64" else 2e-5
    for by_code, by_fn in zip(*results, strict=True):
        np.testing.assert_allclose(by_code, by_fn, rtol=tolerance, atol=tolerance)


SLOPES = [
    Case(dtype="float64", batch=(2,), heads=4, heads_kv=2, len_q=9, len_k=11, head_dim=5, **options)
    for options in (
        {"bias": "1H1k", "sinks": "own", "alibi": "H", "score_mod": "table", "causal": True},
        {"bias": "BHqk", "bias_inf": True, "dropout": 0.3, "score_mod": "gates", "mask": "dense"},
        {"bias": "q1", "sinks": "own", "dropout": 0.2, "score_mod": "branch", "softcap": 2.0},
        {"sinks": "own", "score_mod": "curved", "mask": "blocks", "block": (16, 16), "scale": -0.4},
    )
]


@pytest.mark.parametrize("case", SLOPES, ids=str)
def test_gradients_are_slopes_of_the_package_itself(case: Case) -> None:
    """float64 on the NumPy backend: central differences of what `attention` returns."""
    data, options = answer(case).data, public_options(case, answer(case).data, Numpy())
    wrt = names_of_gradients(data)
    twin = data.score_mod
    assert twin is not None
    arrays = {n: getattr(data, n) for n in wrt if n not in twin.params} | twin.arrays()

    def loss(**moved: np.ndarray) -> float:
        given = {**arrays, **moved}
        q, k, v = (given.pop(n) for n in "qkv")
        params = {**twin.params, **{n: given.pop(n) for n in twin.arrays()}}
        mod = cuflash.ScoreMod(twin.code, params)
        run = {**options, **given, "score_mod": mod, "return_lse": True}
        out, lse = cuflash.attention(q, k, v, **run)
        finite = np.where(np.isfinite(lse), lse * data.dlse, 0.0)
        return float((out * data.dout).sum() + finite.sum())

    _, got = Numpy().vjp(data.q, data.k, data.v, data.dout, dlse=data.dlse, wrt=wrt, **options)
    grads = gradients_by_name(got, data, wrt)
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        grad = grads.get(name, grads.get(f"score_{name}"))
        way, step = rng.standard_normal(x.shape), 1e-5
        slope = (loss(**{name: x + step * way}) - loss(**{name: x - step * way})) / (2 * step)
        assert slope == pytest.approx(float((grad * way).sum()), rel=1e-6, abs=1e-8), name


# ---- identities, on every machine

SMALL = Case(batch=(2,), heads=4, heads_kv=2, len_q=70, len_k=137, head_dim=64)


def agrees(machine: Machine, case: Case, **options: Any) -> list[Any]:
    """Rule T against the exact result of `case`, whatever `options` make of the call; all results."""
    want = answer(case)
    data, wrt = want.data, ("q", "k", "v")
    given = public_options(case, data, machine) | options
    out, lse = machine.attention(data.q, data.k, data.v, return_lse=True, **given)
    run = {"dlse": data.dlse, "deterministic": True, "wrt": wrt, **given}
    got = machine.backward(data.dout, data.q, data.k, data.v, out, lse, **run)
    grads = {name: getattr(got, name) for name in wrt}
    text = f"{machine.name}: {case!r} as {list(options)}"
    oracle.check_all(text, want.exact, want.honest, case.numpy_dtype, out=out, lse=lse, grads=grads)
    return [out, lse, *grads.values()]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, bool)


NOTHING_ASKED = {
    "mask of ones": {"mask": ones(2, 4, 70, 137)},
    "one True": {"mask": ones(1, 1)},
    "blocks of ones": {"mask": lambda: cuflash.BlockMask.from_blocks(ones(1, 2), shape=(70, 137))},
    "bias of zeros": {"bias": np.zeros((4, 1, 137), np.float16)},
    "sinks of -inf": {"sinks": np.full(4, -np.inf, np.float32)},
}


@pytest.mark.parametrize("name", NOTHING_ASKED)
def test_an_option_that_asks_nothing_changes_nothing(backend: Machine, name: str) -> None:
    for causal in (False, True):
        given = {n: x() if callable(x) else x for n, x in NOTHING_ASKED[name].items()}
        agrees(backend, replace(SMALL, causal=causal), **given)


def test_dropout_of_zero_is_no_dropout_bitwise(backend: Machine) -> None:
    plain = agrees(backend, SMALL)
    for options in ({"seed": 5}, {"dropout_p": 0.0, "seed": 7}, {"dropout_p": 0, "seed": None}):
        assert all(map(same_bits, plain, agrees(backend, SMALL, **options)))


def test_a_score_function_can_be_every_other_option() -> None:
    """The score itself, ALiBi, softcap and a bias, as expressions."""
    machine, ScoreMod = Numpy(), cuflash.ScoreMod
    case = replace(SMALL, dtype="float64", causal=True, q_offset=0)
    agrees(machine, case, score_mod=ScoreMod("s"))
    alibi = replace(case, alibi="BH")
    slopes = answer(alibi).data.alibi_slopes
    as_alibi = ScoreMod("s - slope[b][h] * abs(i - j)", {"slope": slopes.astype(np.float64)})
    agrees(machine, alibi, alibi_slopes=None, score_mod=as_alibi)
    agrees(machine, replace(case, softcap=2.0), softcap=None, score_mod=ScoreMod("2 * tanh(s / 2)"))
    bias = replace(case, bias="1Hqk")
    table = ScoreMod("s + table[0][h][i][j]", {"table": answer(bias).data.bias})
    agrees(machine, bias, bias=None, score_mod=table)


def test_a_sink_is_one_more_key_with_value_zero(backend: Machine) -> None:
    case = replace(SMALL, sinks="float32")
    data = answer(case).data
    out, lse = backend.attention(data.q, data.k, data.v, sinks=data.sinks, return_lse=True)
    k, v = (np.concatenate([x, 0 * x[:, :, :1]], axis=2) for x in (data.k, data.v))
    bias = np.zeros((4, 1, 138), np.float32)
    bias[:, 0, 137] = data.sinks
    other, other_lse = backend.attention(data.q, k, v, bias=bias, return_lse=True)
    assert np.allclose(lse, other_lse, rtol=1e-5, atol=1e-5)
    step = oracle.eps(case.numpy_dtype)
    difference = abs(out.astype(float) - other.astype(float))
    assert difference.max() <= 2 * step * abs(answer(case).exact.out).max()


def test_hiding_by_mask_blocks_or_bias_is_the_same(backend: Machine) -> None:
    case = replace(SMALL, mask="blocks", block=(32, 48), causal=True)
    data = answer(case).data
    assert data.mask is not None
    agrees(backend, case)
    agrees(backend, case, mask=data.mask.dense)
    agrees(backend, case, mask=None, bias=np.where(data.mask.dense, 0, -np.inf).astype(np.float16))


def test_a_band_as_mask_is_the_band(backend: Machine) -> None:
    """causal and window, as a boolean array and as blocks cut by them."""
    for options in ({"causal": True}, {"window": (40, 3)}, {"causal": True, "q_offset": -9}):
        case = replace(SMALL, **options)
        seen = oracle.visible(70, 137, **case.options())
        hidden = {"causal": False, "window": None, "q_offset": None}
        agrees(backend, case, **hidden, mask=seen)
        agrees(backend, case, **hidden, mask=cuflash.BlockMask.from_dense(seen, block_size=32))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": "dense", "bias": "1H1k", "sinks": "own"},
        {"mask": "blocks_partial", "block": (32, 48), "dropout": 0.3},
    ],
    ids=str,
)
def test_gradients_are_reproducible_in_any_order_of_threads(options: dict[str, Any]) -> None:
    case = replace(SMALL, **options)
    data = answer(case).data
    wrt, runs = names_of_gradients(data), []
    for seed in (0, 5, 11):
        with Emulator(seed=seed) as machine:
            options = public_options(case, data, machine)
            out, lse = machine.attention(data.q, data.k, data.v, return_lse=True, **options)
            run = {"wrt": wrt, "deterministic": True, **options}
            got = machine.backward(data.dout, data.q, data.k, data.v, out, lse, **run)
            runs.append([out, lse, *gradients_by_name(got, data, wrt).values()])
    for other in runs[1:]:
        assert all(map(same_bits, runs[0], other))


# ---- what arrays may look like


def strange(x: np.ndarray, kind: str) -> np.ndarray:
    """`x` with other strides, in memory that holds something else around it."""
    if kind == "negative":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if kind == "transposed":
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if kind == "fortran":
        return np.asfortranarray(x)
    padded = np.ones((*x.shape[:-2], 2 * x.shape[-2] + 1, 3 * x.shape[-1] + 1), x.dtype)
    view = padded[..., 1::2, 1::3]
    view[...] = x
    return view


@pytest.mark.parametrize("kind", ["negative", "transposed", "fortran", "padded"])
def test_masks_and_biases_of_any_strides(backend: Machine, kind: str) -> None:
    for case in (replace(SMALL, mask="dense"), replace(SMALL, bias="BHqk")):
        data = answer(case).data
        if data.mask is not None:
            agrees(backend, case, mask=strange(data.mask.dense, kind))
        else:
            agrees(backend, case, bias=strange(data.bias, kind))


def test_arguments_stay_as_they_were(backend: Machine) -> None:
    case = replace(SMALL, mask="dense", bias="1H1k", sinks="own")
    data = case.data()
    assert data.mask is not None and data.bias is not None and data.sinks is not None
    given = [data.mask.dense, data.bias, data.sinks]
    before = [x.copy() for x in given]
    options = public_options(case, data, backend)
    for x in given:
        x.flags.writeable = False
    wrt = names_of_gradients(data)
    for _ in range(2):
        backend.vjp(data.q, data.k, data.v, data.dout, wrt=wrt, **options)
    assert all(map(same_bits, given, before))


def test_a_call_without_heads_takes_options_of_two_axes(backend: Machine) -> None:
    """q (Lq, D): mask and bias broadcast to (Lq, Lk), sinks are one number."""
    case = Case(batch=(), heads=1, len_q=40, len_k=70, mask="rows", bias="qk", sinks="float32")
    want = answer(case)
    data = want.data
    assert data.mask is not None and data.sinks is not None
    options = {"mask": data.mask.dense, "bias": data.bias, "sinks": data.sinks}
    wrt = ("q", "k", "v", "bias", "sinks")
    q, k, v, dout = data.q[0], data.k[0], data.v[0], data.dout[0]
    out, lse = backend.attention(q, k, v, return_lse=True, **options)
    got = backend.backward(dout, q, k, v, out, lse, dlse=data.dlse[0], wrt=wrt, **options)
    grads = {n: getattr(got, n) for n in wrt}
    grads |= {n: grads[n][None] for n in "qkv"}
    oracle.check_all(
        backend.name, want.exact, want.honest, q.dtype, out=out[None], lse=lse[None], grads=grads
    )


# ---- memory


def test_the_gradient_of_a_key_bias_takes_no_matrix() -> None:
    """One head's scores would be 67 MB in float32."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 2, 4096, 16), dtype=np.float32) for _ in range(4))
    bias = rng.standard_normal((1, 2, 1, 4096), dtype=np.float32)
    out, lse = cuflash.attention(q, k, v, bias=bias, return_lse=True)
    tracemalloc.start()
    grads = cuflash.attention_backward(dout, q, k, v, out, lse, bias=bias, wrt=("bias", "q"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert grads.bias.shape == bias.shape
    assert peak < 24e6, peak


def test_the_gradient_of_a_key_bias_takes_no_matrix_on_a_device() -> None:
    """No allocation of the size of one head's scores, and all together far from it."""
    case = Case(batch=(), heads=2, len_q=512, len_k=512, bias="Hqk")
    data = case.data()
    bias = np.zeros((2, 1, 512), np.float32)
    with Emulator() as machine:
        out, lse = machine.attention(data.q, data.k, data.v, bias=bias, return_lse=True)
        sizes, empty = [], machine.device.empty

        def counted(shape: Any, dtype: Any) -> Any:
            sizes.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return empty(shape, dtype)

        machine.device.empty = counted
        arrays = (data.dout, data.q, data.k, data.v, out, lse)
        for deterministic in (True, False):
            run = {"wrt": ("bias", "q", "k", "v"), "deterministic": deterministic}
            grads = machine.backward(*arrays, bias=bias, **run)
            assert grads.bias.shape == bias.shape and np.abs(grads.bias).max() > 0
    assert max(sizes) < 512 * 512 * 2 / 2, sizes
