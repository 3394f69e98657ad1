"""Museum family K, biases and boolean masks with their gradients, and A to D, L for them; others' bugs by number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.case import Case, answer, check
from tests.machines import BFLOAT16, Machine, Numpy, normal, same_bits
from tests.option_data import BIASES, axes

BASE = Case(batch=(2,), heads=2, heads_kv=1, len_q=70, len_k=137, head_dim=64)


def arrays(seed: int, len_q: int, len_k: int, heads: int = 2, batch: int = 1) -> tuple[Any, ...]:
    """q, k, v, dout in float16."""
    rng = np.random.default_rng(seed)
    q, dout = (normal(rng, batch, heads, len_q, 64) for _ in range(2))
    k, v = (normal(rng, batch, heads, len_k, 64) for _ in range(2))
    return q, k, v, dout


def everything(machine: Machine, q: Any, k: Any, v: Any, dout: Any, **options: Any) -> list[Any]:
    """out, lse, dq, dk, dv, and the bias's gradient where there is one."""
    wrt = ("q", "k", "v", "bias") if "bias" in options else ("q", "k", "v")
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    run = {"deterministic": True, "wrt": wrt, **options}
    grads = machine.backward(dout, q, k, v, out, lse, **run)
    return [out, lse, *(getattr(grads, name) for name in wrt)]


# ---- K1, K3, K5: the gradient of a bias


@pytest.mark.parametrize("code", BIASES)
def test_K1_every_shape_has_its_gradient(backend: Machine, code: str) -> None:
    """Right, of the bias's own shape, and for more than one batch entry; never silently 0."""
    for batch in ((2,), (2, 2)):
        case = replace(BASE, bias=code, batch=batch, len_q=33)
        check(backend, case, deterministic=True)
        assert np.abs(answer(case).exact.grads["bias"]).max() > 0.01


