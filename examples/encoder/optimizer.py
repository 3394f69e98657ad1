"""Named weights in one vector, and AdamW on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class Weights(Mapping[str, Any]):
    """Arrays by name, all of them views of one vector.

    Clipping and the optimizer are then a few operations on whole vectors, however many layers.

    Parameters
    ----------
    vector : array (n,)
        NumPy or CuPy; kept, not copied.
    shapes : mapping
        Shape by name.

    Examples
    --------
    >>> weights = Weights(np.arange(6.0), {"a": (2, 2), "b": (2,)})
    >>> weights["b"]
    array([4., 5.])
    """

    def __init__(self, vector: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.vector, self.shapes, self._views = vector, dict(shapes), {}
        start = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            self._views[name] = vector[start : start + size].reshape(shape)
            start += size
        if start != vector.size:
            raise ValueError(f"shapes have {start} elements, and the vector has {vector.size}.")

    def __getitem__(self, name: str) -> Any:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def zeros(self) -> Weights:
        """The same shapes, all 0: where gradients are added up."""
        return Weights(self.vector * 0, self.shapes)


class AdamW:
    """Adam with decoupled weight decay, warm-up, cosine decay and clipping.

    Parameters
    ----------
    weights : Weights
        Changed by `step`. What has two axes or more decays.
    steps : int
        Of the whole training; the rate falls to a tenth along a half cosine.
    rate : float
        The largest learning rate.
    warmup : int
        Steps of linear rise.
    decay : float
        Weight decay per unit of rate.
    clip : float
        Largest norm of a gradient.

    Notes
    -----
    Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101, 2017), algorithm
    2. Nothing here waits for a GPU.

    Examples
    --------
    >>> weights = Weights(np.ones(2), {"a": (2,)})
    >>> AdamW(weights, steps=10, rate=0.1, warmup=1).step(Weights(np.array([5.0, -5.0]), {"a": (2,)}))
    >>> weights.vector.round(3)
    array([0.9, 1.1])
    """

    def __init__(
        self,
        weights: Weights,
        *,
        steps: int,
        rate: float,
        warmup: int = 50,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        self.weights, self.steps, self.rate, self.warmup = weights, steps, rate, warmup
        self.betas, self.clip = betas, clip
        self.first, self.second = weights.vector * 0, weights.vector * 0
        self.decay = Weights(weights.vector * 0, weights.shapes)
        for array in self.decay.values():
            array[...] = decay if array.ndim > 1 else 0
        self.done = 0

    def scheduled(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * share))

    def step(self, gradients: Weights) -> None:
        """Change the weights; `gradients` are clipped in place."""
        gradient, (beta1, beta2) = gradients.vector, self.betas
        norm = (gradient * gradient).sum() ** 0.5
        gradient *= (self.clip / (norm + 1e-12)).clip(None, 1)
        rate = self.scheduled(self.done)
        self.done += 1
        self.first += (1 - beta1) * (gradient - self.first)
        self.second += (1 - beta2) * (gradient * gradient - self.second)
        update = self.first / (1 - beta1**self.done)
        update /= (self.second / (1 - beta2**self.done)) ** 0.5 + 1e-8
        update += self.decay.vector * self.weights.vector
        self.weights.vector -= rate * update


def norm(vector: Any) -> float:
    """Euclidean length."""
    return float(np.sqrt(float((vector * vector).sum())))
