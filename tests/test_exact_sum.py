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
F64 = np.dtype(np.float64)
SOURCE = f"""
#include "backward_score_sums.cuh"
static_assert(SUM_WORDS<float> == {_params.SUM_WORDS[4]}, "");
static_assert(SUM_WORDS<double> == {_params.SUM_WORDS[8]}, "");
struct F16 {{ using Element = f16; }};
struct BF16 {{ using Element = bf16; }};
struct F64 {{ using Element = f64; }};
// Thread t of the launch adds terms t, t + threads, ... to their elements.
template <class Real>
__device__ void add(i64* words, const Real* terms, const int* where, int count) {{
    for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < count; n += gridDim.x * blockDim.x)
        exact_add(words + where[n] * SUM_WORDS<Real>, terms[n]);
}}
extern "C" __global__ void add_float(i64* words, const float* terms, const int* where, int count) {{
    add(words, terms, where, count);
}}
extern "C" __global__ void add_double(i64* words, const double* terms, const int* where, int count) {{
    add(words, terms, where, count);
}}
extern "C" __global__ void finish_f16(const __grid_constant__ ScoreSumsParams p) {{
    backward_score_sums<F16>(p);
}}
extern "C" __global__ void finish_bf16(const __grid_constant__ ScoreSumsParams p) {{
    backward_score_sums<BF16>(p);
}}
extern "C" __global__ void finish_f64(const __grid_constant__ ScoreSumsParams p) {{
    backward_score_sums<F64>(p);
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
    words = memory.empty((elements, _params.SUM_WORDS[terms.itemsize]), np.int64)
    words[...] = 0
    arguments = [words, memory.copy(terms), memory.copy(where), np.int32(len(terms))]
    name = "add_double" if terms.dtype == F64 else "add_float"
    module.launch(name, (blocks,), (32,), 0, arguments, seed=seed)
    return module, words


def finished(module: Module, words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The sums as numbers; array 3 of 8, so that the others are seen to be left alone."""
    grads = module.memory.empty(len(words), dtype)
    p = np.zeros((), _params.SCORE_SUMS)
    p["words"][3], p["grads"][3] = words.ctypes.data, grads.ctypes.data
    p["elements"][3], p["element_grads"] = len(words), 8 * (dtype != F32)
    name = "finish_bf16" if dtype == BF16 else "finish_f16"
    if words.shape[1] == _params.SUM_WORDS[8]:
        name = "finish_f64"
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


# ---- sums of doubles


def total_of_doubles(terms: np.ndarray, dtype: np.dtype = F64) -> np.ndarray:
    return finished(*words_of(terms.astype(F64), np.zeros(len(terms), np.int32), 1), dtype)[0]


def nearest_double(terms: np.ndarray) -> float:
    exact = sum(map(Fraction, terms.tolist()), Fraction(0))
    try:
        return float(exact)  # Python rounds the quotient of two integers once
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def wide_doubles(rng: np.random.Generator, count: int) -> np.ndarray:
    """Doubles of all exponents, subnormals included, and their near-opposites."""
    x = rng.integers(0, 2**64, count, np.uint64).view(np.float64)
    x = np.where(np.isfinite(x), x, 1.0) * 2.0**-20
    x[: count // 2] = -x[count // 2 : count // 2 * 2]
    x[: count // 4] = np.nextafter(x[: count // 4], 0.0)
    return rng.permutation(x)


@pytest.mark.parametrize("spread", ["all exponents", "a few", "subnormal"])
def test_sums_of_doubles_are_rounded_once(spread: str) -> None:
    rng = np.random.default_rng(len(spread))
    for count in (1, 2, 7, 100):
        if spread == "all exponents":
            terms = wide_doubles(rng, count)
        else:
            terms = rng.standard_normal(count) * np.exp2(rng.integers(-30, 31, count))
            terms *= 2.0**-1050 if spread == "subnormal" else 1.0
        assert total_of_doubles(terms) == nearest_double(terms), terms


@pytest.mark.parametrize(
    "terms",
    [
        [1.0, 2.0**-53],
        [1.0, 2.0**-53, 2.0**-1074],
        [1.0, 2.0**-53, -(2.0**-1074)],
        [1 + 2.0**-52, 2.0**-53],
        [2.0**1023, 2.0**1023, -(2.0**1023)],
        [1.7976931348623157e308, 2.0**969],
        [1.7976931348623157e308, 2.0**970],
        [-1.7976931348623157e308, -1.7976931348623157e308, 1.0],
        [2.0**-1074, 2.0**-1074],
        [2.0**-1022, -(2.0**-1074)],
        [2.0**1000, 1.0, -(2.0**1000)],
        [],
    ],
    ids=str,
)
def test_ties_and_ends_of_the_range_of_doubles(terms: list[float]) -> None:
    numbers = np.array(terms, F64)
    assert total_of_doubles(numbers) == nearest_double(numbers)


def test_sums_of_doubles_become_floats_by_one_rounding() -> None:
    """Of parameters in float32 with scores in float64: ties of a float, and what breaks them."""
    for terms, want in (
        ([1.0, 2.0**-24], 1.0),
        ([1.0, 2.0**-24, 2.0**-900], 1 + 2.0**-23),
        ([1.0, 2.0**-24, -(2.0**-900)], 1.0),
        ([1 + 2.0**-23, 2.0**-24], 1 + 2.0**-22),
        ([2.0**300], np.inf),
        ([2.0**-150, 2.0**-1000], 2.0**-149),
    ):
        got = total_of_doubles(np.array(terms), F32)
        assert got.dtype == F32 and float(got) == want, terms
    for terms, want in (([1.0, np.inf], np.inf), ([np.inf, -np.inf], np.nan)):
        for dtype in (F32, F64):
            assert np.array_equal(total_of_doubles(np.array(terms), dtype), want, equal_nan=True)
