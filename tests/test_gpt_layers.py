"""The language model's layers and optimizer: gradients by finite differences, AdamW by its textbook."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_gpt
from gpt import attention, layers
from gpt.model import GPT, Arrays, Shape, initial_weights, weight_shapes
from gpt.optimizer import AdamW, Schedule, clip
from tests.machines import Emulator

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("layers", "attention", "model", "optimizer", "data", "training", "plot")
TINY = Shape(layers=2, heads=2, width=8, context=5, vocabulary=260)
# Central differences in float64 with this step: 1e-10 times third derivatives, and the rounding of
# losses of order 1 by 1e-16 over the step.
STEP, ALLOWED = 1e-5, 1e-8


# ---- gradients


def differences(function: Callable[[], float], x: np.ndarray) -> np.ndarray:
    """The gradient of `function()` with respect to x, which is changed in place and put back."""
    gradient = np.empty_like(x)
    for place in np.ndindex(x.shape):
        kept = x[place]
        x[place] = kept + STEP
        above = function()
        x[place] = kept - STEP
        gradient[place] = (above - function()) / (2 * STEP)
        x[place] = kept
    return gradient


def check(layer: Callable[..., Any], arrays: Sequence[np.ndarray]) -> None:
    """Every gradient that a layer's pullback returns, element by element."""
    rng = np.random.default_rng(1)
    y, pullback = layer(*arrays)
    dy = rng.standard_normal(np.shape(y))
    gradients = pullback(dy)
    again = pullback(dy)
    if not isinstance(gradients, tuple):
        gradients, again = (gradients,), (again,)
    assert len(gradients) == len(arrays)
    for x, gradient, repeated in zip(arrays, gradients, again, strict=True):
        expected = differences(lambda: float((layer(*arrays)[0] * dy).sum()), x)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=ALLOWED * (1 + abs(dy).sum()))
        np.testing.assert_array_equal(repeated, gradient)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def tokens_of(*shape: int, below: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, below, size=shape)


LAYER_CASES = {
    "linear": (layers.linear, (normal(2, 3, 4), normal(4, 5), normal(5))),
    "layer_norm": (layers.layer_norm, (normal(2, 3, 5), normal(5), normal(5))),
    "gelu": (layers.gelu, (3 * normal(2, 3, 4),)),
    "embedding": (
        lambda table, positions: layers.embedding(tokens_of(2, 4), table, positions),
        (normal(7, 3), normal(6, 3)),
    ),
    "tied_head": (layers.tied_head, (normal(4, 3), normal(7, 3))),
    "cross_entropy": (
        lambda logits: layers.cross_entropy(logits, tokens_of(4)),
        (5 * normal(4, 7),),
    ),
    "fused_attention": (attention.fused_attention, (normal(2, 5, 3, 2, 3),)),
    "plain_attention": (attention.plain_attention, (normal(2, 5, 3, 2, 3),)),
}


@pytest.mark.parametrize("name", LAYER_CASES)
def test_layer_gradients(name: str) -> None:
    check(*LAYER_CASES[name])


def test_a_wrong_gradient_is_found() -> None:
    def wrong(x: np.ndarray) -> Any:
        y, pullback = layers.gelu(x)
        return y, lambda dy: pullback(dy) + 1e-6

    with pytest.raises(AssertionError):
        check(wrong, (normal(2, 3),))


@pytest.mark.parametrize("name", attention.LAYERS)
def test_model_gradients(name: str) -> None:
    weights = initial_weights(TINY, seed=3, dtype=np.float64)
    rng = np.random.default_rng(4)
    # Away from where it starts, so that no gradient is nearly 0.
    weights.vector += 0.3 * rng.standard_normal(weights.vector.shape)
    model = GPT(TINY, weights, attention.LAYERS[name])
    tokens, targets = rng.integers(0, 256, size=(2, 3, TINY.context))
    loss, pullback = model.loss(tokens, targets)
    gradients = Arrays(weights.shapes, np.zeros_like(weights.vector))
    pullback(gradients)
    for weight in weights:
        # One direction for each array: all its elements in two runs of the model.
        start, along = weights[weight].copy(), rng.standard_normal(weights[weight].shape)
        ends = []
        for sign in (1, -1):
            weights[weight][...] = start + sign * STEP * along
            ends.append(float(model.loss(tokens, targets)[0]))
        weights[weight][...] = start
        slope = (ends[0] - ends[1]) / (2 * STEP)
        assert (gradients[weight] * along).sum() == pytest.approx(slope, rel=1e-6, abs=ALLOWED)
        assert gradients[weight].any(), weight
    assert float(loss) == float(model.loss(tokens, targets)[0])


