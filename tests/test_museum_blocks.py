"""Museum family J, block masks, and A, B, E, G for them: others' bugs as recipes, under their numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle
from tests.case import Case, check
from tests.machines import Emulator, Machine, Numpy, check_forward, normal, same_bits
from tests.option_data import expanded

BASE = Case(batch=(2,), heads=2, heads_kv=1, len_q=70, len_k=137, head_dim=64)


def arrays(seed: int, len_q: int, len_k: int, heads: int = 2, batch: int = 1) -> tuple[Any, ...]:
    """q, k, v, dout in float16."""
    rng = np.random.default_rng(seed)
    q, dout = (normal(rng, batch, heads, len_q, 64) for _ in range(2))
    k, v = (normal(rng, batch, heads, len_k, 64) for _ in range(2))
    return q, k, v, dout


def everything(machine: Machine, q: Any, k: Any, v: Any, dout: Any, **options: Any) -> list[Any]:
    """out, lse, dq, dk, dv."""
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    grads = machine.backward(dout, q, k, v, out, lse, deterministic=True, **options)
    return [out, lse, *grads[:3]]


def agrees(machine: Machine, given: tuple[Any, ...], seen: np.ndarray, **options: Any) -> list[Any]:
    """All results by rule T against the dense mask `seen`."""
    q, k, v, dout = given
    got = everything(machine, *given, **options)
    rest = {n: x for n, x in options.items() if n != "mask"} | {"mask": seen}
    exact = oracle.exact(q, k, v, dout, **rest)
    honest = oracle.low_precision(q, k, v, dout, **rest)
    grads = dict(zip(("q", "k", "v"), got[2:], strict=True))
    text = f"{machine.name} {[x.shape for x in given]} {options}"
    oracle.check_all(text, exact, honest, q.dtype, out=got[0], lse=got[1], grads=grads)
    return got


# ---- J1: empty rows of blocks


@pytest.mark.parametrize("kind", ["rows", "columns", "none", "one"])
def test_J1_rows_and_columns_of_blocks_that_are_empty(backend: Machine, kind: str) -> None:
    blocks = np.ones((4, 5), bool)
    if kind == "rows":
        blocks[[0, 2, 3]] = False
    elif kind == "columns":
        blocks[:, [0, 3, 4]] = False
    else:
        blocks[...] = False
        blocks[1, 2] = kind == "one"
    mask = cuflash.BlockMask.from_blocks(blocks, block_size=(32, 48), shape=(120, 230))
    seen = expanded(blocks, (120, 230), (32, 48))
    out, lse, dq, dk, dv = agrees(backend, arrays(1, 120, 230), seen, mask=mask)
    empty, dead = ~seen.any(axis=1), ~seen.any(axis=0)
    assert (out[:, :, empty] == 0).all() and np.isneginf(lse[:, :, empty]).all()
    assert (dq[:, :, empty] == 0).all()
    assert (dk[:, :, dead] == 0).all() and (dv[:, :, dead] == 0).all()


def test_J1_an_empty_row_with_a_sink(backend: Machine) -> None:
    check(backend, replace(BASE, mask="blocks", block=(16, 48), sinks="float32"))


# ---- J3: any block size, any length


@pytest.mark.parametrize("length", [100, 129])
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (48, 80), (128, 16), (256, 32)], ids=str)
def test_J3_blocks_of_any_size(backend: Machine, length: int, block: tuple[int, int]) -> None:
    """Smaller and larger than the kernels' tiles, dividing them or not, the last one cut."""
    for kind in ("blocks", "blocks_partial"):
        case = replace(BASE, batch=(), mask=kind, block=block, len_q=length, len_k=length + 31)
        check(backend, case, deterministic=True)


