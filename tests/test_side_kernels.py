"""The kernels that run before the others, alone: tile maps of masks, tables of packed sequences.

Maps are exact, whatever the strides of a mask. Tables are right for good lengths, and for bad ones
safe: clamped into the arrays, reported, and no fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _packed_checks, _params, _side_kernels
from tests.emulator.device import EmulatedDevice
from tests.machines import Emulator

ARCH = "sm_80"


def on_device(device: EmulatedDevice, x: np.ndarray) -> np.ndarray:
    """A copy in device memory, with red zones around it."""
    copy = device.empty(x.shape, x.dtype)
    copy[...] = x
    return copy


# ---- tile maps


def patterns(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bools with regions of 64 x 64 that are empty, full, or sparse."""
    *lead, rows, columns = shape
    regions = rng.random((*lead, -(-rows // 64), -(-columns // 64)))
    regions = np.repeat(np.repeat(regions, 64, -2), 64, -1)[..., :rows, :columns]
    sparse = rng.random(shape) < rng.choice([0.002, 0.5, 0.998])
    return np.where(regions < 0.3, False, (regions < 0.6) | sparse)


def wanted_map(dense: np.ndarray, tile: tuple[int, int], by_keys: bool) -> np.ndarray:
    """(2, *lead, tile rows, words): any and all of every tile, as bits."""
    *lead, rows, columns = dense.shape
    counts = -(-rows // tile[0]), -(-columns // tile[1])
    walked = counts[0] if by_keys else counts[1]
    bits = np.zeros((2, *lead, counts[by_keys], -(-walked // 32) * 32), bool)
    for i, j in np.ndindex(counts):
        here = dense[..., i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        at = (..., j, i) if by_keys else (..., i, j)
        bits[0][at], bits[1][at] = here.any((-1, -2)), here.all((-1, -2))
    words = np.packbits(bits, axis=-1, bitorder="little")
    return words.view(np.uint32)


def made_map(
    device: EmulatedDevice,
    kind: str,
    mask: int,
    strides: tuple[int, ...],
    shape: tuple[int, ...],
    tile: tuple[int, int],
    by_keys: bool,
    **values: Any,
) -> np.ndarray:
    """What mask_tiles writes for a mask (batch, heads, rows, columns) at an address."""
    batch, heads, rows, columns = shape
    counts = -(-rows // tile[0]), -(-columns // tile[1])
    tile_rows, words = counts[by_keys], -(-counts[not by_keys] // 32)
    plane = batch * heads * tile_rows * words
    found = device.empty((2, batch, heads, tile_rows, words), np.uint32)
    struct = np.zeros((), _params.MASK_TILES)
    struct["mask"], struct["map"] = mask, device.pointer(found)
    struct["mask_bits"] = values.pop("bits", 0)
    inside = struct["values"]
    inside["strides"]["batch"][-1], inside["strides"]["head"] = strides[:2]
    inside["strides"]["row"], inside["strides"]["key"] = strides[2:]
    inside["map_words"], inside["map_plane"] = words, plane
    for name, value in values.items():
        inside[name] = value
    struct["batch_extent"], struct["heads"] = [1, 1, 1, batch], heads
    struct["len_q"], struct["len_k"], struct["tile_rows"] = rows, columns, tile_rows
    struct["tile_q"], struct["tile_k"], struct["by_keys"] = *tile, by_keys
    struct["group"] = 1
    kernel = device.load(_side_kernels.mask_tiles(ARCH, kind))
    kernel(plane, _side_kernels.MAP_WARPS * 32, 0, struct.tobytes())
    return found


VIEWS = {
    "contiguous": (lambda x: x, lambda x: x),
    "transposed": (lambda x: x.swapaxes(-1, -2), lambda x: x.swapaxes(-1, -2)),
    "backwards": (lambda x: x[..., ::-1, ::-1], lambda x: x[..., ::-1, ::-1]),
    "one row": (lambda x: x[..., :1, :], lambda x: x),
    "one key": (lambda x: x[..., :1], lambda x: x),
}
SIZES = [((1, 2, 300, 272), (128, 64)), ((2, 1, 70, 137), (64, 16)), ((1, 1, 1, 1200), (64, 32))]


@pytest.mark.parametrize("by_keys", [False, True], ids=["rows", "keys"])
@pytest.mark.parametrize(("shape", "tile"), SIZES)
@pytest.mark.parametrize("view", VIEWS)
def test_map_of_a_boolean_array(view: str, shape: Any, tile: Any, by_keys: bool) -> None:
    """Any byte but 0 is visible; strides may be anything."""
    rng = np.random.default_rng(len(view))
    to_memory, from_memory = VIEWS[view]
    dense = patterns(rng, shape)
    device = EmulatedDevice(ARCH, seed=1)
    bytes_ = dense * rng.integers(1, 256, shape, np.uint8)
    memory = on_device(device, to_memory(bytes_))
    mask = np.broadcast_to(from_memory(memory), shape)
    dense = mask != 0
    offset = mask.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    address = device.pointer(memory) + offset
    got = made_map(device, "dense", address, mask.strides, shape, tile, by_keys)
    np.testing.assert_array_equal(got, wanted_map(dense, tile, by_keys))


@pytest.mark.parametrize("by_keys", [False, True], ids=["rows", "keys"])
@pytest.mark.parametrize(("shape", "tile"), SIZES)
@pytest.mark.parametrize("block", [(128, 128), (16, 48), (64, 32)], ids=str)
def test_map_of_a_block_mask(block: tuple[int, int], shape: Any, tile: Any, by_keys: bool) -> None:
    """Tiles and blocks need not fit each other."""
    dense = patterns(np.random.default_rng(block), shape)
    blocks = cuflash.BlockMask.from_dense(dense, block_size=block)
    device = EmulatedDevice(ARCH, seed=1)
    slots = on_device(device, np.broadcast_to(blocks.slots, (*shape[:2], *blocks.slots.shape[-2:])))
    bits = on_device(device, blocks.bits)
    got = made_map(
        *(device, "blocks", device.pointer(slots), tuple(s // 4 for s in slots.strides)),
        *(shape, tile, by_keys),
        bits=device.pointer(bits) if bits.size else 0,
        block_q=block[0],
        block_k=block[1],
        bit_words=bits.shape[-1],
    )
    np.testing.assert_array_equal(got, wanted_map(dense, tile, by_keys))


# ---- packed sequences

TABLES = ((16, False, False), (64, False, True), (128, True, False), (64, True, True))


def planned(cu: list[np.ndarray], totals: list[int], longest: list[int]) -> tuple[Any, list[Any]]:
    """(sequences, work of every table) that packed_plan writes."""
    device = EmulatedDevice(ARCH, seed=1)
    batch = len(cu[0]) - 1
    struct = np.zeros((), _params.PACKED_PLAN)
    memory = [on_device(device, np.repeat(x, 2)) for x in cu]
    for side, x, there, total, most in zip("qk", cu, memory, totals, longest, strict=True):
        struct[f"cu_{side}"] = device.pointer(there)
        struct[f"stride_{side}"], struct[f"wide_{side}"] = 2, x.dtype == np.int64
        struct[f"total_{side}"], struct[f"max_{side}"] = total, most
    sequences = device.empty((1 + batch, 4), np.int32)
    capacities = [totals[by_keys] // tile + batch for tile, by_keys, _ in TABLES]
    work = device.empty((sum(capacities), 2), np.int32)
    struct["sequences"], struct["work"] = device.pointer(sequences), device.pointer(work)
    struct["batch"], struct["tables"] = batch, len(TABLES)
    starts = np.cumsum([0, *capacities])
    for n, (tile, by_keys, longest_last) in enumerate(TABLES):
        table = struct["table"][n]
        table["offset"], table["capacity"], table["tile"] = starts[n], capacities[n], tile
        table["by_keys"], table["longest_last"] = by_keys, longest_last
    kernel = device.load(_side_kernels.packed_plan(ARCH))
    kernel(len(TABLES), _side_kernels.PACKED_WARPS * 32, 0, struct.tobytes())
    return sequences, np.split(work, starts[1:-1])


def wanted_work(lengths: np.ndarray, tile: int, longest_last: bool, capacity: int) -> np.ndarray:
    entries = []
    for b, length in enumerate(lengths):
        tiles = range(-(-int(length) // tile))
        entries += [(b, t) for t in (reversed(tiles) if longest_last else tiles)]
    entries += [(-1, 0)] * (capacity - len(entries))
    return np.array(entries[:capacity], np.int32).reshape(-1, 2)


def lengths(rng: np.random.Generator, batch: int, total: int) -> np.ndarray:
    """Many of them 0."""
    found = rng.multinomial(total, rng.dirichlet(np.full(batch, 0.3)))
    return np.where(rng.random(batch) < 0.3, 0, found)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("batch", [1, 5, 255, 700])
def test_plan_of_good_lengths(batch: int, dtype: Any) -> None:
    rng = np.random.default_rng(batch)
    totals = [900, 1500]
    each = [lengths(rng, batch, total) for total in totals]
    cu = [np.concatenate([[0], np.cumsum(x)]).astype(dtype) for x in each]
    sequences, tables = planned(cu, totals, [int(x.max()) for x in each])
    assert not sequences[0].any()
    want = np.stack([cu[0][:-1], each[0], cu[1][:-1], each[1]], axis=1)
    np.testing.assert_array_equal(sequences[1:], want)
    for work, (tile, by_keys, longest_last) in zip(tables, TABLES, strict=True):
        np.testing.assert_array_equal(
            work, wanted_work(each[by_keys], tile, longest_last, len(work))
        )


BAD = {
    "does not start at 0": [1, 50, 60, 100],
    "decreases": [0, 50, 30, 100],
    "past the end": [0, 50, 60, 101],
    "negative": [0, -5, 60, 100],
    "longer than the maximum": [0, 80, 90, 100],
    "absurd": [0, 2**31 - 1, -(2**31), 100],
    "overlapping": [0, 100, 0, 100],
}


@pytest.mark.parametrize("why", BAD)
def test_bad_lengths_are_reported_and_clamped(why: str) -> None:
    cu = np.array(BAD[why], np.int32)
    good = np.array([0, 20, 60, 100], np.int32)
    for sides in ([cu, good], [good, cu]):
        sequences, tables = planned(sides, [100, 100], [60, 60])
        assert sequences[0, 0] == 1
        starts, spans = sequences[1:, ::2], sequences[1:, 1::2]
        assert (starts >= 0).all() and (spans >= 0).all() and (spans <= 60).all()
        assert (starts + spans <= 100).all()
        for work, (tile, by_keys, _) in zip(tables, TABLES, strict=True):
            b, number = work[work[:, 0] >= 0].T
            assert (number >= 0).all() and (number * tile < spans[b, int(by_keys)]).all()


@pytest.mark.parametrize("why", BAD)
def test_bad_lengths_give_nan_everywhere(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nobody looks into the lengths before the launch."""
    monkeypatch.setattr(_packed_checks, "contents", lambda name, found, total, bound, seen: bound)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 100, 40)).astype(np.float16) for _ in range(3))
    cu, good = np.array(BAD[why], np.int32), np.array([0, 20, 60, 100], np.int32)
    options = {"max_seqlen_q": 60, "max_seqlen_k": 60, "return_lse": True}
    with Emulator(ARCH, seed=1) as machine:
        for sides in ((cu, good), (good, cu)):
            out, lse = machine.varlen(q, k, v, *sides, **options, mask=np.ones((60, 60), bool))
            assert np.isnan(out).all() and np.isnan(lse).all()
        out, lse = machine.varlen(q, k, v, good, good, **options)
        assert np.isfinite(out).all() and np.isfinite(lse).all()
