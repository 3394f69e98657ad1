"""Packed sequences for the NumPy backend, with any option, and what `tests.dense` makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import _cpu, _cpu_tiles
from cuflash._blockmask import BlockMask
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.dense import Dense, Warp

HEADS, HEADS_KV, DIM, DIM_V = 4, 2, 5, 3
SEED, P = 11, 0.3

# Empty sequences anywhere, equal lengths at equal and at unequal distances, one row, one key.
LENGTHS = {
    "museum": ([5, 0, 130, 1, 0], [0, 7, 129, 0, 0]),
    "equal": ([6, 6, 6, 6], [9, 9, 9, 9]),
    "scattered": ([3, 2, 3, 3, 1, 2, 3, 0, 3], [4, 5, 4, 4, 1, 5, 4, 3, 0]),
    "alone": ([17], [23]),
    "nothing": ([0, 0], [3, 0]),
}
NAMES = (
    "plain", "causal", "window", "softcap", "alibi", "alibi_each", "mask", "blocks", "bias",
    "bias_shared", "bias_keys", "sinks", "score_mod", "dropout", "everything",
)  # fmt: skip


class Packed:
    """Packed arrays with garbage behind the last sequence, and options for them."""

    def __init__(
        self, len_q: list[int], len_k: list[int], name: str = "plain", dtype: Any = np.float64
    ) -> None:
        rng = np.random.default_rng(0)
        self.lengths = list(zip(len_q, len_k, strict=True))
        self.cu_q, self.cu_k = (np.concatenate(([0], np.cumsum(n))) for n in (len_q, len_k))
        self.pairs = len(len_q), HEADS, max(len_q), max(len_k)
        total_q, total_k = int(self.cu_q[-1]) + 37, int(self.cu_k[-1]) + 5
        self.q = rng.standard_normal((HEADS, total_q, DIM)).astype(dtype)
        self.k = rng.standard_normal((HEADS_KV, total_k, DIM)).astype(dtype)
        self.v = rng.standard_normal((HEADS_KV, total_k, DIM_V)).astype(dtype)
        self.dout = rng.standard_normal((HEADS, total_q, DIM_V)).astype(dtype)
        self.dlse = rng.standard_normal((HEADS, total_q)).astype(
            _cpu_tiles.accumulator(self.q.dtype)
        )
        for x, end in (
            (self.q, self.cu_q), (self.dout, self.cu_q), (self.dlse, self.cu_q),
            (self.k, self.cu_k), (self.v, self.cu_k),
        ):  # fmt: skip
            x[:, end[-1] :] = np.nan
        self.options = self._options(name, rng)

    def _options(self, name: str, rng: np.random.Generator) -> Options:
        batch, heads, len_q, len_k = self.pairs
        mask = rng.random(self.pairs) < 0.7
        made: dict[str, Any] = {
            "causal": {"right": 0},
            "window": {"left": 4, "right": 2, "q_offset": 1},
            "softcap": {"softcap": 1.5},
            "alibi": {"alibi_slopes": rng.random(heads)},
            "alibi_each": {"alibi_slopes": rng.random((batch, heads))},
            "mask": {"mask": mask},
            "blocks": {"blocks": BlockMask.from_dense(mask, block_size=16) if mask.size else None},
            "bias": {"bias": rng.standard_normal(self.pairs)},
            "bias_shared": {"bias": rng.standard_normal((heads, len_q, len_k))},
            "bias_keys": {"bias": rng.standard_normal((batch, 1, 1, len_k))},
            "sinks": {"sinks": rng.standard_normal(heads)},
            "score_mod": {
                "score_mod": Warp({"gain": 0.5 + rng.random(heads), "table": rng.random(7)})
            },
            "dropout": {"dropout": Dropout.of(P, SEED)},
        }  # fmt: skip
        options: dict[str, Any] = {"q_offset": None}
        chosen = (
            "causal",
            "softcap",
            "alibi_each",
            "mask",
            "bias_shared",
            "sinks",
            "score_mod",
            "dropout",
        )
        for option in chosen if name == "everything" else (name,):
            options |= made.get(option, {})
        return Options(0.3, **options)

    def wrt(self) -> list[str]:
        """Everything that has a gradient."""
        options, mod = self.options, self.options.score_mod
        given = [n for n in ("bias", "alibi_slopes", "sinks") if getattr(options, n) is not None]
        return ["q", "k", "v", *given, *([] if mod is None else mod.arrays)]

    def forward(self, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        return _cpu.varlen_forward(
            self.q, self.k, self.v, self.cu_q, self.cu_k, self.options, **kwargs
        )

    def backward(self, out: np.ndarray, lse: np.ndarray, **kwargs: Any) -> dict[str, Any]:
        """Gradients, those of score parameters among them."""
        kwargs = {"wrt": self.wrt(), "dlse": self.dlse, **kwargs}
        given = self.dout, self.q, self.k, self.v, out, lse, self.cu_q, self.cu_k, self.options
        grads = _cpu.varlen_backward(*given, **kwargs)
        return grads | grads.pop("score_params", {})

    def alone(self, b: int) -> tuple[Dense, np.ndarray, np.ndarray]:
        """Sequence b as a call of its own by the formula, its dout and dlse."""
        options, (len_q, len_k) = self.options, self.lengths[b]
        own_q, own_k = slice(self.cu_q[b], self.cu_q[b + 1]), slice(self.cu_k[b], self.cu_k[b + 1])
        mask = options.mask if options.blocks is None else options.blocks.to_dense()

        def part(x: np.ndarray | None) -> np.ndarray | None:
            """Of an option's array that broadcasts to (batch, H, longest Lq, longest Lk)."""
            return (
                None if x is None else np.broadcast_to(x, self.pairs)[b : b + 1, :, :len_q, :len_k]
            )

        slopes, keep = options.alibi_slopes, None
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[b : b + 1]
        if options.dropout is not None:
            keep = part(dropout_mask(SEED, P, self.pairs))
        dense = Dense(
            *(x[None, :, own].astype(np.float64) for x, own in ((self.q, own_q), (self.k, own_k), (self.v, own_k))),
            scale=options.scale,
            q_offset=len_k - len_q if options.q_offset is None else options.q_offset,
            left=options.left, right=options.right, softcap=options.softcap, alibi_slopes=slopes,
            mask=part(mask), bias=part(options.bias), sinks=options.sinks,
            score_mod=options.score_mod, keep=keep, p=P, first_batch=b,
        )  # fmt: skip
        return dense, self.dout[None, :, own_q].astype(np.float64), self.dlse[None, :, own_q]

    def expected(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """out, lse and gradients from the formula, one sequence at a time."""
        out, lse = np.zeros(self.dout.shape), np.full(self.dlse.shape, -np.inf)
        mod = self.options.score_mod
        grads = {
            name: np.zeros((mod.params[name] if mod is not None and name in mod.params
                            else getattr(self, name, None) if name in "qkv"
                            else getattr(self.options, name)).shape)
            for name in self.wrt()
        }  # fmt: skip
        for b, (len_q, len_k) in enumerate(self.lengths):
            dense, dout, dlse = self.alone(b)
            own_q, own_k = (
                slice(self.cu_q[b], self.cu_q[b + 1]),
                slice(self.cu_k[b], self.cu_k[b + 1]),
            )
            (out[:, own_q],), (lse[:, own_q],) = dense.forward()
            own = dense.backward(dout, dlse)
            own |= own.pop("score_params", {})
            for name, rows in (("q", own_q), ("k", own_k), ("v", own_k)):
                grads[name][:, rows] = own.pop(name)[0]
            for name, grad in own.items():
                into = grads[name]
                if name == "bias":
                    # The part of the bias that this sequence has, axes of extent 1 kept.
                    into = into[_own_part(into.shape, b, len_q, len_k)]
                    into += _fold(grad, into.shape)
                elif name == "alibi_slopes" and into.ndim == 2:
                    into[b] += grad[0]
                else:
                    into += grad
        return out, lse, grads


def _own_part(shape: tuple[int, ...], b: int, len_q: int, len_k: int) -> tuple[slice, ...]:
    whole = (slice(b, b + 1), slice(None), slice(0, len_q), slice(0, len_k))[-len(shape) :]
    return tuple(slice(None) if n == 1 else cut for n, cut in zip(shape, whole, strict=True))


def _fold(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    axes = tuple(a for a, n in enumerate(shape) if n == 1)
    return grad.sum(axis=axes, keepdims=True)