def test_J3_a_thousand_rows_in_blocks_of_128() -> None:
    check(Numpy(), replace(BASE, mask="blocks", block=(128, 128), len_q=1000, len_k=1000))
    with Emulator() as machine:
        case = replace(BASE, batch=(), heads=1, mask="blocks", block=(128, 128))
        check(machine, replace(case, len_q=300, len_k=420), deterministic=True)


@pytest.mark.parametrize("batch", [(), (2,), (2, 2)], ids=str)
@pytest.mark.parametrize("lead", ["full", "heads", "batch", "ones"])
def test_patterns_broadcast_over_batch_and_heads(
    backend: Machine, batch: tuple[int, ...], lead: str
) -> None:
    """One pattern for all, one per head, one per batch entry."""
    rng = np.random.default_rng(3)
    own = {
        "full": (*batch, 4),
        "heads": (4,),
        "batch": (*batch, 1),
        "ones": (1,) * len(batch) + (1,),
    }[lead]
    blocks = rng.random((*own, 3, 3)) < 0.6
    mask = cuflash.BlockMask.from_blocks(blocks, block_size=(32, 48), shape=(70, 137))
    q, dout = (normal(rng, *batch, 4, 70, 64) for _ in range(2))
    k, v = (normal(rng, *batch, 2, 137, 64) for _ in range(2))
    agrees(backend, (q, k, v, dout), expanded(blocks, (70, 137), (32, 48)), mask=mask)


# ---- J7: many blocks


def test_J7_forty_thousand_blocks() -> None:
    """More blocks than any fixed buffer held: 3 heads of 128 x 128 blocks, sampled rows."""
    rng = np.random.default_rng(7)
    blocks = rng.random((3, 128, 128)) < 0.02
    mask = cuflash.BlockMask.from_blocks(blocks, block_size=16, shape=(2048, 2048))
    q, k, v = (rng.standard_normal((3, 2048, 8), dtype=np.float32) for _ in range(3))
    out, lse = cuflash.attention(q, k, v, mask=mask, return_lse=True)
    rows = np.array([0, 1, 15, 16, 999, 2031, 2047])
    seen = expanded(blocks, (2048, 2048), (16, 16))[:, rows]
    want = oracle.exact(q[:, rows], k, v, mask=seen)
    np.testing.assert_allclose(out[:, rows], want.out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[:, rows], want.lse, rtol=1e-5)


def test_J7_one_row_of_a_long_sequence(backend: Machine) -> None:
    """Decoding against thousands of keys of which two blocks are visible."""
    blocks = np.zeros((1, 256), bool)
    blocks[0, [3, 255]] = True
    mask = cuflash.BlockMask.from_blocks(blocks, block_size=16, shape=(1, 4090))
    agrees(backend, arrays(8, 1, 4090), expanded(blocks, (1, 4090), (16, 16)), mask=mask)


# ---- J9: with causal and window


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "q_offset": 0},
        {"causal": True, "q_offset": -20},
        {"window": (40, 3)},
        {"window": (0, 70), "causal": True},
    ],
    ids=str,
)
def test_J9_blocks_of_ones_and_a_band_are_the_band(
    backend: Machine, options: dict[str, Any]
) -> None:
    """Element by element inside the blocks that the band cuts."""
    given = arrays(9, 130, 200)
    mask = cuflash.BlockMask.from_blocks(
        np.ones((3, 4), bool), block_size=(48, 64), shape=(130, 200)
    )
    seen = np.ones((130, 200), bool)
    blocks = agrees(backend, given, seen, mask=mask, **options)
    band = agrees(backend, given, seen, **options)
    assert np.allclose(blocks[1], band[1], rtol=1e-5, atol=1e-5)
    for got, want in zip(blocks, band, strict=True):
        assert np.allclose(got.astype(float), want.astype(float), atol=2e-3)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (50, 10)}], ids=str)
