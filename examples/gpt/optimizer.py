"""AdamW, its schedule, and the clipping of gradients, on one vector of all weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .layers import namespace
from .model import Arrays


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a line up to `peak`, then half a cosine down to a tenth of it.

    Attributes
    ----------
    peak : float
        Largest rate.
    warmup, steps : int
        Steps of the line, and of everything.

    Notes
    -----
    Loshchilov, Hutter, "SGDR", arXiv:1608.03983, section 3; Brown et al., arXiv:2005.14165,
    appendix B.

    Examples
    --------
    >>> rate = Schedule(peak=1.0, warmup=10, steps=110)
    >>> [round(rate(step), 3) for step in (0, 9, 60, 110)]
    [0.1, 1.0, 0.55, 0.1]
    """

    peak: float
    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def clip(gradient: Any, limit: float) -> Any:
    """Scale a gradient down, in place, to a Euclidean norm of `limit` if it is longer.

    Parameters
    ----------
    gradient : array (n,)
        Of all weights.
    limit : float
        Largest norm.

    Returns
    -------
    array ()
        The norm before, still on its device: nothing waits for it.

    Notes
    -----
    Pascanu, Mikolov, Bengio, arXiv:1211.5063, section 3.2.
    """
    xp = namespace(gradient)
    norm = xp.sqrt(xp.dot(gradient, gradient))
    gradient *= xp.minimum(1.0, limit / xp.maximum(norm, 1e-12)).astype(gradient.dtype)
    return norm


class AdamW:
    """Adam with decay of the matrices, not of biases and norms.

    Parameters
    ----------
    weights : Arrays
        Changed in place by `step`.
    decay : float
        Fraction of a matrix taken off per step, times the rate.
    betas : tuple of float
        How much of the two moments a step keeps.
    eps : float
        Added to the root of the second moment.

    Attributes
    ----------
    first, second : array (n,)
        The moments.

    Notes
    -----
    Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        weights: Arrays,
        decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        xp = namespace(weights.vector)
        self.weights, self.decay, self.betas, self.eps = weights, decay, betas, eps
        self.first, self.second = (xp.zeros_like(weights.vector) for _ in range(2))

    def step(self, gradient: Any, rate: float, number: int) -> None:
        """Move the weights.

        Parameters
        ----------
        gradient : array (n,)
            Of all weights; left as it is.
        rate : float
            Learning rate.
        number : int
            Steps before this one.
        """
        xp, (keep_first, keep_second) = namespace(gradient), self.betas
        change = gradient * (1 - keep_first)
        self.first *= keep_first
        self.first += change
        xp.multiply(gradient, gradient, out=change)
        change *= 1 - keep_second
        self.second *= keep_second
        self.second += change
        # The moments begin at 0; both are divided by what their sums of weights lack to 1.
        xp.divide(self.second, 1 - keep_second ** (number + 1), out=change)
        xp.sqrt(change, out=change)
        change += self.eps
        xp.divide(self.first, change, out=change)
        change *= rate / (1 - keep_first ** (number + 1))
        vector, matrices = self.weights.vector, self.weights.matrices
        vector[:matrices] *= 1 - rate * self.decay
        vector -= change
