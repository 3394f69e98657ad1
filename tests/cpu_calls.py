"""Calls of the NumPy backend with any of its options, and their comparison with `tests.dense`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuflash import _cpu, _cpu_masks, _cpu_tiles
from cuflash._blockmask import BlockMask
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.dense import Dense, Warp

BATCH, HEADS, HEADS_KV, LEN_Q, LEN_K, DIM, DIM_V = 2, 4, 2, 21, 37, 5, 3
PAIRS = (BATCH, HEADS, LEN_Q, LEN_K)
SEED, P = 2**40 + 7, 0.3

# (rows, keys, elements, chunk): edges everywhere, units of one head and of several.
TINY = [(16, 8, 1, 4), (5, 7, 1, 16), (64, 16, 4000, 8)]


def shrink_tiles(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, elements: int, chunk: int
) -> None:
    """Tiles so small that small cases cross many of their edges."""
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

# What goes together without one option hiding another.
EVERYTHING = ("window", "softcap", "alibi", "mask", "bias_shared", "sinks", "score_mod", "dropout")


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


def with_sinks(dense: Dense, options: Options, sinks: np.ndarray) -> tuple[Dense, Options]:
    """The same call with sinks."""
    dense = dense.having(sinks=sinks)
    return dense, options_of(dense, options.blocks)


# Every kind of shape that broadcasts to PAIRS.
SHAPES = [
    PAIRS, (1, HEADS, LEN_Q, LEN_K), (BATCH, 1, LEN_Q, LEN_K), (1, 1, LEN_Q, LEN_K),
    (BATCH, HEADS, 1, LEN_K), (1, HEADS, 1, LEN_K), (BATCH, HEADS, LEN_Q, 1), (BATCH, HEADS, 1, 1),
    (HEADS, LEN_Q, LEN_K), (LEN_Q, LEN_K), (LEN_Q, 1), (1, LEN_K), (LEN_K,), (1,), (),
]  # fmt: skip