def test_J9_a_banded_mask_and_another_band(backend: Machine, options: dict[str, Any]) -> None:
    """Partial blocks of a band, cut again by causal or a window."""
    i, j = np.arange(130)[:, None], np.arange(200)
    dense = (abs(i - j + 30) < 25) | (j < 5)
    mask = cuflash.BlockMask.from_dense(dense, block_size=32)
    agrees(backend, arrays(10, 130, 200), dense, mask=mask, **options)


def test_mask_printer_of_blocks(backend: Machine) -> None:
    """Museum A1 for patterns: one-hot values show exactly the visible elements, through partial blocks."""
    rng = np.random.default_rng(11)
    dense = rng.random((70, 128)) < 0.3
    q, k = np.zeros((1, 70, 64), np.float16), np.zeros((1, 128, 64), np.float16)
    for block in ((16, 16), (48, 80)):
        mask = cuflash.BlockMask.from_dense(dense, block_size=block)
        hot = np.split(np.eye(128, dtype=np.float16), 2, axis=1)
        parts = [backend.attention(q, k, v[None], mask=mask)[0] for v in hot]
        assert np.array_equal(np.concatenate(parts, axis=1) != 0, dense)


# ---- what hidden places hold


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 6e4])
def test_B9_what_hidden_keys_hold_never_matters(backend: Machine, garbage: float) -> None:
    """Keys that no row sees, by absent blocks, by bits in blocks that are seen, and by a boolean array."""
    dense = np.random.default_rng(12).random((20, 100)) < 0.5
    dense[:, 64:80] = dense[:, 37] = dense[:, 99] = False
    dead = ~dense.any(axis=0)
    q, k, v, dout = arrays(12, 20, 100, heads=1)
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[:, :, dead], dirty_v[:, :, dead] = garbage, garbage
    for mask in (cuflash.BlockMask.from_dense(dense, block_size=16), dense):
        want = everything(backend, q, k, v, dout, mask=mask)
        assert (want[3][:, :, dead] == 0).all() and (want[4][:, :, dead] == 0).all()
        got = everything(backend, q, dirty_k, dirty_v, dout, mask=mask)
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("kind", ["blocks", "array"])
def test_B9_garbage_shows_in_the_rows_that_see_it_only(
    backend: Machine, where: str, kind: str
) -> None:
    """Key 37 is seen by every third row; its NaN reaches those and no other of the same tile."""
    rng = np.random.default_rng(13)
    dense = rng.random((70, 130)) < 0.7
    dense[:, 37] = np.arange(70) % 3 == 0
    mask = cuflash.BlockMask.from_dense(dense, block_size=(64, 48)) if kind == "blocks" else dense
    q, k, v, dout = arrays(13, 70, 130, heads=1)
    want = everything(backend, q, k, v, dout, mask=mask)
    spoiled = {"k": k.copy(), "v": v.copy()}
    spoiled[where][:, :, 37] = np.nan
    got = everything(backend, q, spoiled["k"], spoiled["v"], dout, mask=mask)
    hit = dense[:, 37]
    assert np.isnan(got[0][:, :, hit].astype(float)).all()
    for place in (0, 1, 2):
        assert same_bits(got[place][:, :, ~hit], want[place][:, :, ~hit])
    assert np.isnan(got[2][:, :, hit].astype(float)).any(axis=-1).all()


def test_rows_without_blocks_keep_their_garbage(backend: Machine) -> None:
    """NaN in q and dout of a row that sees nothing reaches no gradient."""
    blocks = np.array([[True, True], [False, False], [True, False]])
    mask = cuflash.BlockMask.from_blocks(blocks, block_size=(32, 64), shape=(90, 100))
    q, k, v, dout = arrays(14, 90, 100)
    want = everything(backend, q, k, v, dout, mask=mask)
    q, dout = q.copy(), dout.copy()
    q[:, :, 32:64], dout[:, :, 32:64] = np.nan, np.inf
    assert all(map(same_bits, everything(backend, q, k, v, dout, mask=mask), want))


# ---- several calls, one mask


