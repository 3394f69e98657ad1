"""ScoreMod: what it is, and that its CUDA side computes what its NumPy side does."""

from __future__ import annotations

import pickle
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import _compile
from cuflash._scoremod_source import source
from tests.expression_probe import Probed, by_numpy, probe, ptx_of
from tests.scores import LIBRARY
from tests.test_expression import VALUES

COUNT = 96


def places(rng: np.random.Generator, count: int = COUNT) -> np.ndarray:
    """Random b, h, i, j below 2, 3, 5, 7."""
    return np.stack([rng.integers(0, n, count) for n in (2, 3, 5, 7)], axis=1)


def agree(got: Probed, want: Probed, rtol: float, atol: float) -> None:
    for name in ("values", "values_with_slopes", "slopes"):
        a, b = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)
    for name, gradient in want.gradients.items():
        scale = np.abs(gradient[np.isfinite(gradient)]).max(initial=1.0)
        eps = float(ml_dtypes.finfo(got.gradients[name].dtype).eps)
        a = got.gradients[name].astype(np.float64)
        np.testing.assert_allclose(a, gradient, rtol=eps, atol=atol * scale, err_msg=name)


# ---- the object


def test_it_is_immutable_and_readable() -> None:
    decay = np.ones(3, np.float32)
    mod = cuflash.ScoreMod("s - decay[h] * c", {"decay": decay, "c": 2}, fn=np.add)
    assert repr(mod) == "ScoreMod('s - decay[h] * c', decay=(3,) float32, c=2, fn=add)"
    for name in ("code", "params", "other"):
        with pytest.raises(AttributeError, match=name):
            setattr(mod, name, 1)
    with pytest.raises(AttributeError):
        del mod.code
    with pytest.raises(TypeError):
        mod.params["c"] = 3  # type: ignore[index]
    assert mod.params["decay"] is decay and dict(mod.scalars) == {"c": 2}
    assert len({mod, cuflash.ScoreMod("s"), cuflash.ScoreMod("s")}) == 3
    again = pickle.loads(pickle.dumps(mod))
    assert repr(again) == repr(mod) and again.key == mod.key


def test_its_key_and_its_source_are_about_code_names_ranks_and_kinds() -> None:
    def made(**changes: Any) -> cuflash.ScoreMod:
        params = {"w": np.ones(3, np.float32), "c": 2.0} | changes
        return cuflash.ScoreMod("s + w[h] * c" if params["w"].ndim == 1 else "s + w * c", params)

    first = made()
    for same in (
        made(w=np.zeros(3, np.float32)),
        made(w=np.zeros(7, np.float16)),
        made(c=3.5),
        cuflash.ScoreMod(first.code, dict(reversed(first.params.items()))),
    ):
        assert same.key == first.key and source(same) == source(first)
    for other in (
        made(c=2),
        made(w=np.array(1.0)),
        cuflash.ScoreMod("s + w[h] *  c", first.params),
    ):
        assert other.key != first.key and source(other) != source(first)
    assert hash(first.key) == hash(made().key)


def test_params_of_all_kinds() -> None:
    mod = cuflash.ScoreMod(
        "s + a + b0 + c + d + e[0]",
        {
            "e": np.ones(2, ml_dtypes.bfloat16),
            "a": np.float32(0.5),
            "b0": np.int8(-3),
            "c": ml_dtypes.bfloat16(2),
            "d": np.array(1, np.float16),
        },
    )
    assert dict(mod.scalars) == {"a": 0.5, "b0": -3, "c": 2.0} and list(mod.arrays) == ["d", "e"]
    assert [type(x) for x in mod.scalars.values()] == [float, int, float]


# ---- fn


def test_fn_is_the_meaning_for_numpy() -> None:
    seen: dict[str, Any] = {}

    def fn(s: Any, b: Any, h: Any, i: Any, j: Any, w: Any, c: Any) -> Any:
        seen.update(w=w, c=c)
        return s + 100 * w[h]

    w = np.ones(2, np.float16)
    mod = cuflash.ScoreMod("s * w[h] * c", {"w": w, "c": 2}, fn=fn)
    s = np.ones((2, 3, 3), np.float32)
    place = (0, np.arange(2).reshape(2, 1, 1), np.arange(3)[:, None], np.arange(3))
    assert (mod.evaluate(s, *place) == 101).all()
    assert seen["w"].dtype == np.float32 and seen["c"] == 2
    values, slope, _ = mod.derivatives(s, *place)
    assert (values == 101).all() and (slope == 2).all()  # derivatives are the code's


