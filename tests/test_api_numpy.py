"""The public functions on NumPy arrays: shapes, layouts, memory order, dtypes, buffers, and what comes back."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.machines import BFLOAT16, Numpy, check_forward, check_gradients, normal, same_bits

DTYPES = ("float16", "bfloat16", "float32", "float64")
RNG = np.random.default_rng(7)


def qkv(
    batch: tuple[int, ...] = (2,),
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = (7, 9),
    dims: tuple[int, int] = (8, 5),
    dtype: Any = "float32",
) -> tuple[Any, Any, Any, Any]:
    """q, k, v, dout."""
    q = normal(RNG, *batch, heads[0], lengths[0], dims[0], dtype=dtype)
    k = normal(RNG, *batch, heads[1], lengths[1], dims[0], dtype=dtype)
    v = normal(RNG, *batch, heads[1], lengths[1], dims[1], dtype=dtype)
    dout = normal(RNG, *batch, heads[0], lengths[0], dims[1], dtype=dtype)
    return q, k, v, dout


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_together(dtype: str) -> None:
    q, k, v, dout = qkv(dtype=dtype)
    options: dict[str, Any] = {
        "causal": True,
        "window": (4, 3),
        "q_offset": 1,
        "softcap": 2.0,
        "scale": -0.4,
        "alibi_slopes": normal(RNG, 2, 4, dtype="float32"),
    }
    check_forward(Numpy(), q, k, v, **options)
    dlse = normal(RNG, 2, 4, 7, dtype="float64" if dtype == "float64" else "float32")
    check_gradients(Numpy(), q, k, v, dout, dlse=dlse, **options)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (2, 1, 3), (2, 1, 2, 1, 2)])
def test_any_number_of_batch_axes(batch: tuple[int, ...]) -> None:
    q, k, v, dout = qkv(batch)
    out, lse = check_forward(Numpy(), q, k, v)
    assert out.shape == (*batch, 4, 7, 5)
    assert lse.shape == (*batch, 4, 7)
    check_gradients(Numpy(), q, k, v, dout)


@pytest.mark.parametrize(
    ("layout", "options"), list(itertools.product(("HLD", "LHD"), ({}, {"causal": True})))
)
def test_two_axes_are_one_head(layout: str, options: dict[str, Any]) -> None:
    q, k, v, dout = qkv((), (1, 1))
    expected, expected_lse = cuflash.attention(q, k, v, **options, return_lse=True)
    out, lse = cuflash.attention(q[0], k[0], v[0], layout=layout, return_lse=True, **options)
    assert out.shape == (7, 5) and lse.shape == (7,)
    assert same_bits(out, expected[0]) and same_bits(lse, expected_lse[0])
    dlse = normal(RNG, 7, dtype="float32")
    _, pullback = cuflash.attention_vjp(q[0], k[0], v[0], layout=layout, **options)
    _, full = cuflash.attention_vjp(q, k, v, **options)
    for got, want in zip(pullback(dout[0], dlse)[:3], full(dout, dlse[None])[:3], strict=True):
        assert same_bits(got, want[0])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_slopes_without_a_head_axis_keep_their_shape(shape: tuple[int, ...]) -> None:
    q, k, v, dout = (x[0] for x in qkv((), (1, 1)))
    slopes = np.full(shape, 0.3, np.float32)
    _out, pullback = cuflash.attention_vjp(q, k, v, alibi_slopes=slopes, wrt=("alibi_slopes",))
    grad = pullback(dout).alibi_slopes
    assert grad.shape == shape
    gold = oracle.backward(dout[None], q[None], k[None], v[None], alibi_slopes=slopes.reshape(1))
    assert np.allclose(grad, gold["alibi_slopes"].reshape(shape), rtol=1e-4)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_layout_LHD_is_a_transposed_view(batch: tuple[int, ...]) -> None:
    q, k, v, dout = qkv(batch)
    slopes = normal(RNG, *batch, 4, dtype="float32")
    options: dict[str, Any] = {"causal": True, "alibi_slopes": slopes}
    wrt = ("q", "k", "v", "alibi_slopes")
    out, pullback = cuflash.attention_vjp(q, k, v, wrt=wrt, **options)
    turned = [np.ascontiguousarray(x.swapaxes(-3, -2)) for x in (q, k, v, dout)]
    (out2, lse2), pullback2 = cuflash.attention_vjp(
        *turned[:3], layout="LHD", wrt=wrt, return_lse=True, **options
    )
    assert out2.shape == (*batch, 7, 4, 5) and out2.flags.c_contiguous
    assert same_bits(out2.swapaxes(-3, -2), out)
    assert same_bits(lse2, cuflash.attention(q, k, v, return_lse=True, **options)[1])
    grads, grads2 = pullback(dout), pullback2(turned[3])
    for name in "qkv":
        got = getattr(grads2, name)
        assert got.flags.c_contiguous
        assert same_bits(got.swapaxes(-3, -2), getattr(grads, name))
    assert same_bits(grads2.alibi_slopes, grads.alibi_slopes)


def test_results_follow_the_memory_order_of_their_argument() -> None:
    q, k, v, dout = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in qkv())
    out, pullback = cuflash.attention_vjp(q, k, v)
    assert out.swapaxes(1, 2).flags.c_contiguous
    for grad in pullback(dout)[:3]:
        assert grad.swapaxes(1, 2).flags.c_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_results(dtype: str) -> None:
    q, k, v, dout = qkv(dtype=dtype)
    slopes = np.full(4, 0.1, np.float32)
    (out, lse), pullback = cuflash.attention_vjp(
        q, k, v, alibi_slopes=slopes, wrt=("q", "k", "v", "alibi_slopes"), return_lse=True
    )
    grads = pullback(dout, np.zeros_like(lse))
    assert {x.dtype for x in (out, *grads[:3])} == {q.dtype}
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert grads.alibi_slopes.dtype == np.float32
    own = cuflash.attention_vjp(
        q, k, v, alibi_slopes=slopes.astype(q.dtype), wrt=("alibi_slopes",)
    )[1](dout)
    assert own.alibi_slopes.dtype == q.dtype


def test_only_what_was_asked_for_comes_back() -> None:
    q, k, v, dout = qkv()
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    full = cuflash.attention_backward(dout, q, k, v, out, lse)
    assert full._fields == ("q", "k", "v", "bias", "alibi_slopes", "sinks", "score_params")
    for n in range(4):
        for wrt in itertools.permutations("qkv", n):
            grads = cuflash.attention_backward(dout, q, k, v, out, lse, wrt=wrt)
            for name, grad in grads._asdict().items():
                if name in wrt:
                    assert same_bits(grad, getattr(full, name))
                else:
                    assert grad is None
    for wrt in (["q"], {"q"}, ("q", "q")):
        assert cuflash.attention_backward(dout, q, k, v, out, lse, wrt=wrt).k is None


def test_buffers_are_filled_and_returned() -> None:
    q, k, v, dout = qkv()
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    given = np.full_like(out, np.nan)
    got, got_lse = cuflash.attention(q, k, v, out=given, return_lse=True)
    assert got is given and same_bits(got, out) and same_bits(got_lse, lse)
    fresh = cuflash.attention_backward(dout, q, k, v, out, lse)
    buffers = {
        "dq": np.full_like(q, np.nan),
        "dk": np.full_like(k, 7),
        "dv": np.full_like(v, np.nan),
    }
    grads = cuflash.attention_backward(dout, q, k, v, out, lse, **buffers)
    for name in "qkv":
        assert getattr(grads, name) is buffers["d" + name]
        assert same_bits(getattr(grads, name), getattr(fresh, name))
    result, pullback = cuflash.attention_vjp(q, k, v, out=given)
    assert result is given
    dk = np.full_like(k, np.nan)
    assert pullback(dout, dk=dk).k is dk and same_bits(dk, fresh.k)


def test_a_buffer_may_have_any_strides() -> None:
    q, k, v, _dout = qkv()
    out, _lse = cuflash.attention(q, k, v, return_lse=True)
    wide = np.full((2, 4, 7, 3, 10), np.nan, np.float32)
    given = wide[..., 1, ::-2]
    assert cuflash.attention(q, k, v, out=given) is given
    assert same_bits(given.copy(), out)
    assert np.isnan(wide[..., [0, 2], :]).all() and np.isnan(wide[..., 1, ::2]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"q_offset": np.int64(2), "window": (np.int8(3), None)},
        {"q_offset": np.array(2), "window": [3, None]},
        {"q_offset": 2, "window": np.array([3, 10**6])},
        {"causal": np.False_, "q_offset": np.uint8(2), "window": (3, np.array(10**6))},
    ],
)
def test_numbers_of_numpy_are_numbers(options: dict[str, Any]) -> None:
    q, k, v, _ = qkv()
    expected = cuflash.attention(q, k, v, q_offset=2, window=(3, None))
    assert same_bits(cuflash.attention(q, k, v, **options), expected)


@pytest.mark.parametrize(
    "scale", [np.float32(0.5), np.float64(0.5), np.array(0.5), BFLOAT16.type(0.5)]
)
def test_scale_of_any_real_type(scale: Any) -> None:
    q, k, v, _ = qkv()
    expected = cuflash.attention(q, k, v, scale=0.5, softcap=0.5)
    assert same_bits(cuflash.attention(q, k, v, scale=scale, softcap=scale), expected)


def test_an_integer_scale() -> None:
    q, k, v, _ = qkv()
    assert same_bits(cuflash.attention(q, k, v, scale=2), cuflash.attention(q, k, v, scale=2.0))


def test_float64_takes_any_finite_scale() -> None:
    q, k, v, _ = qkv(dtype="float64")
    out = cuflash.attention(q * 1e-150, k * 1e-150, v, scale=1e300)
    expected, _ = oracle.forward(q, k, v, scale=1.0)
    assert np.allclose(out, expected, rtol=1e-9)


def test_k_and_v_broadcast_over_the_batch() -> None:
    q, k, v, dout = qkv((2, 3))
    k1, v1 = k[:1], v[:, :1]
    check_forward(Numpy(), q, k1, v1)
    grads = check_gradients(Numpy(), q, k1, v1, dout)
    assert grads.k.shape == (1, 3, 2, 9, 8) and grads.v.shape == (2, 1, 2, 9, 5)


def test_inputs_may_be_the_same_array_read_only_or_a_subclass(tmp_path: Any) -> None:
    q = normal(RNG, 2, 6, 8, dtype="float32")
    expected = cuflash.attention(q, q.copy(), q.copy())
    q.flags.writeable = False
    assert same_bits(cuflash.attention(q, q, q), expected)
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=q.shape)
    mapped[...] = q
    assert same_bits(cuflash.attention(mapped, q, mapped), expected)
    assert type(cuflash.attention(mapped, mapped, mapped)) is np.ndarray


def test_the_pullback_may_be_called_again() -> None:
    q, k, v, dout = qkv()
    _, pullback = cuflash.attention_vjp(q, k, v, causal=True)
    first, second = pullback(dout), pullback(dout)
    assert all(same_bits(a, b) for a, b in zip(first[:3], second[:3], strict=True))


# ---- merge


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_merge(dtype: str, rank: int) -> None:
    q, k, v, _ = qkv((2, 1), dtype=dtype, heads=(1, 1))
    while q.ndim > rank:
        q, k, v = q[0], k[0], v[0]
    cuts = [slice(0, 4), slice(4, 4), slice(4, 9)]
    parts = [cuflash.attention(q, k[..., c, :], v[..., c, :], return_lse=True) for c in cuts]
    outs, lses = zip(*parts, strict=True)
    out, lse = cuflash.merge_attention(outs, lses)
    while q.ndim < 3:
        q, k, v, out, lse = q[None], k[None], v[None], out[None], lse[None]
    gold, gold_lse = oracle.forward(q, k, v)
    # Parts are rounded to the dtype before they are merged: one more rounding than attention itself.
    honest = oracle.low_precision(q, k, v)["out"]
    oracle.check(out, gold, honest, oracle.FORWARD, q.dtype, case=(dtype, rank))
    oracle.check_lse(lse, gold_lse, q.dtype)


def test_merge_into_a_part_or_a_buffer() -> None:
    q, k, v, _ = qkv()
    parts = [
        cuflash.attention(q, k[..., c, :], v[..., c, :], return_lse=True)
        for c in (slice(4), slice(4, 9))
    ]
    outs, lses = (list(x) for x in zip(*parts, strict=True))
    expected, _ = cuflash.merge_attention(outs, lses)
    buffer = np.full_like(expected, np.nan)
    assert cuflash.merge_attention(outs, lses, out=buffer)[0] is buffer
    assert same_bits(buffer, expected)
    for n in range(2):
        copies = [x.copy() for x in outs]
        assert cuflash.merge_attention(copies, lses, out=copies[n])[0] is copies[n]
        assert same_bits(copies[n], expected)


def test_merge_takes_stacked_arrays() -> None:
    q, k, v, _ = qkv()
    parts = [
        cuflash.attention(q, k[..., c, :], v[..., c, :], return_lse=True)
        for c in (slice(4), slice(4, 9))
    ]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    assert np.allclose(
        cuflash.merge_attention(outs, lses)[0], cuflash.attention(q, k, v), atol=1e-6
    )


# ---- the package


def test_N15_import_is_light() -> None:
    """No CuPy, no planning, no compiler at import; 0.2 s beyond NumPy at most."""
    code = (
        "import sys, time; import numpy, ml_dtypes; start = time.process_time(); import cuflash;"
        "took = time.process_time() - start; bad = {'cupy', 'scipy', 'torch', 'tqdm'} & set(sys.modules);"
        "assert not bad, bad; assert took < 0.2, took"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_public_names() -> None:
    assert all(hasattr(cuflash, name) for name in cuflash.__all__)
    assert sorted(cuflash.__all__) == cuflash.__all__


@pytest.mark.parametrize("module", ["_attention", "_gradient", "_merge"])
def test_docstring_examples(module: str) -> None:
    import doctest
    import importlib

    failed, tried = doctest.testmod(importlib.import_module(f"cuflash.{module}"))
    assert tried and not failed


def test_prepared_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash import _prepare

    _prepare.forget()
    monkeypatch.setattr(_prepare, "CAPACITY", 5)
    for length in range(1, 20):
        q = np.zeros((1, length, 4), np.float32)
        cuflash.attention(q, q, q)
        cuflash.attention(q, q, q)
        assert len(_prepare._calls) <= 5
