"""Learn from a whole stretch of a genome at once: 65,536 bases in one sequence, hidden bases guessed.

A bacterium's chromosome, single bases as tokens, 15% of them hidden. A small encoder sees 128 bases
to either side through a block mask, and the rest through 16 global positions that see and are seen
by all; what a head makes of a distance is a learned table inside cuflash.attention's score function.
It first learns on short pieces, as the Longformer did, then on whole stretches, and is judged on a
stretch it has not seen, beside tables of how often each base stands between its neighbours.

    pip install pyrodigal==3.7.1                  # carries the chromosome; 3 MB
    python examples/genome.py                     # 3 minutes of one CPU core
    python examples/genome.py --device cupy --layers 6 --steps 3000    # on a GPU

The first prints, in nats per hidden base of 65,536 it has not seen: 1.3812 for each base's own frequency,
1.3680, 1.3584, 1.3489 between 1, 2, 3 neighbours to either side, and 1.3497 +- 0.0025 for the model. A step
on all of them takes 1.1 GiB; matrices of scores would take 256.

Exit status 1 when the model does not beat the table of nearest neighbours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

import cuflash
from encoder import measure
from encoder.attention import Attention, plain_bytes
from encoder.dna import HIDDEN, ContextTable, chromosome, hide
from encoder.layers import cross_entropy, linear
from encoder.model import Shape, encode
from encoder.optimizer import AdamW, Weights
from encoder.relative import Relative, look_at


@dataclass(frozen=True)
class Model:
    """An encoder of bases between global positions and their answers.

    Attributes
    ----------
    shape : Shape
    relative : Relative
        `first` of its positions are global.
    window : int
        Bases seen to either side.
    block : int
        Of the block mask.
    xp : module
        `numpy` or `cupy`.
    """

    shape: Shape
    relative: Relative
    window: int
    block: int = 128
    xp: Any = np

    @classmethod
    def of(cls, layers: int, heads: int, width: int, window: int, first: int, xp: Any) -> Model:
        """A model whose tables reach as far as its window."""
        relative = Relative(heads, window, first)
        # A token per base, one for hidden ones, and each global position is a token of its own.
        kinds = HIDDEN + 1 + first
        shape = Shape(layers, heads, width, kinds, 4, layers, entries=relative.entries)
        return cls(shape, relative, window, xp=xp)

    def initial(self, seed: int) -> Weights:
        """Random weights; heads begin by looking at single neighbours, nearer ones first."""
        weights = self.shape.initial(seed)
        steps = np.arange(self.shape.layers * self.shape.heads)
        offsets = (1 + steps // 2) * np.where(steps % 2, 1, -1)
        for number in range(self.shape.layers):
            near = offsets[number * self.shape.heads :][: self.shape.heads]
            weights[f"{number}.table"][...] = look_at(self.relative, near, strength=8, width=0.5)
        return Weights(self.xp.asarray(weights.vector), weights.shapes)

    def attention(self, bases: int) -> Attention:
        """Window and global positions over so many bases."""
        first, length = self.relative.first, bases + self.relative.first
        mask = cuflash.BlockMask.global_window(
            (self.window, self.window),
            range(first),
            shape=(length, length),
            block_size=self.block,
        )
        return Attention(mask=mask, relative=self.relative, dtype=None if self.xp is np else "f2")

    def forward(
        self, weights: Weights, shown: np.ndarray, places: np.ndarray, attention: Attention
    ) -> tuple[Any, Any]:
        """Logits (places, 4) of the bases at the places, and the pullback (dlogits, gradients)."""
        first = self.relative.first
        tokens = np.concatenate([np.arange(HIDDEN + 1, HIDDEN + 1 + first), shown])
        tokens, at = self.xp.asarray(tokens[None]), self.xp.asarray(first + places)
        rows, back_rows = encode(self.shape, weights, tokens, attention)
        logits, back_head = linear(rows[0, at], weights["head.weight"], weights["head.bias"])

        def pullback(dlogits: Any, gradients: Weights) -> None:
            dchosen, dweight, dbias = back_head(dlogits)
            gradients["head.weight"][...] += dweight
            gradients["head.bias"][...] += dbias
            drows = self.xp.zeros_like(rows)
            drows[0, at] = dchosen
            back_rows(drows, gradients)

        return logits, pullback

    def learn(
        self,
        weights: Weights,
        gradients: Weights,
        piece: np.ndarray,
        hidden: tuple[np.ndarray, np.ndarray],
        attention: Attention,
    ) -> Any:
        """The loss on one piece; its gradient is put into `gradients`."""
        shown, places = hidden
        logits, back = self.forward(weights, shown, places, attention)
        loss, back_loss = cross_entropy(logits, self.xp.asarray(piece[places].astype(np.int64)))
        gradients.vector[...] = 0
        back(back_loss(1.0), gradients)
        return loss


def judge(
    model: Model, weights: Weights, piece: np.ndarray, shown: np.ndarray, places: np.ndarray
) -> tuple[float, float]:
    """Mean loss on a piece in nats, and its standard error."""
    logits, _ = model.forward(weights, shown, places, model.attention(len(piece)))
    logits = np.asarray(logits if model.xp is np else logits.get(), np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(places)), piece[places]]
    return float(losses.mean()), float(losses.std() / np.sqrt(len(losses)))


def train(
    model: Model, weights: Weights, bases: np.ndarray, options: argparse.Namespace
) -> list[float]:
    """Learn on short pieces and then on long ones; the losses of all steps."""
    rng = np.random.default_rng(options.seed)
    lengths = [options.short] * options.steps + [options.length] * options.long_steps
    attentions = {length: model.attention(length) for length in set(lengths)}
    optimizer = AdamW(weights, steps=len(lengths), rate=options.rate, warmup=len(lengths) // 20)
    gradients, losses = weights.zeros(), []
    with tqdm(lengths, unit="step", leave=False, disable=None) as bar:
        for length in bar:
            start = int(rng.integers(0, len(bases) - length + 1))
            piece = bases[start : start + length]
            hidden = hide(piece, options.hidden, rng)
            loss = model.learn(weights, gradients, piece, hidden, attentions[length])
            optimizer.step(gradients)
            losses.append(loss)
            if len(losses) % 10 == 0:  # reading it waits for a GPU
                bar.set_postfix(length=length, loss=f"{float(loss):.4f}")
    return [float(loss) for loss in losses]


def cost(model: Model, weights: Weights, piece: np.ndarray, options: argparse.Namespace) -> str:
    """Time and memory of one step on a whole stretch, and what plain matrices would need."""
    attention, gradients = model.attention(len(piece)), weights.zeros()
    hidden = hide(piece, options.hidden, np.random.default_rng(0))

    def step() -> None:
        model.learn(weights, gradients, piece, hidden, attention)

    seconds, peak = measure.cost(step, model.xp)
    length, shape = len(piece) + model.relative.first, model.shape
    matrices = plain_bytes(1, shape.heads, length, shape.layers, 4)
    return (
        f"one step on {length:,} positions: {seconds:.2f} s, {measure.size(peak)} at the largest; "
        f"{attention.mask.density:.2%} of all pairs are visible\n"  # type: ignore[union-attr]
        f"by matmul, softmax, matmul: {measure.size(matrices)} of matrices alone, "
        f"and {measure.size(measure.free_bytes(model.xp))} are free"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("numpy", "cupy"), default="numpy")
    add("--length", type=int, default=65536, help="bases of a whole stretch")
    add("--short", type=int, default=2048, help="bases of a short piece")
    add("--steps", type=int, default=300, help="on short pieces")
    add("--long-steps", type=int, default=4, help="on whole stretches")
    add("--window", type=int, default=128, help="bases seen to either side")
    add("--first", type=int, default=16, help="global positions")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=64)
    add("--hidden", type=float, default=0.15, help="share of the bases that are to be guessed")
    add("--rate", type=float, default=2e-3, help="largest learning rate")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and judge; 0 when the model beats the table of nearest neighbours."""
    options = parse(arguments)
    xp: Any = np
    if options.device == "cupy":
        import cupy as xp
    try:
        bases = chromosome()
    except FileNotFoundError as error:
        sys.exit(str(error))
    model = Model.of(
        options.layers, options.heads, options.width, options.window, options.first, xp
    )
    weights = model.initial(options.seed)
    unseen, seen = bases[: options.length], bases[options.length :]
    print(
        f"{len(seen):,} bases to learn from, {len(unseen):,} others to be judged by; "
        f"{weights.vector.size:,} weights\n{cost(model, weights, unseen, options)}",
        flush=True,
    )
    start, core = time.perf_counter(), time.process_time()
    train(model, weights, seen, options)
    seconds, core = time.perf_counter() - start, time.process_time() - core
    rng = np.random.default_rng(options.seed + 1)
    shown, places = hide(unseen, options.hidden, rng)
    print(
        f"trained in {seconds:.0f} s ({core:.0f} s of one core)\n"
        "nats per hidden base of the unseen stretch:"
    )
    tables = {}
    for side in range(4):
        table = ContextTable(side, seen, options.hidden, rng)
        tables[side] = table.loss(shown, unseen, places)
        around = f"between {side} + {side} neighbours" if side else "by itself"
        print(f"  {tables[side]:.4f}  how often each base is there, {around}")
    loss, error = judge(model, weights, unseen, shown, places)
    print(f"  {loss:.4f}  this model, +- {error:.4f}")
    return 0 if loss < tables[1] else 1


if __name__ == "__main__":
    sys.exit(main())
