"""A Problem states a call completely: extents, band, layout; and metadata alone decides what overlaps what."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import _arrays, _prepare
from cuflash._arrays import Meta
from cuflash._errors import Seen
from cuflash._problem import Arrangement, Operand, Problem
from tests import oracle

DEFAULTS: dict[str, Any] = {
    "causal": False,
    "window": None,
    "q_offset": None,
    "scale": None,
    "softcap": None,
    "layout": "HLD",
}


def meta(*shape: int, dtype: Any = "float16", offset: int = 0) -> Meta:
    return Meta(*_arrays.signature(np.zeros(shape, dtype), False))._replace(offset=offset)


def problem(q: Meta, k: Meta, v: Meta | None = None, **options: Any) -> Problem:
    arrays = {"q": q, "k": k, "v": k if v is None else v}
    return Problem.of("forward", arrays, {**DEFAULTS, **options}, Seen(arrays))


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({}, None, None),
        ({"causal": True}, None, 0),
        ({"window": (3, 5)}, 3, 5),
        ({"window": (3, 5), "causal": True}, 3, 0),
        ({"window": (None, 5), "causal": True}, None, 0),
        ({"window": (7, None)}, 7, None),
        ({"window": (7, None), "causal": True}, 7, 0),
        ({"window": (None, None)}, None, None),
        ({"window": (0, 0), "causal": True}, 0, 0),
        ({"window": (10**30, 0)}, 10**30, 0),
    ],
)
def test_causal_and_window_become_one_band(options: Any, left: Any, right: Any) -> None:
    found = problem(meta(2, 5, 8), meta(2, 9, 8), **options)
    assert (found.left, found.right, found.q_offset) == (left, right, 4)


@pytest.mark.parametrize(("len_q", "len_k"), [(5, 9), (9, 5), (1, 1)])
def test_the_band_is_the_oracles_mask(len_q: int, len_k: int) -> None:
    for causal, left, right, offset in itertools.product(
        (False, True), (None, 0, 2, 100), (None, 0, 1, 100), (None, 0, -3, 50)
    ):
        options = {"causal": causal, "window": (left, right), "q_offset": offset}
        p = problem(meta(1, len_q, 4), meta(1, len_k, 4), **options)
        d, j = np.arange(len_q)[:, None] + p.q_offset, np.arange(len_k)
        seen = np.ones((len_q, len_k), bool)
        seen &= p.left is None or j >= d - p.left
        seen &= p.right is None or j <= d + p.right
        assert np.array_equal(seen, oracle.visible(len_q, len_k, **options))


def test_extents_in_either_layout() -> None:
    want = ((3, 2), 6, 2, 10, 20, 8, 5)
    for layout, turn in (("HLD", (0, 1, 2, 3, 4)), ("LHD", (0, 1, 3, 2, 4))):
        shapes = [(3, 2, 6, 10, 8), (3, 1, 2, 20, 8), (1, 2, 2, 20, 5)]
        metas = [meta(*(shape[axis] for axis in turn)) for shape in shapes]
        p = problem(*metas, layout=layout)
        assert (p.batch, p.heads, p.heads_kv, p.len_q, p.len_k, p.head_dim, p.head_dim_v) == want
        assert dict(p.operands)["k"].shape == (3, 1, 2, 20, 8)
        assert p.scale == pytest.approx(8**-0.5)


def test_a_problem_is_a_key() -> None:
    """Equal calls make equal Problems, whatever their arrays are; planning caches on them."""
    first, second = (problem(meta(2, 5, 8), meta(2, 9, 8), causal=True) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != problem(meta(2, 5, 8), meta(2, 9, 8))
    with pytest.raises(AttributeError):
        first.scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("array", "aligned"),
    [
        (np.zeros((2, 5, 8), "f2"), True),
        (np.zeros((2, 5, 16), "f2")[..., :8], True),
        (np.zeros((2, 5, 12), "f2")[..., :8], False),
        (np.zeros((2, 5, 16), "f2")[..., ::2], False),
        (np.zeros((2, 5, 8), "f2")[:, ::-1], True),
        (np.zeros((2, 5, 8), "f2")[..., ::-1], False),
        (np.zeros((2, 5, 7), "f2"), False),
        (np.broadcast_to(np.zeros(8, "f2"), (2, 5, 8)), True),
        (np.zeros((1, 1, 7), "f2"), True),
        (np.zeros((2, 5, 4), "f4"), True),
    ],
)
def test_aligned_rows(array: Any, aligned: bool) -> None:
    found = Meta(*_arrays.signature(array, False))
    assert Operand.of(found).aligned == aligned
    assert not Operand.of(found._replace(offset=2)).aligned


@pytest.mark.parametrize(
    ("rank", "layout"), [(2, "HLD"), (2, "LHD"), (3, "LHD"), (4, "LHD"), (5, "HLD")]
)
def test_arrangements_are_undone(rank: int, layout: str) -> None:
    view = Arrangement(rank, layout)
    x = np.arange(2**rank).reshape((2,) * rank)
    standard = view.standard(x)
    assert standard.ndim == max(3, rank) and np.shares_memory(standard, x)
    assert np.array_equal(view.restore(standard), x)
    assert view.shape(standard.shape) == x.shape
    found = view.standard_meta(Meta(*_arrays.signature(x, False)))
    assert found.shape == standard.shape
    assert found.strides[-2:] == standard.strides[-2:]


def test_a_prepared_call_depends_on_everything_that_matters() -> None:
    """N1: whatever changes the meaning of a call, or the kernel it takes, changes the key it is kept under."""
    q = np.zeros((2, 6, 8), np.float16)
    base = [q, q, q, *[None] * 6], [False, None, None, None, None, "HLD", 0.0, None, False]

    def key(device: bool = False, **changes: Any) -> Any:
        arrays, values = list(base[0]), list(base[1])
        for name, value in changes.items():
            if name in _prepare.FORWARD_ARRAYS:
                arrays[_prepare.FORWARD_ARRAYS.index(name)] = value
            else:
                values[_prepare.FORWARD_OPTIONS.index(name)] = value
        found = _Device() if device else None
        return _prepare.key_of("forward", found, arrays, values)  # type: ignore[arg-type]

    class _Device:
        key = "gpu"

    wide = np.zeros((2, 6, 16), np.float16)
    shifted = np.zeros(2 * 6 * 8 + 8, np.float16)
    first = (-_arrays.address_of(shifted) // 2) % 8
    aligned, odd = (shifted[first + n : first + n + 96].reshape(2, 6, 8) for n in (0, 1))
    frozen = q.copy()
    frozen.flags.writeable = False
    keys = [
        key(),
        key(device=True, q=aligned, k=aligned, v=aligned),
        key(device=True, q=odd, k=aligned, v=aligned),
        key(q=wide[..., :8]),
        key(q=q.astype(ml_dtypes.bfloat16)),
        key(q=q.view(">f2")),
        key(out=q),
        key(out=frozen),
        key(alibi_slopes=np.zeros(2, np.float16)),
        key(alibi_slopes=np.zeros(2, np.float32)),
        key(causal=True),
        key(causal=1),
        key(window=(1, 0)),
        key(window=(True, 0)),
        key(window=(1.0, 0)),
        key(q_offset=1),
        key(q_offset=True),
        key(scale=1),
        key(scale=1.0),
        key(scale=0.0),
        key(softcap=1.0),
        key(layout="LHD"),
        key(return_lse=1),
        key(dropout_p=0.5),
        key(precision="tf32"),
        key(bias=np.zeros((6, 6), np.float16)),
        key(bias=np.zeros((6, 6), np.float32)),
        key(mask=np.zeros((6, 6), bool)),
        key(sinks=np.zeros(2, np.float32)),
        key(seed=np.zeros((), np.uint64)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(q=q.copy())


# ---- memory


def random_view(rng: np.random.Generator) -> np.ndarray:
    """A view with strides of any sign, padded, broadcast or overlapping."""
    rank = int(rng.integers(1, 4))
    shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 4, rank))
    strides = tuple(int(s) for s in rng.integers(-8, 9, rank) * 2)
    memory = np.zeros(200, np.int16)[100:]
    return np.lib.stride_tricks.as_strided(memory, shape, strides)


def bytes_of(x: np.ndarray) -> list[int]:
    """Address of every byte of every element."""
    at = _arrays.address_of(x)
    firsts = [at + int(np.dot(index, x.strides)) for index in np.ndindex(x.shape)]
    return [first + n for first in firsts for n in range(x.itemsize)]


def test_spans_and_overlap_against_every_byte() -> None:
    rng = np.random.default_rng(0)
    overlapping = 0
    for _ in range(1000):
        x = random_view(rng)
        found = Meta(*_arrays.signature(x, False))
        every = bytes_of(x)
        low, high = found.span()
        if every:
            at = _arrays.address_of(x)
            assert (at + low, at + high) == (min(every), max(every) + 1)
        else:
            assert (low, high) == (0, 0)
        if len(set(every)) < len(every):
            overlapping += 1
            assert found.overlaps_itself()
        other = random_view(rng)
        assert not _arrays.share_memory(x, other) or set(every) & set(bytes_of(other))
        mine = x[::-1]
        assert _arrays.share_memory(x, mine) == bool(every)
    assert overlapping > 100


def test_ordinary_outputs_do_not_overlap_themselves() -> None:
    for x in (
        np.zeros((2, 3, 4)),
        np.zeros((2, 3, 4)).transpose(2, 0, 1),
        np.zeros((2, 6, 8))[:, ::-2, ::-1],
        np.zeros((1, 0, 8)),
        np.zeros((3, 1, 4))[:, np.zeros(1, int)],
    ):
        assert not Meta(*_arrays.signature(x, False)).overlaps_itself()


def test_sharing_is_judged_from_addresses_alone() -> None:
    """Device arrays are described to NumPy by address; nothing is read."""

    class OnDevice:
        def __init__(self, array: np.ndarray) -> None:
            self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
            self.data = type("Memory", (), {"ptr": _arrays.address_of(array)})

    fused = np.zeros((4, 3, 8), np.float16)
    q, k = OnDevice(fused[:, 0]), OnDevice(fused[:, 1])
    assert not _arrays.share_memory(q, k)
    assert _arrays.share_memory(q, OnDevice(fused[2:]))
