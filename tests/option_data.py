"""Masks, biases, sinks and score parameters of a case: every kind that the contract allows, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import philox, scores

if TYPE_CHECKING:
    from tests.case import Case

MASKS = (
    "dense",  # one element of three hidden, per batch and head
    "rows",  # (Lq, Lk), some rows and some keys hidden altogether
    "keys",  # (*B, 1, 1, Lk): padding of the keys
    "heads",  # (H, 1, Lk)
    "tiles",  # (H, Lq, Lk): whole blocks hidden, others whole, some cut
    "blocks",  # BlockMask of whole blocks, per batch and head
    "blocks_shared",  # BlockMask of whole blocks, the same for all
    "blocks_partial",  # BlockMask.from_dense of "tiles"
)
# Axes of biases; see `axes`.
BIASES = ("BHqk", "1Hqk", "B1qk", "11qk", "BH1k", "1H1k", "Hqk", "qk", "q1", "1k", "BHq1")


@dataclass(frozen=True)
class Masked:
    """A mask for both sides: `dense` for the oracle, and what makes it for the package.

    Parameters
    ----------
    dense
        bool, broadcastable to (*B, H, Lq, Lk); blocks are expanded here, not by the package.
    kind
        As in `Case`.
    blocks
        bool (..., nQ, nK) for the kinds that are made from blocks.
    """

    dense: np.ndarray
    kind: str
    blocks: np.ndarray | None = None

    def public(self, shape: tuple[int, int], block: tuple[int, int]) -> Any:
        """What a user would pass as `mask`."""
        import cuflash

        if self.blocks is not None:
            return cuflash.BlockMask.from_blocks(self.blocks, block_size=block, shape=shape)
        if self.kind == "blocks_partial":
            return cuflash.BlockMask.from_dense(self.dense, block_size=block)
        return self.dense


def expanded(blocks: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The dense mask of a pattern of blocks."""
    rows = blocks[..., np.arange(shape[0]) // block[0], :]
    return rows[..., np.arange(shape[1]) // block[1]]


def axes(code: str, case: Case) -> tuple[int, ...]:
    """The shape that a code such as "B1qk" stands for."""
    batch = {"B": case.batch, "1": (1,) * len(case.batch)}
    extents = {"H": case.heads, "q": case.len_q, "k": case.len_k, "1": 1}
    lead = batch[code[0]] if len(code) == 4 else ()
    return (*lead, *(extents[a] for a in code[-3:]))


def draw(case: Case) -> dict[str, Any]:
    """The option arrays of a case, by the names in `Data`."""
    rng = np.random.default_rng([case.seed, case.len_q, case.len_k, 3])
    made = {"mask": _mask(case, rng), "bias": _bias(case, rng), "sinks": None, "score_mod": None}
    own = case.numpy_dtype
    if case.sinks is not None:
        dtype = own if case.sinks == "own" else np.float32
        made["sinks"] = (1 + rng.standard_normal(case.heads)).astype(dtype)
    if case.score_mod is not None:
        dtype = own if case.dtype == "float64" else np.float32
        extents = (math.prod(case.batch), case.heads, case.len_q, case.len_k)
        made["score_mod"] = scores.LIBRARY[case.score_mod].of(*extents, dtype=dtype, seed=case.seed)
    return made


def kept(case: Case) -> np.ndarray:
    """Dropout's keep mask, (*B, H, Lq, Lk)."""
    rows = (math.prod(case.batch), case.heads, case.len_q, case.len_k)
    mask = philox.keep_mask(case.dropout_seed, case.dropout, *rows)
    return mask.reshape(*case.batch, *rows[1:])


def _bias(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    if case.bias is None:
        return None
    bias = rng.standard_normal(axes(case.bias, case))
    if case.bias_inf:
        bias[rng.random(bias.shape) < 0.1] = -np.inf
    return bias.astype(case.numpy_dtype if case.bias_dtype == "own" else case.bias_dtype)


def _mask(case: Case, rng: np.random.Generator) -> Masked | None:
    kind, (len_q, len_k) = case.mask, (case.len_q, case.len_k)
    if kind is None:
        return None
    counts = -(-len_q // case.block[0]), -(-len_k // case.block[1])
    if kind in ("blocks", "blocks_shared"):
        lead = (*case.batch, case.heads) if kind == "blocks" else ()
        blocks = rng.random((*lead, *counts)) < 0.6
        return Masked(expanded(blocks, (len_q, len_k), case.block), kind, blocks)
    if kind == "dense":
        return Masked(rng.random((*case.batch, case.heads, len_q, len_k)) < 0.67, kind)
    if kind == "rows":
        dense = rng.random((len_q, len_k)) < 0.6
        dense[2 % max(1, len_q) : 6 : 3] = dense[-1:] = False
        dense[:, len_k // 2 : len_k // 2 + 3] = False
        return Masked(dense, kind)
    if kind == "keys":
        lengths = rng.integers(0, len_k + 1, (*case.batch, 1, 1, 1))
        return Masked(np.arange(len_k) < lengths, kind)
    if kind == "heads":
        return Masked(rng.random((case.heads, 1, len_k)) < 0.7, kind)
    assert kind in ("tiles", "blocks_partial"), kind
    # A third each of the blocks hidden, whole and cut.
    state = expanded(rng.integers(0, 3, (case.heads, *counts)), (len_q, len_k), case.block)
    cut = rng.random((case.heads, len_q, len_k)) < 0.5
    return Masked((state == 1) | ((state == 2) & cut), kind)
