"""Pictures whose labels an independent flood fill confirms, and an encoder with checked gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

import cuflash
from encoder import layers, measure
from encoder.attention import Attention, plain_attention, plain_bytes
from encoder.model import Shape, encode
from encoder.optimizer import AdamW, Weights
from encoder.paths import BACKGROUND, DASH, DOT, SCENES, Scene, pictures
from encoder.relative import Relative, look_at
from examples import pathfinder


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- pictures


def joined(picture: np.ndarray, reach: int) -> bool:
    """Does a flood fill from one dot, which jumps gaps, come to the other?"""
    dots, count = ndimage.label(picture == DOT, np.ones((3, 3)))
    assert count == 2
    todo = [tuple(place) for place in np.argwhere(dots == 1)]
    seen = set(todo)
    marked = {tuple(place) for place in np.argwhere(picture != BACKGROUND)}
    while todo:
        row, column = todo.pop()
        for y in range(row - reach, row + reach + 1):
            for x in range(column - reach, column + reach + 1):
                if (y, x) in marked and (y, x) not in seen:
                    seen.add((y, x))
                    todo.append((y, x))
    return any(dots[place] == 2 for place in seen)


@pytest.mark.parametrize(("side", "count"), [(16, 200), (32, 60), (128, 6), (256, 2)])
@pytest.mark.parametrize("dashes", [2, None])
def test_labels_are_what_a_flood_fill_finds(side: int, count: int, dashes: int | None) -> None:
    scene = SCENES[side] if dashes is None else replace(SCENES[side], dashes=dashes)
    pixels, labels = pictures(scene, count, rng(side))
    assert pixels.shape == (count, side, side)
    found = [joined(picture, scene.reach) for picture in pixels]
    np.testing.assert_array_equal(found, labels == 1)


def test_labels_are_even_and_distances_tell_nothing() -> None:
    pixels, labels = pictures(SCENES[16], 2000, rng(1))
    assert abs(labels.mean() - 0.5) < 5 * math.sqrt(0.25 / len(labels))
    # The best threshold on these very pictures is a little better than chance by its choice.
    assert pathfinder.shortcut(pixels, labels) < 0.54


def test_shortcut_finds_what_a_distance_tells() -> None:
    pixels = np.zeros((4, 8, 8), np.uint8)
    for picture, column in zip(pixels, (2, 3, 6, 7), strict=True):
        picture[0, [0, column]] = DOT
    assert pathfinder.shortcut(pixels, np.array([1, 1, 0, 0])) == 1
    assert pathfinder.shortcut(pixels, np.array([0, 0, 1, 1])) == 1
    assert pathfinder.shortcut(pixels, np.array([1, 0, 0, 1])) == 0.75


def test_pictures_are_those_of_their_seed() -> None:
    scene = SCENES[16]
    (a, b), (c, d) = (pictures(scene, 20, rng(7)) for _ in range(2))
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)
    assert (a != pictures(scene, 20, rng(8))[0]).any()


# ---- gradients of the layers


def check_gradients(
    function: Callable[..., tuple[Any, Any]], *arguments: np.ndarray, seed: int = 0
) -> None:
    """A pullback against central differences along random directions, in float64."""
    y, pullback = function(*(x.copy() for x in arguments))
    weight = rng(seed).standard_normal(np.shape(y))
    gradients = pullback(weight.copy())
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == len(arguments)
    for number, (x, gradient) in enumerate(zip(arguments, gradients, strict=True)):
        assert gradient.shape == x.shape
        step = 1e-6 * rng(seed + 1 + number).standard_normal(x.shape)
        ends = []
        for sign in (1, -1):
            moved = [z + sign * step if z is x else z.copy() for z in arguments]
            ends.append((function(*moved)[0] * weight).sum())
        assert (gradient * step).sum() == pytest.approx(
            (ends[0] - ends[1]) / 2, rel=1e-6, abs=1e-13
        )


def test_gradients_of_layers() -> None:
    x, weight, bias = (rng().standard_normal(shape) for shape in ((2, 5, 6), (6, 4), (4,)))
    check_gradients(layers.linear, x, weight, bias)
    check_gradients(layers.gelu, 2 * x)
    check_gradients(layers.layer_norm, x + 1, *rng(1).standard_normal((2, 6)))
    tokens = np.array([[0, 2, 2], [3, 0, 2]])
    check_gradients(lambda table: layers.embedding(tokens, table), weight)
    labels = np.array([1, 3, 3, 0, 2, 1])
    check_gradients(lambda logits: layers.cross_entropy(logits, labels), 3 * weight)


def test_gradient_of_rotary() -> None:
    qkv = rng().standard_normal((2, 16, 3, 2, 8))
    angles = pathfinder.phases(4, 8)
    check_gradients(lambda x: layers.rotary(x, angles), qkv)


def test_rotary_products_depend_on_the_offset_alone() -> None:
    side, row = 6, rng().standard_normal((2, 8))
    qkv = np.zeros((1, side * side, 3, 1, 8))
    qkv[0, :, :2, 0] = row
    angles = pathfinder.phases(side, 8)
    turned, _ = layers.rotary(qkv, angles)
    scores = (turned[0, :, 0, 0] @ turned[0, :, 1, 0].T).reshape(side, side, side, side)
    for y, x in ((0, 0), (1, 2), (3, 1)):
        moved = scores[y, x, y : y + 3, x : x + 3]
        np.testing.assert_allclose(moved, scores[0, 0, :3, :3], atol=1e-12)


@pytest.mark.parametrize("kind", ["cuflash", "plain"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("first", [None, 0, 3])
def test_gradients_of_attention(kind: str, sparse: bool, first: int | None) -> None:
    length = 40
    mask = cuflash.BlockMask.global_window((6, 6), [0], shape=(length, length), block_size=16)
    relative = None if first is None else Relative(heads=2, reach=5, first=first)
    attention = Attention(kind, mask if sparse else None, relative)
    qkv = rng().standard_normal((2, length, 3, 2, 4))
    if relative is None:
        check_gradients(lambda x: _first_gradient(attention(x)), qkv)
    else:
        table = rng(1).standard_normal((2, relative.entries))
        check_gradients(attention, qkv, table)


def _first_gradient(result: tuple[Any, Any]) -> tuple[Any, Any]:
    y, pullback = result
    return y, lambda dy: pullback(dy)[0]


def small_shape(**values: Any) -> Shape:
    given = {"layers": 3, "heads": 2, "width": 8, "kinds": 3, "outputs": 2, "distinct": 2}
    return Shape(**{**given, **values})


@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_of_the_encoder(sparse: bool) -> None:
    relative = Relative(heads=2, reach=4, first=2)
    shape = small_shape(entries=relative.entries)
    mask = cuflash.BlockMask.butterfly(shape=(36, 36), block_size=16) if sparse else None
    attention = Attention(mask=mask, relative=relative)
    tokens = rng(2).integers(0, 3, (2, 36))
    start = shape.initial(0, np.float64)
    vector = start.vector + 0.3 * rng(3).standard_normal(start.vector.shape)
    angles = pathfinder.phases(6, 4)

    def function(vector: np.ndarray) -> tuple[Any, Any]:
        weights = Weights(vector, shape.shapes)
        rows, back = encode(shape, weights, tokens, attention, angles)

        def pullback(drows: Any) -> Any:
            gradients = weights.zeros()
            back(drows, gradients)
            return gradients.vector

        return rows, pullback

    check_gradients(function, vector)


def test_gradient_of_the_whole_model() -> None:
    scene = SCENES[16]
    shape = small_shape(heads=2, width=16, layers=2)
    model = pathfinder.Model(scene, shape, Attention(mask=pathfinder.butterfly_and_window(16)))
    start = model.initial(0)
    vector = start.vector + 0.2 * rng(3).standard_normal(start.vector.shape)
    pixels, _ = pictures(scene, 2, rng(4))

    def function(vector: np.ndarray) -> tuple[Any, Any]:
        weights = Weights(vector, shape.shapes)
        logits, back = model.forward(weights, pixels)

        def pullback(dlogits: Any) -> Any:
            gradients = weights.zeros()
            back(dlogits, gradients)
            return gradients.vector

        return logits, pullback

    check_gradients(function, vector)


# ---- attention, its masks, and the optimizer


@pytest.mark.parametrize("relative", [None, Relative(heads=2, reach=9, first=1)])
def test_attention_is_the_plain_formula(relative: Relative | None) -> None:
    length = 100
    qkv = rng().standard_normal((2, length, 3, 2, 8))
    table = None if relative is None else rng(1).standard_normal((2, relative.entries))
    for mask in (None, cuflash.BlockMask.butterfly(shape=(length, length), block_size=16)):
        fused = Attention(mask=mask, relative=relative)
        (y, back), (z, plain_back) = fused(qkv, table), plain_attention(qkv, table, mask, relative)
        np.testing.assert_allclose(y, z, rtol=1e-9, atol=1e-12)
        dy = rng(2).standard_normal(y.shape)
        for a, b in zip(back(dy), plain_back(dy), strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_sparse_is_full_when_all_blocks_are_visible() -> None:
    length = 64
    blocks = np.ones((4, 4), bool)
    mask = cuflash.BlockMask.from_blocks(blocks, block_size=16, shape=(length, length))
    shape, tokens = small_shape(), rng().integers(0, 3, (1, length))
    weights = shape.initial(1)
    full, back = encode(shape, weights, tokens, Attention())
    sparse, sparse_back = encode(shape, weights, tokens, Attention(mask=mask))
    np.testing.assert_allclose(sparse, full, atol=1e-6)
    gradients, sparse_gradients = weights.zeros(), weights.zeros()
    back(full, gradients)
    sparse_back(full, sparse_gradients)
    np.testing.assert_allclose(sparse_gradients.vector, gradients.vector, rtol=1e-4, atol=1e-4)


def test_half_precision_products_keep_small_gradients() -> None:
    qkv = rng().standard_normal((1, 50, 3, 2, 8)).astype(np.float32)
    dy = 1e-9 * rng(1).standard_normal((1, 50, 2, 8)).astype(np.float32)
    exact = Attention()(qkv)[1](dy)[0]
    half = Attention(dtype=np.float16)(qkv)[1](dy)[0]
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=3e-3 * abs(exact).max())


def test_heads_begin_by_looking_at_their_offset() -> None:
    table = look_at(Relative(heads=2, reach=4), [-2, 3], strength=8, width=0.5)
    assert (table[:, :9].argmax(axis=1) - 4).tolist() == [-2, 3]
    # In two dimensions: the most looked at pixel is as far away as a gap, in four directions.
    scene, shape = SCENES[16], small_shape(heads=4, width=64, layers=1, distinct=1)
    model = pathfinder.Model(scene, shape, Attention())
    query, key, _ = model.initial(0)["0.qkv.bias"].reshape(3, 4, 16)
    qkv = np.zeros((1, 256, 3, 4, 16), np.float32)
    qkv[0, :, 0], qkv[0, :, 1] = query, key
    layers.rotary(qkv, pathfinder.phases(16, 16).astype(np.complex64))
    at = 8 * 16 + 8
    scores = np.einsum("hd,khd->hk", qkv[0, at, 0], qkv[0, :, 1])
    offsets = np.stack(np.divmod(scores.argmax(axis=1), 16), axis=1) - 8
    assert offsets.tolist() == [[0, 2], [2, 0], [0, -2], [-2, 0]]


def test_the_mask_has_every_near_pixel() -> None:
    mask = pathfinder.butterfly_and_window(16)
    pixels = mask.to_dense()[0].reshape(16, 16, 16, 16)
    rows = np.arange(16)
    for y in range(16):
        visible = np.array([pixels[y, :, z].all() for z in range(16)])
        near = abs(rows - y) <= 1  # a window of two rows holds the next row whole
        powers = np.isin(rows ^ y, [0, 1, 2, 4, 8])
        np.testing.assert_array_equal(visible, near | powers)


def test_adamw_is_its_paper() -> None:
    start, shapes = rng().standard_normal(5), {"a": (2, 2), "b": (1,)}
    weights = Weights(start.copy(), shapes)
    optimizer = AdamW(weights, steps=10, rate=0.1, warmup=2, decay=0.5, clip=1e9)
    first = second = np.zeros(5)
    expected, decay = start.copy(), np.array([0.5, 0.5, 0.5, 0.5, 0])
    for step in range(4):
        gradient = rng(step + 1).standard_normal(5)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        adam = first / (1 - 0.9 ** (step + 1)) / np.sqrt(second / (1 - 0.99 ** (step + 1)))
        expected -= optimizer.scheduled(step) * (adam + decay * expected)
        optimizer.step(Weights(gradient.copy(), shapes))
        np.testing.assert_allclose(weights.vector, expected, rtol=1e-6)
    assert [optimizer.scheduled(step) for step in (0, 1, 10)] == pytest.approx([0.05, 0.1, 0.01])
    gradients = Weights(100 * rng(9).standard_normal(5), shapes)
    AdamW(weights, steps=1, rate=0.1, warmup=1, clip=2.0).step(gradients)
    assert np.linalg.norm(gradients.vector) == pytest.approx(2)


# ---- training and its report


@pytest.mark.parametrize("sparse", [False, True])
def test_steps_lower_the_loss(sparse: bool) -> None:
    scene = Scene(side=16, dashes=2, distractors=0)
    attention = Attention(mask=pathfinder.butterfly_and_window(16) if sparse else None)
    model = pathfinder.Model(scene, small_shape(width=32, layers=2, distinct=1), attention)
    weights, data = model.initial(0), pictures(scene, 8, rng())
    gradients, losses = weights.zeros(), []
    optimizer = AdamW(weights, steps=15, rate=3e-3, warmup=1)
    for _ in range(15):
        losses.append(float(model.learn(weights, gradients, *data)))
        optimizer.step(gradients)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # every answer equally likely
    assert losses[-1] < 0.6
    assert model.accuracy(weights, *data, 3) >= 0.75


def test_curriculum_waits_until_paths_are_learned() -> None:
    curriculum, generator = pathfinder.Curriculum(5, 10**6), rng()
    for _ in range(50):
        curriculum.told(2, 0.69)
    assert curriculum.top == 2
    for _ in range(50):
        curriculum.told(2, 0.01)
    assert curriculum.top == 3  # the next length begins as if nothing was known of it
    for _ in range(50):
        curriculum.told(2, 0.01)
    assert curriculum.top == 3  # what counts is how the longest do
    drawn = [curriculum.draw(generator) for _ in range(200)]
    assert set(drawn) == {2, 3}


def test_curriculum_ends_with_the_longest_paths() -> None:
    curriculum, tops = pathfinder.Curriculum(5, 100), []
    for _ in range(100):
        curriculum.told(curriculum.top, 0.69)
        tops.append(curriculum.top)
    assert sorted(tops) == tops
    assert set(tops) == {2, 3, 4, 5}
    assert tops[60] == 5
    assert pathfinder.Curriculum(2, 10).draw(rng()) == 2


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--layers", "1", "--width", "16", "--heads", "1", "--batch", "2"]
    assert pathfinder.main(["--steps", "2", "--tests", "3", *size]) == 1  # two steps teach nothing
    text = capsys.readouterr().out
    assert "16 x 16 = 256 positions" in text
    for line in ("full: ", "sparse, ", "matmul, softmax, matmul: "):
        assert f"\n{line}" in text
    assert text.count("of 3 new pictures told right after 2 steps") == 2


def test_a_good_model_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pathfinder.Model, "accuracy", lambda *_: 0.9)
    size = ["--layers", "1", "--width", "16", "--heads", "1", "--batch", "1", "--steps", "1"]
    assert pathfinder.main([*size, "--tests", "200", "--attention", "sparse"]) == 0
    text = capsys.readouterr().out
    assert "90.0% +- 2.1% of 200 new pictures" in text
    assert "\nfull" not in text


def test_plain_attention_that_does_not_fit_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = pathfinder.parse(["--side", "256"])
    assert (options.steps, options.tests, options.batch) == (0, 0, 1)
    monkeypatch.setattr(measure, "free_bytes", lambda xp: 2**30)
    shape = Shape(5, 4, 64, 3, 2, 1)
    model = pathfinder.Model(SCENES[256], shape, Attention("plain"))
    # 4 heads, 5 layers and 2 more, 65536 squared, 4 bytes.
    assert plain_bytes(1, 4, 65536, 5, 4) == 4 * 7 * 2**34
    needed = f"{28 * 16:.1f} GiB of matrices alone, and 1.0 GiB are free"
    assert pathfinder.cost(model, model.initial(0), options) == f"does not fit: {needed}"


def test_memory_is_linear_in_the_length() -> None:
    def peak(side: int, kind: str) -> int:
        scene = replace(SCENES[side], distractors=0)
        model = pathfinder.Model(scene, small_shape(layers=2, width=8), Attention(kind))
        weights = model.initial(0)
        data = pictures(scene, 1, rng())
        return measure.peak_bytes(lambda: model.learn(weights, weights.zeros(), *data), np)

    matrices = plain_bytes(1, 2, 1024, 2, 4)
    assert matrices < peak(32, "plain") < 1.5 * matrices
    assert peak(32, "cuflash") < 0.5 * matrices


def test_dashes_are_drawn_as_said() -> None:
    scene = Scene(side=32, dashes=4, distractors=0, dash=3)
    pixels, labels = pictures(scene, 30, rng(3))
    assert scene.steps(4) == 15
    counts = (pixels != BACKGROUND).sum(axis=(1, 2))
    assert counts.max() <= 2 * 4 * 3  # two paths; a walk may come back to its own pixels
    assert ((pixels == DOT).sum(axis=(1, 2)) == 2).all()
    assert (pixels == DASH).any(axis=(1, 2)).all()
    assert set(labels.tolist()) == {0, 1}
