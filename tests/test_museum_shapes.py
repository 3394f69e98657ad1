"""Museum families D and E, shapes, strides, limits and grouped heads: others' bugs under their numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.machines import Machine, check_forward, check_gradients, normal, same_bits


def arrays(
    seed: int,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (20, 30),
    dims: tuple[int, int] = (32, 32),
    batch: tuple[int, ...] = (1,),
    factor: float = 1.0,
) -> tuple[Any, Any, Any, Any]:
    """q, k, v, dout in float16."""
    rng = np.random.default_rng(seed)
    q = normal(rng, *batch, heads[0], lengths[0], dims[0], factor=factor)
    k = normal(rng, *batch, heads[1], lengths[1], dims[0], factor=factor)
    v = normal(rng, *batch, heads[1], lengths[1], dims[1])
    dout = normal(rng, *batch, heads[0], lengths[0], dims[1])
    return q, k, v, dout


def everything(machine: Machine, q: Any, k: Any, v: Any, dout: Any, **options: Any) -> list[Any]:
    """out, lse, dq, dk, dv."""
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    return [out, lse, *machine.backward(dout, q, k, v, out, lse, deterministic=True, **options)[:3]]


def guarded(shape: tuple[int, ...], dtype: Any, guard: int = 64) -> tuple[Any, Any]:
    """A C-ordered array inside a larger one full of 0x7F, and that larger one."""
    size = int(np.prod(shape))
    whole = np.full(size + 2 * guard, 0x7F, np.uint8).repeat(np.dtype(dtype).itemsize).view(dtype)
    return whole[guard : guard + size].reshape(shape), whole


def intact(whole: Any, guard: int = 64) -> bool:
    """Whether nothing was written beside the array inside."""
    ends = np.concatenate([whole[:guard], whole[-guard:]])
    return bool((ends.view(np.uint8) == 0x7F).all())


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 32, 33])
def test_D1_small_head_dims(backend: Machine, dim: int) -> None:
    for length in (1, 70):
        q, k, v, dout = arrays(1, lengths=(length, length), dims=(dim, dim))
        check_forward(backend, q, k, v)
        check_gradients(backend, q, k, v, dout, causal=True)


@pytest.mark.parametrize("dim", [1, 5, 31, 40])
def test_D1_nothing_is_written_beside_an_output(host_backend: Machine, dim: int) -> None:
    q, k, v, dout = arrays(2, lengths=(37, 21), dims=(dim, dim))
    out, out_whole = guarded(q.shape, q.dtype)
    _, lse = cuflash.attention(q, k, v, out=out, return_lse=True)
    names = {"dq": q, "dk": k, "dv": v}
    buffers = {name: guarded(x.shape, x.dtype) for name, x in names.items()}
    given = {name: array for name, (array, _) in buffers.items()}
    cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=True, **given)
    want = everything(host_backend, q, k, v, dout)
    assert same_bits(out.copy(), want[0])
    assert all(same_bits(given[n].copy(), x) for n, x in zip(names, want[2:], strict=True))
    assert intact(out_whole) and all(intact(whole) for _, whole in buffers.values())


@pytest.mark.parametrize("dims", [(64, 32), (32, 64), (64, 1), (40, 64), (1, 33)])
def test_D3_value_head_dim_of_its_own(backend: Machine, dims: tuple[int, int]) -> None:
    q, k, v, dout = arrays(3, (4, 2), (33, 50), dims)
    check_forward(backend, q, k, v, causal=True)
    check_gradients(backend, q, k, v, dout, causal=True)


@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (192, 128), (8, 256)])
def test_D3_wide_value_head_dims(wide_backend: Machine, dims: tuple[int, int]) -> None:
    q, k, v, dout = arrays(3, (4, 2), (33, 50), dims)
    check_forward(wide_backend, q, k, v, causal=True)
    check_gradients(wide_backend, q, k, v, dout, causal=True)


def test_D5_zeros(backend: Machine) -> None:
    """Every combination of empty extents: right shapes, 0 and -inf, nothing launched."""
    launches = getattr(getattr(backend, "device", None), "launches", [])
    for batch, heads, len_q, len_k in itertools.product((0, 2), (0, 2), (0, 3), (0, 4)):
        if 0 not in (batch, heads, len_q, len_k):
            continue
        q = np.zeros((batch, heads, len_q, 8), np.float16)
        k = np.zeros((batch, heads, len_k, 8), np.float16)
        v = np.zeros((batch, heads, len_k, 5), np.float16)
        for causal in (False, True):
            dout = np.ones((batch, heads, len_q, 5), np.float16)
            slopes = np.ones(heads, np.float32)
            options = {"causal": causal, "alibi_slopes": slopes}
            out, lse = backend.attention(q, k, v, return_lse=True, **options)
            assert out.shape == (batch, heads, len_q, 5) and (out == 0).all()
            assert lse.shape == (batch, heads, len_q) and np.isneginf(lse).all()
            wrt = ("q", "k", "v", "alibi_slopes")
            grads = backend.backward(dout, q, k, v, out, lse, wrt=wrt, **options)
            for name, argument in (("q", q), ("k", k), ("v", v), ("alibi_slopes", slopes)):
                grad = getattr(grads, name)
                assert grad.shape == argument.shape and (grad == 0).all()
    assert not launches
    empty = np.zeros((2, 0, 5), np.float16), np.zeros((2, 0), np.float32)
    assert backend.merge([empty[0]] * 2, [empty[1]] * 2)[0].shape == (2, 0, 5)


@pytest.mark.parametrize(
    "shape", [(65536, 2, 1, 16), (70000, 1, 2, 8), (1, 4, 65536, 8), (3, 5, 30000, 8)]
)
def test_D7_more_batches_and_heads_than_a_grid_axis(
    wide_backend: Machine, shape: tuple[int, ...]
) -> None:
    """(B, L, H, D): spot checks over 200 rows."""
    rng = np.random.default_rng(7)
    q, k, v, dout = (normal(rng, *shape) for _ in range(4))
    out, grads = wide_backend.vjp(q, k, v, dout, layout="LHD", deterministic=True)
    batches, heads = rng.integers(0, shape[0], 200), rng.integers(0, shape[2], 200)
    batches[0], heads[0] = shape[0] - 1, shape[2] - 1
    pick = [np.ascontiguousarray(x[batches, :, heads])[:, None] for x in (q, k, v, dout)]
    truth, honest = oracle.exact(*pick), oracle.low_precision(*pick)
    some = {n: getattr(grads, n)[batches, :, heads][:, None] for n in "qkv"}
    got = out[batches, :, heads][:, None]
    oracle.check_all(shape, truth, honest, q.dtype, out=got, grads=some)


def test_D7_more_row_tiles_than_a_grid_axis(wide_backend: Machine) -> None:
    rng = np.random.default_rng(8)
    len_q = 64 * 65535 + 1
    q, dout = np.empty((1, len_q, 8), np.float16), np.empty((1, len_q, 8), np.float16)
    q[...] = normal(rng, 1, 1, 8)
    dout[...] = normal(rng, 1, 1, 8)
    rows = np.append(rng.integers(0, len_q, 200), len_q - 1)
    q[:, rows], dout[:, rows] = normal(rng, 1, rows.size, 8), normal(rng, 1, rows.size, 8)
    k, v = normal(rng, 1, 8, 8), normal(rng, 1, 8, 8)
    out, grads = wide_backend.vjp(q, k, v, dout, wrt=("q",))
    pick = q[:, rows], k, v, dout[:, rows]
    truth, honest = oracle.exact(*pick), oracle.low_precision(*pick)
    some = {"q": grads.q[:, rows]}
    oracle.check_all(len_q, truth, honest, q.dtype, out=out[:, rows], grads=some)


# ---- memory


def views(x: np.ndarray) -> dict[str, np.ndarray]:
    """`x` with the same numbers in every kind of memory."""

    def fill(view: np.ndarray) -> np.ndarray:
        view[...] = x
        return view

    *batch, heads, length, dim = x.shape
    padded = np.full((*batch, heads, length, dim + 3), np.nan, x.dtype)
    return {
        "transposed": np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
        "every second row": fill(
            np.full((*batch, heads, 2 * length, dim), np.nan, x.dtype)[..., ::2, :]
        ),
        "part of a fused array": fill(
            np.full((*batch, heads, length, 3, dim), np.nan, x.dtype)[..., 1, :]
        ),
        "end of fused columns": fill(
            np.full((*batch, heads, length, 3 * dim), np.nan, x.dtype)[..., dim : 2 * dim]
        ),
        "padded rows": fill(padded[..., :dim]),
        "rows from the end": fill(np.empty_like(x)[..., ::-1, :]),
        "columns from the end": fill(np.empty_like(x)[..., ::-1]),
        "all from the end": fill(np.empty_like(x)[..., ::-1, ::-1, ::-1]),
        "Fortran order": np.asfortranarray(x),
        "every second column": fill(np.full((*x.shape[:-1], 2 * dim), np.nan, x.dtype)[..., ::2]),
        **{f"shifted by {n}": shifted(x, n) for n in (1, 4, 7)},
    }


def shifted(x: np.ndarray, elements: int) -> np.ndarray:
    """`x` in contiguous memory that begins `elements` elements after a 16-byte boundary."""
    from cuflash._arrays import address_of

    memory = np.full(x.size + 32, np.nan, x.dtype)
    first = (-address_of(memory) // x.itemsize) % (16 // x.itemsize) + elements
    view = memory[first : first + x.size].reshape(x.shape)
    view[...] = x
    assert address_of(view) % 16 == elements * x.itemsize % 16
    return view


KINDS = list(views(np.zeros((1, 1, 1, 8), np.float16)))


@pytest.mark.parametrize("kind", KINDS)
def test_D9_D11_L1_any_memory(backend: Machine, kind: str) -> None:
    """Strides and alignments of every argument, dout included, change nothing but bits of rounding."""
    q, k, v, dout = arrays(9, (4, 2), (37, 70))
    want = everything(backend, q, k, v, dout, causal=True)
    for place in range(4):
        changed = [q, k, v, dout]
        changed[place] = views(changed[place])[kind]
        before = [x.copy() for x in changed]
        got = everything(backend, *changed, causal=True)
        for a, b in zip(got, want, strict=True):
            assert np.allclose(a.astype(float), b.astype(float), rtol=2e-3, atol=2e-3), kind
        assert all(same_bits(a.copy(), b) for a, b in zip(changed, before, strict=True))
    everywhere = [views(x)[kind] for x in (q, k, v, dout)]
    check_forward(backend, *everywhere[:3], causal=True)
    check_gradients(backend, *everywhere, causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_D11_outputs_in_any_memory(host_backend: Machine, kind: str) -> None:
    q, k, v, dout = arrays(10, (4, 2), (37, 70))
    out, lse, dq, dk, dv = everything(host_backend, q, k, v, dout)
    given = views(np.full_like(out, 7))[kind]
    assert cuflash.attention(q, k, v, out=given) is given
    assert np.allclose(given.astype(float), out.astype(float), rtol=2e-3, atol=2e-3)
    buffers = {n: views(np.full_like(x, 7))[kind] for n, x in (("dq", dq), ("dk", dk), ("dv", dv))}
    grads = cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=True, **buffers)
    for name, want in (("q", dq), ("k", dk), ("v", dv)):
        got = getattr(grads, name)
        assert got is buffers["d" + name]
        assert np.allclose(got.astype(float), want.astype(float), rtol=2e-3, atol=2e-3), name


@pytest.mark.parametrize("len_k", [32, 33, 65])
@pytest.mark.parametrize("over", ["batch", "heads", "keys", "columns"])
def test_D13_stride_zero(backend: Machine, over: str, len_k: int) -> None:
    """Broadcast, then dense, then broadcast again: no cache may take one for the other."""
    q, k, v, dout = arrays(13, (2, 2), (20, len_k), batch=(3,))
    axis = {"batch": 0, "heads": 1, "keys": 2, "columns": 3}[over]

    def spread(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.take(x, [0], axis=axis), x.shape)

    flat = spread(k), spread(v), spread(dout)
    want = everything(backend, q, flat[0].copy(), flat[1].copy(), flat[2].copy())
    for _ in range(2):
        got = everything(backend, q, *flat)
        for a, b in zip(got, want, strict=True):
            assert np.allclose(a.astype(float), b.astype(float), rtol=2e-3, atol=2e-3)
        check_forward(backend, q, k, v)


@pytest.mark.parametrize(
    "heads", [(28, 4), (7, 1), (6, 2), (40, 8), (12, 2), (9, 3), (5, 1), (17, 1)]
)
@pytest.mark.parametrize("lengths", [(37, 101), (127, 60)])
def test_D15_E5_any_group(
    backend: Machine, heads: tuple[int, int], lengths: tuple[int, int]
) -> None:
    q, k, v, dout = arrays(15, heads, lengths)
    check_forward(backend, q, k, v, causal=True)
    if lengths[0] == 37:
        check_gradients(backend, q, k, v, dout, causal=True)


@pytest.mark.parametrize("group", [3, 5, 7])
def test_D17_short_queries_of_a_group(backend: Machine, group: int) -> None:
    for len_q in range(1, 10):
        q, k, v, _ = arrays(17, (group, 1), (len_q, 40))
        check_forward(backend, q, k, v, causal=True)


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1_000_000), (8, 262_145)])
def test_D19_long_sequences(wide_backend: Machine, len_q: int, len_k: int) -> None:
    q, k, v, _ = arrays(19, (1, 1), (len_q, len_k), (16, 16))
    check_forward(wide_backend, q, k, v, causal=True)


# ---- grouped heads


@pytest.mark.parametrize("heads", [(8, 2), (6, 1), (4, 4)])
def test_E1_gqa_is_attention_over_repeated_heads(backend: Machine, heads: tuple[int, int]) -> None:
    q, k, v, dout = arrays(21, heads, (40, 50))
    group = heads[0] // heads[1]
    out, lse, dq, dk, dv = everything(backend, q, k, v, dout, causal=True)
    repeated = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    out2, lse2, dq2, dk2, dv2 = everything(backend, q, *repeated, dout, causal=True)
    assert np.allclose(out.astype(float), out2.astype(float), atol=2e-3)
    assert np.allclose(lse, lse2, atol=1e-5)
    assert np.allclose(dq.astype(float), dq2.astype(float), atol=4e-3)
    for grad, wide in ((dk, dk2), (dv, dv2)):
        folded = wide.astype(float).reshape(1, heads[1], group, *wide.shape[2:]).sum(axis=2)
        step = np.spacing(np.abs(wide).max()).astype(float)
        assert np.abs(grad.astype(float) - folded).max() <= (group + 1) * step
    check_gradients(backend, q, k, v, dout, causal=True)


@pytest.mark.parametrize("heads", [1, 31, 32, 33, 64])
def test_E3_one_query_many_heads(backend: Machine, heads: int) -> None:
    q, k, v, _ = arrays(23, (heads, 1), (1, 90))
    slopes = np.linspace(0.01, 0.5, heads, dtype=np.float32)
    for options in ({}, {"window": (40, 0)}, {"causal": True, "alibi_slopes": slopes}):
        check_forward(backend, q, k, v, **options)


def test_broadcast_batches_sum_their_gradients(backend: Machine) -> None:
    q, k, v, dout = arrays(24, (4, 2), (20, 30), batch=(2, 3))
    grads = check_gradients(backend, q, k[:1], v[:, :1], dout, deterministic=True)
    assert grads.k.shape == (1, 3, 2, 30, 32) and grads.v.shape == (2, 1, 2, 30, 32)


@pytest.mark.parametrize("layout", ["HLD", "LHD"])
def test_layouts(backend: Machine, layout: str) -> None:
    q, k, v, dout = arrays(25, (4, 2), (20, 30), (32, 32), (2,))
    want = everything(backend, q, k, v, dout, causal=True)
    turned = [x.swapaxes(1, 2) for x in (q, k, v, dout)]
    if layout == "LHD":
        turned = [np.ascontiguousarray(x) for x in turned]
    got = everything(backend, *turned, causal=True, layout="LHD")
    got = [got[0].swapaxes(1, 2), got[1], *(x.swapaxes(1, 2) for x in got[2:])]
    assert all(map(same_bits, got, want))
    rank_2 = everything(backend, *(x[0, 0] for x in (q, k, v, dout)), layout=layout)
    rank_3 = everything(backend, *(x[0, :1] for x in (q, k, v, dout)))
    assert all(same_bits(a, b[0]) for a, b in zip(rank_2, rank_3, strict=True))
