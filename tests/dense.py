"""Attention with every option as one dense float64 formula, forward and backward, for small cases.

Written from the definition and apart from the package: whole Lq x Lk matrices, no tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass
class Warp:
    """A score function, its derivatives by hand, in the form in which the package takes ScoreMods:
    `gain[h] * s + table[(i - j) % len] * sin(s) + 0.1 * b`."""

    params: dict[str, np.ndarray]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return self.params

    def evaluate(self, s: Any, b: Any, h: Any, i: Any, j: Any, arrays: Any) -> Any:
        gain, table = (arrays[n].astype(np.float64) for n in ("gain", "table"))
        return gain[h] * s + table[(i - j) % len(table)] * np.sin(s) + 0.1 * b

    def derivatives(
        self, s: Any, b: Any, h: Any, i: Any, j: Any, arrays: Any, wrt: Any = ()
    ) -> tuple[Any, Any, dict[str, Callable[[Any, Any], None]]]:
        gain, table = (arrays[n].astype(np.float64) for n in ("gain", "table"))
        at = (i - j) % len(table)
        slope = gain[h] + table[at] * np.cos(s)
        terms = {"gain": (h, s), "table": (at, np.sin(s))}

        def scatter(name: str) -> Callable[[Any, Any], None]:
            where, factor = terms[name]

            def add(weights: Any, into: Any) -> None:
                seen = weights != 0
                spread = np.broadcast_to(where, weights.shape)
                np.add.at(into, spread[seen], (weights * factor)[seen])

            return add

        return self.evaluate(s, b, h, i, j, arrays), slope, {n: scatter(n) for n in wrt}


@dataclass
class Dense:
    """A call of arrays (B, H, L, D) with all its options; `first_batch` is the number of the first
    batch element.

    `keep` (B, H, Lq, Lk) is dropout's mask, `p` its probability.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float = 0.3
    q_offset: int = 0
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    alibi_slopes: np.ndarray | None = None
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    sinks: np.ndarray | None = None
    score_mod: Warp | None = None
    keep: np.ndarray | None = None
    p: float = 0.0
    first_batch: int = 0
    saved: dict[str, Any] = field(default_factory=dict)

    def having(self, **changes: Any) -> Dense:
        """The same call with other arguments."""
        return replace(self, **changes, saved={})

    def visible(self) -> np.ndarray:
        """bool (B, H, Lq, Lk)."""
        (batch, heads, len_q, _), len_k = self.q.shape, self.k.shape[-2]
        away = np.arange(len_k) - np.arange(len_q)[:, None] - self.q_offset
        seen = np.ones((batch, heads, len_q, len_k), bool)
        seen &= True if self.left is None else away >= -self.left
        seen &= True if self.right is None else away <= self.right
        return seen if self.mask is None else seen & self.mask

    def forward(self) -> tuple[np.ndarray, np.ndarray]:
        """out (B, H, Lq, Dv), lse (B, H, Lq)."""
        q, k, v = self._wide()
        batch, heads, len_q, _ = q.shape
        raw = self.scale * q @ k.swapaxes(-1, -2)
        tanh = None if self.softcap is None else np.tanh(raw / self.softcap)
        s = raw if tanh is None else self.softcap * tanh
        where = np.ix_(*(range(n) for n in (batch, heads, len_q, k.shape[-2])))
        where = (where[0] + self.first_batch, *where[1:])
        modified = None
        if self.score_mod is not None:
            mod = self.score_mod
            modified = mod.derivatives(s, *where, mod.params, wrt=tuple(mod.params))
            s = modified[0]
        if self.bias is not None:
            s = s + self.bias.astype(np.float64)
        if self.alibi_slopes is not None:
            slopes = np.broadcast_to(self.alibi_slopes, (batch, heads)).astype(np.float64)
            s = s - slopes[..., None, None] * abs(where[2] + self.q_offset - where[3])
        seen = self.visible()
        s = np.where(seen, s, -np.inf)
        sink = np.full(heads, -np.inf) if self.sinks is None else self.sinks.astype(np.float64)
        sink = np.broadcast_to(sink[:, None, None], (batch, heads, len_q, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            top = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
            shift = np.where(np.isneginf(top), 0, top)
            e = np.where(seen, np.exp(s - shift), 0)
            total = e.sum(axis=-1, keepdims=True) + np.exp(sink - shift)
            lse = np.log(total) + top
            weights = e / np.where(total == 0, 1, total)
        z = 1.0 if self.keep is None else self.keep / (1 - self.p)
        out = (weights * z) @ v
        with np.errstate(invalid="ignore"):
            share = np.where(
                np.isneginf(sink), 0, np.exp(sink - np.where(np.isneginf(lse), 0, lse))
            )
        self.saved = {
            "weights": weights, "z": z, "tanh": tanh, "modified": modified, "share": share,
            "away": abs(where[2] + self.q_offset - where[3]),
        }  # fmt: skip
        return out, lse[..., 0]

    def backward(self, dout: np.ndarray, dlse: np.ndarray) -> dict[str, Any]:
        """Gradients of sum(out * dout) + sum(lse * dlse) by name; those of score parameters in
        "score_params"."""
        out, _ = self.forward()
        q, k, v = self._wide()
        weights, z = self.saved["weights"], self.saved["z"]
        delta = (dout * out).sum(axis=-1, keepdims=True) - dlse[..., None]
        ds = weights * ((dout @ v.swapaxes(-1, -2)) * z - delta)
        grads: dict[str, Any] = {"v": (weights * z).swapaxes(-1, -2) @ dout}
        if self.sinks is not None:
            grads["sinks"] = -(self.saved["share"] * delta).sum(axis=(0, 2, 3))
        if self.alibi_slopes is not None:
            by_head = -(ds * self.saved["away"]).sum(axis=(-2, -1))
            grads["alibi_slopes"] = unbroadcast(by_head, self.alibi_slopes.shape)
        if self.bias is not None:
            grads["bias"] = unbroadcast(ds, self.bias.shape)
        if self.saved["modified"] is not None:
            _, slope, scatter = self.saved["modified"]
            grads["score_params"] = {}
            for name, x in self.score_mod.params.items():
                grads["score_params"][name] = np.zeros(x.shape)
                scatter[name](ds, grads["score_params"][name])
            ds = ds * slope
        if self.saved["tanh"] is not None:
            ds = ds * (1 - self.saved["tanh"] ** 2)
        grads["q"] = self.scale * ds @ k
        grads["k"] = self.scale * ds.swapaxes(-1, -2) @ q
        for name in ("k", "v"):
            given = getattr(self, name)
            heads_kv, group = given.shape[1], q.shape[1] // given.shape[1]
            by_group = grads[name].reshape(len(q), heads_kv, group, *given.shape[2:])
            per_head = by_group.sum(axis=2)
            grads[name] = unbroadcast(per_head, given.shape)
        return grads

    def _wide(self) -> list[np.ndarray]:
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        return [
            q,
            *(np.repeat(np.broadcast_to(x, (len(q), *x.shape[1:])), group, 1) for x in (k, v)),
        ]


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which an array of `shape` was broadcast."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)
