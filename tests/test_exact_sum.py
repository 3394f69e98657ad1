"""Sums of floats in integer words: the same bits in any order, and rounded once."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from cuflash import _params
from tests.emulator.memory import Memory
from tests.emulator.module import Module
from tests.emulator.nvrtc import Nvrtc

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
SOURCE = f"""
#include "backward_score_sums.cuh"
static_assert(SUM_WORDS == {_params.SUM_WORDS}, "");
struct F16 {{ using Element = f16; }};
struct BF16 {{ using Element = bf16; }};
// Thread t of the launch adds terms t, t + threads, ... to their elements.
extern "C" __global__ void add(i64* words, const float* terms, const int* where, int count) {{
    for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < count; n += gridDim.x * blockDim.x)
        exact_add(words + where[n] * SUM_WORDS, terms[n]);
}}
extern "C" __global__ void finish_f16(const __grid_constant__ ScoreSumsParams p) {{
    backward_score_sums<F16>(p);
}}
extern "C" __global__ void finish_bf16(const __grid_constant__ ScoreSumsParams p) {{
    backward_score_sums<BF16>(p);
}}
"""


@functools.cache
def ptx() -> str:
    return Nvrtc().ptx(SOURCE)


def words_of(
    terms: np.ndarray, where: np.ndarray, elements: int, *, seed: int = 0, blocks: int = 2
) -> tuple[Module, np.ndarray]:
    """The accumulators after all terms were added by threads in an order that `seed` chooses."""
    memory = Memory()
    module = Module(ptx(), memory)
    words = memory.empty((elements, _params.SUM_WORDS), np.int64)
    words[...] = 0
    arguments = [words, memory.copy(terms), memory.copy(where), np.int32(len(terms))]
    module.launch("add", (blocks,), (32,), 0, arguments, seed=seed)
    return module, words


def finished(module: Module, words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The sums as numbers; array 3 of 8, so that the others are seen to be left alone."""
    grads = module.memory.empty(len(words), dtype)
    p = np.zeros((), _params.SCORE_SUMS)
    p["words"][3], p["grads"][3] = words.ctypes.data, grads.ctypes.data
    p["elements"][3], p["grads_16bit"] = len(words), 8 * (dtype.itemsize == 2)
    name = "finish_bf16" if dtype == BF16 else "finish_f16"
    module.launch(name, (1,), (32,), 0, p[()])
    return np.array(grads)


def total(terms: np.ndarray, dtype: np.dtype = F32) -> np.ndarray:
    where = np.zeros(len(terms), np.int32)
    return finished(*words_of(terms.astype(np.float32), where, 1), dtype)[0]


def nearest(exact: Fraction, dtype: np.dtype) -> np.ndarray:
    """`exact` rounded to nearest even."""
    if exact == 0:
        return np.zeros((), dtype)
    info = ml_dtypes.finfo(dtype)
    exponent = math.frexp(float(exact))[1] - 1  # of the number, or of the power of two next to it
    unit = Fraction(2) ** max(exponent - info.nmant, info.minexp - info.nmant)
    number = round(exact / unit) * unit  # Python rounds halves to even
    if abs(number) > Fraction(float(info.max)):
        return np.asarray(math.copysign(math.inf, number)).astype(dtype)
    return np.asarray(float(number)).astype(dtype)


