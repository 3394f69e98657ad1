"""Museum family C, numerics: bugs of other libraries as recipes, under their numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests import oracle
from tests.machines import Machine, check_forward, check_gradients, dtype_of, normal


@pytest.mark.parametrize("length", [1, 2, 5, 17, 128])
@pytest.mark.parametrize("dim", [16, 32, 64])
def test_C1_short_and_loud(backend: Machine, length: int, dim: int) -> None:
    """Keys beyond the end of a tile were not masked in backward: large values made them NaN."""
    rng = np.random.default_rng(1)
    q = normal(rng, 1, 2, length, dim, factor=5)
    k, v, dout = (normal(rng, 1, 2, length, dim, factor=3) for _ in range(3))
    check_forward(backend, q, k, v)
    _, grads = backend.vjp(q, k, v, dout)
    gold, honest = oracle.backward(dout, q, k, v), oracle.low_precision(q, k, v, dout)
    for name in "qkv":
        # The museum's bound: with a handful of nearly one-hot rows, delta from the rounded out costs more than
        # the honest computation happens to lose.
        error = np.abs(getattr(grads, name).astype(float) - gold[name])
        allowed = 5 * np.abs(honest[name] - gold[name]).max() + 1e-3
        assert error.max() <= allowed, (name, error.max(), allowed)


@pytest.mark.parametrize(("value", "length"), [(133120.0, 1), (133120.0, 2), (133120.0, 65)])
def test_C3_huge_equal_logits(backend: Machine, value: float, length: int) -> None:
    """exp2(s * c - m * c) must be 1 at the maximum although the product rounds: s * c is 2e11 here."""
    x = np.full((1, 1, length, 64), value, dtype_of("bfloat16"))
    out, lse = backend.attention(x, x, x, return_lse=True)
    assert np.array_equal(out, x)
    assert np.allclose(lse, value**2 * 64 / 8, rtol=1e-6)
    grads = check_gradients(backend, x, x, x, x * dtype_of("bfloat16").type(1e-3))
    assert all(np.isfinite(g.astype(float)).all() for g in grads[:3])


@pytest.mark.parametrize("length", [2, 64, 65])
def test_C3_huge_equal_logits_in_float32(length: int, wide_backend: Machine) -> None:
    if "float32" not in wide_backend.dtypes:
        x = np.full((1, 1, length, 32), 6e4, np.float16)
    else:
        x = np.full((1, 1, length, 32), 1e9, np.float32)
    out, lse = wide_backend.attention(x, x, x, return_lse=True)
    # A mean of equal numbers, to the rounding of a float32 sum.
    assert np.allclose(out, x, rtol=1e-6)
    assert np.allclose(lse, float(x.flat[0]) ** 2 * 32 / 32**0.5, rtol=1e-6)


def test_C3_huge_logits_that_differ(backend: Machine) -> None:
    """One score far above the others at 1e9: a one-hot row, no NaN, exact values."""
    q = np.zeros((1, 1, 70, 32), np.float16)
    k = np.zeros((1, 1, 70, 32), np.float16)
    q[..., 0] = 6e4
    k[0, 0, :, 0] = np.linspace(-6e4, 6e4, 70)
    v = normal(np.random.default_rng(3), 1, 1, 70, 32)
    out, _ = check_forward(backend, q, k, v)
    assert np.array_equal(out, np.broadcast_to(v[:, :, -1:], out.shape))
    out, _ = check_forward(backend, q, k, v, scale=-1.0)
    assert np.array_equal(out, np.broadcast_to(v[:, :, :1], out.shape))


@pytest.mark.parametrize("scale", [0, 0.0, -0.0])
def test_C5_scale_zero_is_a_mean(backend: Machine, scale: float) -> None:
    rng = np.random.default_rng(5)
    q, k, v, dout = (normal(rng, 1, 2, 70, 32) for _ in range(4))
    _, lse = check_forward(backend, q, k, v, scale=scale, causal=True)
    assert np.allclose(lse, np.log(np.arange(1, 71)), atol=1e-6)
    grads = check_gradients(backend, q, k, v, dout, scale=scale, causal=True)
    assert (grads.q == 0).all() and (grads.k == 0).all()


@pytest.mark.parametrize("dim", [5, 40, 59, 96, 111])
def test_C6_the_default_scale_is_of_the_true_head_dim(backend: Machine, dim: int) -> None:
    rng = np.random.default_rng(6)
    q, k, v, dout = (normal(rng, 1, 1, 20, dim, factor=2) for _ in range(4))
    _, lse = backend.attention(q, k, v, return_lse=True)
    _, gold = oracle.forward(q, k, v, scale=dim**-0.5)
    assert np.allclose(lse, gold, rtol=1e-5, atol=1e-5)
    if dim in (59, 96):  # L9: and in backward
        check_gradients(backend, q, k, v, dout)


def test_C8_softcap_comes_before_the_mask(backend: Machine) -> None:
    """Capping -inf would give masked keys a logit of -cap, and 1e4 in their values would show."""
    rng = np.random.default_rng(8)
    q, k = (normal(rng, 1, 1, 70, 32) for _ in range(2))
    v = normal(rng, 1, 1, 70, 32)
    v[:, :, 40:] = 1e4
    out, lse = check_forward(backend, q, k, v, softcap=1.0, causal=True)
    part, part_lse = backend.attention(
        q[:, :, :40], k[:, :, :40], v[:, :, :40], softcap=1.0, causal=True, return_lse=True
    )
    assert np.allclose(out[:, :, :40].astype(float), part.astype(float), atol=2e-3)
    assert np.allclose(lse[:, :, :40], part_lse, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
def test_C10_split_keys_and_merge(backend: Machine, chunks: int) -> None:
    """lse is natural, so parts merge to the whole; one chunk is empty."""
    rng = np.random.default_rng(10)
    q = normal(rng, 2, 2, 33, 32, factor=3, dtype=backend.exact)
    k, v = (normal(rng, 2, 2, 150, 32, dtype=backend.exact) for _ in range(2))
    cuts = [0, *sorted(rng.integers(0, 151, chunks - 1)), 150]
    cuts = [0, *cuts] if chunks > 1 else cuts  # a first chunk of no keys
    spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(cuts)]
    parts = [backend.attention(q, k[:, :, span], v[:, :, span], return_lse=True) for span in spans]
    out, lse = backend.merge(*zip(*parts, strict=True))
    truth, honest = oracle.exact(q, k, v), oracle.low_precision(q, k, v)
    oracle.check_all((backend.name, spans), truth, honest, q.dtype, out=out, lse=lse)


def test_C12_many_merges_do_not_drift(backend: Machine) -> None:
    """64 chunks one after another, each merge rounding its out to the dtype: at most 65 roundings."""
    rng = np.random.default_rng(12)
    q = normal(rng, 1, 2, 3, 32, dtype=backend.exact)
    k, v = (normal(rng, 1, 2, 64 * 16, 32, dtype=backend.exact) for _ in range(2))
    chunks = [slice(n, n + 16) for n in range(0, 64 * 16, 16)]
    parts = [backend.attention(q, k[:, :, c], v[:, :, c], return_lse=True) for c in chunks]
    truth, honest = oracle.exact(q, k, v), oracle.low_precision(q, k, v)
    at_once = backend.merge(*zip(*parts, strict=True))
    oracle.check_all("at once", truth, honest, q.dtype, out=at_once[0], lse=at_once[1])
    out, lse = parts[0]
    for part, part_lse in parts[1:]:
        out, lse = backend.merge([out, part], [lse, part_lse])
    # Roundings add up like a random walk, damped by the weight 1 - 1/n of what was merged before.
    # Each weight carries a rounding of lse too.
    step = (oracle.eps(q.dtype) + oracle.score_step(truth.lse, q.dtype)) * np.abs(truth.out).max()
    assert np.abs(out.astype(float) - truth.out).max() <= 8 * step
    assert np.allclose(lse, truth.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_C14_one_key_returns_its_value_bit_by_bit(wide_backend: Machine, dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(dtype_of(dtype))
    check_values_come_back(wide_backend, every[finite(every)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_C14_a_sample_of_values_in_the_emulator(backend: Machine, dtype: str) -> None:
    """Every subnormal of both signs around 0 and around the smallest normal number, and each 31st number."""
    bits = np.arange(2**16, dtype=np.uint16)
    low = bits & 0x7FFF
    smallest = 0x0400 if dtype == "float16" else 0x0080
    chosen = (low < 64) | (np.abs(low.astype(int) - smallest) < 64) | (bits % 31 == 0)
    some = bits[chosen].view(dtype_of(dtype))
    check_values_come_back(backend, some[finite(some)])


def finite(values: Any) -> Any:
    """By the bits: some NaN of bfloat16 cannot even be converted without a warning."""
    exponent = 0x7C00 if values.dtype == np.float16 else 0x7F80
    return (values.view(np.uint16) & exponent) != exponent


def check_values_come_back(machine: Machine, values: Any) -> None:
    """With one key, out is v: subnormals kept, only the sign of zero lost (sums begin at +0)."""
    heads = -(-values.size // 64)
    v = np.resize(values, (1, heads, 1, 64))
    q = np.ones((1, heads, 1, 64), v.dtype)
    out = machine.attention(q, q, v)
    assert np.array_equal(out, v)
    nonzero = v != 0
    assert np.array_equal(out[nonzero].view(np.uint16), v[nonzero].view(np.uint16))


@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (7, 7), (33, 33), (128, 128), (256, 256), (40, 72)]
)
def test_C16_the_last_column_counts(wide_backend: Machine, dims: tuple[int, int]) -> None:
    check_last_column(wide_backend, *dims)


@pytest.mark.parametrize("dims", [(32, 32), (31, 31), (64, 64), (57, 33)])
def test_C16_the_last_column_counts_in_kernels(backend: Machine, dims: tuple[int, int]) -> None:
    check_last_column(backend, *dims)


def check_last_column(machine: Machine, dim: int, dim_v: int) -> None:
    """All signal in the last columns of q, k and v."""
    rng = np.random.default_rng(16)
    q, k = (np.zeros((1, 1, 20, dim), np.float16) for _ in range(2))
    v, dout = (np.zeros((1, 1, 20, dim_v), np.float16) for _ in range(2))
    for x in (q, k, v, dout):
        x[..., -1] = rng.standard_normal(20) * 3
    out, _ = check_forward(machine, q, k, v)
    grads = check_gradients(machine, q, k, v, dout)
    assert (out[..., :-1] == 0).all() and np.abs(out[..., -1].astype(float)).max() > 0.1
    assert np.abs(grads.k[..., -1].astype(float)).max() > 0.01


@pytest.mark.parametrize("factor", [0.01, 3.0, 20.0])
def test_soft_and_one_hot_rows(backend: Machine, factor: float) -> None:
    rng = np.random.default_rng(18)
    q, k, v, dout = (normal(rng, 1, 1, 70, 32) for _ in range(4))
    q = (q.astype(float) * factor).astype(np.float16)
    check_forward(backend, q, k, v)
    check_gradients(backend, q, k, v, dout, deterministic=True)


def test_scores_with_a_large_common_part(backend: Machine) -> None:
    """Rows whose scores are all near 300, or near -300: nothing overflows, lse keeps its digits."""
    rng = np.random.default_rng(19)
    k, v = normal(rng, 1, 1, 70, 32), normal(rng, 1, 1, 70, 32)
    q = normal(rng, 1, 1, 70, 32)
    k[..., 0] = 40
    for shift in (40, -40):
        q[..., 0] = shift
        check_forward(backend, q, k, v)
