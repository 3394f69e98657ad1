"""Museum family B, empty rows and garbage in hidden places: bugs of other libraries as recipes, under their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.machines import Machine, check_forward, check_gradients, normal, same_bits

GARBAGE = (np.nan, np.inf, -np.inf, 6e4)


def arrays(
    seed: int, heads: int = 2, len_q: int = 8, len_k: int = 8, dim: int = 32
) -> tuple[Any, Any, Any, Any]:
    """q, k, v, dout in float16 with one batch axis of 1."""
    rng = np.random.default_rng(seed)
    q, dout = (normal(rng, 1, heads, len_q, dim) for _ in range(2))
    k, v = (normal(rng, 1, heads, len_k, dim) for _ in range(2))
    return q, k, v, dout


def everything(machine: Machine, q: Any, k: Any, v: Any, dout: Any, **options: Any) -> list[Any]:
    """out, lse, dq, dk, dv."""
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    grads = machine.backward(dout, q, k, v, out, lse, deterministic=True, **options)
    return [out, lse, *grads[:3]]


@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [
        (8, 3, {"causal": True}),
        (200, 60, {"causal": True}),
        (70, 70, {"window": (2, None), "q_offset": 40}),
        (70, 70, {"causal": True, "q_offset": -30}),
        (5, 5, {"causal": True, "q_offset": -100}),
        (5, 5, {"window": (3, 3), "q_offset": 10**15}),
    ],
)
def test_B1_rows_without_keys(backend: Machine, len_q: int, len_k: int, options: Any) -> None:
    q, k, v, dout = arrays(1, 2, len_q, len_k)
    out, lse = check_forward(backend, q, k, v, **options)
    grads = check_gradients(backend, q, k, v, dout, deterministic=True, **options)
    empty = np.isneginf(lse)
    assert empty.any()
    assert (out[empty] == 0).all() and (grads.q[empty] == 0).all()
    assert all(np.isfinite(g.astype(float)).all() for g in grads[:3])
    # What arrives for such a row does not matter, nor does what the row itself holds.
    other = np.where(empty[..., None], normal(np.random.default_rng(2), *dout.shape), dout)
    again = everything(backend, q, k, v, other, **options)
    first = everything(backend, q, k, v, dout, **options)
    assert all(map(same_bits, first, again))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_L5_garbage_that_arrives_for_rows_without_keys(backend: Machine, garbage: float) -> None:
    """NaN in dout, and in q, of rows that see nothing reaches no other gradient."""
    q, k, v, dout = arrays(5, 2, 100, 40)
    want = everything(backend, q, k, v, dout, causal=True)
    empty = np.isneginf(want[1])
    q, dout = q.copy(), dout.copy()
    dout[empty] = garbage
    q[empty] = garbage
    got = everything(backend, q, k, v, dout, causal=True)
    assert all(map(same_bits, got, want))


def test_B5_lse_of_an_empty_row_is_minus_infinity(backend: Machine) -> None:
    q, k, v, _ = arrays(5, 2, 9, 4)
    _, lse = backend.attention(q, k, v, causal=True, return_lse=True)
    assert np.isneginf(lse[..., :5]).all() and np.isfinite(lse[..., 5:]).all()
    _, lse = backend.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("parts", [1, 2, 3, 33])
def test_B7_merging_empty_states(backend: Machine, parts: int) -> None:
    out, lse = np.zeros((2, 5, 32), np.float16), np.full((2, 5), -np.inf, np.float32)
    got, got_lse = backend.merge([out] * parts, [lse] * parts)
    assert (got == 0).all() and np.isneginf(got_lse).all()
    # An empty state has no say, whatever its out holds.
    full = normal(np.random.default_rng(7), 2, 5, 32)
    full_lse = np.linspace(-3, 80, 10, dtype=np.float32).reshape(2, 5)
    for garbage in (0, *GARBAGE):
        outs = [np.full_like(out, garbage)] * parts + [full]
        got, got_lse = backend.merge(outs, [lse] * parts + [full_lse])
        assert same_bits(got, full) and np.allclose(got_lse, full_lse, rtol=1e-6)


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (5, 1), (65, 1), (66, 65), (130, 129)])
def test_B8_one_key_in_the_last_tile(backend: Machine, len_q: int, len_k: int) -> None:
    rng = np.random.default_rng(8)
    q = normal(rng, 17, 1, len_q, 32)
    k, v = (normal(rng, 17, 1, len_k, 32) for _ in range(2))
    for causal in (False, True):
        out, _ = check_forward(backend, q, k, v, causal=causal)
        assert np.isfinite(out.astype(float)).all()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "q_offset": 20},  # keys from 90 on
        {"window": (5, None), "q_offset": 80},  # keys before 75
        {"window": (3, 2), "q_offset": 50},  # both, cutting tiles on either side
    ],
)
def test_B9_what_dead_keys_hold_never_matters(
    backend: Machine, options: dict[str, Any], garbage: float
) -> None:
    q, k, v, dout = arrays(9, 2, 70, 150)
    i, j = np.arange(70)[:, None] + options["q_offset"], np.arange(150)
    left, right = options.get("window", (None, None))
    right = 0 if options.get("causal") else right
    seen = np.ones((70, 150), bool)
    seen &= True if left is None else j >= i - left
    seen &= True if right is None else j <= i + right
    dead = ~seen.any(axis=0)
    assert dead.any()
    want = everything(backend, q, k, v, dout, **options)
    assert (want[3][:, :, dead] == 0).all() and (want[4][:, :, dead] == 0).all()
    k, v = k.copy(), v.copy()
    k[:, :, dead], v[:, :, dead] = garbage, garbage
    got = everything(backend, q, k, v, dout, **options)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_B9_what_a_visible_place_holds_stays_in_its_rows(
    backend: Machine, where: str, garbage: float
) -> None:
    """Key 37 is seen by rows 37 and on: those show it, the rows above, in the same tile, do not."""
    q, k, v, dout = arrays(10, 1, 70, 70)
    want = everything(backend, q, k, v, dout, causal=True)
    spoiled = {"q": q, "k": k, "v": v}
    spoiled[where] = spoiled[where].copy()
    spoiled[where][..., 37, 3] = garbage
    got = everything(backend, *spoiled.values(), dout, causal=True)
    rows = slice(37, 38) if where == "q" else slice(37, None)
    others = [r for r in range(70) if r not in range(70)[rows]]
    assert same_bits(got[0][:, :, others], want[0][:, :, others])
    assert same_bits(got[1][:, :, others], want[1][:, :, others])
    assert same_bits(got[2][:, :, others], want[2][:, :, others])
    if np.isnan(garbage):
        assert np.isnan(got[0][:, :, rows].astype(float)).any(axis=-1).all()
        assert np.isnan(got[1][:, :, rows]).all() == (where != "v")
    if where == "v":
        assert not np.isfinite(got[0][:, :, 37:, 3].astype(float)).any()
        columns = [c for c in range(32) if c != 3]
        assert same_bits(got[0][..., columns], want[0][..., columns])
    # Gradients of keys that no spoiled row sees are untouched; row 37 sees every key up to itself.
    later = slice(38, None) if where == "q" else slice(0, 0)
    assert same_bits(got[3][:, :, later], want[3][:, :, later])


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_B9_garbage_in_dout_stays_in_its_row(backend: Machine, garbage: float) -> None:
    q, k, v, dout = arrays(12, 1, 70, 70)
    want = everything(backend, q, k, v, dout, causal=True)
    dout = dout.copy()
    dout[..., 20, 5] = garbage
    got = everything(backend, q, k, v, dout, causal=True)
    others = [r for r in range(70) if r != 20]
    assert same_bits(got[2][:, :, others], want[2][:, :, others])
    assert np.isnan(got[2][:, :, 20].astype(float)).any()
    # Keys after 20 are hidden from row 20.
    for place in (3, 4):
        assert same_bits(got[place][:, :, 21:], want[place][:, :, 21:])


@pytest.mark.parametrize("len_q", [1, 63, 65, 127, 129])
def test_B11_no_padding_row_reaches_a_gradient(backend: Machine, len_q: int) -> None:
    """Workspaces are full of NaN on the emulator: an unwritten lse or delta row would show."""
    q, k, v, dout = arrays(11, 1, len_q, 65)
    check_gradients(backend, q, k, v, dout)
    check_gradients(backend, q, k, v, dout, causal=True, deterministic=True)


@pytest.mark.parametrize("position", [0, 1, 2047, 4095])
def test_B13_one_visible_key_among_thousands(backend: Machine, position: int) -> None:
    q, k, v, dout = arrays(13, 1, 1, 4096)
    options: dict[str, Any] = {"window": (0, 0), "q_offset": position}
    out, lse, dq, dk, dv = everything(backend, q, k, v, dout, **options)
    assert same_bits(out[0, 0, 0], v[0, 0, position])
    score = q[0, 0, 0].astype(float) @ k[0, 0, position].astype(float) / np.sqrt(32)
    assert np.allclose(lse, score, rtol=1e-5)
    # P = 1, so dS is the difference of two float32 sums of the same 32 products: a few of their roundings.
    assert np.abs(dq.astype(float)).max() < 1e-5 and np.abs(dk.astype(float)).max() < 1e-5
    assert same_bits(dv[0, 0, position], dout[0, 0, 0])
    assert (np.delete(dv, position, axis=2) == 0).all()


def test_B15_empty_rows_agree_in_all_paths(backend: Machine) -> None:
    """Whole, in parts and merged, and backward: the same definition of nothing."""
    q, k, v, dout = arrays(15, 2, 50, 20)
    out, lse = backend.attention(q, k, v, causal=True, return_lse=True)
    parts = [
        backend.attention(
            q, k[:, :, c], v[:, :, c], causal=True, q_offset=-30 - c.start, return_lse=True
        )
        for c in (slice(0, 7), slice(7, 20))
    ]
    merged, merged_lse = backend.merge(*zip(*parts, strict=True))
    empty = np.isneginf(lse)
    assert empty[..., :30].all() and not empty[..., 30:].any()
    assert (np.isneginf(merged_lse) == empty).all() and (merged[empty] == 0).all()
    assert np.allclose(merged.astype(float), out.astype(float), atol=2e-3)
    grads = backend.backward(dout, q, k, v, merged, merged_lse, causal=True)
    assert (grads.q[empty] == 0).all()