def exactly(terms: np.ndarray) -> Fraction:
    return sum((Fraction(float(x)) for x in terms.astype(np.float32)), Fraction(0))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def wide(rng: np.random.Generator, count: int) -> np.ndarray:
    """Floats of all exponents, subnormals included, and their near-opposites: sums that cancel."""
    x = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(1)) * np.float32(2.0**-20)
    x[: count // 2] = -x[count // 2 : count // 2 * 2]
    x[: count // 4] = np.nextafter(x[: count // 4], np.float32(0))
    return rng.permutation(x)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("spread", ["all exponents", "a few", "one sign"])
def test_sums_are_rounded_once(spread: str, dtype: np.dtype) -> None:
    rng = np.random.default_rng(len(spread))
    for count in (1, 2, 7, 100):
        if spread == "all exponents":
            terms = wide(rng, count)
        else:
            terms = rng.standard_normal(count).astype(np.float32)
            terms *= np.exp2(rng.integers(-8, 9, count)).astype(np.float32)
            terms = abs(terms) if spread == "one sign" else terms
        got, want = total(terms, dtype), nearest(exactly(terms), dtype)
        assert same(got, want), (terms, got, want)


# In units of the last place of the result: ties, and what is just beside them.
TIES = [
    [1.0, 2.0**-24],
    [1.0, 2.0**-24, 2.0**-149],
    [1.0, 2.0**-24, -(2.0**-149)],
    [1 + 2.0**-23, 2.0**-24],
    [1.0, 2.0**-11],
    [1.0, 2.0**-11, 2.0**-60],
    [1.0, 2.0**-8, -(2.0**-100)],
    [-1.0, -(2.0**-24), -(2.0**-149)],
    [2.0**-149, 2.0**-149],
    [2.0**-126, -(2.0**-149)],
    [2.0**127, 2.0**127, -(2.0**127)],
    [3.4028234e38, 2.0**102],
    [3.4028234e38, 2.0**103],
    [3.4028234e38, 3.4028234e38, -1.0],
    [65504.0, 15.999],
    [65504.0, 16.0],
    [2.0**-24, 2.0**-26],
    [2.0**100, 1.0, -(2.0**100)],
    [0.0, -0.0],
    [],
]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("terms", TIES, ids=str)
def test_ties_and_ends_of_the_range(terms: list[float], dtype: np.dtype) -> None:
    numbers = np.array(terms, np.float32)
    got, want = total(numbers, dtype), nearest(exactly(numbers), dtype)
    assert same(got, np.abs(want) if want == 0 else want), (got, want)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_infinities_and_nans_come_out(dtype: np.dtype) -> None:
    inf, nan = np.inf, np.nan
    for terms, want in (
        ([1.0, inf, -5.0], inf),
        ([-inf, 3e38, 3e38], -inf),
        ([inf, inf], inf),
        ([inf, -inf], nan),
        ([nan, 1.0], nan),
        ([nan, inf], nan),
    ):
        got = total(np.array(terms, np.float32), dtype)
        assert np.array_equal(got.astype(np.float32), np.float32(want), equal_nan=True), terms


def test_any_order_and_any_schedule_give_the_same_words() -> None:
    rng = np.random.default_rng(5)
    terms, where = wide(rng, 400), rng.integers(0, 5, 400).astype(np.int32)
    first = None
    for run in range(4):
        order = rng.permutation(400)
        module, words = words_of(terms[order], where[order], 5, seed=run, blocks=1 + run)
        results = [words.tobytes(), *(finished(module, words, d).tobytes() for d in (F32, F16))]
        first = first or results
        assert results == first
    got = finished(module, words, F32)
    for element in range(5):
        assert same(got[element], nearest(exactly(terms[where == element]), F32))


def test_a_digit_holds_as_many_terms_as_the_comment_says() -> None:
    """Words near their limit, as after 2^34 terms of one sign, still become the right number."""
    module, words = words_of(np.zeros(1, np.float32), np.zeros(1, np.int32), 2)
    words[:, :10] = 2**34 * (2**29 - 1)
    words[1] *= -1
    assert int(words[0, 0]) == 2**63 - 2**34
    words[:, 5:] = 0  # else the sum is beyond float
    exact = sum((Fraction(int(w)) * Fraction(2) ** (29 * n - 149)) for n, w in enumerate(words[0]))
    assert [float(x) for x in finished(module, words, F32)] == [
        float(nearest(exact, F32)),
        -float(nearest(exact, F32)),
    ]
