"""Masks, biases, sinks, dropout and score functions on the NumPy backend, alone and together.

Everything is compared with `tests.dense`, in float64 unless a test is about dtypes, with tiles so
small that every case crosses many of their edges.
"""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import _cpu, _cpu_backward, _cpu_forward, _cpu_masks, _cpu_sums, _cpu_tiles
from cuflash._blockmask import BlockMask
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.dense import Dense, Warp

BATCH, HEADS, HEADS_KV, LEN_Q, LEN_K, DIM, DIM_V = 2, 4, 2, 21, 37, 5, 3
PAIRS = (BATCH, HEADS, LEN_Q, LEN_K)
SEED, P = 2**40 + 7, 0.3


@pytest.fixture(params=[(16, 8, 1, 4), (5, 7, 1, 16), (64, 16, 4000, 8)], ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """(rows, keys, elements, chunk): edges everywhere, units of one head and of several."""
    rows, keys, elements, chunk = request.param
    monkeypatch.setattr(_cpu_tiles, "TILE_ROWS", rows)
    monkeypatch.setattr(_cpu_tiles, "TILE_KEYS", keys)
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(_cpu_tiles, "LEAST_ROWS", 8)
    monkeypatch.setattr(_cpu_masks, "CHUNK", chunk)


def arrays(
    rng: np.random.Generator, batch: int = BATCH, len_q: int = LEN_Q, len_k: int = LEN_K
) -> dict[str, np.ndarray]:
    """q, k, v."""
    return {
        "q": rng.standard_normal((batch, HEADS, len_q, DIM)),
        "k": rng.standard_normal((batch, HEADS_KV, len_k, DIM)),
        "v": rng.standard_normal((batch, HEADS_KV, len_k, DIM_V)) + 0.5,
    }


def warp(rng: np.random.Generator) -> Warp:
    """A score function with two parameter arrays."""
    return Warp({"gain": 0.5 + rng.random(HEADS), "table": rng.standard_normal(9)})


def block_mask(rng: np.random.Generator, batch: int = BATCH, heads: int = HEADS) -> BlockMask:
    """Full, absent and partial blocks of 16 x 16, with an empty row of blocks."""
    dense = rng.random((batch, heads, LEN_Q, LEN_K)) < 0.7
    dense[..., :16, 16:32] = True
    dense[..., :16, :16] &= rng.random((batch, heads, 1, 1)) < 0.5
    dense[0, 0, 16:] = False
    return BlockMask.from_dense(dense, block_size=16)


def some_mask(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """A bool array with hidden rows, hidden tiles and whole tiles."""
    mask = rng.random(shape) < 0.6
    if shape[-2] > 9:
        mask[..., 2, :] = mask[..., 5, :] = False
        mask[..., 9:, 20:] = False
        mask[..., :9, 8:24] = True
    return mask


# Every option by name: fields of Dense.
def one(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """The fields of Dense that an option means."""
    made: dict[str, Any] = {
        "causal": lambda: {"right": 0, "q_offset": LEN_K - LEN_Q},
        "window": lambda: {"left": 11, "right": 6, "q_offset": 3},
        "softcap": lambda: {"softcap": 1.5},
        "alibi": lambda: {"alibi_slopes": rng.random((BATCH, HEADS))},
        "mask": lambda: {"mask": some_mask(rng, *PAIRS)},
        "mask_keys": lambda: {"mask": some_mask(rng, BATCH, 1, 1, LEN_K)},
        "blocks": lambda: {"mask": block_mask(rng)},
        "blocks_shared": lambda: {"mask": block_mask(rng, 1, 1)},
        "bias": lambda: {"bias": rng.standard_normal(PAIRS)},
        "bias_shared": lambda: {"bias": rng.standard_normal((HEADS, LEN_Q, LEN_K))},
        "bias_keys": lambda: {"bias": rng.standard_normal((1, HEADS, 1, LEN_K))},
        "sinks": lambda: {"sinks": rng.standard_normal(HEADS)},
        "score_mod": lambda: {"score_mod": warp(rng)},
        "dropout": lambda: {"keep": dropout_mask(SEED, P, PAIRS), "p": P},
    }  # fmt: skip
    return made[name]()


NAMES = (
    "causal", "window", "softcap", "alibi", "mask", "mask_keys", "blocks", "blocks_shared", "bias",
    "bias_shared", "bias_keys", "sinks", "score_mod", "dropout",
)  # fmt: skip


def call_of(names: tuple[str, ...], seed: int = 0) -> tuple[Dense, Options]:
    """A call with these options: as a formula, and as the backend's options."""
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {}
    for name in names:
        fields |= one(name, rng)
    blocks = fields["mask"] if isinstance(fields.get("mask"), BlockMask) else None
    dense = Dense(**arrays(rng), **fields)
    options = options_of(dense, blocks)
    if blocks is not None:
        dense = dense.having(mask=blocks.to_dense())
    return dense, options


def options_of(dense: Dense, blocks: BlockMask | None = None) -> Options:
    """The same call for the backend."""
    return Options(
        scale=dense.scale, q_offset=dense.q_offset, left=dense.left, right=dense.right,
        softcap=dense.softcap, alibi_slopes=dense.alibi_slopes,
        mask=None if blocks is not None or dense.mask is None else dense.mask,
        blocks=blocks, bias=dense.bias, sinks=dense.sinks, score_mod=dense.score_mod,
        dropout=None if dense.keep is None else Dropout.of(dense.p, SEED),
    )  # fmt: skip


def wrt_of(options: Options) -> list[str]:
    """Everything that has a gradient."""
    given = [n for n in ("bias", "alibi_slopes", "sinks") if getattr(options, n) is not None]
    mod = options.score_mod
    return ["q", "k", "v", *given, *([] if mod is None else mod.arrays)]


def flat(grads: dict[str, Any]) -> dict[str, np.ndarray]:
    """Gradients with those of score parameters among them."""
    grads = dict(grads)
    return grads | grads.pop("score_params", {})


def cotangents(dense: Dense) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(99)
    rows = dense.q.shape[:-1]
    return rng.standard_normal((*rows, dense.v.shape[-1])), rng.standard_normal(rows)


def run(
    dense: Dense, options: Options, wrt: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """out, lse and all gradients of the backend."""
    dout, dlse = cotangents(dense)
    dout, dlse = dout.astype(dense.q.dtype), dlse.astype(_cpu_tiles.accumulator(dense.q.dtype))
    out, lse = _cpu.forward(dense.q, dense.k, dense.v, options)
    given = dout, dense.q, dense.k, dense.v, out, lse
    wrt = wrt_of(options) if wrt is None else wrt
    return out, lse, flat(_cpu.backward(*given, options, dlse=dlse, wrt=wrt))


def check(dense: Dense, options: Options, rtol: float = 1e-10) -> dict[str, np.ndarray]:
    """The backend against the formula; its gradients."""
    out, lse, grads = run(dense, options)
    want_out, want_lse = dense.forward()
    np.testing.assert_allclose(out, want_out, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(lse, want_lse, rtol=rtol, atol=rtol)
    want = flat(dense.backward(*cotangents(dense)))
    assert set(grads) == set(want)
    for name, grad in grads.items():
        given = argument(dense, name)
        assert (grad.shape, grad.dtype) == (given.shape, given.dtype), name
        size = max(1.0, abs(want[name]).max(initial=0))
        np.testing.assert_allclose(grad, want[name], rtol=rtol, atol=rtol * size, err_msg=name)
    return grads


def argument(dense: Dense, name: str) -> np.ndarray:
    """What a gradient is of."""
    mod = dense.score_mod
    return mod.params[name] if mod is not None and name in mod.params else getattr(dense, name)


def with_argument(dense: Dense, name: str, value: np.ndarray) -> Dense:
    """The call with another value of what a gradient is of."""
    mod = dense.score_mod
    if mod is not None and name in mod.params:
        return dense.having(score_mod=Warp({**mod.params, name: value}))
    return dense.having(**{name: value})


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("name", NAMES)
def test_each_option(name: str) -> None:
    check(*call_of((name,)))


COVERING = [
    pair for pair in itertools.combinations(NAMES, 2) if len({n.split("_")[0] for n in pair}) == 2
    and set(pair) not in ({"causal", "window"}, {"mask", "blocks"}, {"mask", "blocks_shared"},
                          {"mask_keys", "blocks"}, {"mask_keys", "blocks_shared"})
]  # fmt: skip


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("names", COVERING, ids="-".join)
def test_pairs_of_options(names: tuple[str, ...]) -> None:
    check(*call_of(names, seed=1))


EVERYTHING = ("window", "softcap", "alibi", "mask", "bias_shared", "sinks", "score_mod", "dropout")


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("mask", ["mask", "blocks", "blocks_shared"])
@pytest.mark.parametrize("bias", ["bias", "bias_shared", "bias_keys"])
def test_all_options_together(mask: str, bias: str) -> None:
    names = [{"mask": mask, "bias_shared": bias}.get(name, name) for name in EVERYTHING]
    check(*call_of(tuple(names), seed=2))


def test_mask_and_blocks_together() -> None:
    dense, options = call_of(("blocks", "sinks"))
    mask = some_mask(np.random.default_rng(5), *PAIRS)
    both = dense.having(mask=mask & dense.mask)
    check(both, options_of(dense.having(mask=mask)).__class__(**{
        **{n: getattr(options, n) for n in Options.__slots__}, "mask": mask,
    }))  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [("bias", "causal"), ("bias_shared", "mask"), ("bias_keys", "sinks"), ("score_mod", "window"),
     ("dropout", "blocks"), ("sinks", "dropout"), ("alibi", "mask"), EVERYTHING],
    ids="-".join,
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(names: tuple[str, ...]) -> None:
    """Along random directions in every argument: the formula's forward against the backend's backward."""
    dense, options = call_of(names, seed=3)
    dout, dlse = cotangents(dense)
    grads = run(dense, options)[2]
    rng = np.random.default_rng(4)

    def loss(call: Dense) -> float:
        out, lse = call.forward()
        seen = np.isfinite(lse)
        return float((out * dout).sum() + (lse[seen] * dlse[seen]).sum())

    for name, grad in grads.items():
        x = argument(dense, name)
        for _ in range(3):
            step = rng.standard_normal(x.shape)
            ahead, behind = (loss(with_argument(dense, name, x + h * step)) for h in (1e-5, -1e-5))
            want = (ahead - behind) / 2e-5
            assert abs((grad * step).sum() - want) < 1e-6 * max(abs(want), 1.0), name


# ---- bias

SHAPES = [
    PAIRS, (1, HEADS, LEN_Q, LEN_K), (BATCH, 1, LEN_Q, LEN_K), (1, 1, LEN_Q, LEN_K),
    (BATCH, HEADS, 1, LEN_K), (1, HEADS, 1, LEN_K), (BATCH, HEADS, LEN_Q, 1), (BATCH, HEADS, 1, 1),
    (HEADS, LEN_Q, LEN_K), (LEN_Q, LEN_K), (LEN_Q, 1), (1, LEN_K), (LEN_K,), (1,), (),
]  # fmt: skip


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("part_elements", [0, 1 << 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_of_every_shape(
    shape: tuple[int, ...], part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", part_elements)
    rng = np.random.default_rng(0)
    dense = Dense(**arrays(rng), bias=np.asarray(rng.standard_normal(shape)), right=16)
    grads = check(dense, options_of(dense))
    assert (grads["bias"] != 0).any()


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bias_dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("shape", [PAIRS, (HEADS, LEN_Q, LEN_K), (BATCH, 1, 1, LEN_K)], ids=str)
def test_bias_dtypes(shape: tuple[int, ...], dtype: Any, bias_dtype: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = {n: x.astype(dtype) for n, x in arrays(rng).items()}
    dense = Dense(**inputs, bias=rng.standard_normal(shape).astype(bias_dtype))
    out, lse, grads = run(dense, options_of(dense))
    want = dense.backward(*(x.astype(dtype).astype(np.float64) for x in cotangents(dense)))["bias"]
    assert (grads["bias"].shape, grads["bias"].dtype) == (shape, np.dtype(bias_dtype))
    # delta is taken from the rounded output: an error of its eps times what cancels in a row.
    eps = 4 * max(float(ml_dtypes.finfo(d).eps) for d in (dtype, bias_dtype))
    np.testing.assert_allclose(
        grads["bias"].astype(np.float64), want, rtol=eps, atol=eps * abs(want).max()
    )
    want_out, want_lse = dense.forward()
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.astype(np.float64), want_out, rtol=eps, atol=eps)


def test_bias_broadcast_by_the_user_keeps_its_shape() -> None:
    """A view of stride 0 has as many gradients as it has elements."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, HEADS, 1, LEN_K))
    dense = Dense(**arrays(rng), bias=np.broadcast_to(row, PAIRS))
    assert check(dense, options_of(dense))["bias"].shape == PAIRS
    strange = rng.standard_normal((LEN_K, LEN_Q, HEADS)).transpose(2, 1, 0)[:, ::-1, ::-1]
    dense = dense.having(bias=strange)
    check(dense, options_of(dense))


@pytest.mark.usefixtures("tiny_tiles")
def test_bias_of_minus_infinity() -> None:
    """A prefix over several tiles, single entries, one whole row; no gradient there, and no NaN."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(PAIRS)
    bias[..., :30] = -np.inf
    bias[1] = np.where(rng.random(PAIRS[1:]) < 0.5, -np.inf, rng.standard_normal(PAIRS[1:]))
    bias[1, 2, 7] = -np.inf
    for sinks in (None, rng.standard_normal(HEADS)):
        dense = Dense(**arrays(rng), bias=bias, sinks=sinks)
        grads = check(dense, options_of(dense))
        assert (grads["bias"][np.isneginf(bias)] == 0).all()
        assert all(np.isfinite(grad).all() for grad in grads.values())
        out, lse = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense))
        assert (out[1, 2, 7] == 0).all()
        assert (lse[1, 2, 7] == (-np.inf if sinks is None else sinks[2])).all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_bias_of_infinity_is_seen_in_its_row_only(value: float) -> None:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(PAIRS)
    bias[1, 2, 7, 20] = value
    dense = Dense(**arrays(rng), bias=bias)
    out, lse, grads = run(dense, options_of(dense))
    row = np.zeros(PAIRS[:3], bool)
    row[1, 2, 7] = True
    for x in (out, grads["q"], grads["bias"]):
        np.testing.assert_array_equal(np.isnan(x).all(axis=-1), row)
        assert np.isfinite(x[~row]).all()
    np.testing.assert_array_equal(np.isnan(lse), row)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("key", [0, 1, 63, 64, 127])
def test_one_finite_key(key: int) -> None:
    rng = np.random.default_rng(0)
    bias = np.full((1, 128), -np.inf)
    bias[0, key] = 0.5
    dense = Dense(**arrays(rng, len_k=128), bias=bias)
    check(dense, options_of(dense))
    out, _ = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense))
    want = np.repeat(dense.v[:, :, key], 2, axis=1)[:, :, None]
    np.testing.assert_array_equal(out, np.broadcast_to(want, out.shape))


# ---- masks


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_of_every_shape(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    mask = np.asarray(rng.random(shape) < 0.7)
    dense = Dense(**arrays(rng), mask=np.broadcast_to(mask, PAIRS))
    check(dense, options_of(dense))
    check(dense, options_of(dense.having(mask=mask)))


def test_hidden_rows_do_nothing() -> None:
    """out 0, lse -inf, dq 0; and whatever reaches them backward changes nothing else."""
    rng = np.random.default_rng(0)
    mask = np.ones((LEN_Q, LEN_K), bool)
    mask[[2, 5]] = False
    dense = Dense(**arrays(rng), mask=mask)
    options = options_of(dense)
    out, lse = _cpu.forward(dense.q, dense.k, dense.v, options)
    assert (out[:, :, [2, 5]] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(~mask.any(-1), lse.shape))
    dout, _ = cotangents(dense)
    results = []
    for value in (0.0, 1e300, np.nan):
        dout[:, :, [2, 5]] = value
        grads = _cpu.backward(dout, dense.q, dense.k, dense.v, out, lse, options)
        assert (grads["q"][:, :, [2, 5]] == 0).all()
        results.append(b"".join(grad.tobytes() for grad in grads.values()))
    assert len(set(results)) == 1


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 6e4])
@pytest.mark.parametrize("kind", ["dense", "keys", "blocks"])
def test_contents_of_hidden_keys_never_matter(kind: str, garbage: float) -> None:
    rng = np.random.default_rng(0)
    dead = rng.random(LEN_K) < 0.4
    dead[16:32] = True
    mask = (rng.random(PAIRS) < 0.7) & ~dead
    if kind == "keys":
        mask = ~dead[None, :]
    blocks = BlockMask.from_dense(mask, block_size=16) if kind == "blocks" else None
    dense = Dense(**arrays(rng), mask=mask, keep=dropout_mask(SEED, P, PAIRS), p=P)
    options = options_of(dense, blocks)
    clean = dense.having(k=dense.k.copy(), v=dense.v.copy())
    for name in ("k", "v"):
        getattr(clean, name)[:, :, dead] = 0
        getattr(dense, name)[:, :, dead] = garbage
    got, want = run(dense, options), run(clean, options)
    for a, b in zip((*got[:2], *got[2].values()), (*want[:2], *want[2].values()), strict=True):
        assert a.tobytes() == b.tobytes()
    assert (got[2]["k"][:, :, dead] == 0).all()
    assert (got[2]["v"][:, :, dead] == 0).all()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("blocks", [False, True])
def test_garbage_reaches_only_the_rows_that_see_it(blocks: bool, garbage: float) -> None:
    """Heads of one unit see different keys."""
    rng = np.random.default_rng(0)
    mask = rng.random(PAIRS) < 0.5
    dense = Dense(**arrays(rng), mask=mask)
    options = options_of(dense, BlockMask.from_dense(mask, block_size=16) if blocks else None)
    want_out, want_lse, want = run(dense, options)
    for name in ("k", "v"):
        getattr(dense, name)[1, 1, 17] = garbage
    out, lse, grads = run(dense, options)
    touched = np.zeros(PAIRS[:3], bool)
    touched[1, 2:] = mask[1, 2:, :, 17]
    assert not np.isfinite(out[touched]).any()
    np.testing.assert_array_equal(out[~touched], want_out[~touched])
    np.testing.assert_array_equal(lse[~touched], want_lse[~touched])
    np.testing.assert_array_equal(grads["q"][~touched], want["q"][~touched])
    assert np.isfinite(grads["q"][~touched]).all()


def tiles_of(dense: Dense, options: Options) -> list[Any]:
    """The tiles that forward visits."""
    shape = _cpu_tiles.Shape.of(dense.q, dense.k, dense.v)
    call = _cpu_tiles.Call.of(shape, _cpu_tiles.Extras.of(options, shape.axes, dense.q.dtype))
    return [
        place
        for unit in call.units()
        for q0, q1 in call.row_tiles()
        for place in call.tiles(unit, q0, q1)
    ]


@pytest.mark.parametrize("block", [16, 64, 128, (32, 64), (512, 64)])
def test_absent_blocks_are_not_visited(block: Any) -> None:
    """Each visible block is visited once, and its neighbours are not."""
    rng = np.random.default_rng(0)
    bq, bk = block if isinstance(block, tuple) else (block, block)
    length = 1024
    pattern = np.eye(-(-length // bq), -(-length // bk), dtype=bool)
    pattern[0, -1] = True
    mask = BlockMask.from_blocks(pattern, block_size=block, shape=(length, length))
    q = rng.standard_normal((1, length, 4))
    dense = Dense(q, q, q)
    tiles = tiles_of(dense, options_of(dense, mask))
    visited = sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in tiles)
    # Several rows of small blocks are one tile, which visits what any of them shows.
    joined = max(1, _cpu_tiles.LEAST_ROWS // bq)
    assert visited <= pattern.sum() * bq * bk * joined
    assert visited >= pattern.sum() * bq * bk


def test_hidden_tiles_of_dense_masks_are_not_visited() -> None:
    length = 1024
    q = np.zeros((1, length, 4))
    i, j = np.arange(length)[:, None], np.arange(length)
    mask = (i // 256 == j // 256) & (j <= i)
    dense = Dense(q, q, q)
    tiles = tiles_of(dense, options_of(dense.having(mask=mask)))
    assert sorted((t.q0, t.k0, t.k1) for t in tiles) == [
        (n, n, n + 256) for n in range(0, 1024, 256)
    ]


def test_whole_tiles_are_not_cut() -> None:
    """Neither by full blocks nor by the True part of a mask; and a cut has only its columns."""
    length = 512
    q = np.zeros((1, length, 4))
    dense = Dense(q, q, q)
    mask = np.ones((length, length), bool)
    mask[300:, 100:120] = False
    for blocks in (None, BlockMask.from_dense(mask, block_size=128)):
        options = options_of(dense.having(mask=mask), blocks)
        shape = _cpu_tiles.Shape.of(q, q, q)
        call = _cpu_tiles.Call.of(shape, _cpu_tiles.Extras.of(options, shape.axes, q.dtype))
        (unit,) = call.units()
        cuts = {
            (place.q0, place.k0): call.masks.cut(place)
            for q0, q1 in call.row_tiles()
            for place in call.tiles(unit, q0, q1)
        }
        assert any(cut is None for cut in cuts.values())
        found = [cut for cut in cuts.values() if cut is not None]
        assert [columns for cut in found for columns, _ in cut.parts] == [slice(100, 120)] * len(
            found
        )


@pytest.mark.parametrize("lengths", [(100, 129), (129, 100), (1000, 999), (1, 300), (300, 1)])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_blocks_of_odd_lengths(lengths: tuple[int, int], block: int) -> None:
    rng = np.random.default_rng(0)
    len_q, len_k = lengths
    pattern = rng.random((HEADS, -(-len_q // block), -(-len_k // block))) < 0.5
    pattern[1, 0], pattern[2] = False, False
    mask = BlockMask.from_blocks(pattern, block_size=block, shape=lengths)
    dense = Dense(**arrays(rng, 1, len_q, len_k), right=0, q_offset=len_k - len_q)
    full = dense.having(mask=mask.to_dense())
    check(full, options_of(full, mask))


def test_full_blocks_are_no_mask_at_all() -> None:
    dense, options = call_of(("causal", "sinks"))
    ones = BlockMask.from_dense(np.ones((LEN_Q, LEN_K), bool), block_size=16)
    full = run(dense, options_of(dense, ones))
    for a, b in zip(full[:2], run(dense, options)[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


# ---- sinks


def test_sink_of_minus_infinity_is_none() -> None:
    for names in (("causal",), ("mask",), ("dropout",)):
        dense, options = call_of(names)
        without = run(dense, options)
        with_none = run(*_with_sinks(dense, options, np.full(HEADS, -np.inf)))
        assert (with_none[2].pop("sinks") == 0).all()
        pairs = zip(
            (*without[:2], *without[2].values()),
            (*with_none[:2], *with_none[2].values()),
            strict=True,
        )
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)


def _with_sinks(dense: Dense, options: Options, sinks: np.ndarray) -> tuple[Dense, Options]:
    dense = dense.having(sinks=sinks)
    return dense, options_of(dense, options.blocks)


@pytest.mark.parametrize("len_k", [0, LEN_K])
def test_rows_with_nothing_but_a_sink(len_k: int) -> None:
    """lse is the sink's logit exactly, and its gradient passes through."""
    rng = np.random.default_rng(0)
    sinks = np.array([0.3, -50.0, 700.0, -np.inf])
    mask = np.zeros((LEN_Q, len_k), bool)
    dense = Dense(**arrays(rng, len_k=len_k), sinks=sinks, mask=mask)
    out, lse, grads = run(dense, options_of(dense))
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[:, None], lse.shape))
    _, dlse = cotangents(dense)
    want = np.where(np.isneginf(sinks), 0, dlse.sum(axis=(0, 2)))
    np.testing.assert_allclose(grads["sinks"], want, rtol=1e-12)
    assert all((grads[name] == 0).all() for name in ("q", "k", "v"))


@pytest.mark.parametrize("sink", [1e4, -1e4, 80.0])
def test_huge_sinks(sink: float) -> None:
    dense, options = call_of(("mask",))
    inputs = {n: getattr(dense, n).astype(np.float32) for n in ("q", "k", "v")}
    dense, options = _with_sinks(dense.having(**inputs), options, np.full(HEADS, sink, np.float32))
    out, lse, grads = run(dense, options)
    want, want_lse = dense.forward()
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    assert all(np.isfinite(grad).all() for grad in grads.values())


# ---- dropout


def test_no_dropout_bitwise() -> None:
    dense, options = call_of(("mask", "alibi"))
    with_zero = options_of(dense.having(keep=np.ones(PAIRS, bool), p=0.0))
    assert with_zero.dropout is not None
    without, zero = run(dense, options), run(dense, with_zero)
    assert without[0].tobytes() == zero[0].tobytes()
    assert all(without[2][n].tobytes() == zero[2][n].tobytes() for n in without[2])


@pytest.mark.usefixtures("tiny_tiles")
def test_which_weights_are_dropped() -> None:
    """Values of one-hot keys show every weight; the same whatever the tiles, and lse has all."""
    rng = np.random.default_rng(0)
    inputs = arrays(rng)
    inputs["v"] = np.broadcast_to(np.eye(LEN_K), (BATCH, HEADS_KV, LEN_K, LEN_K))
    dense = Dense(**inputs, right=20)
    plain, plain_lse = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense))
    keep = dropout_mask(SEED, P, PAIRS)
    out, lse = _cpu.forward(dense.q, dense.k, dense.v, options_of(dense.having(keep=keep, p=P)))
    np.testing.assert_array_equal(out != 0, keep & dense.visible())
    np.testing.assert_allclose(out, plain * keep / (1 - P), rtol=1e-12)
    np.testing.assert_array_equal(lse, plain_lse)


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_dropout_keeps_the_mean(p: float) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 2, 256, 8))
    options = Options(0.1, 0, dropout=Dropout.of(p, 3))
    out, _ = _cpu.forward(q, k, np.ones((1, 2, 256, 1)), options)
    spread = np.sqrt(p / (1 - p) / 256)
    assert abs(out.mean() - 1) < 5 * spread / np.sqrt(out.size)
    assert 0.7 * spread < out.std() < 1.5 * spread


# ---- buffers, threads, memory


@pytest.mark.parametrize("part_elements", [0, 1 << 16])
@pytest.mark.parametrize("bias", ["bias", "bias_shared", "bias_keys"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_on_any_number_of_threads(
    bias: str, dtype: str, part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(_cpu_tiles, "TILE_KEYS", 16)
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", part_elements)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", part_elements)
    names = tuple(bias if name == "bias_shared" else name for name in EVERYTHING)
    dense, _ = call_of(names, seed=6)
    inputs = {n: getattr(dense, n).astype(dtype) for n in ("q", "k", "v", "bias", "sinks")}
    dense = dense.having(**inputs)
    results = []
    for threads in (1, 2, 5):
        for module in (_cpu_forward, _cpu_backward):
            monkeypatch.setattr(
                module, "threads_for", lambda items, pairs, n=threads: min(items, n)
            )
        out, lse, grads = run(dense, options_of(dense))
        results.append([x.tobytes() for x in (out, lse, *grads.values())])
    assert results[0] == results[1] == results[2]


def test_only_what_is_asked_for() -> None:
    dense, options = call_of(EVERYTHING, seed=7)
    full = run(dense, options)[2]
    for name in full:
        part = run(dense, options, [name])[2]
        assert set(part) == {name}
        np.testing.assert_array_equal(part[name], full[name])
    assert run(dense, options, [])[2] == {}


def test_arguments_are_not_changed() -> None:
    dense, options = call_of(EVERYTHING, seed=8)
    given = [dense.q, dense.k, dense.v, dense.bias, dense.mask, dense.sinks, dense.alibi_slopes]
    given += dense.score_mod.params.values()
    before = [x.tobytes() for x in given]
    for x in given:
        x.flags.writeable = False
    run(dense, options)
    assert [x.tobytes() for x in given] == before


def test_several_batch_axes_count_as_one() -> None:
    """(2, 1, H, ...) and (1, 2, H, ...) give what (2, H, ...) gives, for every option."""
    dense, options = call_of(EVERYTHING, seed=9)
    want_out, want_lse, want = run(dense, options)
    dout, dlse = cotangents(dense)
    for lead in ((2, 1), (1, 2)):

        def apart(x: np.ndarray, lead: tuple[int, int] = lead) -> np.ndarray:
            return x.reshape(*lead, *x.shape[1:])

        own = Options(**{
            **{name: getattr(options, name) for name in Options.__slots__},
            "mask": apart(options.mask), "alibi_slopes": apart(options.alibi_slopes),
        })  # fmt: skip
        q, k, v = map(apart, (dense.q, dense.k, dense.v))
        out, lse = _cpu.forward(q, k, v, own)
        given = apart(dout), q, k, v, out, lse
        grads = flat(_cpu.backward(*given, own, dlse=apart(dlse), wrt=wrt_of(own)))
        np.testing.assert_array_equal(out, apart(want_out))
        np.testing.assert_array_equal(lse, apart(want_lse))
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad.reshape(want[name].shape), want[name])


def test_batch_numbers_are_flat_indices() -> None:
    """Batch (2, 3): dropout draws element (1, 0) as number 3, whatever units hold it."""
    keep = dropout_mask(SEED, P, (2, 3, 2, 5, 7))
    q, k = np.zeros((2, 3, 2, 5, 4)), np.zeros((2, 3, 2, 7, 4))
    v = np.broadcast_to(np.eye(7), (2, 3, 2, 7, 7))
    options = Options(0.3, 0, dropout=Dropout.of(P, SEED))
    for elements in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_cpu_tiles, "TILE_ELEMENTS", elements)
            out, _ = _cpu.forward(q, k, v, options)
        np.testing.assert_array_equal(out != 0, keep)


@pytest.mark.parametrize(
    ("option", "items"),
    [
        ("bias", [1, 1, 1, 1]),
        ("bias_shared", [2, 2]),
        ("bias_keys", [1, 1, 1, 1]),
        ("score_mod", [4]),
    ],
)
def test_units_that_share_a_sum_are_one_threads(
    option: str, items: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(B, Hkv) = (2, 2) units: with a large bias over the batch, one thread has both of a head."""
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", 0)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", 0)
    seen: list[int] = []

    def counting(work: Any, worker: Any, threads: int) -> None:
        do = worker(lambda: False)
        for item in work:
            seen.append(len(item))
            do(item)

    monkeypatch.setattr(_cpu_backward, "run", counting)
    dense, options = call_of((option,))
    run(dense, options)
    assert seen == items
