"""Runs the CUDA side of a ScoreMod at a list of places, in the emulator."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuflash import _params
from cuflash._dtypes import FLOAT32
from cuflash._launch_options import scalar_bits
from cuflash._scoremod import ScoreMod
from cuflash._scoremod_source import source
from tests.emulator.memory import Memory
from tests.emulator.module import Module
from tests.emulator.nvrtc import Nvrtc

# Thread t takes pairs t, t + 32, ..., in this order.
KERNELS = """
#include "backward_score_sums.cuh"
struct Config { using Element = %s; };
using Real = Config::Element::Real;
using Modifier = ScoreExpression<Config::Element>;
extern "C" __global__ void probe(const __grid_constant__ BackwardParams p, const Real* s,
                                 const int* place, const Real* weights, Real* out, int count) {
    const Modifier modifier(p);
    expression::ParameterSums<Modifier, %du> sums;
    for (int n = threadIdx.x; n < count; n += 32) {
        const int b = place[4 * n], h = place[4 * n + 1], i = place[4 * n + 2], j = place[4 * n + 3];
        const auto both = modifier.with_derivative(s[n], b, h, i, j);
        out[n] = modifier.value(s[n], b, h, i, j);
        out[count + n] = both.x;
        out[2 * count + n] = both.y;
        sums.add(modifier, p.score_grads, s[n], b, h, i, j, weights[n]);
    }
    sums.flush(p.score_grads);
}
extern "C" __global__ void finish(const __grid_constant__ ScoreSumsParams p) {
    backward_score_sums<Config>(p);
}
"""


class Probed(NamedTuple):
    """What kernels compute at each place, and the gradients of the wanted arrays."""

    values: np.ndarray
    values_with_slopes: np.ndarray
    slopes: np.ndarray
    gradients: dict[str, np.ndarray]


def ptx_of(
    mod: ScoreMod,
    wanted: tuple[str, ...] = (),
    arch: str = "compute_80",
    real: np.dtype = FLOAT32,
) -> str:
    """The probe's kernels."""
    bits = sum(1 << n for n, name in enumerate(mod.arrays) if name in wanted)
    is_bf16 = any(x.dtype == ml_dtypes.bfloat16 for x in mod.arrays.values())
    element = "f64" if real.itemsize == 8 else "bf16" if is_bf16 else "f16"
    return Nvrtc().ptx(source(mod, real) + KERNELS % (element, bits), arch)


def probe(
    mod: ScoreMod,
    s: np.ndarray,
    place: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    wanted: tuple[str, ...] = (),
    seed: int = 1,
    ptx: str = "",
) -> Probed:
    """Values, slopes and gradients by the generated CUDA code.

    Parameters
    ----------
    mod
        16-bit arrays must all have one dtype.
    s, weights
        float32 or float64 (count,).
    place
        (count, 4): b, h, i, j.
    """
    memory = Memory()
    module = Module(ptx or ptx_of(mod, wanted, real=s.dtype), memory)
    p = np.zeros((), _params.BACKWARD)
    sums = np.zeros((), _params.SCORE_SUMS)
    gradients: dict[str, np.ndarray] = {}
    held: list[Any] = []
    for n, (name, array) in enumerate(mod.arrays.items()):
        extents = p["values"]["score"]["extents"][n]
        extents[:] = 1
        extents[: array.ndim] = array.shape
        is_element = array.dtype != FLOAT32
        p["values"]["score"]["element_arrays"] |= is_element << n
        if array.size == 0:
            continue
        held.append(memory.copy(np.ascontiguousarray(array).reshape(-1)))
        p["options"]["score_arrays"][n] = held[-1].ctypes.data
        if name in wanted:
            words = memory.empty((array.size, _params.SUM_WORDS[s.itemsize]), np.int64)
            words[...] = 0
            gradients[name] = memory.empty(array.shape or (1,), array.dtype)
            held.append(words)
            p["score_grads"][n] = sums["words"][n] = words.ctypes.data
            sums["grads"][n] = gradients[name].ctypes.data
            sums["elements"][n] = array.size
            sums["element_grads"] |= is_element << n
    for n, number in enumerate(mod.scalars.values()):
        p["options"]["score_scalars"][n] = scalar_bits(number, s.dtype)
    count = len(s)
    out = memory.empty((3, count), s.dtype)
    inputs = [memory.copy(x) for x in (s, place.astype(np.int32))]
    weighed = memory.copy(np.zeros(count, s.dtype) if weights is None else weights)
    arguments = [p[()], *inputs, weighed, out, np.int32(count)]
    module.launch("probe", (1,), (32,), 0, arguments, seed=seed)
    module.launch("finish", (2,), (32,), 0, sums[()])
    shaped = {n: np.array(g).reshape(mod.arrays[n].shape) for n, g in gradients.items()}
    return Probed(*map(np.array, out), shaped)


def by_numpy(
    mod: ScoreMod,
    s: np.ndarray,
    place: np.ndarray,
    weights: np.ndarray | None = None,
    wanted: tuple[str, ...] = (),
) -> Probed:
    """The same in float64, by the NumPy meaning of the code."""
    arrays = {n: np.asarray(x).astype(np.float64) for n, x in mod.arrays.items()}
    values, slopes, scatter = mod.derivatives(s.astype(np.float64), *place.T, arrays, wrt=wanted)
    gradients = {n: np.zeros(arrays[n].shape) for n in wanted}
    for name in wanted:
        assert weights is not None
        scatter[name](weights.astype(np.float64), gradients[name])
    return Probed(values, values, slopes, gradients)
