"""The gas: forces are the energy's gradient, the mask leaves out nothing, and the physics is the known one."""

from __future__ import annotations

import doctest
import importlib
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
import sph
from encoder import measure
from gradcheck import relative_error
from particles.gas import Gas
from particles.motion import Motion, at_rest, frequency, scale_factors
from particles.neighbours import REACH, near, order
from tests.machines import Emulator


def stirred(count: int, gamma: float = 2.0) -> Motion:
    return Motion.stirred(Gas(count, gamma), seed=0)


# ---- energy and forces


@pytest.mark.parametrize("gamma", [2.0, 5 / 3, 3.0])
@pytest.mark.parametrize("sparse", [False, True])
def test_against_matrices(gamma: float, sparse: bool) -> None:
    motion = replace(stirred(700, gamma), sparse=sparse)
    errors = sph.differences(motion.state(), motion.gas.dense(motion.x, motion.velocity, np))
    for name, allowed in sph.rounding(motion.gas).items():
        assert errors[name] < allowed, name


@pytest.mark.parametrize("gamma", [2.0, 5 / 3])
def test_force_is_minus_the_gradient_of_the_energy(gamma: float) -> None:
    motion = stirred(300, gamma)

    def energy(moved: Any) -> float:
        return replace(motion, x=moved["x"]).state().energy

    step = 0.01 * motion.gas.width * np.sqrt(motion.x.size)
    force = motion.state().force
    assert relative_error(energy, {"x": motion.x}, "x", -force, step=step) < 1e-7
    # A force that is wrong for a single particle is seen.
    force[17] *= 1.01
    assert relative_error(energy, {"x": motion.x}, "x", -force, step=step) > 1e-7


def test_two_particles_by_hand() -> None:
    gas = Gas(2)
    x, velocity = np.array([[-0.3, 0.1], [0.2, -0.1]]), np.zeros((2, 2))
    h, m, k = gas.width, 0.5, gas.stiffness
    gaussian = np.exp(-((0.5**2 + 0.2**2) / h**2))
    density = m * (1 + gaussian) / (np.pi * h**2)
    state = gas.state(x, velocity, None, np)
    np.testing.assert_allclose(state.density, density, rtol=1e-14)
    trap = m * (0.1 + 0.05) / 2
    np.testing.assert_allclose(state.energy, 2 * m * k * density + trap, rtol=1e-14)
    # d/dx_0 of 2 m k density
    push = 2 * m * k * m / (np.pi * h**2) * gaussian * 2 / h**2 * (x[0] - x[1])
    np.testing.assert_allclose(state.force, [push - m * x[0], -push - m * x[1]], rtol=1e-12)


def test_sums_for_some_particles_are_rows_of_the_matrices() -> None:
    motion = stirred(200)
    whole = motion.gas.dense(motion.x, motion.velocity, np)
    rows = np.array([3, 77, 199])
    some = motion.gas.dense(motion.x, motion.velocity, np, rows, whole.density)
    for name in ("force", "density", "flow"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name)[rows], rtol=1e-13)
    assert some.energy == whole.energy


@pytest.mark.parametrize("part", ["force", "density"])
def test_one_particle_that_is_wrong_fails(part: str) -> None:
    motion = stirred(1000)
    state = motion.state()
    assert sph.check_some(motion, state, np, 32)
    size = {"force": motion.gas.mass, "density": motion.gas.central}[part]
    getattr(state, part)[999] += 1e-6 * size
    assert not sph.check_some(motion, state, np, 32)


def test_what_matrices_take() -> None:
    motion = stirred(1000)
    peak = measure.peak_bytes(lambda: motion.gas.dense(motion.x, motion.velocity, np), np)
    assert peak == pytest.approx(motion.gas.dense_bytes(), rel=0.02)


@pytest.mark.thorough
def test_kernels_with_a_mask() -> None:
    """Blocks that are absent: more than neighbours' order leaves to a few particles."""
    motion = stirred(150)
    mask = near(motion.x, 0.05, np, block=16)
    assert 0.05 < mask.density < 0.95
    expected = motion.gas.state(motion.x, motion.velocity, mask, np)
    with Emulator("sm_80"):
        found = motion.gas.state(motion.x, motion.velocity, mask, np)
    for name, error in sph.differences(found, expected).items():
        assert error < sph.rounding(motion.gas)[name], name


@pytest.mark.slow
def test_by_kernels() -> None:
    """float64 kernels with a block mask and a gradient of lse alone."""
    motion = stirred(150)
    dense = motion.gas.dense(motion.x, motion.velocity, np)
    with Emulator("sm_80"):
        errors = sph.differences(motion.state(), dense)
    for name, allowed in sph.rounding(motion.gas).items():
        assert errors[name] < allowed, name


@pytest.mark.gpu
def test_command_on_a_gpu() -> None:
    assert sph.main(["--device", "cupy", "--steps", "3"]) == 0


