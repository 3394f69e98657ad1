"""How the gas begins, moves by its forces, and should move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .gas import Gas, State
from .neighbours import REACH, near, order


def at_rest(gas: Gas) -> np.ndarray:
    """Places (n, 2) with the density of the gas at rest, in an order where neighbours are together.

    A spiral with the golden angle (Vogel, Math. Biosciences 44, 1979) whose radii follow the mass
    inside them, so that there is no noise of random places.
    """
    inside = (np.arange(gas.count) + 0.5) / gas.count
    radius = np.sqrt(1 - (1 - inside) ** ((gas.gamma - 1) / gas.gamma))
    angle = np.arange(gas.count) * math.pi * (3 - math.sqrt(5))
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return x[order(x)]


@dataclass
class Motion:
    """Particles in motion, by leapfrog.

    Attributes
    ----------
    gas : Gas
    x, velocity : array (n, 2)
    xp : module
        `numpy` or `cupy`.
    sparse : bool
        Leave out blocks of pairs that are too far apart to matter.
    """

    gas: Gas
    x: Any
    velocity: Any
    xp: Any = np
    sparse: bool = True

    @classmethod
    def breathing(cls, gas: Gas, rate: float, xp: Any = np) -> Motion:
        """The gas at rest, set in motion outwards with `rate` times the place."""
        x = xp.asarray(at_rest(gas))
        return cls(gas, x, rate * x, xp)

    @classmethod
    def stirred(cls, gas: Gas, seed: int, xp: Any = np) -> Motion:
        """Places off those at rest, so that forces are large, and velocities without a symmetry."""
        normal, x = np.random.default_rng(seed).standard_normal, at_rest(gas)
        x = x + 0.3 * gas.width * normal(x.shape)
        return cls(gas, xp.asarray(x), xp.asarray(normal(x.shape)), xp)

    def mask(self) -> Any:
        """Of the particles where they are now."""
        return near(self.x, REACH * self.gas.width, self.xp) if self.sparse else None

    def state(self) -> State:
        """Energy and forces where they are now."""
        return self.gas.state(self.x, self.velocity, self.mask(), self.xp)

    def step_size(self) -> float:
        """A quarter of what sound takes across a particle at the centre.

        Sound squared is gamma * stiffness * density**(gamma - 1).
        """
        sound = math.sqrt((self.gas.gamma - 1) / 2)
        return 0.25 * self.gas.width / sound

    def energy(self, state: State) -> float:
        """All of it."""
        return float(state.energy + self.gas.mass * (self.velocity**2).sum() / 2)

    def radius(self) -> float:
        """Root of the mean of the squared distances from the centre."""
        return float(self.xp.sqrt((self.x**2).sum(axis=1).mean()))

    def steps(self, count: int, size: float) -> Iterator[State]:
        """The state before the first step and after each: half a kick, drift, half a kick."""
        state = self.state()
        yield state
        for _ in range(count):
            self.velocity = self.velocity + size / 2 / self.gas.mass * state.force
            self.x = self.x + size * self.velocity
            state = self.state()
            self.velocity = self.velocity + size / 2 / self.gas.mass * state.force
            yield state


def scale_factors(gas: Gas, rate: float, times: np.ndarray) -> np.ndarray:
    """b(t), by which every distance from the centre grows in the exact motion, and its rate b'(t).

    Parameters
    ----------
    gas : Gas
    rate : float
        b'(0); b(0) is 1.
    times : array (n,)
        Increasing, from 0.

    Returns
    -------
    array (n, 2)

    Notes
    -----
    Density b**-2 and velocities b'/b * x solve the equations of the gas when
    b'' = -b + b**(1 - 2 gamma). With gamma = 2 the motion has exactly twice the trap's frequency
    whatever its amplitude (Pitaevskii, Rosch, Phys. Rev. A 55, 1997, R853); water in a basin: Thacker,
    J. Fluid Mech. 107, 1981. Integrated by the classical method of Runge and Kutta.

    Examples
    --------
    >>> later = scale_factors(Gas(10), 0.2, np.array([0, np.pi]))[1]  # one period
    >>> bool(np.allclose(later, [1, 0.2]))
    True
    """

    def slope(y: np.ndarray) -> np.ndarray:
        return np.array([y[1], -y[0] + y[0] ** (1 - 2 * gas.gamma)])

    found, y = [np.array([1.0, rate])], np.array([1.0, rate])
    for start, end in pairwise(times):
        parts = max(1, math.ceil((end - start) / 0.002))
        step = (end - start) / parts
        for _ in range(parts):
            k1 = slope(y)
            k2 = slope(y + step / 2 * k1)
            k3 = slope(y + step / 2 * k2)
            k4 = slope(y + step * k3)
            y = y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(y)
    return np.array(found)


def frequency(times: np.ndarray, values: np.ndarray) -> float:
    """Angular frequency of the sine wave, plus a constant, that is nearest to the values.

    Parameters
    ----------
    times, values : array (n,)
        Over about one period.

    Examples
    --------
    >>> t = np.linspace(0, 3, 100)
    >>> round(frequency(t, 5 + np.sin(1.9 * t + 0.3)), 6)
    1.9
    """

    def misfit(omega: float) -> float:
        waves = np.stack([np.ones_like(times), np.cos(omega * times), np.sin(omega * times)], 1)
        best = np.linalg.lstsq(waves, np.asarray(values), rcond=None)[0]
        return float(((waves @ best - values) ** 2).sum())

    guess = 2 * math.pi / (times[-1] - times[0])
    low, high = 0.7 * guess, 1.3 * guess
    for _ in range(60):  # thirds: one minimum in between
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if misfit(left) < misfit(right) else (left, high)
    return float(low + high) / 2
