"""Merging parts in float32 and float64 on the GPU: what the rounding of each step allows, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash._params import MERGE_MAX_PARTS
from tests.machines import Emulator, normal, same_bits

LONG = np.longdouble


def parts_of(
    rng: np.random.Generator, count: int, dtype: str, shape: tuple[int, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Parts with lse of a few units apart; the second one saw no key in some rows, and holds NaN there."""
    outs = [normal(rng, *shape, dtype=dtype) for _ in range(count)]
    lses = [normal(rng, *shape[:-1], dtype=dtype, factor=3) for _ in range(count)]
    unseen = rng.random(shape[:-1]) < 0.3
    outs[1][unseen], lses[1][unseen] = np.nan, -np.inf
    return outs, lses


def check(outs: list, lses: list, out: np.ndarray, lse: np.ndarray) -> None:
    """Against longdouble, element by element."""
    exact = np.stack(lses).astype(LONG)
    top = exact.max(0)
    weights = np.exp(exact - top)
    terms = weights[..., None] * np.where(weights[..., None] == 0, 0, np.stack(outs).astype(LONG))
    total = weights.sum(0)
    want = terms.sum(0) / total[..., None]
    # Rounding: lse - top (which exp turns into as many relative errors as its size), exp, the sum of
    # the weights and the quotient, the product and the sum of the parts, twice where the parts come in
    # groups of 32.
    eps = np.finfo(outs[0].dtype).eps
    distance = np.where(np.isfinite(exact), top - exact, 0).max()
    roundings = 2 * (2 * len(outs) + 6 + float(distance))
    bound = roundings * eps / 2 * np.abs(terms).sum(0) / total[..., None]
    assert (np.abs(out - want) <= bound).all()
    want_lse = top + np.log(total)
    assert (np.abs(lse - want_lse) <= roundings * eps / 2 * (1 + np.abs(want_lse))).all()


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [3, MERGE_MAX_PARTS + 5])
def test_merge_is_as_exact_as_its_steps(arch: str, dtype: str, count: int) -> None:
    rng = np.random.default_rng(count)
    outs, lses = parts_of(rng, count, dtype, (2, 3, 5, 37))
    with Emulator(arch) as machine:
        out, lse = machine.merge(outs, lses)
        names = {name for name, *_ in machine.device.launches}
    assert out.dtype == lse.dtype == np.dtype(dtype)
    assert names == {f"merge_{'f32' if dtype == 'float32' else 'f64'}"}
    check(outs, lses, out, lse)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merge_of_parts_of_attention_is_attention(dtype: str) -> None:
    rng = np.random.default_rng(7)
    q, k, v = (normal(rng, 2, 50, 40, dtype=dtype) for _ in "qkv")
    cuts = slice(0, 9), slice(9, 9), slice(9, 50)
    with Emulator("sm_80") as machine:
        parts = [machine.attention(q, k[:, c], v[:, c], return_lse=True) for c in cuts]
        out, lse = machine.merge(*zip(*parts, strict=True))
        whole, whole_lse = machine.attention(q, k, v, return_lse=True)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out, whole, rtol=0, atol=20 * eps)
    np.testing.assert_allclose(lse, whole_lse, rtol=4 * eps)


def test_merge_writes_into_a_strided_buffer_and_rows_without_keys_are_zero() -> None:
    rng = np.random.default_rng(8)
    outs, lses = parts_of(rng, 2, "float64", (2, 6, 8))
    lses[0][:, 2] = lses[1][:, 2] = -np.inf
    memory = np.full((2, 6, 16), 5.0)
    with Emulator("sm_80") as machine:
        out, lse = machine.merge(outs, lses, out=memory[..., ::2])
        plain, _ = machine.merge(outs, lses)
    assert same_bits(np.ascontiguousarray(out), plain) and (memory[..., 1::2] == 5).all()
    assert not out[:, 2].any() and (lse[:, 2] == -np.inf).all()
