"""A NaN stays where the contract lets it: bit for bit, everything that does not see it is unchanged.

Rows of several heads share tiles when queries are few, and a weight of 0 times NaN is NaN: these
are the places where a value could leak from a pair that is visible into one that is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.machines import Machine, normal, same_bits

HEADS, HEADS_KV, KEYS, DIM = 4, 2, 90, 32


def drawn(queries: int) -> dict[str, Any]:
    """q, k, v, dout and a bias, by name."""
    rng = np.random.default_rng(queries)
    shapes = {"q": (HEADS, queries, DIM), "k": (HEADS_KV, KEYS, DIM), "v": (HEADS_KV, KEYS, DIM)}
    shapes |= {"dout": (HEADS, queries, DIM), "bias": (HEADS, queries, KEYS)}
    return {name: normal(rng, *shape) for name, shape in shapes.items()}


def run(machine: Machine, x: dict[str, Any], mask: Any) -> dict[str, Any]:
    """out, lse and gradients by name."""
    q, k, v = x["q"], x["k"], x["v"]
    options = {"mask": mask, "bias": x["bias"]}
    out, lse = machine.attention(q, k, v, return_lse=True, **options)
    wrt = ("q", "k", "v", "bias")
    grads = machine.backward(x["dout"], q, k, v, out, lse, wrt=wrt, deterministic=True, **options)
    return {"out": out, "lse": lse} | {name: getattr(grads, name) for name in wrt}


def check_unchanged(before: dict[str, Any], after: dict[str, Any], rows: Any, keys: Any) -> None:
    """Rows (heads, queries) and keys (heads of k, keys) outside of those told have the same bits."""
    for name in ("out", "lse", "q", "bias"):
        assert same_bits(before[name][~rows], after[name][~rows]), f"{name} of rows that see no NaN"
    for name in ("k", "v"):
        assert same_bits(before[name][~keys], after[name][~keys]), f"d{name} of keys without NaN"


@pytest.mark.parametrize("queries", [3, 70])
def test_keys_that_only_some_heads_see(backend: Machine, queries: int) -> None:
    """Heads 0 and 2 see key 40, of whose group heads 1 and 3 do not; nor do the first queries."""
    x, mask = drawn(queries), np.ones((HEADS, queries, KEYS), bool)
    mask[[1, 3], :, 40] = False
    mask[:, : queries // 2, 40] = False
    before = run(backend, x, mask)
    sees = mask[:, :, 40]
    every = np.ones((HEADS_KV, KEYS), bool)  # rows with NaN reach every key
    for name, bad in (("k", np.nan), ("v", np.inf)):
        spoilt = x[name].copy()
        spoilt[:, 40] = bad
        after = run(backend, x | {name: spoilt}, mask)
        check_unchanged(before, after, sees, every)
        assert not np.isfinite(after["out"][sees]).any()


@pytest.mark.parametrize("queries", [3, 70])
def test_a_row_of_nan_and_biases_of_hidden_pairs(backend: Machine, queries: int) -> None:
    """Row 1 of head 2 sees keys below 50; the bias of no row at its hidden pairs is ever used."""
    x, mask = drawn(queries), np.ones((HEADS, queries, KEYS), bool)
    mask[2, 1, 50:] = False
    mask[:, :, 7] = False
    before = run(backend, x, mask)
    hidden = x["bias"].copy()
    hidden[~mask] = np.nan
    nothing = np.zeros((HEADS, queries), bool), np.zeros((HEADS_KV, KEYS), bool)
    check_unchanged(before, run(backend, x | {"bias": hidden}, mask), *nothing)
    rows, keys = (n.copy() for n in nothing)
    rows[2, 1], keys[1, :50] = True, True
    for name in ("q", "dout"):
        spoilt = x[name].copy()
        spoilt[2, 1] = np.nan
        check_unchanged(before, run(backend, x | {name: spoilt}, mask), rows, keys)
