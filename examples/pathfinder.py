"""Long-range vision from single pixels: is there a dashed path between the two dots?

The Pathfinder task, with every pixel a token: 16 x 16 = 256 of them by default, 128 x 128 = 16,384
(Path-X) and 256 x 256 = 65,536 (Path-256) with --side. A small encoder with rotary positions in two
dimensions learns it from short paths to long ones, once with every pixel looking at every pixel and
once block-sparse (butterfly and window), and each is measured beside matmul, softmax, matmul.

    python examples/pathfinder.py                           # 10 minutes of one CPU core
    python examples/pathfinder.py --side 128                # one measured step of each
    python examples/pathfinder.py --side 256 --device cupy  # needs a GPU

The first prints, beside times and memory of each step: full attention tells 78.8% +- 1.3% of 1000 new
pictures right (4 minutes of training), block-sparse attention over 39.2% of the pairs 65.6% +- 1.5%
(5 minutes), and the distance of the dots alone 52.9%.

Exit status 1 when a model that was tested is not better than chance by five standard errors.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

import cuflash
from encoder import measure
from encoder.attention import Attention, plain_bytes
from encoder.layers import cross_entropy, linear
from encoder.model import Shape, encode
from encoder.optimizer import AdamW, Weights
from encoder.paths import DOT, SCENES, Scene, pictures

# Long pictures are there to be measured: training on them takes days on one GPU.
DEFAULTS: dict[int, dict[str, int]] = {
    16: {"steps": 800, "batch": 16, "tests": 1000},
    32: {"steps": 4000, "batch": 16, "tests": 1000},
    128: {"steps": 0, "batch": 1, "tests": 0},
    256: {"steps": 0, "batch": 1, "tests": 0},
}
LEARNED = 0.3  # a running loss, in nats, at which paths become longer
LONGEST_FROM = 0.6  # the share of the steps after which they are as long as they get


def phases(side: int, head_dim: int) -> np.ndarray:
    """Rotary angles (side * side, head_dim / 2) as exp(1j * angle): half for rows, half for columns.

    Wavelengths go from 4 pixels to twice the picture.
    """
    steps = np.geomspace(math.pi / 2, math.pi / side, head_dim // 4)
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = np.concatenate([rows[:, None] * steps, columns[:, None] * steps], axis=1)
    return np.exp(1j * angles)


def butterfly_and_window(side: int) -> cuflash.BlockMask:
    """Two rows of pixels to either side, and the blocks that differ in one binary digit.

    Dao, Chen et al., "Pixelated Butterfly" (arXiv:2112.00029, 2021); block-sparse FlashAttention
    solved Path-256 with it (Dao et al., arXiv:2205.14135, 2022, section 4.2).
    """
    shape, block = (side * side, side * side), min(128, max(16, side))
    near = cuflash.BlockMask.sliding_window((2 * side, 2 * side), shape=shape, block_size=block)
    return near | cuflash.BlockMask.butterfly(shape=shape, block_size=block)


@dataclass(frozen=True)
class Model:
    """An encoder of pixels and a map from its rows at the dots to two logits.

    Attributes
    ----------
    scene : Scene
    shape : Shape
    attention : Attention
    xp : module
        `numpy` or `cupy`.
    """

    scene: Scene
    shape: Shape
    attention: Attention
    xp: Any = np

    def initial(self, seed: int) -> Weights:
        """Random weights; heads begin by looking a gap away, each in a direction of its own.

        As in ConViT (d'Ascoli et al., arXiv:2103.10697, 2021, section 3): a convolution at first,
        free to become something else. A constant query and a constant key do it, since rotary
        turns both: their product is largest where the key is `hop` away from the query.
        """
        weights = self.shape.initial(seed)
        heads, dim = self.shape.heads, self.shape.width // self.shape.heads
        steps = np.geomspace(math.pi / 2, math.pi / self.scene.side, dim // 4)
        strength = math.sqrt(6)
        for layer in range(self.shape.distinct):
            turn = 2 * math.pi * (np.arange(heads) + layer % 2 / 2)[:, None] / heads
            hop = self.scene.reach
            rows, columns = hop * np.sin(turn) * steps, hop * np.cos(turn) * steps
            angles = np.concatenate([rows, columns], axis=1)  # (heads, dim / 2)
            query, key, _ = weights[f"{layer}.qkv.bias"].reshape(3, heads, dim // 2, 2)
            query[..., 0], query[..., 1] = strength * np.cos(angles), strength * np.sin(angles)
            key[..., 0] = strength
        return Weights(self.xp.asarray(weights.vector), weights.shapes)

    def forward(self, weights: Weights, pixels: np.ndarray) -> tuple[Any, Any]:
        """Logits (n, 2) of pictures (n, side, side), and the pullback (dlogits, gradients)."""
        xp, dim = self.xp, self.shape.width // self.shape.heads
        tokens = xp.asarray(pixels.reshape(len(pixels), -1).astype(np.int32))
        # Complex numbers of the weights' precision.
        kind = np.result_type(weights.vector.dtype, np.complex64)
        angles = xp.asarray(phases(self.scene.side, dim).astype(kind))
        rows, back_rows = encode(self.shape, weights, tokens, self.attention, angles)
        share = (tokens == DOT).astype(rows.dtype)
        share /= share.sum(axis=1, keepdims=True)
        mean = (share[:, None, :] @ rows)[:, 0]
        logits, back_head = linear(mean, weights["head.weight"], weights["head.bias"])

        def pullback(dlogits: Any, gradients: Weights) -> None:
            dmean, dweight, dbias = back_head(dlogits)
            gradients["head.weight"][...] += dweight
            gradients["head.bias"][...] += dbias
            back_rows(share[:, :, None] * dmean[:, None, :], gradients)

        return logits, pullback

    def learn(
        self, weights: Weights, gradients: Weights, pixels: np.ndarray, labels: np.ndarray
    ) -> Any:
        """The mean loss on pictures; its gradient is put into `gradients`."""
        logits, back = self.forward(weights, pixels)
        loss, back_loss = cross_entropy(logits, self.xp.asarray(labels))
        gradients.vector[...] = 0
        back(back_loss(1.0), gradients)
        return loss

    def accuracy(
        self, weights: Weights, pixels: np.ndarray, labels: np.ndarray, batch: int
    ) -> float:
        """Share of the pictures that are told right."""
        right = 0
        for start in range(0, len(pixels), batch):
            logits, _ = self.forward(weights, pixels[start : start + batch])
            right += int(
                (logits.argmax(axis=1) == self.xp.asarray(labels[start : start + batch])).sum()
            )
        return right / len(pixels)


class Curriculum:
    """Paths grow by a dash when those of now are told right, and at the latest by a schedule.

    Bengio, Louradour, Collobert, Weston, "Curriculum Learning" (ICML 2009).

    Parameters
    ----------
    longest : int
        Dashes at the end.
    steps : int
        Of the whole training.
    """

    def __init__(self, longest: int, steps: int) -> None:
        self.longest, self.steps, self.done = longest, steps, 0
        self.top, self.loss = min(2, longest), math.log(2)

    def draw(self, rng: np.random.Generator) -> int:
        """Dashes for the next step: every second time as many as there may be now."""
        return self.top if rng.random() < 0.5 else int(rng.integers(2, self.top + 1))

    def told(self, dashes: int, loss: float) -> None:
        """The loss of a step."""
        self.done += 1
        if dashes == self.top:
            self.loss += 0.1 * (loss - self.loss)
        # Squared: the first lengths take longest, since all that follows builds on them.
        share = min(1, self.done / (LONGEST_FROM * self.steps))
        scheduled = 2 + int((self.longest - 2) * share**2)
        if self.top < self.longest and (self.loss < LEARNED or self.top < scheduled):
            self.top, self.loss = self.top + 1, math.log(2)


def train(model: Model, weights: Weights, options: argparse.Namespace, name: str) -> list[float]:
    """Learn from pictures whose paths become longer; the losses of all steps."""
    rng, gradients = np.random.default_rng(options.seed), weights.zeros()
    optimizer = AdamW(weights, steps=options.steps, rate=options.rate, warmup=options.steps // 20)
    curriculum, losses = Curriculum(model.scene.dashes, options.steps), []
    with tqdm(range(options.steps), desc=name, unit="step", leave=False, disable=None) as bar:
        for _ in bar:
            dashes = curriculum.draw(rng)
            scene = replace(model.scene, dashes=dashes)
            loss = model.learn(weights, gradients, *pictures(scene, options.batch, rng))
            optimizer.step(gradients)
            losses.append(float(loss))
            curriculum.told(dashes, losses[-1])
            bar.set_postfix(dashes=curriculum.top, loss=f"{np.mean(losses[-20:]):.3f}")
    return losses


def shortcut(pixels: np.ndarray, labels: np.ndarray) -> float:
    """What the distance of the dots alone can tell, with the best of all thresholds."""
    dots = [np.argwhere(picture == DOT) for picture in pixels]
    far = np.array([math.hypot(*(places[-1] - places[0])) for places in dots])
    right = labels[np.argsort(far, kind="stable")]
    below = np.concatenate([[0], np.cumsum(right)]) + np.concatenate(
        [np.cumsum((1 - right)[::-1])[::-1], [0]]
    )
    return float(max(below.max(), len(labels) - below.min()) / len(labels))


def cost(model: Model, weights: Weights, options: argparse.Namespace) -> str:
    """Time and memory of a training step, or what it would need where that is not there."""
    shape, length, xp = model.shape, model.scene.side**2, model.xp
    if model.attention.kind == "plain":
        needed = plain_bytes(options.batch, shape.heads, length, shape.layers, 4)
        free = measure.free_bytes(xp)
        if needed > 0.9 * free:  # the rest of the step wants some too
            text = f"{measure.size(needed)} of matrices alone"
            return f"does not fit: {text}, and {measure.size(free)} are free"
    gradients = weights.zeros()
    data = pictures(model.scene, options.batch, np.random.default_rng(options.seed))
    seconds, peak = measure.cost(lambda: model.learn(weights, gradients, *data), xp)
    return f"{seconds:.3f} s a step, {measure.size(peak)} at the largest"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the side's values where nothing else is said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--side", type=int, choices=SCENES, default=16)
    add("--device", choices=("numpy", "cupy"), default="numpy")
    add("--attention", choices=("full", "sparse", "both"), default="both")
    for name, what in (
        ("steps", "of training"),
        ("batch", "pictures a step"),
        ("tests", "pictures to be judged by; 0 for none"),
        ("dashes", "of the long paths"),
    ):
        add(f"--{name}", type=int, help=what)
    add("--layers", type=int, default=5)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=64)
    add("--rate", type=float, default=1e-3, help="largest learning rate")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, value in {**DEFAULTS[options.side], "dashes": SCENES[options.side].dashes}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test and measure; 0 when all that was tested beats chance."""
    options = parse(arguments)
    xp: Any = np
    if options.device == "cupy":
        import cupy as xp
    scene = replace(SCENES[options.side], dashes=options.dashes)
    shape = Shape(options.layers, options.heads, options.width, DOT + 1, 2, distinct=1)
    dtype = None if xp is np else np.float16
    kinds = {"full": Attention(dtype=dtype)}
    if options.attention != "full":
        kinds["sparse"] = Attention(mask=butterfly_and_window(options.side), dtype=dtype)
    if options.attention == "sparse":
        del kinds["full"]
    print(
        f"{scene.side} x {scene.side} = {scene.side**2:,} positions, {options.batch} pictures a "
        f"step, {shape.layers} layers of {shape.heads} heads"
    )
    tests = pictures(scene, options.tests, np.random.default_rng(options.seed + 1))
    good = True
    for name, attention in kinds.items():
        model = Model(scene, shape, attention, xp)
        weights = model.initial(options.seed)
        if attention.mask is not None:
            name = f"{name}, {attention.mask.density:.1%} of all pairs"
        print(f"{name}: {cost(model, weights, options)}", flush=True)
        start, core = time.perf_counter(), time.process_time()
        train(model, weights, options, name)
        if options.tests:
            seconds, core = time.perf_counter() - start, time.process_time() - core
            share = model.accuracy(weights, *tests, options.batch)
            error = math.sqrt(share * (1 - share) / options.tests)
            good &= share > 0.5 + 5 * math.sqrt(0.25 / options.tests)
            print(
                f"  {100 * share:.1f}% +- {100 * error:.1f}% of {options.tests} new pictures told "
                f"right after {options.steps} steps in {seconds:.0f} s ({core:.0f} s of one core)"
            )
    plain = Model(scene, shape, Attention("plain"), xp)
    print(f"matmul, softmax, matmul: {cost(plain, plain.initial(options.seed), options)}")
    if options.tests:
        print(f"the distance of the dots alone tells {100 * shortcut(*tests):.1f}%")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