def test_fn_of_a_wrong_shape_is_an_error() -> None:
    mod = cuflash.ScoreMod("s", fn=lambda s, b, h, i, j: s[..., :2])
    with pytest.raises(ValueError, match=r"fn returned shape \(4, 2\), and s has shape \(4, 3\)"):
        mod.evaluate(np.ones((4, 3)), 0, 0, 0, 0)


# ---- CUDA


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", LIBRARY)
def test_kernels_compute_what_numpy_does(name: str, dtype: str) -> None:
    rng = np.random.default_rng(len(name))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    twin = LIBRARY[name].of(2, 3, 5, 7, dtype=kind, seed=1)
    mod = cuflash.ScoreMod(twin.code, twin.params)
    wanted = tuple(twin.arrays())
    real = np.float64 if dtype == "float64" else np.float32
    s, weights = (rng.standard_normal(COUNT).astype(real) for _ in "sw")
    place = places(rng)
    got = probe(mod, s, place, weights, wanted=wanted)
    tolerance = 1e-14 if dtype == "float64" else 1e-6
    agree(got, by_numpy(mod, s, place, weights, wanted), 2 * tolerance, tolerance)


def chosen(codes: list[str]) -> str:
    """One expression that is the j-th of `codes` at key j."""
    return "".join(f"j == {n} ? ({code}) : " for n, code in enumerate(codes)) + "0"


def test_kernels_follow_c_as_numpy_does() -> None:
    """Integers, casts, precedence: every example of `test_expression` by the compiler itself."""
    mod = cuflash.ScoreMod(chosen([code for code, _ in VALUES]))
    place = np.array([[1, 2, 7, n] for n in range(len(VALUES))])
    got = probe(mod, np.full(len(VALUES), 0.75, np.float32), place)
    want = np.array([x for _, x in VALUES], np.float32)
    np.testing.assert_allclose(got.values, want, rtol=1e-6, atol=1e-6)
    assert np.array_equal(got.values, got.values_with_slopes)


