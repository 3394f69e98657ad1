"""The encoder: the layers put together, forwards and backwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .attention import Attention
from .layers import Pullback, embedding, gelu, layer_norm, linear, rotary
from .optimizer import Weights


@dataclass(frozen=True)
class Shape:
    """Extents of an encoder.

    Attributes
    ----------
    layers, heads, width : int
        Head dimension: width / heads.
    distinct : int
        Layers with weights of their own; the others repeat them in turn.
    kinds : int
        Of tokens.
    outputs : int
        Columns of the last map.
    entries : int
        Of each layer's relative-position table, per head; 0 for none.
    """

    layers: int
    heads: int
    width: int
    kinds: int
    outputs: int
    distinct: int
    entries: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights by name."""
        width = self.width
        found: dict[str, tuple[int, ...]] = {"tokens": (self.kinds, width)}
        maps = {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        for number in range(self.distinct):
            at = f"{number}."
            for name, extents in maps.items():
                found |= {f"{at}{name}.weight": extents, f"{at}{name}.bias": extents[1:]}
            for name in ("before", "between"):
                found |= {f"{at}{name}.weight": (width,), f"{at}{name}.bias": (width,)}
            if self.entries:
                found[f"{at}table"] = (self.heads, self.entries)
        found |= {"last.weight": (width,), "last.bias": (width,)}
        return found | {"head.weight": (width, self.outputs), "head.bias": (self.outputs,)}

    def initial(self, seed: int, dtype: Any = np.float32) -> Weights:
        """Random weights, as NumPy arrays: norms and biases at 1 and 0, tables at 0."""
        shapes, rng = self.shapes, np.random.default_rng(seed)
        size = sum(math.prod(extents) for extents in shapes.values())
        weights = Weights(np.zeros(size, dtype), shapes)
        for name, array in weights.items():
            if name == "tokens":
                array[...] = rng.standard_normal(array.shape)
            elif name == "head.weight":
                array[...] = 0  # every answer equally likely
            elif array.ndim == 2 and name.endswith("weight"):
                # The sum of all layers' contributions is to have the size of one row of x.
                share = 2 * self.layers if name.endswith(("out.weight", "down.weight")) else 1
                array[...] = rng.standard_normal(array.shape) / math.sqrt(len(array) * share)
            elif name.endswith("weight"):
                array[...] = 1
        return weights


def encode(
    shape: Shape, weights: Weights, tokens: Any, attention: Attention, phases: Any = None
) -> tuple[Any, Pullback]:
    """Rows (batch, length, width) for a batch of sequences, ready for the last linear map.

    Parameters
    ----------
    shape : Shape
    weights : Weights
    tokens : int array (batch, length)
    attention : Attention
    phases : complex array (length, D / 2), optional
        Rotary position embedding of queries and keys.

    Returns
    -------
    rows : array (batch, length, width)
    pullback : callable
        (drows, gradients) -> None; adds to the Weights `gradients`

    Notes
    -----
    Layers that repeat: Dehghani, Gouws, Vinyals, Uszkoreit, Kaiser, "Universal Transformers"
    (arXiv:1807.03819, 2018). Pre-norm: Xiong et al., "On Layer Normalization in the Transformer Architecture"
    (arXiv:2002.04745, 2020), figure 1b.
    """
    x, back_tokens = embedding(tokens, weights["tokens"])
    backs = []
    for number in range(shape.layers):
        x, back = _block(shape, weights, f"{number % shape.distinct}.", x, attention, phases)
        backs.append(back)
    rows, back_last = layer_norm(x, weights["last.weight"], weights["last.bias"])

    def pullback(drows: Any, gradients: Weights) -> None:
        dx, dweight, dbias = back_last(drows)
        _add(gradients, "last", dweight, dbias)
        for back in reversed(backs):
            dx = back(dx, gradients)
        gradients["tokens"][...] += back_tokens(dx)

    return rows, pullback


def _block(
    shape: Shape, weights: Weights, at: str, x: Any, attention: Attention, phases: Any
) -> tuple[Any, Pullback]:
    """x plus attention, plus a network of one hidden layer."""

    def apply(layer: Any, name: str, y: Any) -> tuple[Any, Pullback]:
        return layer(y, weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"])

    parts = (*x.shape[:2], 3, shape.heads, shape.width // shape.heads)
    y, back_before = apply(layer_norm, "before", x)
    qkv, back_qkv = apply(linear, "qkv", y)
    qkv = qkv.reshape(parts)
    if phases is not None:
        qkv, back_turn = rotary(qkv, phases)
    y, back_attention = attention(qkv, weights.get(f"{at}table"))
    y, back_out = apply(linear, "out", y.reshape(x.shape))
    x = x + y
    y, back_between = apply(layer_norm, "between", x)
    y, back_up = apply(linear, "up", y)
    y, back_gelu = gelu(y)
    y, back_down = apply(linear, "down", y)

    def pullback(dx: Any, gradients: Weights) -> Any:
        def apply_back(back: Pullback, name: str, dy: Any) -> Any:
            dy, dweight, dbias = back(dy)
            _add(gradients, at + name, dweight, dbias)
            return dy

        dy = back_gelu(apply_back(back_down, "down", dx))
        dy = apply_back(back_between, "between", apply_back(back_up, "up", dy))
        dx = dx + dy
        dy = apply_back(back_out, "out", dx).reshape(*parts[:2], *parts[3:])
        dqkv, dtable = back_attention(dy)
        if dtable is not None:
            gradients[f"{at}table"][...] += dtable
        if phases is not None:
            dqkv = back_turn(dqkv)
        dy = apply_back(back_qkv, "qkv", dqkv.reshape(*parts[:2], -1))
        return dx + apply_back(back_before, "before", dy)

    return x + y, pullback


def _add(gradients: Weights, name: str, dweight: Any, dbias: Any) -> None:
    gradients[f"{name}.weight"][...] += dweight
    gradients[f"{name}.bias"][...] += dbias
