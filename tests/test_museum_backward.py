"""Museum family L and identities of the gradient: others' bugs under their numbers, and what must hold by algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.machines import Machine, check_gradients, dtype_of, normal, same_bits


def arrays(
    seed: int,
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = (40, 70),
    dim: int = 32,
    dtype: str = "float16",
) -> tuple[Any, Any, Any, Any]:
    """q, k, v, dout."""
    rng = np.random.default_rng(seed)
    q, dout = (normal(rng, 1, heads[0], lengths[0], dim, dtype=dtype) for _ in range(2))
    k, v = (normal(rng, 1, heads[1], lengths[1], dim, dtype=dtype) for _ in range(2))
    return q, k, v, dout


def close(a: Any, b: Any, factor: float = 1.0) -> bool:
    """Equal up to a few roundings of the coarser dtype at the size of the arrays."""
    a, b = np.asarray(a), np.asarray(b)
    step = max(1e-14, *(oracle.eps(x.dtype) for x in (a, b)))
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
    return bool(np.abs(a - b).max(initial=0) <= 4 * factor * step * size)


@pytest.mark.parametrize("deterministic", [False, True])
def test_L3_preallocated_gradients(backend: Machine, deterministic: bool) -> None:
    """Buffers full of NaN, and buffers used before, end up as fresh ones."""
    put = backend.put if backend.name == "cupy" else np.copy
    q, k, v, dout = arrays(3)
    run: dict[str, Any] = {"causal": True, "deterministic": deterministic}
    out, lse = backend.attention(q, k, v, causal=True, return_lse=True)
    fresh = backend.backward(dout, q, k, v, out, lse, **run)
    buffers = {n: put(np.full_like(x, np.nan)) for n, x in (("dq", q), ("dk", k), ("dv", v))}
    inputs = list(map(put, (dout, q, k, v, out, lse)))
    for _ in range(2):
        grads = cuflash.attention_backward(*inputs, **run, **buffers)
        for name in "qkv":
            assert getattr(grads, name) is buffers["d" + name]
            assert close(backend.get(buffers["d" + name]), getattr(fresh, name)), name


@pytest.mark.parametrize("dim", [59, 96])
def test_L9_the_default_scale_is_of_the_true_head_dim(wide_backend: Machine, dim: int) -> None:
    check_gradients(wide_backend, *arrays(9, dim=dim))


def test_L11_backward_twice_and_linear(backend: Machine) -> None:
    """The saved results are not used up, and gradients are linear in dout and dlse."""
    q, k, v, dout = arrays(11, dtype=backend.exact)
    other = normal(np.random.default_rng(12), *dout.shape, dtype=backend.exact)
    # On a grid, so that the combination below is exact in every dtype.
    dout, other = ((np.round(x.astype(float) * 64) / 64).astype(x.dtype) for x in (dout, other))
    out, lse = backend.attention(q, k, v, causal=True, return_lse=True)
    run: dict[str, Any] = {"causal": True, "deterministic": True}
    first = backend.backward(dout, q, k, v, out, lse, **run)
    again = backend.backward(dout, q, k, v, out, lse, **run)
    assert all(map(same_bits, first[:3], again[:3]))
    second = backend.backward(other, q, k, v, out, lse, **run)
    both = backend.backward(2 * dout + other / 2, q, k, v, out, lse, **run)
    for a, b, c in zip(first[:3], second[:3], both[:3], strict=True):
        assert close(2 * a.astype(np.float64) + b.astype(np.float64) / 2, c, 3)


def test_dlse_alone(backend: Machine) -> None:
    """lse is a result like out: its gradient is softmax-weighted keys and queries."""
    q, k, v, dout = arrays(13)
    dlse = np.random.default_rng(1).standard_normal(dout.shape[:-1]).astype(np.float32)
    grads = check_gradients(backend, q, k, v, np.zeros_like(dout), dlse=dlse, causal=True)
    assert (grads.v == 0).all()
    both = check_gradients(backend, q, k, v, dout, dlse=dlse, causal=True, deterministic=True)
    assert not close(both.q, grads.q)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "q_offset": -7}])
def test_L13_sums(backend: Machine, options: dict[str, Any]) -> None:
    """What holds for any data: scores move q and k alike, and each row of weights sums to one."""
    q, k, v, dout = arrays(14, dtype=backend.exact)
    out, lse = backend.attention(q, k, v, return_lse=True, **options)
    grads = backend.backward(dout, q, k, v, out, lse, deterministic=True, **options)
    q64, k64, dout64 = (x.astype(np.float64) for x in (q, k, dout))
    dq, dk, dv = (x.astype(np.float64) for x in grads[:3])
    # sum(dq * q) == sum(dk * k), per kv head: both are sum(dS * S)
    group = q.shape[1] // k.shape[1]
    by_q = (dq * q64).reshape(1, k.shape[1], group, -1).sum(axis=(2, 3))
    by_k = (dk * k64).reshape(1, k.shape[1], -1).sum(axis=2)
    step = oracle.eps(q.dtype)
    scale = np.sqrt(q64.size) * max(np.abs(dq * q64).max(), np.abs(dk * k64).max())
    assert np.abs(by_q - by_k).max() <= step * scale
    # The weights of a row that sees keys sum to 1: dv summed over keys is dout summed over those rows.
    seen = ~np.isneginf(lse)
    rows = np.where(seen[..., None], dout64, 0).reshape(1, k.shape[1], -1, dout.shape[-1])
    error = np.abs(dv.sum(axis=2) - rows.sum(axis=2))
    # Each weight and each dv carries a rounding; exp of a score near 10 makes ten of the former.
    assert (error <= step * (10 * np.abs(rows).sum(axis=2) + np.abs(dv).sum(axis=2))).all()
    assert np.median(error) <= step * np.abs(rows).sum(axis=2).mean()


def test_L13_scaling_the_values(backend: Machine) -> None:
    """v times a power of two scales out, dq and dk by it exactly, and leaves dv alone."""
    q, k, v, dout = arrays(15, dtype=backend.exact)
    run: dict[str, Any] = {"causal": True}
    one, one_lse = backend.attention(q, k, v, return_lse=True, **run)
    two, two_lse = backend.attention(q, k, v * v.dtype.type(2), return_lse=True, **run)
    # Halves round alike on either side but where one is subnormal: there by a step of subnormals, at most.
    doubled, normal = one * one.dtype.type(2), np.abs(one) >= np.finfo(one.dtype).tiny
    assert same_bits(two[normal], doubled[normal]) and same_bits(one_lse, two_lse)
    assert (np.abs(two - doubled) <= np.finfo(one.dtype).smallest_subnormal).all()
    first = backend.backward(dout, q, k, v, one, one_lse, deterministic=True, **run)
    second = backend.backward(
        dout, q, k, v * v.dtype.type(2), two, two_lse, deterministic=True, **run
    )
    assert close(second.q, first.q.astype(np.float64) * 2, 0.5)
    assert close(second.k, first.k.astype(np.float64) * 2, 0.5)
    assert same_bits(second.v, first.v)


def test_gradients_against_finite_differences() -> None:
    """The definition itself, in float64, every option on."""
    rng = np.random.default_rng(16)
    q, k, v, dout = arrays(16, lengths=(7, 9), dim=5, dtype="float64")
    dlse = rng.standard_normal(dout.shape[:-1])
    slopes = rng.random((1, 4))
    options: dict[str, Any] = {"causal": True, "window": (5, None), "softcap": 1.5, "scale": -0.7}
    given = {"q": q, "k": k, "v": v, "alibi_slopes": slopes}

    def loss(arguments: dict[str, Any]) -> float:
        # A row without keys has lse = -inf, which no step changes.
        out, lse = cuflash.attention(**arguments, **options, return_lse=True)
        return float((out * dout).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum())

    _, pullback = cuflash.attention_vjp(**given, **options, wrt=("q", "k", "v", "alibi_slopes"))
    grads = pullback(dout, dlse)
    for name, array in given.items():
        direction = rng.standard_normal(array.shape)
        step = 1e-6
        up, down = ({**given, name: array + s * direction} for s in (step, -step))
        slope = (loss(up) - loss(down)) / (2 * step)
        assert np.isclose(slope, (getattr(grads, name) * direction).sum(), rtol=1e-6), name


# ---- identities


def test_keys_in_any_order(backend: Machine) -> None:
    """Without a mask the order of keys means nothing."""
    q, k, v, dout = arrays(17, dtype=backend.exact)
    order = np.random.default_rng(3).permutation(k.shape[2])
    out, grads = backend.vjp(q, k, v, dout, deterministic=True)
    out2, grads2 = backend.vjp(q, k[:, :, order], v[:, :, order], dout, deterministic=True)
    assert close(out, out2) and close(grads.q, grads2.q)
    assert close(grads.k[:, :, order], grads2.k) and close(grads.v[:, :, order], grads2.v)


def test_each_batch_element_on_its_own(backend: Machine) -> None:
    """G5 too: a sequence gets the same bits alone and beside others."""
    rng = np.random.default_rng(18)
    q, dout = (normal(rng, 5, 2, 33, 32) for _ in range(2))
    k, v = (normal(rng, 5, 2, 70, 32) for _ in range(2))
    out, grads = backend.vjp(q, k, v, dout, causal=True, deterministic=True)
    for n in (0, 4):
        one = slice(n, n + 1)
        alone, alone_grads = backend.vjp(
            q[one], k[one], v[one], dout[one], causal=True, deterministic=True
        )
        assert same_bits(alone, out[one])
        for a, b in zip(alone_grads[:3], grads[:3], strict=True):
            assert same_bits(a, b[one])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sign_of_scale_is_a_sign_of_q(backend: Machine, sign: int) -> None:
    q, k, v, dout = arrays(19)
    out, grads = backend.vjp(q, k, v, dout, scale=sign * 0.25, deterministic=True)
    flipped = q * dtype_of("float16").type(-1)
    out2, grads2 = backend.vjp(flipped, k, v, dout, scale=-sign * 0.25, deterministic=True)
    assert close(out, out2) and close(grads.k, grads2.k) and close(grads.v, grads2.v)
    assert close(grads.q, -grads2.q)


def test_a_wide_softcap_and_zero_slopes_change_nothing(backend: Machine) -> None:
    q, k, v, dout = arrays(20)
    out, grads = backend.vjp(q, k, v, dout, causal=True, deterministic=True)
    zero = np.zeros(4, np.float32)
    for options in ({"softcap": 1e6}, {"alibi_slopes": zero}):
        out2, grads2 = backend.vjp(q, k, v, dout, causal=True, deterministic=True, **options)
        assert close(out, out2)
        assert all(close(a, b) for a, b in zip(grads[:3], grads2[:3], strict=True))


def test_L5_what_a_row_without_keys_gets_back_is_nobodys(backend: Machine) -> None:
    """NaN in dout of a row that sees no key reaches no gradient, that of a sink neither."""
    rng = np.random.default_rng(5)
    q, k, v, dout = (normal(rng, 2, 40, 32, dtype=backend.exact) for _ in "qkvd")
    sinks = rng.standard_normal(2).astype(np.float32)
    options = {"causal": True, "q_offset": -7, "sinks": sinks, "wrt": ("q", "k", "v", "sinks")}
    _, want = backend.vjp(q, k, v, dout, **options)
    dout[:, :7] = np.nan
    _, got = backend.vjp(q, k, v, dout, **options, deterministic=True)
    assert np.isfinite(got.sinks).all() and np.array_equal(got.sinks, want.sinks)
    for a, b in ((got.q, want.q), (got.k, want.k), (got.v, want.v)):
        assert np.allclose(a.astype("f8"), b.astype("f8"), atol=2e-3)