def test_one_mask_serves_many_calls(backend: Machine) -> None:
    """Called twice, and once more after others with another mask of the same sizes: nothing is stale."""
    rng = np.random.default_rng(15)
    given = arrays(15, 70, 130)
    masks = [
        cuflash.BlockMask.from_blocks(
            rng.random((3, 3)) < 0.5, block_size=(32, 48), shape=(70, 130)
        )
        for _ in range(2)
    ]
    want = [everything(backend, *given, mask=mask) for mask in masks]
    assert not same_bits(want[0][0], want[1][0])
    for mask, first in zip(masks, want, strict=True):
        assert all(map(same_bits, everything(backend, *given, mask=mask), first))
    everything(backend, *given, mask=masks[0], causal=True)
    assert all(map(same_bits, everything(backend, *given, mask=masks[0]), want[0]))


def test_combined_masks_are_combined_elements(backend: Machine) -> None:
    """&, |, ~ and T of patterns, as attention sees them."""
    rng = np.random.default_rng(16)
    one, two = (rng.random((100, 100)) < 0.5 for _ in range(2))
    first, second = (cuflash.BlockMask.from_dense(x, block_size=32) for x in (one, two))
    q, k, v, _ = arrays(16, 100, 100)
    for mask, seen in (
        (first & second, one & two),
        (first | second, one | two),
        (~first, ~one),
        (first.T, one.T),
    ):
        check_blocks(backend, q, k, v, mask, seen)


def check_blocks(machine: Machine, q: Any, k: Any, v: Any, mask: Any, seen: np.ndarray) -> None:
    out, lse = machine.attention(q, k, v, mask=mask, return_lse=True)
    exact = oracle.exact(q, k, v, mask=seen)
    honest = oracle.low_precision(q, k, v, mask=seen)
    oracle.check_all((machine.name, mask), exact, honest, q.dtype, out=out, lse=lse)


@pytest.mark.parametrize("heads", [(28, 4), (7, 1), (6, 2)], ids=str)
def test_groups_share_keys_and_not_patterns(backend: Machine, heads: tuple[int, int]) -> None:
    """Each query head has its own pattern over keys that a group shares."""
    many, few = heads
    case = replace(BASE, batch=(), heads=many, heads_kv=few, len_q=37, len_k=101)
    check(backend, replace(case, mask="blocks", block=(16, 32), causal=True), deterministic=True)


def test_B13_one_visible_key_among_thousands(backend: Machine) -> None:
    q, k, v, _ = arrays(17, 1, 4096, heads=1)
    for position in (0, 1, 2047, 4095):
        dense = np.zeros((1, 4096), bool)
        dense[0, position] = True
        for mask in (dense, cuflash.BlockMask.from_dense(dense)):
            out = backend.attention(q, k, v, mask=mask)
            assert same_bits(out[0, 0, 0], v[0, 0, position])


def test_work_of_the_numpy_backend_follows_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent blocks are not computed: their keys are never read, which NaN in all of them shows fast."""
    rng = np.random.default_rng(18)
    q, k, v = (rng.standard_normal((1, 1024, 16), dtype=np.float32) for _ in range(3))
    blocks = np.eye(8, dtype=bool)
    mask = cuflash.BlockMask.from_blocks(blocks, shape=(1024, 1024))
    counted = []
    matmul = np.matmul

    def counting(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(int(np.prod(a.shape)) * b.shape[-1])
        return matmul(a, b, *args, **kwargs)

    monkeypatch.setattr(np, "matmul", counting)
    check_forward(Numpy(), q, k, v, mask=np.kron(blocks, np.ones((128, 128), bool)))
    by_array = sum(counted)
    counted.clear()
    cuflash.attention(q, k, v, mask=mask)
    by_blocks = sum(counted)
    counted.clear()
    cuflash.attention(q, k, v)
    for some in (by_array, by_blocks):
        assert 0 < some <= sum(counted) // 4
