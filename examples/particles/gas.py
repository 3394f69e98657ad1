"""Energy and forces of a trapped gas of particles, from the log-sum-exp of attention.

Smoothed particle hydrodynamics gives every particle a density, the sum of the Gaussians of all
particles at its place. That sum is the denominator of a softmax over particles whose score falls
with the distance squared; so lse is the logarithm of the density, and forces are what the pullback
makes of a gradient of lse. The numerator with velocities as values is the smoothed velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cuflash


class State(NamedTuple):
    """What one call tells about particles at their places.

    Attributes
    ----------
    energy : float
        Internal and potential; kinetic energy is not in it.
    force : array (n, 2)
        Minus the gradient of the energy.
    density : array (n,)
        Of mass, at every particle.
    flow : array (n, 2)
        The velocities around every particle, weighted by nearness.
    """

    energy: Any
    force: Any
    density: Any
    flow: Any


@dataclass(frozen=True)
class Gas:
    """A polytropic gas, pressure = stiffness * density**gamma, in a harmonic trap in two dimensions.

    Total mass, the trap's angular frequency and the radius at rest are 1. With gamma = 2 this is
    water in a parabolic basin, a trapped Bose gas in its hydrodynamic limit, and the "toy star".

    Attributes
    ----------
    count : int
        Particles.
    gamma : float
        Exponent, above 1.
    overlap : float
        Width of a particle's Gaussian over the distance of particles at the centre.

    Notes
    -----
    Gingold, Monaghan, "Smoothed particle hydrodynamics: theory and application to non-spherical
    stars", MNRAS 181, 1977: densities from Gaussians. Springel, Hernquist, MNRAS 333, 2002: forces
    as the exact gradient of the energy, which therefore is conserved. Monaghan, Price, "Toy stars in
    one dimension", MNRAS 350, 2004: the trap in the place of gravity.

    Examples
    --------
    >>> gas = Gas(1000)
    >>> round(gas.central, 4), round(gas.width, 4)
    (0.6366, 0.0594)
    """

    count: int
    gamma: float = 2.0
    overlap: float = 1.5

    @property
    def mass(self) -> float:
        """Of one particle."""
        return 1 / self.count

    @property
    def central(self) -> float:
        """Density at the centre at rest: density = central * (1 - r**2)**(1 / (gamma - 1))."""
        return self.gamma / ((self.gamma - 1) * math.pi)

    @property
    def stiffness(self) -> float:
        """So that pressure and trap balance with radius 1."""
        return (self.gamma - 1) / (2 * self.gamma * self.central ** (self.gamma - 1))

    @property
    def width(self) -> float:
        """h of exp(-(distance / h)**2)."""
        return self.overlap * math.sqrt(self.mass / self.central)

    def inputs(self, x: Any, xp: Any) -> tuple[Any, Any]:
        """Queries and keys whose product is -(|x_i - x_j| / h)**2.

        That is 2 x_i . x_j - |x_j|**2 - |x_i|**2 over h**2: terms as large as 1 / h**2 that cancel to
        order 1, which takes float64.
        """
        ones, squares = xp.ones_like(x[:, :1]), (x * x).sum(axis=1, keepdims=True) / self.width**2
        q = xp.concatenate([2 * x / self.width**2, ones, -squares], axis=1)
        k = xp.concatenate([x, -squares, ones], axis=1)
        return q, k

    def from_log_density(self, log_density: Any, x: Any, xp: Any) -> tuple[Any, Any]:
        """Energy, and its gradient with respect to the logarithm of every particle's density."""
        pressure_like = self.stiffness * xp.exp((self.gamma - 1) * log_density)
        internal = pressure_like.sum() / (self.gamma - 1)
        trap = (x * x).sum() / 2
        return self.mass * (internal + trap), self.mass * pressure_like

    def state(self, x: Any, velocity: Any, mask: cuflash.BlockMask | None, xp: Any) -> State:
        """Energy, forces and density by cuflash.

        Parameters
        ----------
        x, velocity : array (n, 2), float64
        mask : BlockMask, optional
            Pairs near enough to matter (`neighbours.near`); None for all pairs.
        xp : module
            `numpy` or `cupy`.
        """
        q, k = self.inputs(x, xp)
        (flow, lse), pullback = cuflash.attention_vjp(
            q, k, velocity, scale=1.0, mask=mask, wrt=("q", "k"), return_lse=True
        )
        log_density = lse + math.log(self.mass / (math.pi * self.width**2))
        energy, slope = self.from_log_density(log_density, x, xp)
        grads = pullback(xp.zeros_like(flow), slope)
        # Back through `inputs`. The last of q's and the third of k's columns hold the sums of all
        # weights that the first two hold sums of places with: what they have in common cancels.
        weights = grads.q[:, 3:] + grads.k[:, 2:3]
        force = -2 / self.width**2 * (grads.q[:, :2] - x * weights) - grads.k[:, :2] - self.mass * x
        return State(energy, force, xp.exp(log_density), flow)

    def dense(
        self, x: Any, velocity: Any, xp: Any, rows: Any = slice(None), density: Any = None
    ) -> State:
        """The same by matrices of all pairs and their differences: nothing cancels, nothing fits.

        With `rows` for these particles alone, as sums over all; the density of all is then given.
        """
        apart = x[rows, None] - x[None]  # (rows, n, 2)
        weight = xp.exp(-(apart * apart).sum(axis=2) / self.width**2)
        weight *= self.mass / (math.pi * self.width**2)
        own = weight.sum(axis=1)
        density = own if density is None else density
        energy, slope = self.from_log_density(xp.log(density), x, xp)
        # d density_i / d x_j for all pairs, times d energy / d density_i.
        ratio = slope / density
        pairs = (ratio[rows, None] + ratio[None]) * weight
        force = 2 / self.width**2 * (pairs[:, :, None] * apart).sum(axis=1) - self.mass * x[rows]
        return State(energy, force, own, (weight / own[:, None]) @ velocity)

    def pair_bytes(self) -> int:
        """Of one float64 matrix of all pairs."""
        return 8 * self.count**2

    def dense_bytes(self) -> int:
        """Of all that `dense` holds at its largest: places twice, their products, weights twice."""
        return 6 * self.pair_bytes()
