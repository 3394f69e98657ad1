"""A gas breathing in a trap: 131,072 particles, densities and forces by attention and its gradient, in float64.

Smoothed particle hydrodynamics is attention. Scores fall with the distance squared, so lse is the
logarithm of every particle's density, the energy is a function of it, and forces are minus its
gradient: the pullback's, through queries and keys. A block mask is the neighbour list. With
gamma = 2 (water in a parabolic basin, a Bose gas in a trap, a toy star) the gas breathes at twice
the trap's frequency, whatever the amplitude; energy is conserved as leapfrog conserves it.

    python examples/sph.py        # --device cupy --particles 1048576 --steps 1000 on a GPU

It checks energy, forces, densities and smoothed velocities of 1,500 particles against matrices of
all pairs and against finite differences, follows 2,000 through a whole period beside the exact
solution, and then takes some steps of 131,072, of which no matrix of all pairs fits. Exit status 1
when one of the checks fails. It takes some 50 s of CPU time, here on two cores shared with other work:

    1,500 particles, all pairs, against matrices: energy 0e+00, force 7e-14, density 4e-14, flow 4e-14
    1,500 particles, the 73% that are near, against matrices: energy 0e+00, force 5e-14, density 4e-14, flow 4e-14
      forces against finite differences of the energy: 9e-09
    2,000 particles, one period in 212 steps: 6 s of CPU time
      energy stays within 4.5e-06 of itself
      frequency 2.003 of the trap's, exact 2.000; radius within 0.5% of the exact one, which moves by 20%
    131,072 particles, 1.34% of pairs seen: 194.1 MiB of arrays for energy and forces
      one matrix of all pairs: 128.0 GiB; the dense formula would hold 768.0 GiB; free here: 21.6 GiB
      8 steps: 3.8 s of CPU time each, 95 s in all; energy stays within 1.9e-10 of itself
      smoothed velocities within 0.1% of the exact flow
      32 of them against sums over all 131,072: force 7e-11, density 2e-12
      had this been float32: force 1e-01
    all checks hold
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from encoder import measure
from gradcheck import relative_error
from particles.gas import Gas, State
from particles.motion import Motion, frequency, scale_factors

PARTS = ("energy", "force", "density", "flow")


def rounding(gas: Gas) -> dict[str, float]:
    """Relative error that float64 leaves to each part of a `State`, four times over.

    Scores are differences of numbers as large as 2 / h**2, so that is what their rounding is relative
    to, and with them weights and densities. Forces are sums of weights times distances near h over
    h**2: 1 / h more, should all errors of a sum point the same way.
    """
    scores = 4 * np.finfo(float).eps * 2 / gas.width**2
    return {"energy": scores, "force": scores / gas.width, "density": scores, "flow": scores}


def differences(found: State, expected: State) -> dict[str, float]:
    """The largest difference of each part over the largest value of that part."""
    return {
        name: float(abs(getattr(found, name) - one).max() / abs(one).max())
        for name, one in expected._asdict().items()
    }


def check_small(count: int, options: argparse.Namespace, xp: Any) -> bool:
    """Everything against all pairs, with and without the mask, and forces against the energy.

    Off rest, where forces are not what is left of a balance.
    """
    gas = Gas(count, options.gamma)
    motion = Motion.stirred(gas, 0, xp)
    dense, allowed = gas.dense(motion.x, motion.velocity, xp), rounding(gas)
    good = True
    for mask in (None, motion.mask()):
        found = gas.state(motion.x, motion.velocity, mask, xp)
        errors = differences(found, dense)
        good &= all(errors[name] < allowed[name] for name in PARTS)
        seen = f"the {mask.density:.0%} that are near" if mask else "all pairs"
        shown = ", ".join(f"{name} {errors[name]:.0e}" for name in PARTS)
        print(f"{count:,} particles, {seen}, against matrices: {shown}")
    state = motion.state()
    energy = lambda moved: gas.state(moved["x"], motion.velocity, motion.mask(), xp).energy  # noqa: E731
    # Every particle moves by about a hundredth of its width.
    step = 0.01 * gas.width * math.sqrt(motion.x.size)
    error = relative_error(energy, {"x": motion.x}, "x", -state.force, step=step)
    print(f"  forces against finite differences of the energy: {error:.0e}")
    return good and error < 1e-7


def check_period(count: int, options: argparse.Namespace, xp: Any) -> bool:
    """One period beside the exact solution."""
    gas = Gas(count, options.gamma)
    motion = Motion.breathing(gas, options.rate, xp)
    period = 2 * math.pi / math.sqrt(2 * gas.gamma)
    steps = math.ceil(period / motion.step_size())
    times = period / steps * np.arange(steps + 1)
    start, energies, radii = time.process_time(), [], []
    for state in tqdm(
        motion.steps(steps, period / steps), total=steps + 1, desc="period", leave=False
    ):
        energies.append(motion.energy(state))
        radii.append(motion.radius())
    seconds = time.process_time() - start
    drift = float(np.abs(np.divide(energies, energies[0]) - 1).max())
    exact = scale_factors(gas, options.rate, times)[:, 0]
    apart = float(np.abs(np.divide(radii, radii[0]) - exact).max())
    ours, theirs = (frequency(times, np.square(curve)) for curve in (radii, exact))
    print(
        f"{count:,} particles, one period in {steps} steps: {seconds:.0f} s of CPU time\n"
        f"  energy stays within {drift:.1e} of itself\n"
        f"  frequency {ours:.3f} of the trap's, exact {theirs:.3f}; "
        f"radius within {apart:.1%} of the exact one, which moves by {np.ptp(exact):.0%}"
    )
    # Leapfrog errs by (step * fastest frequency)**2, and steps are a quarter of that time; at the
    # edge, one width wide, the gas is no continuum.
    return drift < 1e-4 and abs(ours / theirs - 1) < gas.width / 2


def check_large(options: argparse.Namespace, xp: Any) -> bool:
    """Steps of more particles than matrices of all pairs have room for."""
    gas = Gas(options.particles, options.gamma)
    motion = Motion.breathing(gas, options.rate, xp)
    peak = measure.peak_bytes(motion.state, xp)
    mask, size = motion.mask(), motion.step_size()
    print(
        f"{gas.count:,} particles, {mask.density:.2%} of pairs seen: "
        f"{measure.size(peak)} of arrays for energy and forces\n"
        f"  one matrix of all pairs: {measure.size(gas.pair_bytes())}; the dense formula would hold "
        f"{measure.size(gas.dense_bytes())}; free here: {measure.size(measure.free_bytes(xp))}",
        flush=True,
    )
    energies, start, clock = [], time.process_time(), time.perf_counter()
    for state in tqdm(
        motion.steps(options.steps, size), total=options.steps + 1, desc="steps", leave=False
    ):
        energies.append(motion.energy(state))
    measure.wait(xp)
    cpu, wall = time.process_time() - start, time.perf_counter() - clock
    b, rate = scale_factors(gas, options.rate, np.array([0, options.steps * size]))[1]
    drift = float(np.abs(np.divide(energies, energies[0]) - 1).max())
    # The particles at the edge are no continuum: look at those inside.
    inside = (motion.x**2).sum(axis=1) < 0.8**2
    wrong = (state.flow - rate / b * motion.x)[inside]
    apart = float(np.sqrt((wrong**2).sum() / ((rate / b * motion.x)[inside] ** 2).sum()))
    print(
        f"  {options.steps} steps: {cpu / (options.steps + 1):.1f} s of CPU time each, "
        f"{wall:.0f} s in all; energy stays within {drift:.1e} of itself\n"
        f"  smoothed velocities within {apart:.1%} of the exact flow"
    )
    good = drift < 1e-4 and peak < gas.pair_bytes()
    return good and check_some(motion, state, xp)


def check_some(motion: Motion, state: State, xp: Any, count: int = 32) -> bool:
    """Force and density of some particles against sums over all others, which do fit.

    Near rest pressure and trap balance, and forces are small: their error is measured against the
    pull of the trap at the edge.
    """
    rows, gas = xp.linspace(0, motion.gas.count - 1, count).astype(int), motion.gas
    expected = gas.dense(motion.x, motion.velocity, xp, rows, state.density)
    errors, allowed = {}, rounding(gas)
    for name, size in (("force", gas.mass), ("density", gas.central)):
        apart = getattr(state, name)[rows] - getattr(expected, name)
        errors[name] = float(abs(apart).max()) / size
    shown = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    print(f"  {count} of them against sums over all {gas.count:,}: {shown}")
    places, velocity = (x.astype(np.float32) for x in (motion.x, motion.velocity))
    apart = gas.state(places, velocity, motion.mask(), xp).force - state.force
    print(f"  had this been float32: force {float(abs(apart).max()) / gas.mass:.0e}")
    return all(errors[name] < allowed[name] for name in errors)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["numpy", "cupy"], default="numpy")
    parser.add_argument("--particles", type=int, default=131072, help="of the long run (131072)")
    parser.add_argument("--steps", type=int, default=8, help="of the long run (8)")
    parser.add_argument("--small", type=int, default=1500, help="checked against matrices (1500)")
    parser.add_argument("--middle", type=int, default=2000, help="through a period (2000)")
    parser.add_argument("--gamma", type=float, default=2.0, help="of the gas (2)")
    parser.add_argument("--rate", type=float, default=0.2, help="of growth at the start (0.2)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the three; 0 when all checks hold."""
    options = parse(arguments)
    xp: Any = np
    if options.device == "cupy":
        import cupy as xp
    good = check_small(options.small, options, xp)
    good &= check_period(options.middle, options, xp)
    good &= check_large(options, xp)
    print("all checks hold" if good else "A CHECK FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
