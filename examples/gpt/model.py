"""GPT-2: the layers put together, forwards and backwards.

Weights have GPT-2's names ("wte", "h.0.attn.c_attn.weight", ...) and its shapes. All of them are
views of one vector, so that clipping and the optimizer are a few operations on whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .attention import Layer
from .layers import cross_entropy, embedding, gelu, layer_norm, linear, tied_head


@dataclass(frozen=True)
class Shape:
    """Extents of the model.

    Attributes
    ----------
    layers, heads, width, context : int
        Of GPT-2 "small": 12, 12, 768, 1024.
    vocabulary : int
        Rows of the embedding, at least 256: tokens are bytes.
    """

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int = 256


class Arrays(Mapping[str, Any]):
    """Arrays by name, each a view of a part of `vector`.

    Parameters
    ----------
    shapes : mapping of str to tuple
        In the order of the vector.
    vector : array (sum of sizes,)
        Where they live.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], vector: Any) -> None:
        self.shapes, self.vector, self._views = shapes, vector, {}
        start = 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            self._views[name] = vector[start:end].reshape(shape)
            start = end

    def __getitem__(self, name: str) -> Any:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def matrices(self) -> int:
        """Elements of the vector that belong to matrices, which come first."""
        return sum(math.prod(shape) for shape in self.shapes.values() if len(shape) == 2)


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by name, matrices first."""
    width = shape.width
    dense = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4}
    found: dict[str, tuple[int, ...]] = {
        "wte": (shape.vocabulary, width),
        "wpe": (shape.context, width),
    }
    for number in range(shape.layers):
        for name, factor in dense.items():
            found[f"h.{number}.{name}.weight"] = (width, factor * width)
            found[f"h.{number}.{name}.bias"] = (factor * width,)
        found[f"h.{number}.mlp.c_proj.weight"] = (4 * width, width)
        found[f"h.{number}.mlp.c_proj.bias"] = (width,)
        for name in ("ln_1", "ln_2"):
            found |= {f"h.{number}.{name}.{part}": (width,) for part in ("weight", "bias")}
    found |= {f"ln_f.{part}": (width,) for part in ("weight", "bias")}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def initial_weights(shape: Shape, seed: int, xp: Any = np, dtype: Any = np.float32) -> Arrays:
    """Weights before the first step, the same for NumPy and CuPy.

    Parameters
    ----------
    shape : Shape
        Of the model.
    seed : int
        Of the random numbers.
    xp : module
        `numpy` or `cupy`.
    dtype : dtype
        Of the weights.

    Returns
    -------
    Arrays

    Notes
    -----
    Normal with deviation 0.02 for GPT-2's width of 768, and as the inverse root of the width for
    others; projections that end in the residual stream are divided by the root of how many there
    are. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    Positions begin as waves (Vaswani et al., arXiv:1706.03762, section 3.5) and are trained like
    the rest: a short run has no time to find out which positions are neighbours.
    """
    rng, shapes = np.random.default_rng(seed), weight_shapes(shape)
    weights = Arrays(shapes, np.zeros(sum(map(math.prod, shapes.values())), dtype=dtype))
    for name, weight in weights.items():
        if weight.ndim == 2:
            ends = 2 * shape.layers if name.endswith("c_proj.weight") else 1
            deviation = 0.02 * math.sqrt(768 / (shape.width * ends))
            unit = _waves(shape) if name == "wpe" else rng.standard_normal(weight.shape)
            weight[...] = deviation * unit
        elif ".ln_" in f".{name}" and name.endswith("weight"):
            weight[...] = 1
    return weights if xp is np else Arrays(shapes, xp.asarray(weights.vector))


def _waves(shape: Shape) -> np.ndarray:
    """(context, width) of variance 1: sines and cosines, from 1 to `context` radians long."""
    columns = np.arange(shape.width)
    angles = np.arange(shape.context)[:, None] / shape.context ** (columns // 2 * 2 / shape.width)
    return math.sqrt(2) * np.where(columns % 2, np.cos(angles), np.sin(angles))


class GPT:
    """The model.

    Parameters
    ----------
    shape : Shape
        Its extents.
    weights : Arrays
        From `initial_weights` or a checkpoint.
    attention : callable
        A layer of `attention.py`.

    Examples
    --------
    >>> from gpt.attention import fused_attention
    >>> shape = Shape(layers=1, heads=2, width=8, context=16)
    >>> model = GPT(shape, initial_weights(shape, seed=0), fused_attention)
    >>> tokens = np.arange(12).reshape(2, 6)
    >>> loss, pullback = model.loss(tokens, tokens)
    >>> gradients = Arrays(model.weights.shapes, np.zeros_like(model.weights.vector))
    >>> pullback(gradients)
    >>> loss.shape, gradients["wte"].shape
    ((), (256, 8))
    """

    def __init__(self, shape: Shape, weights: Arrays, attention: Layer) -> None:
        self.shape, self.weights, self.attention = shape, weights, attention

    def loss(self, tokens: Any, targets: Any) -> tuple[Any, Callable[[Arrays], None]]:
        """Mean cross entropy in nats per token.

        Parameters
        ----------
        tokens : integer array (batch, length)
            What the model sees; length <= context.
        targets : integer array (batch, length)
            What comes next.

        Returns
        -------
        loss : array ()
        pullback : callable
            Adds the gradient of the loss to the `Arrays` it is given.
        """
        x, back_hidden = self._hidden(tokens)
        rows = x.reshape(-1, x.shape[-1])
        logits, back_head = tied_head(rows, self.weights["wte"])
        loss, back_loss = cross_entropy(logits, targets.reshape(-1))

        def pullback(gradients: Arrays) -> None:
            drows, dtable = back_head(back_loss())
            gradients["wte"][...] += dtable
            back_hidden(drows.reshape(x.shape), gradients)

        return loss, pullback

    def next_logits(self, tokens: Any) -> Any:
        """Scores (batch, vocabulary) of the token after the last of `tokens` (batch, length)."""
        x, _ = self._hidden(tokens)
        return tied_head(x[:, -1], self.weights["wte"])[0]

    def _hidden(self, tokens: Any) -> tuple[Any, Callable[[Any, Arrays], None]]:
        """Last hidden state (batch, length, width)."""
        x, back_embedding = embedding(tokens, self.weights["wte"], self.weights["wpe"])
        backs = []
        for number in range(self.shape.layers):
            x, back = self._block(x, f"h.{number}.")
            backs.append(back)
        x, back_norm = self._named(layer_norm, x, "ln_f")

        def pullback(dx: Any, gradients: Arrays) -> None:
            dx = back_norm(dx, gradients)
            for back in reversed(backs):
                dx = back(dx, gradients)
            dtable, dpositions = back_embedding(dx)
            gradients["wte"][...] += dtable
            gradients["wpe"][...] += dpositions

        return x, pullback

    def _block(self, x: Any, name: str) -> tuple[Any, Callable[[Any, Arrays], Any]]:
        """x + attention(norm(x)), and of that x + mlp(norm(x))."""
        batch, length, width = x.shape
        heads = self.shape.heads
        y, back_norm_1 = self._named(layer_norm, x, f"{name}ln_1")
        y, back_qkv = self._named(linear, y, f"{name}attn.c_attn")
        y, back_attention = self.attention(y.reshape(batch, length, 3, heads, width // heads))
        y, back_out = self._named(linear, y.reshape(x.shape), f"{name}attn.c_proj")
        x = x + y
        y, back_norm_2 = self._named(layer_norm, x, f"{name}ln_2")
        y, back_up = self._named(linear, y, f"{name}mlp.c_fc")
        y, back_gelu = gelu(y)
        y, back_down = self._named(linear, y, f"{name}mlp.c_proj")

        def pullback(dx: Any, gradients: Arrays) -> Any:
            dy = back_gelu(back_down(dx, gradients))
            dx = dx + back_norm_2(back_up(dy, gradients), gradients)
            dy = back_out(dx, gradients).reshape(batch, length, heads, width // heads)
            dy = back_attention(dy).reshape(batch, length, 3 * width)
            return dx + back_norm_1(back_qkv(dy, gradients), gradients)

        return x + y, pullback

    def _named(
        self, layer: Callable[..., Any], x: Any, name: str
    ) -> tuple[Any, Callable[[Any, Arrays], Any]]:
        """A layer with the weights of that name; its pullback adds their gradients and returns dx."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        y, inner = layer(x, self.weights[weight], self.weights[bias])

        def pullback(dy: Any, gradients: Arrays) -> Any:
            dx, dweight, dbias = inner(dy)
            gradients[weight][...] += dweight
            gradients[bias][...] += dbias
            return dx

        return y, pullback