FUNCTIONS = {
    "exp(s)": (-80, 80),
    "exp2(s)": (-120, 120),
    "expm1(s)": (-5, 5),
    "log(s)": (1e-3, 50),
    "log2(s)": (1e-3, 50),
    "log10(s)": (1e-3, 50),
    "log1p(s)": (-0.9, 50),
    "sqrt(s)": (1e-3, 50),
    "rsqrt(s)": (1e-3, 50),
    "tanh(s)": (-5, 5),
    "sigmoid(s)": (-20, 20),
    "sin(s)": (-40, 40),
    "cos(s)": (-40, 40),
    "fabs(s)": (-5, 5),
    "abs(s)": (-5, 5),
    "floor(s)": (-5, 5),
    "ceil(s)": (-5, 5),
    "round(s)": (-5, 5),
    "trunc(s)": (-5, 5),
    "rint(s)": (-5, 5),
    "pow(abs(s), 1.7f)": (0.01, 9),
    "pow(2.5f, s)": (-9, 9),
    "pow(s, s)": (0.01, 3),
    "pow(s, 2)": (-5, 5),
    "min(s, 1.5f)": (-5, 5),
    "max(i, s)": (-5, 5),
    "fmin(1, s)": (-5, 5),
    "fmax(s, s * s)": (-5, 5),
    "1 / s": (0.1, 5),
    "s / (1 + s)": (0.1, 5),
    "s * s - -s": (-5, 5),
    "s > 0 ? log(s) : s": (-5, 5),
    "(float)s * float(i)": (-5, 5),
}


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_functions_are_accurate(real: type) -> None:
    """Within a few units of the last place, or of 1 where the result is smaller."""
    codes = list(FUNCTIONS)
    mod = cuflash.ScoreMod(chosen(codes))
    rng = np.random.default_rng(1)
    each = 64
    s = np.concatenate([rng.uniform(*ends, each) for ends in FUNCTIONS.values()]).astype(real)
    place = np.array([[0, 0, 2, n] for n in range(len(codes)) for _ in range(each)])
    got, want = probe(mod, s, place), by_numpy(mod, s, place)
    for what in ("values", "slopes"):
        a, b = getattr(got, what), getattr(want, what)
        error = abs(a - b) / np.maximum(abs(b), 1)
        worst = int(error.argmax())
        assert error[worst] < 9 * np.finfo(real).eps, (
            codes[worst // each],
            what,
            s[worst],
            a[worst],
            b[worst],
        )
    assert np.array_equal(got.values, got.values_with_slopes)


def test_branches_that_are_not_taken_do_not_poison_kernels() -> None:
    w = np.array([0.0, 4.0], np.float32)
    code = "s > 0 ? s * log(s) : i == 1 ? sqrt(w[0]) + w[1] * s : 2 * s + sqrt(0 * s)"
    mod = cuflash.ScoreMod(code, {"w": w})
    s = np.array([0, 0, 2, -1], np.float32)
    place = np.array([[0, 0, i, 0] for i in (0, 1, 1, 1)])
    got = probe(mod, s, place, np.ones(4, np.float32), wanted=("w",))
    agree(got, by_numpy(mod, s, place, np.ones(4), ("w",)), 1e-6, 1e-6)
    assert got.slopes[0] == 2 and got.gradients["w"][0] == np.inf and got.gradients["w"][1] == -1


def test_indices_outside_give_nan_and_no_gradient() -> None:
    """The emulator would fault on the access."""
    params = {
        "t": np.ones((2, 3), np.float32),
        "none": np.ones((0, 2), np.float32),
        "u": np.ones(2),
    }
    params["u"] = params["u"].astype(np.float16)
    code = "i == 0 ? t[j][h] : i == 1 ? t[h][j] * u[b] : i == 2 ? u[j - 3] : none[b][h] + t[-b][0]"
    mod = cuflash.ScoreMod(code, params)
    place = np.array(
        [[b, h, i, j] for b in (0, 1) for h in (0, 2) for i in range(4) for j in range(7)]
    )
    s, weights = (np.ones(len(place), np.float32) for _ in "sw")
    wanted = ("t", "u")
    got = probe(mod, s, place, weights, wanted=wanted)
    want = by_numpy(mod, s, place, weights, wanted)
    agree(got, want, 1e-6, 1e-6)
    assert np.isnan(got.values).any() and np.isfinite(got.values).any()


def test_a_weight_of_zero_adds_nothing() -> None:
    mod = cuflash.ScoreMod("s * w[h] + log(w[h])", {"w": np.zeros(3, np.float32)})
    s = np.array([np.nan, np.inf, 1], np.float32)
    place = np.zeros((3, 4), int)
    got = probe(mod, s, place, np.zeros(3, np.float32), wanted=("w",))
    assert not got.gradients["w"].any()
    got = probe(mod, s, place, np.array([0, 0, 1], np.float32), wanted=("w",))
    assert got.gradients["w"].tolist() == [np.inf, 0, 0]


def test_gradients_have_the_same_bits_in_every_schedule() -> None:
    rng = np.random.default_rng(2)
    mod = cuflash.ScoreMod("exp(s * w[h]) * t[i][j]", {"w": rng.random(3), "t": rng.random((5, 7))})
    mod = cuflash.ScoreMod(mod.code, {n: x.astype(np.float32) for n, x in mod.arrays.items()})
    s, weights = (rng.standard_normal(300).astype(np.float32) for _ in "sw")
    place, ptx = places(rng, 300), ptx_of(mod, ("t", "w"))
    runs = [
        probe(mod, s, place, weights, wanted=("t", "w"), seed=seed, ptx=ptx) for seed in (0, 3, 8)
    ]
    for run in runs[1:]:
        for name in ("t", "w"):
            assert run.gradients[name].tobytes() == runs[0].gradients[name].tobytes()


def test_only_wanted_arrays_get_gradients() -> None:
    rng = np.random.default_rng(4)
    params = {name: rng.random(7).astype(np.float32) for name in ("x", "y", "z")}
    mod = cuflash.ScoreMod("s * x[j] * y[j] + z[h] * y[i] + x[0]", params)
    s, weights, place = rng.random(64).astype(np.float32), np.ones(64, np.float32), places(rng, 64)
    full = by_numpy(mod, s, place, weights, ("x", "y", "z")).gradients
    for wanted in (("y",), ("x", "z")):
        got = probe(mod, s, place, weights, wanted=wanted)
        assert set(got.gradients) == set(wanted)
        agree(got, by_numpy(mod, s, place, weights, wanted)._replace(
            gradients={n: full[n] for n in wanted}), 1e-6, 1e-6)  # fmt: skip


def test_kernels_compute_in_floats() -> None:
    """Real literals without f, ints in functions of floats: no instruction works on doubles."""
    code = "s * 0.1 + 1.0 / 3 + i * 2.5 + sqrt(i) + pow(i, 2) + exp(1) + c + (j < 2) * 1e-3"
    assert ".f64" not in ptx_of(cuflash.ScoreMod(code, {"c": 0.3}))


# Names that the generated code, CUDA or C++ use themselves; all are free for parameters.
HARD_NAMES = ["value", "at", "options", "values", "Element", "Params", "Dual", "expression", "read"]
HARD_NAMES += ["threadIdx", "warpSize", "array", "site", "this_", "_x", "times", "N", "std", "u16"]


def test_parameters_may_have_names_of_ours() -> None:
    rng = np.random.default_rng(0)
    for first in range(0, len(HARD_NAMES), 7):
        names = HARD_NAMES[first : first + 7]
        params = {name: rng.random(7).astype(np.float32) for name in names}
        params[f"{names[0]}2"] = 3.0
        code = " + ".join(f"{name}[j] * s" for name in names) + f" + (float){names[0]}2"
        mod = cuflash.ScoreMod(code, params)
        s, place = rng.random(8).astype(np.float32), places(rng, 8)
        weights, wanted = np.ones(8, np.float32), tuple(names)
        got = probe(mod, s, place, weights, wanted=wanted)
        agree(got, by_numpy(mod, s, place, weights, wanted), 1e-6, 1e-6)


# ---- the compiler


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a", "sm_120"])
def test_expressions_compile_for_every_architecture(arch: str) -> None:
    for twin in (e.of(2, 3, 5, 7, seed=1) for e in LIBRARY.values()):
        mod = cuflash.ScoreMod(twin.code, twin.params)
        text = source(mod) + (
            'extern "C" __global__ void f(const __grid_constant__ ForwardParams p, float* x) {'
            "x[1] = ScoreExpression<f16>(p).value(x[0], 0, 1, 2, 3); }"
        )
        assert _compile.compile_cubin(text, "f", arch, None)


def test_what_the_compiler_refuses_points_at_the_users_line() -> None:
    mod = cuflash.ScoreMod("s +  // the first line\n  i *\n  2.5f", {})
    text = source(mod) + (
        'extern "C" __global__ void f(const __grid_constant__ ForwardParams p, float* x) {'
        "x[1] = ScoreExpression<f16>(p).value(x[0], 0, 1, 2, 3); }"
    )
    assert _compile.compile_cubin(text, "f", "sm_80", None)
    # No expression is known that passes our parser and not the compiler: one is planted.
    with pytest.raises(cuflash.CompileError, match=r"score_mod\(2\): error: .*unknown_name"):
        _compile.compile_cubin(text.replace("  i *", "  unknown_name *"), "f", "sm_80", None)
    with pytest.raises(cuflash.CompileError, match=r"score_mod\(3\): error"):
        _compile.compile_cubin(text.replace("  2.5f", "  2.5f s"), "f", "sm_80", None)


def test_the_source_is_the_users_text() -> None:
    code = "s * 1.5 /* gain */ +\n\t(float)i * 2e3f + expf(1.) - 0x10u % 3u + INFINITY"
    lines = source(cuflash.ScoreMod(code)).split('#line 1 "score_mod"\n')[1].splitlines()
    assert lines[0] == "s * 1.5f            +"
    assert re.fullmatch(
        r" \(score_mod_Number\)i \* 2e3f \+ exp \(1\.f\) - 0x10u % 3u \+ float\(::positive_infinity\(\)\)",
        lines[1],
    )
    double = source(cuflash.ScoreMod("s * 1.5 + 2e3f + INFINITY"), np.dtype(np.float64))
    assert "\ns * 1.5 + 2e3 + double(::positive_infinity())\n" in double
