"""Peers' grids against a second reference (`contract_formula.py`), by rule T.

Shapes are those of FlashAttention's tests: lengths off every tile, head dims off every multiple of
8. Options are drawn together, as the contract lets everything compose with everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import rule_t
from tests.contract_formula import reference, slack
from tests.machines import Emulator, Machine, Numpy, dtype_of, normal

LENGTHS = [(1, 147), (113, 203), (108, 256), (239, 1), (127, 313), (203, 113), (97, 97), (17, 2)]
HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128)
HEADS = [(4, 4), (6, 2), (5, 1), (2, 1)]
EDGES = (0, 1, 63, 64, 65, 128, None)  # of windows: next to the sizes of tiles


def drawn(rng: np.random.Generator, dtype: str, dims: tuple[int, ...], longest: int) -> Any:
    """(q, k, v, dout, dlse), and options that the contract lets stand together."""
    fits = [pair for pair in LENGTHS if max(pair) <= longest]
    (queries, keys), (heads, heads_kv) = fits[rng.integers(len(fits))], HEADS[rng.integers(4)]
    dim = int(rng.choice(dims))
    dim_v = dim if rng.random() < 0.7 else dim // 2 + 1
    wide = np.dtype(np.float64 if dtype == "float64" else np.float32)

    def made(*shape: int) -> Any:
        return normal(rng, *shape, dtype=dtype)

    arrays = [
        made(2, heads, queries, dim),
        made(2, heads_kv, keys, dim),
        made(2, heads_kv, keys, dim_v),
    ]
    arrays += [
        made(2, heads, queries, dim_v),
        rng.standard_normal((2, heads, queries)).astype(wide),
    ]
    bias_shapes = [(queries, keys), (2, 1, 1, keys), (1, heads, queries, 1), (keys,)]
    bias = rng.standard_normal(bias_shapes[rng.integers(4)])
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    mask_shapes = [(queries, keys), (2, 1, 1, keys), (2, heads, queries, 1)]
    mask = rng.random(mask_shapes[rng.integers(3)]) < 0.7
    window = EDGES[rng.integers(7)], EDGES[rng.integers(7)]
    might = {
        "causal": True,
        "window": window,
        "q_offset": int(rng.integers(-20, keys + 20)),
        "softcap": float(rng.choice([1.0, 15.0, 50.0])),
        "alibi_slopes": 0.3 * rng.random((2, heads) if rng.random() < 0.5 else heads).astype(wide),
        "bias": bias.astype(dtype_of(dtype) if rng.random() < 0.5 else wide),
        "mask": mask,
        "sinks": rng.standard_normal(heads).astype(wide),
        "scale": float(rng.choice([-0.1, 0.3, 1 / dim])),
    }
    options = {name: value for name, value in might.items() if rng.random() < 0.3}
    if rng.random() < 0.3:
        options |= {"dropout_p": float(rng.choice([0.17, 0.48])), "seed": int(rng.integers(2**63))}
    return arrays, options


def check(machine: Machine, seed: int, dtype: str, dims: tuple[int, ...], longest: int) -> None:
    """One drawn call, forward and backward, in a drawn layout."""
    rng = np.random.default_rng(seed)
    arrays, options = drawn(rng, dtype, dims, longest)
    gold, low = (reference(*arrays, low, **options) for low in (None, dtype_of(dtype)))
    q, k, v, dout, dlse = arrays
    wrt = ("q", "k", "v", *(n for n in ("bias", "alibi_slopes", "sinks") if n in options))
    turned = bool(rng.integers(2))
    run = options | {"layout": "LHD" if turned else "HLD"}

    def there(x: Any) -> Any:
        return x.swapaxes(1, 2) if turned else x

    q_, k_, v_, dout_ = (np.ascontiguousarray(there(x)) for x in (q, k, v, dout))
    out, lse = machine.attention(q_, k_, v_, return_lse=True, **run)
    deterministic = bool(rng.integers(2))
    grads = machine.backward(
        dout_, q_, k_, v_, out, lse, dlse=dlse, wrt=wrt, deterministic=deterministic, **run
    )
    shown = {n: x.shape if isinstance(x, np.ndarray) else x for n, x in run.items()}
    case = f"seed {seed}: {machine.name} q{q.shape} k{k.shape} v{v.shape} {dtype} {shown}"
    got = {"out": there(out)} | {n: getattr(grads, n) for n in wrt}
    got |= {n: there(got[n]) for n in ("q", "k", "v")}
    rule_t.check_lse(lse, gold["lse"], q.dtype, case=case)
    spare = slack(*arrays, rule_t.eps(q.dtype), **options)
    for name, x in got.items():
        wanted = options[name].dtype if name in options else q.dtype
        mult = rule_t.FORWARD if name == "out" else rule_t.GRADIENT
        more = {"name": name, "case": case, "lse": gold["lse"], "spare": spare.get(name)}
        rule_t.check(x, gold[name], low[name], mult, wanted, **more)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("seed", range(3))
def test_drawn_calls_on_numpy(dtype: str, seed: int) -> None:
    check(Numpy(), 100 * seed + len(dtype), dtype, HEAD_DIMS, 313)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("seed", range(3, 60))
def test_more_drawn_calls_on_numpy(dtype: str, seed: int) -> None:
    check(Numpy(), 100 * seed + len(dtype), dtype, HEAD_DIMS, 313)


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
@pytest.mark.parametrize("seed", range(12))
def test_drawn_calls_in_the_emulator(arch: str, seed: int) -> None:
    with Emulator(arch, seed=seed) as machine:
        dtype = machine.dtypes[seed % len(machine.dtypes)]
        check(machine, 1000 + seed, dtype, (64, 80), 203)