@pytest.mark.parametrize("bias_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_K3_every_dtype_of_a_bias(backend: Machine, dtype: str, bias_dtype: str) -> None:
    check(backend, replace(BASE, dtype=dtype, bias="1H1k", bias_dtype=bias_dtype))


@pytest.mark.parametrize("bias_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_K3_wide_dtypes_of_a_bias(dtype: str, bias_dtype: str) -> None:
    """On the NumPy backend; kernels take 16-bit arrays."""
    check(Numpy(), replace(BASE, dtype=dtype, bias="1H1k", bias_dtype=bias_dtype))


@pytest.mark.parametrize("len_k", [1, 7, 65, 100])
def test_K5_the_gradient_is_written_in_place_and_nowhere_else(
    host_backend: Machine, len_k: int
) -> None:
    """Rows of odd lengths, one behind the other, in a buffer of NaN between guards."""
    case = Case(batch=(), heads=2, len_q=33, len_k=len_k, bias="Hqk", bias_dtype="float32")
    data = answer(case).data
    q, k, v, dout, bias = data.q, data.k, data.v, data.dout, data.bias
    assert bias is not None
    want = everything(host_backend, q, k, v, dout, bias=bias)
    guard = 4096
    memory = np.full(2 * guard + bias.nbytes, 0xFF, np.uint8)
    dbias = memory[guard : guard + bias.nbytes].view(bias.dtype).reshape(bias.shape)
    run = {"bias": bias, "wrt": ("bias",), "deterministic": True, "dbias": dbias}
    grads = cuflash.attention_backward(dout, q, k, v, *want[:2], **run)
    assert grads.bias is dbias and grads.q is None
    assert same_bits(dbias, want[-1])
    assert (memory[:guard] == 0xFF).all() and (memory[guard + bias.nbytes :] == 0xFF).all()


def test_L13_invariants_of_gradients(backend: Machine) -> None:
    """Rows of dbias sum to 0 where nothing else takes weight; q.dq = k.dk; v scaled scales what is linear in it."""
    case = replace(BASE, bias="BHqk", bias_dtype="float32", causal=True)
    data = answer(case).data
    run = {"bias": data.bias, "causal": True}
    given = data.q, data.k, data.v, data.dout
    out, _, dq, dk, _, dbias = everything(backend, *given, **run)
    # delta comes from the rounded out: half a step of it per column.
    step = 2.0**-11 * abs(data.dout.astype(float) * out.astype(float)).sum(-1)
    assert (abs(dbias.astype(float).sum(-1)) <= step + 1e-4).all()
    sums = [
        (x.astype(float) * g.astype(float)).sum((1, 2, 3)) for x, g in ((data.q, dq), (data.k, dk))
    ]
    size = (abs(data.q.astype(float)) * abs(dq.astype(float))).sum((1, 2, 3))
    assert (abs(sums[0] - sums[1]) <= 2e-3 * size).all()
    double = everything(backend, data.q, data.k, 2 * data.v, data.dout, **run)
    for place in (0, 2, 3, 5):
        once, twice = (x[place].astype(float) for x in ((out, 0, dq, dk, 0, dbias), double))
        assert np.allclose(2 * once, twice, rtol=2e-3, atol=1e-3 * abs(twice).max())


def test_L11_pullbacks_are_linear_and_repeatable(backend: Machine) -> None:
    case = replace(BASE, bias="1H1k", bias_dtype="float32", sinks="float32", mask="rows")
    data = answer(case).data
    assert data.mask is not None
    names = ("q", "k", "v", "bias", "sinks")
    put = backend.put
    _, pullback = cuflash.attention_vjp(
        *map(put, (data.q, data.k, data.v)),
        bias=put(data.bias),
        sinks=put(data.sinks),
        mask=put(data.mask.dense),
        wrt=names,
        deterministic=True,
    )
    once, again, doubled = (
        pullback(put(data.dout)),
        pullback(put(data.dout)),
        pullback(put(2 * data.dout)),
    )
    for name in names:
        a, b, c = (backend.get(getattr(x, name)) for x in (once, again, doubled))
        assert same_bits(a, b)
        assert np.allclose(2 * a.astype(float), c.astype(float), rtol=2e-3, atol=1e-5)


# ---- K13, B3, B13: infinities


def test_K13_minus_infinity_has_no_gradient(backend: Machine) -> None:
    check(backend, replace(BASE, bias="BHqk", bias_inf=True), deterministic=True)
    case = replace(BASE, bias="1H1k", bias_inf=True, causal=True, sinks="own")
    check(backend, case, deterministic=True)
    data = answer(case).data
    run = {"bias": data.bias, "sinks": data.sinks, "causal": True}
    dbias = everything(backend, data.q, data.k, data.v, data.dout, **run)[-1]
    assert data.bias is not None
    assert (dbias[np.isneginf(data.bias)] == 0).all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_K13_plus_infinity_and_nan_show_in_their_row(backend: Machine, value: float) -> None:
    q, k, v, dout = arrays(13, 70, 130)
    bias = np.zeros((70, 130), np.float16)
    want = everything(backend, q, k, v, dout, bias=bias)
    bias[40, 99] = value
    got = everything(backend, q, k, v, dout, bias=bias)
    others = np.arange(70) != 40
    assert np.isnan(got[0][:, :, 40].astype(float)).all()
    for place in (0, 1, 2):
        assert same_bits(got[place][:, :, others], want[place][:, :, others])
    assert same_bits(got[5][others], want[5][others])
    # Hidden, the same entry is nothing.
    mask = np.ones((70, 130), bool)
    mask[40, 99] = False
    hidden = everything(backend, q, k, v, dout, bias=bias, mask=mask)
    bias[40, 99] = 0
    assert all(map(same_bits, hidden, everything(backend, q, k, v, dout, bias=bias, mask=mask)))


def test_B3_tiles_that_begin_with_minus_infinity(backend: Machine) -> None:
    """No weight on keys before 130, two tiles: the running maximum stays -inf at first."""
    given = arrays(3, 70, 200)
    bias = np.zeros((1, 200), np.float16)
    bias[0, :130] = -np.inf
    got = everything(backend, *given, bias=bias)
    options = {"bias": bias}
    exact = oracle.exact(*given, **options)
    honest = oracle.low_precision(*given, **options)
    grads = dict(zip(("q", "k", "v", "bias"), got[2:], strict=True))
    text = f"{backend.name} B3"
    oracle.check_all(text, exact, honest, np.float16, out=got[0], lse=got[1], grads=grads)
    bias[0] = -np.inf
    out, lse, *grads = everything(backend, *given, bias=bias)
    assert (out == 0).all() and np.isneginf(lse).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("position", [0, 1, 2047, 4095])
def test_B13_one_finite_key_among_thousands(backend: Machine, position: int) -> None:
    q, k, v, dout = arrays(13, 1, 4096)
    bias = np.full(4096, -np.inf, np.float32)
    bias[position] = 3.0
    out, lse, _, _, dv, dbias = everything(backend, q, k, v, dout, bias=bias)
    assert same_bits(out[0, :, 0], v[0, :, position])
    score = np.einsum("hd,hd->h", q[0, :, 0].astype(float), k[0, :, position].astype(float)) / 8
    assert np.allclose(lse[0, :, 0], score + 3, rtol=1e-5)
    assert same_bits(dv[0, :, position], dout[0, :, 0])
    assert (np.delete(dv, position, axis=2) == 0).all() and abs(dbias).max() < 1e-4


# ---- K7, B1, C8: boolean masks

MASK_SHAPES = ("BHqk", "1Hqk", "B1qk", "11qk", "BH1k", "B11k", "111k", "BHq1", "B111", "1111")


@pytest.mark.parametrize("code", [*MASK_SHAPES, "Hqk", "H1k", "qk", "1k", "q1", "11", "k", ""])
def test_K7_every_shape_of_a_mask(backend: Machine, code: str) -> None:
    case = Case(batch=(3,), heads=2, heads_kv=1, len_q=33, len_k=70)
    shape = {"k": (70,), "": ()}.get(code) if len(code) < 2 else axes(code, case)
    mask = np.asarray(np.random.default_rng(7).random(shape) < 0.7)
    data = answer(case).data
    given = data.q, data.k, data.v, data.dout
    out, lse, *grads = everything(backend, *given, mask=mask)
    exact = oracle.exact(*given, mask=mask)
    honest = oracle.low_precision(*given, mask=mask)
    named = dict(zip(("q", "k", "v"), grads, strict=True))
    text = f"{backend.name} mask {mask.shape}"
    oracle.check_all(text, exact, honest, np.float16, out=out, lse=lse, grads=named)


def test_B1_rows_without_keys_by_a_boolean_mask(backend: Machine) -> None:
    """Rows 2 and 5 see nothing: out 0, lse -inf, dq 0, and what arrives for them reaches nothing."""
    q, k, v, dout = arrays(1, 8, 8)
    mask = np.ones((8, 8), bool)
    mask[[2, 5]] = False
    want = everything(backend, q, k, v, dout, mask=mask)
    out, lse, dq, dk, dv = want
    assert (out[:, :, [2, 5]] == 0).all() and (dq[:, :, [2, 5]] == 0).all()
    assert np.isneginf(lse[:, :, [2, 5]]).all()
    assert all(np.isfinite(g.astype(float)).all() for g in (dk, dv))
    for garbage in (7.0, np.nan, np.inf):
        other = dout.copy()
        other[:, :, [2, 5]] = garbage
        assert all(map(same_bits, everything(backend, q, k, v, other, mask=mask), want))


def test_C8_a_capped_score_is_still_hidden(backend: Machine) -> None:
    """softcap 1 of -inf would be -1: a fifth of the weight. Keys the mask hides have huge values."""
    q, k, v, dout = arrays(8, 70, 130)
    mask = np.random.default_rng(8).random(130) < 0.5
    v[:, :, ~mask] = 1e4
    got = everything(backend, q, k, v, dout, mask=mask, softcap=1.0)
    kept = backend.attention(q, k[:, :, mask], v[:, :, mask], softcap=1.0)
    assert np.allclose(got[0].astype(float), kept.astype(float), atol=2e-3)


def test_B9_padding_holds_anything(backend: Machine) -> None:
    """(B, 1, 1, Lk): the usual padding mask, with NaN in every padded key; bitwise as with zeros."""
    q, k, v, dout = arrays(9, 9, 70, heads=1, batch=3)
    mask = np.arange(70) < np.array([70, 65, 1])[:, None, None, None]
    hidden = np.broadcast_to(~mask.swapaxes(-1, -2), (3, 1, 70, 1))
    zero_k, zero_v = (np.where(hidden, 0, x).astype(np.float16) for x in (k, v))
    want = everything(backend, q, zero_k, zero_v, dout, mask=mask)
    for garbage in (np.nan, np.inf, -np.inf, 6e4):
        dirty = [np.where(hidden, garbage, x).astype(np.float16) for x in (k, v)]
        got = everything(backend, q, *dirty, dout, mask=mask)
        assert all(map(same_bits, got, want))


# ---- D11, D13, O: memory


@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_D11_biases_and_masks_at_odd_addresses(backend: Machine, shift: int) -> None:
    q, k, v, dout = arrays(11, 33, 70)
    rng = np.random.default_rng(11)
    for dtype in (np.float16, np.float32, BFLOAT16):
        if dtype is BFLOAT16:
            q, k, v, dout = (x.astype(BFLOAT16) for x in (q, k, v, dout))
        bias = rng.standard_normal((2, 33, 70)).astype(dtype)
        memory = np.ones(bias.size + 8, dtype)
        moved = memory[shift : shift + bias.size].reshape(bias.shape)
        moved[...] = bias
        want = everything(backend, q, k, v, dout, bias=bias)
        assert all(map(same_bits, everything(backend, q, k, v, dout, bias=moved), want))
    mask = rng.random((2, 33, 70)) < 0.6
    memory = np.ones(mask.size + 8, bool)
    moved = memory[shift : shift + mask.size].reshape(mask.shape)
    moved[...] = mask
    want = everything(backend, q, k, v, dout, mask=mask)
    assert all(map(same_bits, everything(backend, q, k, v, dout, mask=moved), want))


@pytest.mark.parametrize("len_k", [32, 33, 65, 97])
def test_D13_broadcast_by_strides_of_zero(backend: Machine, len_k: int) -> None:
    """A bias expanded by the caller has strides 0 and its full gradient; then dense, then expanded again."""
    q, k, v, dout = arrays(13, 33, len_k, batch=2)
    rng = np.random.default_rng(len_k)
    row = rng.standard_normal((2, 1, len_k)).astype(np.float32)
    expanded = np.broadcast_to(row, (2, 2, 33, len_k))
    first = everything(backend, q, k, v, dout, bias=expanded)
    dense = everything(backend, q, k, v, dout, bias=expanded.copy())
    again = everything(backend, q, k, v, dout, bias=expanded)
    assert first[5].shape == expanded.shape and first[5].strides[-1] == 4
    for a, b, c in zip(first, dense, again, strict=True):
        assert same_bits(a, b) and same_bits(a, c)
    mask = np.broadcast_to(rng.random((1, len_k)) < 0.6, (2, 2, 33, len_k))
    one, other = (everything(backend, q, k, v, dout, mask=x) for x in (mask, mask.copy()))
    assert all(map(same_bits, one, other))


def test_E3_one_row_of_many_heads(backend: Machine) -> None:
    """Heads packed as rows once broke lse, strides of the bias, windows, causal and dropout."""
    for heads in (1, 31, 33):
        for options in (
            {"bias": "BH1k", "causal": True},
            {"bias": "BHqk", "window": (40, 0)},
            {"mask": "heads", "dropout": 0.2},
        ):
            case = Case(heads=heads, heads_kv=1, len_q=1, len_k=70, batch=(2,), **options)
            check(backend, case, deterministic=True)


def test_A17_a_bias_for_the_last_row_alone(backend: Machine) -> None:
    """Decoding the last row with its row of the bias is the last row of the whole."""
    q, k, v, _ = arrays(17, 65, 150)
    bias = np.random.default_rng(17).standard_normal((2, 65, 150)).astype(np.float32)
    full, full_lse = backend.attention(q, k, v, bias=bias, causal=True, return_lse=True)
    run = {"bias": bias[:, -1:], "causal": True, "return_lse": True}
    last, last_lse = backend.attention(q[:, :, -1:], k, v, **run)
    assert np.allclose(last.astype(float), full[:, :, -1:].astype(float), atol=1e-3)
    assert np.allclose(last_lse, full_lse[:, :, -1:], atol=1e-5)


def test_C1_large_scores_with_a_large_bias(backend: Machine) -> None:
    """q times 5, k and v times 3, bias times 50: finite, and right."""
    for length in (1, 2, 17, 128):
        q, k, v, dout = arrays(1, length, length)
        rng = np.random.default_rng(length)
        bias = (50 * rng.standard_normal((2, length, length))).astype(np.float16)
        given = 5 * q, 3 * k, 3 * v, dout
        out, lse, *grads = everything(backend, *given, bias=bias, causal=True)
        options = {"bias": bias, "causal": True}
        exact = oracle.exact(*given, **options)
        honest = oracle.low_precision(*given, **options)
        named = dict(zip(("q", "k", "v", "bias"), grads, strict=True))
        text = f"{backend.name} C1 {length}"
        oracle.check_all(text, exact, honest, np.float16, out=out, lse=lse, grads=named)
