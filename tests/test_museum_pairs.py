"""Museum A7, H12, K11, P5: an option beside another was silently ignored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash


def _blocks() -> Any:
    dense = np.tri(4, 4, 1, dtype=bool)
    dense[2, 0] = False
    return cuflash.BlockMask.from_dense(dense, block_size=16)


# What each option is set to; made when it is used.
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (2, 1)},
    "q_offset": lambda: {"q_offset": 1},
    "softcap": lambda: {"softcap": 1.0},
    "scale": lambda: {"scale": 0.9},
    "mask": lambda: {"mask": np.arange(16).reshape(4, 4) % 3 > 0},
    "blocks": lambda: {"mask": _blocks()},
    "bias": lambda: {"bias": np.linspace(-1, 1, 4)},
    "alibi_slopes": lambda: {"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4])},
    "sinks": lambda: {"sinks": np.array([0.5, 1.0, -1.0, 0.0])},
    "dropout": lambda: {"dropout_p": 0.5, "seed": 3},
    "score_mod": lambda: {"score_mod": cuflash.ScoreMod("s * 0.5f + j")},
    "layout": lambda: {"layout": "LHD"},
}
# Only these have positions that q_offset could shift.
PLACED = {"causal", "window", "alibi_slopes"}
PAIRS = [
    pair
    for pair in itertools.combinations(OPTIONS, 2)
    if set(pair) != {"mask", "blocks"} and ("q_offset" not in pair or PLACED & set(pair))
]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_P5_no_option_is_lost_beside_another(one: str, two: str) -> None:
    """Leaving out either of the two changes the result, forward and backward."""
    rng = np.random.default_rng(5)
    q, k, v, dout = rng.standard_normal((4, 2, 4, 4, 8))

    def run(*names: str) -> tuple[Any, ...]:
        options = {n: x for name in names for n, x in OPTIONS[name]().items()}
        out, pullback = cuflash.attention_vjp(q, k, v, **options)
        return (out, *pullback(dout)[:3])

    both = run(one, two)
    for alone in (run(one), run(two)):
        for a, b in zip(both, alone, strict=True):
            assert not np.allclose(a, b, atol=1e-3)
