"""The NumPy backend from the inside: tile edges, masks, products with garbage, buffers.

What a user sees of it is tested through the public API, elsewhere; here tiles are made tiny so that small cases cross
many of their edges.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import _cpu, _cpu_tiles
from cuflash._cpu_bits import overwrite, rounded
from cuflash._cpu_masks import Band, Cut
from cuflash._cpu_products import visible_matmul
from cuflash._cpu_softmax import row_maximum
from cuflash._options import Options
from cuflash._order import empty_like_order
from tests import cases, oracle
from tests.cases import Case
from tests.machines import Numpy

# ---- tiles


@pytest.fixture(params=[(16, 8, 1), (5, 7, 1), (3, 64, 4000), (64, 3, 900)], ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """(rows, keys, elements): edges everywhere, units of one head and of several."""
    rows, keys, elements = request.param
    monkeypatch.setattr(_cpu_tiles, "TILE_ROWS", rows)
    monkeypatch.setattr(_cpu_tiles, "TILE_KEYS", keys)
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", elements)


EDGES = [
    Case(len_q=33, len_k=50, head_dim=8, heads=4, heads_kv=2, batch=(2,)),
    Case(
        len_q=33,
        len_k=50,
        head_dim=8,
        heads=3,
        heads_kv=1,
        causal=True,
        broadcast_kv=True,
        batch=(2, 2),
    ),
    Case(len_q=50, len_k=33, head_dim=5, head_dim_v=9, causal=True, softcap=3.0),
    Case(len_q=40, len_k=40, head_dim=8, window=(7, 8), alibi="BH", batch=(3,)),
    Case(
        len_q=40, len_k=61, head_dim=8, window=(0, 15), q_offset=-3, alibi="H", heads=6, heads_kv=2
    ),
    Case(len_q=31, len_k=47, head_dim=8, magnitude=20.0, causal=True),
]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_tile_edges(case: Case, dtype: str) -> None:
    cases.check(Numpy(), replace(case, dtype=dtype))


def test_units_cover_every_head_once() -> None:
    for outer, heads in itertools.product(
        [(1,), (7,), (2, 3), (3, 1, 4), (2, 2, 2)], (1, 2, 3, 5, 8, 100)
    ):
        count = np.zeros(outer, dtype=int)
        for unit in _cpu_tiles.units(outer, heads):
            count[unit] += 1
            assert count[unit].size <= heads
        assert (count == 1).all()


def test_many_short_heads_are_few_steps() -> None:
    """512 heads of 16 tokens must not be 512 Python iterations."""
    q = np.zeros((64, 8, 16, 32), np.float32)
    shape = _cpu_tiles.Shape.of(q, q, q)
    tiling = _cpu_tiles.Tiling.of(shape)
    assert len(list(_cpu_tiles.units(shape.outer, tiling.heads))) <= 4


def test_conversion_once_or_by_tile_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Case(len_q=70, len_k=600, head_dim=16, causal=True).data()
    options = Options(0.25, 530, None, 0)

    def run() -> list[np.ndarray]:
        out, lse = _cpu.forward(data.q, data.k, data.v, options)
        grads = _cpu.backward(data.dout, data.q, data.k, data.v, out, lse, options)
        return [out, lse, *grads.values()]

    once = run()
    monkeypatch.setattr(_cpu_tiles, "CONVERTED_BYTES", 0)
    for a, b in zip(once, run(), strict=True):
        assert a.tobytes() == b.tobytes()


# ---- masks


@pytest.mark.parametrize("offset", [0, 3, -4, 20, -20, 2**70, -(2**70)])
def test_band_agrees_with_the_oracle_on_every_tile(offset: int) -> None:
    len_q, len_k = 9, 11
    sides = (None, 0, 1, 4, 30, 2**70)
    for left, right in itertools.product(sides, sides):
        seen = oracle.visible(len_q, len_k, window=(left, right), q_offset=offset)
        band = Band(len_k, offset, left, right)
        for q0, q1 in ((0, 9), (2, 5), (8, 9)):
            low, high = band.keys(q0, q1)
            hit = np.flatnonzero(seen[q0:q1].any(axis=0))
            assert (low >= high) if hit.size == 0 else (low == hit[0] and high == hit[-1] + 1)
            for k0, k1 in ((0, 11), (3, 7), (10, 11)):
                cut = band.cut(q0, q1, k0, k1)
                want = seen[q0:q1, k0:k1]
                if cut is None:
                    assert want.all()
                    continue
                assert not want.all()
                np.testing.assert_array_equal(cut.visible(1), want)
                tile = np.ones(want.shape)
                cut.fill(tile, 0)
                np.testing.assert_array_equal(tile, want)


def test_band_touches_only_the_columns_it_cuts() -> None:
    cut = Band(4096, 0, None, 0).cut(1024, 1280, 512, 1280)
    assert cut is not None
    assert [columns for columns, _ in cut.parts] == [slice(513, 768)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize("value", [0, -np.inf, 3.5])
def test_overwriting_elements(value: float, dtype: Any) -> None:
    """Bit by bit what copyto does, in views too, whatever stood there."""
    rng = np.random.default_rng(0)
    x = rng.choice([1.0, -2.0, 0.0, np.nan, np.inf, -np.inf], size=(3, 2, 5, 9)).astype(dtype)
    for where in (
        rng.random((5, 7)) < 0.5,
        rng.random((2, 1, 7)) < 0.5,
        rng.random((3, 2, 5, 1)) < 0.5,
    ):
        got, want = x.copy(), x.copy()
        overwrite(got[..., 1:8], value, where)
        np.copyto(want[..., 1:8], value, where=where)
        assert got.tobytes() == want.tobytes()


def test_rounding_to_float16() -> None:
    """Every float16, the halves between them, their neighbours in float32, and what is out of range."""
    half = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    half = np.sort(half[np.isfinite(half)])
    between = (half[1:] + half[:-1]) / 2
    x = np.concatenate([half, between])
    x = np.concatenate(
        [
            x,
            np.nextafter(x, np.inf),
            np.nextafter(x, -np.inf),
            [np.nan, np.inf, -np.inf, 1e30, 1e-30],
        ]
    )
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
        np.testing.assert_array_equal(rounded(x, np.dtype(np.float16)), want)
    assert rounded(x, np.dtype(np.float32)).tobytes() == x.tobytes()


# ---- products with garbage


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_visible_matmul_forms_no_hidden_product(group: int, transposed: bool) -> None:
    """Against sums over visible pairs only, with every kind of value against every kind of weight."""
    rng = np.random.default_rng(group)
    rows, keys, dim = 6, 7, 40
    hidden = rng.random((rows, keys)) < 0.4
    cut = Cut(rows, keys, ((slice(0, 3), hidden[:, :3]), (slice(3, keys), hidden[:, 3:])))
    visible = np.tile(~hidden, (group, 1))
    weights = rng.choice([0.0, 0.5, -2.0, np.nan, 1.0, 1.0, 1.0], size=visible.shape)
    weights[~visible] = 0
    if transposed:
        weights, visible = weights.T.copy(), visible.T
    x = rng.choice(
        [1.0, 2.0, -3.0, 0.0, np.nan, np.inf, -np.inf],
        size=(weights.shape[1], dim),
        p=[0.22] * 4 + [0.04] * 3,
    )
    with np.errstate(all="ignore"):
        got = visible_matmul(weights, x, cut, transposed=transposed)
        want = np.array([weights[i, visible[i]] @ x[visible[i]] for i in range(len(weights))])
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(want).any()
    assert np.isinf(want).any()
    assert np.isnan(want).any()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 6e4])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_garbage_stays_in_the_rows_that_see_it(where: str, garbage: float) -> None:
    case = Case(len_q=30, len_k=40, head_dim=8, heads=4, heads_kv=2, window=(9, 4))
    data = case.data()
    array = getattr(data, where)
    array[:, 1, 17, 3] = garbage
    array[:, 0, 4, :] = garbage
    given = data.q, data.k, data.v, data.dout
    exact = oracle.exact(*given, window=(9, 4))
    honest = oracle.low_precision(*given, window=(9, 4))
    out, lse, grads = run_backend(data, Options(8**-0.5, 10, 9, 4))
    oracle.check_all(f"{where} {garbage}", exact, honest, np.float16, out=out, lse=lse, grads=grads)
    assert np.isfinite(exact.out).any()


def run_backend(
    data: cases.Data, options: Options, **kwargs: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """out, lse, gradients."""
    out, lse = _cpu.forward(data.q, data.k, data.v, options)
    return out, lse, _cpu.backward(data.dout, data.q, data.k, data.v, out, lse, options, **kwargs)


def test_row_maximum() -> None:
    x = np.array(
        [[[1.0, 5.0, -2.0], [np.nan, 1.0, 2.0]], [[-np.inf, -np.inf, -np.inf], [np.inf, 0.0, 1.0]]]
    )
    np.testing.assert_array_equal(row_maximum(x), [[[5.0], [np.nan]], [[-np.inf], [np.inf]]])


def test_huge_logits() -> None:
    """q = k = v = 133120: the logits are 1.4e11, a step of float32 there is 8192, and exp must still see 0."""
    for lengths, dtype in (
        ((1, 1), ml_dtypes.bfloat16),
        ((3, 65), ml_dtypes.bfloat16),
        ((2, 65), np.float32),
    ):
        q, k = (np.full((1, n, 64), 133120, dtype) for n in lengths)
        options = Options(0.125, lengths[1] - lengths[0])
        out, lse = _cpu.forward(q, k, k, options)
        assert (out == 133120).all()
        np.testing.assert_allclose(lse, 133120.0**2 * 8, rtol=1e-6)
        # lse one step lower is as right, and exp(s - lse) must not become exp(8192).
        for near in (lse, np.nextafter(lse, np.float32(0))):
            grads = _cpu.backward(np.ones_like(q), q, k, k, out, near, options)
            assert all(np.isfinite(g.astype(np.float32)).all() for g in grads.values())


# ---- results and buffers


def test_buffers_are_overwritten_and_arguments_are_not() -> None:
    case = Case(
        dtype="float32",
        len_q=20,
        len_k=30,
        head_dim=8,
        heads=4,
        heads_kv=2,
        batch=(2,),
        q_offset=-4,
        causal=True,
    )
    data, options = case.data(), Options(0.3, -4, None, 0)
    before = [x.tobytes() for x in (data.q, data.k, data.v, data.dout)]
    out, lse, grads = run_backend(data, options)
    strange = np.full((2, 20, 4, 24), np.nan, np.float32).transpose(0, 2, 1, 3)[..., ::-3]
    got, got_lse = _cpu.forward(data.q, data.k, data.v, options, out=strange)
    assert got is strange
    np.testing.assert_array_equal(got, out)
    np.testing.assert_array_equal(got_lse, lse)
    buffers = {n: np.full_like(grads[n], np.nan) for n in ("q", "k", "v")}
    again = _cpu.backward(data.dout, data.q, data.k, data.v, out, lse, options, grads_out=buffers)
    for name, grad in grads.items():
        assert again[name] is buffers[name]
        np.testing.assert_array_equal(again[name], grad)
    assert before == [x.tobytes() for x in (data.q, data.k, data.v, data.dout)]


@pytest.mark.parametrize("wrt", [(), ("q",), ("k",), ("v",), ("alibi_slopes",), ("q", "v")])
def test_only_what_is_asked_for(wrt: tuple[str, ...]) -> None:
    data = Case(dtype="float32", len_q=20, len_k=30, head_dim=8, alibi="H").data()
    options = Options(0.3, 10, None, None, None, data.alibi_slopes)
    full = run_backend(data, options, wrt=("q", "k", "v", "alibi_slopes"))[2]
    part = run_backend(data, options, wrt=wrt)[2]
    assert set(part) == set(wrt)
    for name in wrt:
        np.testing.assert_array_equal(part[name], full[name])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_memory_order_follows_the_reference(order: tuple[int, ...]) -> None:
    back = tuple(int(a) for a in np.argsort(order))
    reference = np.empty([(2, 3, 5, 7)[a] for a in order], np.float32).transpose(back)
    made = empty_like_order((2, 3, 5, 4), np.float16, reference)
    assert made.shape == (2, 3, 5, 4)
    assert made.dtype == np.float16
    assert made.transpose(order).flags.c_contiguous
    assert (
        empty_like_order((2, 3, 5, 4), np.float16, reference[::-1, :, ::-2])
        .transpose(order)
        .flags.c_contiguous
    )


def test_memory_order_of_broadcast_axes() -> None:
    x = np.broadcast_to(np.empty((5, 1, 7)), (4, 5, 3, 7))
    assert empty_like_order((4, 5, 3, 7), np.float32, x).flags.c_contiguous
    assert empty_like_order((3, 7), np.float32, x).shape == (3, 7)


# ---- merge


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_merge_of_parts_is_the_whole(dtype: str) -> None:
    case = Case(dtype=dtype, len_q=40, len_k=97, head_dim=16, causal=True, heads=4, heads_kv=2)
    want, data = cases.answer(case), case.data()
    outs, lses = [], []
    for k0, k1 in itertools.pairwise((0, 0, 13, 60, 61, 97)):
        # The diagonal moves with the keys that are left out before the part.
        options = Options(0.25, 57 - k0, None, 0)
        out, lse = _cpu.forward(data.q, data.k[..., k0:k1, :], data.v[..., k0:k1, :], options)
        outs.append(out)
        lses.append(lse)
    out, lse = _cpu.merge(outs, lses)
    assert (np.isneginf(lses[0])).all()
    oracle.check_all(case, want.exact, want.honest, case.numpy_dtype, out=out, lse=lse)
    again, _ = _cpu.merge(outs, lses, out=outs[2])
    assert again is outs[2]
    assert again.tobytes() == out.tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 33])
def test_merge_of_nothing_is_nothing(count: int) -> None:
    garbage = np.full((2, 5, 4), np.nan, np.float16)
    empty = np.full((2, 5), -np.inf, np.float32)
    out, lse = _cpu.merge([garbage] * count, [empty] * count)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    some, some_lse = np.ones((2, 5, 4), np.float16), np.zeros((2, 5), np.float32)
    out, lse = _cpu.merge([garbage] * count + [some], [empty] * count + [some_lse])
    assert (out == 1).all()
    assert (lse == 0).all()