def test_the_attentions_agree() -> None:
    qkv, dout = normal(2, 40, 3, 3, 16), normal(2, 40, 3, 16)
    (fused, back_fused), (plain, back_plain) = (
        layer(qkv) for layer in (attention.fused_attention, attention.plain_attention)
    )
    np.testing.assert_allclose(fused, plain, rtol=0, atol=1e-14)
    np.testing.assert_allclose(back_fused(dout), back_plain(dout), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", attention.LAYERS)
def test_16_bit_gradients_scale_exactly(name: str) -> None:
    # 2^-40 is far below what float16 can hold: without the factor all of these would be 0.
    qkv, dout = normal(1, 9, 3, 2, 8).astype(np.float32), normal(1, 9, 2, 8).astype(np.float32)
    out, pullback = attention.in_precision(attention.LAYERS[name], np.float16)(qkv)
    dqkv = pullback(dout)
    assert out.dtype == dqkv.dtype == np.float32
    np.testing.assert_array_equal(pullback(dout * 2.0**-40), dqkv * 2.0**-40)
    np.testing.assert_array_equal(pullback(0 * dout), 0 * dqkv)
    exact = attention.plain_attention(qkv.astype(np.float64))[1](dout.astype(np.float64))
    # q, k, v, dout and the result are rounded to 2^-11 each; logits and weights pass it on.
    assert abs(dqkv - exact).max() < 16 * 2.0**-11 * abs(exact).max()


@pytest.mark.slow
def test_the_gpus_kernels_read_and_write_the_projection_in_place() -> None:
    qkv = normal(1, 20, 3, 2, 16).astype(np.float16)
    dout = normal(1, 20, 2, 16).astype(np.float16)
    with Emulator():
        out, pullback = attention.fused_attention(qkv)
        dqkv = pullback(dout)
    exact, exact_pullback = attention.plain_attention(qkv.astype(np.float64))
    assert abs(out - exact).max() < 4 * 2.0**-11 * abs(exact).max()
    exact = exact_pullback(dout.astype(np.float64))
    assert abs(dqkv - exact).max() < 16 * 2.0**-11 * abs(exact).max()


# ---- optimizer


def test_adamw_is_the_textbooks() -> None:
    shape = Shape(layers=1, heads=1, width=2, context=2, vocabulary=256)
    weights = initial_weights(shape, seed=0, dtype=np.float64)
    rng = np.random.default_rng(0)
    expected = {name: x.copy() for name, x in weights.items()}
    first = {name: np.zeros_like(x) for name, x in weights.items()}
    second = {name: np.zeros_like(x) for name, x in weights.items()}
    optimizer = AdamW(weights, decay=0.1)
    for number in range(3):
        gradients = Arrays(weights.shapes, rng.standard_normal(weights.vector.shape))
        kept = gradients.vector.copy()
        optimizer.step(gradients.vector, 0.01, number)
        np.testing.assert_array_equal(gradients.vector, kept)
        for name, g in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            unbiased = first[name] / (1 - 0.9 ** (number + 1))
            change = unbiased / (np.sqrt(second[name] / (1 - 0.95 ** (number + 1))) + 1e-8)
            decay = 0.1 if g.ndim == 2 else 0
            expected[name] = expected[name] - 0.01 * (change + decay * expected[name])
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-12, atol=1e-14)


def test_gradients_are_clipped_to_a_norm() -> None:
    gradient = np.array([3.0, 4.0], dtype=np.float32)
    assert clip(gradient, 10.0) == 5
    np.testing.assert_array_equal(gradient, [3, 4])
    assert clip(gradient, 1.0) == 5
    np.testing.assert_allclose(gradient, [0.6, 0.8], rtol=1e-6)
    nothing = np.zeros(2, dtype=np.float32)
    assert clip(nothing, 1.0) == 0
    assert not nothing.any()


def test_schedule_warms_up_and_falls() -> None:
    rates = [Schedule(1e-3, warmup=5, steps=50)(step) for step in range(50)]
    assert rates.index(max(rates)) in (4, 5) and max(rates) == pytest.approx(1e-3)
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)


# ---- model


def test_gpt2_is_gpt2() -> None:
    sizes = map(math.prod, weight_shapes(train_gpt.SHAPES["gpt2"]).values())
    assert sum(sizes) == 124_439_808  # as Hugging Face counts openai-community/gpt2


def test_the_model_cannot_see_the_future() -> None:
    model = GPT(TINY, initial_weights(TINY, seed=0), attention.fused_attention)
    tokens = tokens_of(1, TINY.context, below=256)
    changed = tokens.copy()
    changed[0, -1] += 1
    (x, _), (y, _) = model._hidden(tokens), model._hidden(changed)
    np.testing.assert_allclose(y[:, :-1], x[:, :-1], rtol=0, atol=1e-6)
    assert abs(y - x)[:, -1].max() > 1e-2
    logits, _ = layers.tied_head(x[:, 2], model.weights["wte"])
    np.testing.assert_allclose(model.next_logits(tokens[:, :3]), logits, rtol=0, atol=1e-5)


# ---- all files


def test_cupy_has_every_function_that_is_used() -> None:
    cupy = pytest.importorskip("cupy")
    used = {
        name
        for module in MODULES
        for name in re.findall(
            r"\bxp\.(\w+)", (ROOT / "examples" / "gpt" / f"{module}.py").read_text()
        )
    }
    assert len(used) > 15
    assert not [name for name in used if not hasattr(cupy, name)]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"gpt.{module}"))
    assert failed == 0
