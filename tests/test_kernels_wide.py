"""Kernels for float32 and float64 in the emulator, against longdouble and by rule T.

The emulator rounds like IEEE where tensor cores cut off: what it shows of float32 is the split of the
factors and the order of the sums, not the last bit of a tensor core.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import packed
from tests.case import Case, check
from tests.machines import Emulator, normal
from tests.packed import Packed

LONG = np.longdouble


def plain(arrays: dict[str, np.ndarray], dtype: Any, causal: bool) -> dict[str, np.ndarray]:
    """Result and gradients by the plain formula in one precision; heads share k and v in groups."""
    q, k, v, dout = (arrays[name].astype(dtype) for name in ("q", "k", "v", "dout"))
    group = q.shape[0] // k.shape[0]
    keys, values = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scale = dtype(arrays["q"].shape[-1] ** -0.5)
    s = scale * (q @ keys.swapaxes(-1, -2))
    if causal:
        row = np.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2]
        s = np.where(np.arange(s.shape[-1]) <= row, s, dtype(-np.inf))
    top = s.max(-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    p /= total
    out = p @ values
    ds = p * (dout @ values.swapaxes(-1, -2) - (dout * out).sum(-1, keepdims=True))

    def of_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(k.shape[0], group, *x.shape[1:]).sum(1)

    dq = scale * (ds @ keys)
    # Variances that gradients get from rows whose weights all have a relative error of variance 1.
    step = steps_of_lse((top + np.log(total)).astype(np.float64)) ** 2
    return {
        "out": out,
        "q": dq,
        "k": of_group(scale * (ds.swapaxes(-1, -2) @ q)),
        "v": of_group(p.swapaxes(-1, -2) @ dout),
        "lse q": step * dq**2,
        "lse k": of_group((step * ds**2).swapaxes(-1, -2) @ (scale * q) ** 2),
        "lse v": of_group((step * p**2).swapaxes(-1, -2) @ dout**2),
    }


def steps_of_lse(lse: np.ndarray) -> np.ndarray:
    """Deviation of a row's weights when its lse is rounded to float32, and once more in log2 units: a
    rounding error is even over a step of the last place, whose deviation is 1/sqrt(12) of it.
    """

    def step(x: np.ndarray) -> np.ndarray:
        return np.spacing(np.abs(x).astype(np.float32)).astype(np.float64)

    return np.hypot(step(lse), np.log(2) * step(lse / np.log(2))) / np.sqrt(12)


def errors(
    arch: str, dtype: str, dims: tuple[int, int], causal: bool, **options: Any
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """By result: size of our error, of the plain formula's in the same dtype, and of the result; under
    "lse q" and so on, in the last one, what float32 lse adds to the error of a gradient.
    """
    rng, (d, dv) = np.random.default_rng(d_seed(dims)), dims
    shapes = {"q": (2, 70, d), "k": (1, 137, d), "v": (1, 137, dv), "dout": (2, 70, dv)}
    arrays = {name: normal(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    with Emulator(arch, seed=1) as machine:
        out, grads = machine.vjp(*arrays.values(), causal=causal, **options)
    got = {"out": out, "q": grads.q, "k": grads.k, "v": grads.v}
    exact, honest = (plain(arrays, kind, causal) for kind in (LONG, np.dtype(dtype).type))

    def size(x: np.ndarray) -> float:
        return float(np.sqrt((x.astype(LONG) ** 2).mean()))

    return (
        {name: size(got[name] - exact[name]) for name in got},
        {name: size(honest[name] - exact[name]) for name in got},
        {n: float(np.sqrt(x.mean())) if "lse" in n else size(x) for n, x in exact.items()},
    )


def d_seed(dims: tuple[int, int]) -> int:
    return 1000 * dims[0] + dims[1]


DIMS = [(64, 64), (40, 40), (5, 7), (128, 128)]
PLACES = [
    *(("sm_80", dims) for dims in DIMS),
    *(("sm_90a", dims) for dims in ((64, 64), (64, 20))),
    ("sm_75", (64, 64)),
]


@pytest.mark.parametrize(("arch", "dims"), PLACES, ids=str)
def test_float64_is_as_exact_as_the_plain_formula(arch: str, dims: tuple[int, int]) -> None:
    ours, honest, _ = errors(arch, "float64", dims, causal=dims[0] != 40)
    for name, error in ours.items():
        assert error <= 4 * honest[name], name


@pytest.mark.parametrize(("arch", "dims"), PLACES, ids=str)
def test_float32_is_as_exact_as_the_plain_formula(arch: str, dims: tuple[int, int]) -> None:
    ours, honest, sizes = errors(arch, "float32", dims, causal=dims[0] != 40)
    # Multiply-adds sum key after key, NumPy in blocks.
    assert ours["out"] <= honest["out"] * (1.3 if arch == "sm_75" else 1.1)
    # Backward forms the weights again from lse, by contract a float32, and so has its rounding, common
    # to all weights of a row, beside what the plain formula has. At most twice as many roundings of like
    # size as the plain formula, exp2 and the order of the sums included, make the factor sqrt(2).
    for name in "qkv":
        assert ours[name] <= np.sqrt(2) * np.hypot(honest[name], sizes[f"lse {name}"]), name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_tf32_keeps_three_digits(arch: str) -> None:
    ours, _, size = errors(arch, "float32", (64, 64), causal=True, precision="tf32")
    for name, error in ours.items():
        assert 1e-5 * size[name] < error <= 1e-3 * size[name], name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dims", [(256, 256), (192, 128)], ids=str)
def test_large_head_dims(dtype: str, dims: tuple[int, int]) -> None:
    """Where accumulators come in parts and gradients one at a time."""
    ours, honest, _ = errors("sm_80", dtype, dims, causal=True)
    for name, error in ours.items():
        assert error <= 2.5 * honest[name], name


BASE = Case(batch=(), heads=2, heads_kv=1, len_q=70, len_k=137, head_dim=64)
KINDS = [
    replace(BASE, heads=3, causal=True),
    replace(BASE, softcap=3.0, alibi="H"),
    replace(BASE, mask="tiles", causal=True),
    replace(BASE, mask="blocks_partial", block=(32, 48)),
    replace(BASE, bias="Hqk", window=(64, 20)),
    replace(BASE, sinks="float32", causal=True, q_offset=-20),
    replace(BASE, dropout=0.3),
]
OPTIONS = [replace(case, dtype=dtype) for dtype in ("float32", "float64") for case in KINDS]
OPTIONS += [replace(BASE, dtype=dtype, score_mod="relative") for dtype in ("float32", "float64")]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_each_option_passes_rule_t(case: Case) -> None:
    for seed in (0, 1):
        with Emulator("sm_80", seed=seed) as machine:
            check(machine, case, deterministic=True, dlse=seed == 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packed_sequences_pass_rule_t(dtype: str) -> None:
    case = replace(BASE, dtype=dtype, causal=True)
    lengths = (5, 0, 130, 1, 0, 40), (0, 7, 129, 0, 0, 66)
    with Emulator("sm_80", seed=1) as machine:
        packed.check(machine, Packed(*lengths, case, tail_q=37, tail_k=5), deterministic=True)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_bank_conflicts(arch: str, dtype: str) -> None:
    arrays = [normal(np.random.default_rng(0), 1, 128, 64, dtype=dtype) for _ in range(4)]
    with Emulator(arch, seed=0) as machine:
        machine.device.count = True
        machine.vjp(*arrays)
        for name, _, counters in machine.device.launches:
            conflicts = {at: n.bank_conflicts for at, n in counters.lines.items()}
            assert not any(conflicts.values()), (name, conflicts)


def test_the_name_says_which_products_ran() -> None:
    q = np.zeros((1, 16, 64), np.float32)
    with Emulator("sm_80") as machine:
        for options in ({}, {"precision": "ieee"}, {"precision": "tf32"}):
            machine.attention(q, q, q, **options)
        machine.attention(*(x.astype(np.float64) for x in (q, q, q)))
        names = [name for name, *_ in machine.device.launches]
    assert [name.split("_")[1] for name in names] == ["f32", "f32", "f32tf32", "f64"]


def test_precision_is_checked() -> None:
    q = np.zeros((1, 4, 8), np.float32)
    for precision in (None, "ieee", "tf32"):
        assert cuflash.attention(q, q, q, precision=precision).dtype == np.float32
    with pytest.raises(ValueError, match="'ieee', 'tf32'"):
        cuflash.attention(q, q, q, precision="fp32")
    with pytest.raises(TypeError, match="not a str"):
        cuflash.attention(q, q, q, precision=1)
    wide = q.astype(np.float64)
    with pytest.raises(ValueError, match="float64"):
        cuflash.attention(wide, wide, wide, precision="tf32")


def test_explain_says_which_products_run_and_where_they_are_slow() -> None:
    wide = np.zeros((1, 4, 8))
    narrow, half = wide.astype(np.float32), wide.astype(np.float16)

    def said(arch: str, q: np.ndarray, **options: Any) -> tuple[str, bool]:
        with Emulator(arch):
            text = str(cuflash.explain(q, q, q, **options))
            assert ("products by" in text) == (q is not half)
            return text.partition("products by ")[2].partition("\n")[0], "slow" in text

    for arch in ("sm_80", "sm_86", "sm_90a", "sm_120"):
        assert said(arch, narrow)[0].startswith("3xTF32") and not said(arch, narrow)[1]
        assert said(arch, narrow, precision="tf32")[0].startswith("TF32")
        assert said(arch, wide)[0].startswith("DMMA")
        assert said(arch, wide)[1] == (arch in ("sm_86", "sm_120"))
    for q, options in ((narrow, {}), (narrow, {"precision": "tf32"}), (wide, {})):
        assert said("sm_75", q, **options) == (f"FMA of {q.dtype}", True)
    assert said("sm_75", half) == said("sm_80", half) == ("", False)
