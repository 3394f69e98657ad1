"""Masked bases: the chromosome, the tables a model has to beat, and the model around its globals."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest

from encoder import dna, measure
from encoder.attention import Attention
from encoder.layers import cross_entropy
from encoder.optimizer import AdamW, Weights
from encoder.relative import Relative
from examples import genome


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def small(window: int = 8, first: int = 3, **values: int) -> genome.Model:
    given = {"layers": 1, "heads": 2, "width": 16, **values}
    return genome.Model.of(**given, window=window, first=first, xp=np)


# ---- the data


def test_chromosome_is_the_one_of_the_database() -> None:
    bases = dna.chromosome()
    # Length and composition of NZ_LN831026.1.
    counts = dict(zip(dna.BASES, np.bincount(bases).tolist(), strict=True))
    assert counts == {"A": 571277, "C": 661407, "G": 657251, "T": 573731}
    assert len(bases) == 2463666


def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install pyrodigal=="):
        dna.chromosome()
    with pytest.raises(SystemExit, match="pip install pyrodigal=="):
        genome.main([])


def test_the_package_named_is_the_one_that_is_pinned() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError) as error:
            dna.chromosome()
    (pin,) = re.findall(r"pip install (pyrodigal==[\d.]+)", str(error.value))
    root = Path(__file__).parent.parent
    assert f'"{pin}"' in (root / "pyproject.toml").read_text()
    assert f"pip install {pin}" in (genome.__doc__ or "")


@pytest.mark.parametrize("text", [">name\n", ">name\nACGN\n"])
def test_what_is_not_four_letters_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not all in ACGT"):
        dna.parse(text)


def test_hidden_places_are_hidden_and_no_others() -> None:
    bases = rng().integers(0, 4, 1000).astype(np.uint8)
    shown, places = dna.hide(bases, 0.15, rng(1))
    assert len(set(places.tolist())) == 150
    assert (shown[places] == dna.HIDDEN).all()
    others = np.delete(np.arange(1000), places)
    np.testing.assert_array_equal(shown[others], bases[others])


def test_context_table_against_counting_one_by_one() -> None:
    bases = rng().choice(4, 400, p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
    table = dna.ContextTable(1, bases, 0.25, rng(5), rounds=2)
    again, counts = rng(5), np.ones((5, 5, 4))
    for _ in range(2):
        shown, _ = dna.hide(bases, 0.25, again)
        around = [dna.HIDDEN, *shown.tolist(), dna.HIDDEN]
        for place, base in enumerate(bases.tolist()):
            counts[around[place], around[place + 2], base] += 1
    shown, places = dna.hide(bases, 0.25, rng(6))
    around = [dna.HIDDEN, *shown.tolist(), dna.HIDDEN]
    losses = []
    for place in places.tolist():
        row = counts[around[place], around[place + 2]]
        losses.append(-math.log(row[bases[place]] / row.sum()))
    assert table.loss(shown, bases, places) == pytest.approx(np.mean(losses), rel=1e-12)


def test_table_without_neighbours_is_the_unigram_entropy() -> None:
    bases = np.repeat(np.arange(4, dtype=np.uint8), [4000, 3000, 2000, 1000])
    table = dna.ContextTable(0, bases, 0.1, rng())
    share = np.array([0.4, 0.3, 0.2, 0.1])
    loss = table.loss(bases, bases, np.arange(len(bases)))
    assert loss == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)


# ---- the model


def test_who_sees_whom() -> None:
    mask = small(window=8, first=3).attention(50).mask
    assert mask is not None
    i, j = np.arange(53)[:, None], np.arange(53)
    expected = (abs(i - j) <= 8) | (i < 3) | (j < 3)
    np.testing.assert_array_equal(mask.to_dense()[0], expected)


def test_distances_have_their_entries() -> None:
    relative = Relative(heads=1, reach=2, first=1)
    matrix = relative.matrix(np.arange(7.0)[None], 6)[0]
    # Entries 0 to 4: distances -2 to 2; 5: the key is global; 6: the query alone is.
    assert matrix.astype(int).tolist() == [
        [5, 6, 6, 6, 6, 6],
        [5, 2, 3, 4, 4, 4],
        [5, 1, 2, 3, 4, 4],
        [5, 0, 1, 2, 3, 4],
        [5, 0, 0, 1, 2, 3],
        [5, 0, 0, 0, 1, 2],
    ]
    q = np.zeros((6, 1))
    np.testing.assert_array_equal(
        relative.score_mod(np.arange(7.0)[None]).evaluate(
            np.zeros((6, 6)),
            0,
            0,
            np.arange(6)[:, None],
            np.arange(6),
            {"table": np.arange(7.0)[None]},
        )
        + q,
        matrix,
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_of_the_model(seed: int) -> None:
    model = small()
    start = model.initial(0)
    vector = start.vector + 0.2 * rng(seed).standard_normal(start.vector.shape)
    piece = rng(1).integers(0, 4, 60).astype(np.uint8)
    hidden, attention = dna.hide(piece, 0.3, rng(2)), model.attention(60)
    weights = Weights(vector, start.shapes)
    gradients = weights.zeros()
    model.learn(weights, gradients, piece, hidden, attention)
    step = 1e-6 * rng(3).standard_normal(vector.shape)
    ends = [
        model.learn(Weights(moved, start.shapes), weights.zeros(), piece, hidden, attention)
        for moved in (vector + step, vector - step)
    ]
    assert gradients.vector @ step == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-6)
    # Every weight has a part in the result, those of global positions too.
    for name, gradient in gradients.items():
        assert abs(gradient).max() > 0, name


def test_a_full_mask_is_no_mask() -> None:
    model = small(window=100, first=2)
    piece = rng().integers(0, 4, 70).astype(np.uint8)
    shown, places = dna.hide(piece, 0.2, rng(1))
    weights = model.initial(0)
    masked = model.attention(70)
    assert masked.mask is not None and masked.mask.density == 1
    sparse, _ = model.forward(weights, shown, places, masked)
    full, _ = model.forward(weights, shown, places, Attention(relative=model.relative))
    plain, _ = model.forward(weights, shown, places, Attention("plain", None, model.relative))
    np.testing.assert_allclose(sparse, full, atol=1e-5)
    np.testing.assert_allclose(plain, full, atol=1e-5)


def test_steps_lower_the_loss_below_what_neighbours_do_not_tell() -> None:
    # Every base follows from the one before: A -> C -> G -> T -> A, from a random start.
    model = small(window=8, first=1, width=32)
    piece = (np.arange(300) % 4).astype(np.uint8)
    weights, gradients = model.initial(0), model.initial(0).zeros()
    attention, optimizer = model.attention(300), AdamW(weights, steps=60, rate=5e-3, warmup=3)
    losses = []
    for step in range(60):
        moved = np.roll(piece, step)
        loss = model.learn(weights, gradients, moved, dna.hide(moved, 0.15, rng(step)), attention)
        losses.append(float(loss))
        optimizer.step(gradients)
    assert losses[0] == pytest.approx(math.log(4), abs=1e-6)
    assert losses[-1] < 0.5 * math.log(4)
    shown, places = dna.hide(piece, 0.15, rng(99))
    loss, error = genome.judge(model, weights, piece, shown, places)
    assert loss < 0.5 * math.log(4)
    assert 0 <= error < loss


def test_judge_is_the_loss_of_training() -> None:
    model, piece = small(), rng().integers(0, 4, 90).astype(np.uint8)
    weights = model.initial(0)
    weights["head.weight"][...] = rng(1).standard_normal(weights["head.weight"].shape)
    shown, places = dna.hide(piece, 0.2, rng(2))
    logits, _ = model.forward(weights, shown, places, model.attention(90))
    loss, _ = cross_entropy(logits, piece[places])
    assert genome.judge(model, weights, piece, shown, places)[0] == pytest.approx(
        float(loss), rel=1e-5
    )


def test_memory_is_linear_in_the_length() -> None:
    model = small(window=16)
    weights = model.initial(0)

    def peak(length: int) -> int:
        piece = np.zeros(length, np.uint8)
        hidden, attention = dna.hide(piece, 0.1, rng()), model.attention(length)
        step = lambda: model.learn(weights, weights.zeros(), piece, hidden, attention)  # noqa: E731
        return measure.peak_bytes(step, np)

    assert peak(4096) < 5 * peak(1024)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--layers", "1", "--heads", "1", "--width", "8", "--window", "16"]
    lengths = ["--length", "1024", "--short", "128", "--steps", "2", "--long-steps", "1"]
    assert genome.main([*size, *lengths]) == 1  # three steps do not beat a table
    text = capsys.readouterr().out
    assert "2,462,642 bases to learn from, 1,024 others" in text
    assert "one step on 1,040 positions: " in text
    losses = re.findall(r"^  (\d\.\d{4})  ", text, re.MULTILINE)
    assert len(losses) == 5
    unigram, neighbours, *_, model = map(float, losses)
    assert neighbours < unigram < math.log(4) + 0.01
    assert 1.2 < model < 1.5