def test_float32_is_not_enough() -> None:
    """Scores are differences of large numbers, the larger the more particles there are."""
    errors = []
    for count in (500, 8000):
        motion = stirred(count)
        single = [part.astype(np.float32) for part in (motion.x, motion.velocity)]
        found = motion.gas.state(*single, motion.mask(), np)
        errors.append(sph.differences(found, motion.state())["force"])
    assert 1e-6 < errors[0] < errors[1] / 4


# ---- neighbours


def test_order_keeps_neighbours_together() -> None:
    x = np.random.default_rng(0).random((4096, 2))
    assert sorted(order(x).tolist()) == list(range(4096))
    runs = x[order(x)].reshape(64, 64, 2)
    # 64 runs of equal area would be squares of side 1/8.
    assert np.median(runs.max(axis=1) - runs.min(axis=1)) < 1.5 / 8


@pytest.mark.parametrize("count", [64, 100, 1000])
def test_mask_holds_every_near_pair(count: int) -> None:
    x = np.random.default_rng(count).random((count, 2))
    x = x[order(x)]
    mask = near(x, 0.2, np, block=32)
    close = ((x[:, None] - x[None]) ** 2).sum(axis=2) < 0.2**2
    dense = mask.to_dense()[0]
    assert not (close & ~dense).any()
    assert count < 1000 or mask.density < 0.6


def test_what_the_mask_leaves_out_is_below_rounding() -> None:
    assert np.exp(-(REACH**2)) < np.finfo(float).eps / 2


# ---- physics


def test_density_at_rest() -> None:
    gas = Gas(4000)
    x = at_rest(gas)
    density = gas.dense(x, np.zeros_like(x), np).density
    radius2 = (x**2).sum(axis=1)
    inside = radius2 < 0.8**2
    # Smoothing adds h**2 / 4 times the Laplacian, -4 * central; the rest is the spiral's roughness.
    expected = gas.central * (1 - radius2 - gas.width**2)
    assert np.abs(density - expected)[inside].max() < 0.02 * gas.central
    assert np.mean((density - expected)[inside]) == pytest.approx(0, abs=1e-3 * gas.central)


def test_energy_drift_is_of_second_order() -> None:
    drifts = []
    for steps in (60, 120):
        motion = Motion.breathing(Gas(300), 0.2)
        energies = [motion.energy(state) for state in motion.steps(steps, 2.0 / steps)]
        drifts.append(max(abs(np.subtract(energies, energies[0]))) / energies[0])
    assert drifts[0] < 1e-4
    assert drifts[1] < drifts[0] / 3


def test_momentum_is_that_of_the_trap_alone() -> None:
    # Forces between particles cancel: what is left is the trap's pull on the centre of mass.
    motion = stirred(500)
    total = motion.state().force.sum(axis=0)
    np.testing.assert_allclose(total, -motion.x.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("rate", [0.01, 0.4])
def test_exact_solution_breathes_at_twice_the_frequency(rate: float) -> None:
    times = np.linspace(0, np.pi, 50)
    b = scale_factors(Gas(10), rate, times)[:, 0]
    assert frequency(times, b**2) == pytest.approx(2, abs=1e-6)


def test_small_breaths_of_another_gas() -> None:
    gas = Gas(10, gamma=5 / 3)
    times = np.linspace(0, 2 * np.pi / np.sqrt(2 * gas.gamma), 50)
    b = scale_factors(gas, 1e-3, times)[:, 0]
    assert frequency(times, b) == pytest.approx(np.sqrt(2 * gas.gamma), rel=1e-3)


def test_memory_is_linear() -> None:
    peaks = []
    for count in (4096, 16384):
        motion = Motion.breathing(Gas(count), 0.2)
        peaks.append(measure.peak_bytes(motion.state, np))
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < Gas(16384).pair_bytes() / 20


# ---- the command


SMALL = ["--small", "300", "--middle", "300", "--particles", "8192", "--steps", "2"]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert sph.main(SMALL) == 0
    text = capsys.readouterr().out
    assert "one matrix of all pairs: 512.0 MiB" in text
    assert "the dense formula would hold 3.0 GiB" in text
    assert re.search(r"frequency \d\.\d{3} of the trap's, exact 2\.000", text)
    assert text.endswith("all checks hold\n")


@pytest.mark.parametrize("wrong", ["k", "q"])
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    whole = cuflash.attention_vjp

    def spoiled(*arrays: Any, **options: Any) -> Any:
        result, pullback = whole(*arrays, **options)

        def back(*given: Any) -> Any:
            grads = pullback(*given)
            return grads._replace(**{wrong: getattr(grads, wrong) * (1 + 1e-6)})

        return result, back

    monkeypatch.setattr(cuflash, "attention_vjp", spoiled)
    assert sph.main(SMALL) == 1


@pytest.mark.parametrize("name", ["gas", "motion", "neighbours"])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"particles.{name}"))
    assert result.attempted and not result.failed
