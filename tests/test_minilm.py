"""A real model end to end: weights, tokenizer, and cuflash in place of its attention."""

from __future__ import annotations

import numpy as np
import pytest

from examples import minilm


@pytest.mark.slow
def test_search_agrees_with_float64(capsys: pytest.CaptureFixture[str]) -> None:
    assert minilm.main([]) == 0
    text = capsys.readouterr().out
    assert "ten best answers to every question: the same" in text
    for question in minilm.QUESTIONS:
        assert question in text


def test_embedding_is_the_published_one() -> None:
    # As sentence-transformers prints it for this model and sentence, to the digits it prints.
    published = [6.76569e-02, 6.34960e-02, 4.87131e-02, 7.93050e-02, 3.74481e-02, 2.65275e-03]
    encoder = minilm.Encoder(np, np.float32, minilm.cuflash_attention)
    (vector,) = encoder.embed(["This is an example sentence"], lambda count: None)
    np.testing.assert_allclose(vector[:6], published, atol=2e-6)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_disagreement_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(xp: object, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return minilm.plain_attention(xp, q, np.roll(k, 1, axis=1), v)

    monkeypatch.setattr(minilm, "cuflash_attention", shifted)
    monkeypatch.setattr(minilm, "passages", lambda count: [("topic", "words to be found")] * 2)
    assert minilm.main([]) == 1
