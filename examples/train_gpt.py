"""Train a GPT-2-shaped language model on cuflash, in NumPy or CuPy, without a framework.

Layers and their gradients are written out in `examples/gpt`; attention is `cuflash.attention_vjp`.
The text is the documentation in the standard library of the Python that runs, as bytes.

    python examples/train_gpt.py                 # 2 CPU cores, under 3 minutes
    python examples/train_gpt.py --compare       # and the same by matmul, softmax, matmul
    python examples/train_gpt.py --size gpt2 --device cupy   # 124M parameters, needs a GPU

An interrupted run goes on with --resume from its last checkpoint, to bitwise the same weights (on a
GPU: unless --fast-gradients was given). Exit status 1 when the model does not beat the unigram
entropy of the text or, in float32, when the two curves of --compare differ by more than rounding.
Beside other work on the same cores, OPENBLAS_NUM_THREADS=1 keeps threads from waiting for each other.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.attention import LAYERS
from gpt.data import Corpus, corpus
from gpt.model import Shape
from gpt.plot import loss_curves
from gpt.training import History, Settings, Training

# GPT-2's vocabulary has 50257 rows. Bytes name the first 256 of them; the others are there so that
# the number of parameters and the cost of a step are GPT-2's.
SHAPES = {
    "small": Shape(layers=4, heads=4, width=128, context=128),
    "gpt2": Shape(layers=12, heads=12, width=768, context=1024, vocabulary=50257),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"text": "docs", "batch": 8, "steps": 1000, "rate": 2e-3, "tests": 16},
    "gpt2": {"text": "source", "batch": 16, "steps": 1000, "rate": 6e-4, "tests": 4},
}
TOLERANCE = 1e-3  # of the running loss, float32, nats


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the size's values where nothing else is said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SHAPES, default="small")
    add("--device", choices=("numpy", "cupy"), default="numpy")
    add("--attention", choices=LAYERS, default="cuflash")
    add("--compare", action="store_true", help="train with both attentions, from the same seed")
    add("--precision", choices=("float32", "bfloat16", "float16"), help="of attention alone")
    add("--text", help="'docs' or 'source' of the standard library, or a file")
    for name in ("layers", "heads", "width", "context", "batch", "steps", "tests"):
        add(f"--{name}", type=int, help=f"another number than the size's: {_of_sizes(name)}")
    add("--rate", type=float, help=f"largest learning rate: {_of_sizes('rate')}")
    add("--seed", type=int, default=0)
    add("--fast-gradients", action="store_true", help="on a GPU: not bitwise reproducible")
    add("--out", type=Path, default=Path("train_gpt_out"), help="folder of checkpoints and curve")
    add("--resume", action="store_true", help="go on from the checkpoints in that folder")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS")
    add("--until", type=int, metavar="STEP", help="stop there, as if interrupted")
    add("--sample", type=int, default=400, metavar="BYTES", help="to write at the end")
    add("--prompt", default="The ")
    add("--temperature", type=float, default=0.7)
    options = parser.parse_args(arguments)
    for name, value in (DEFAULTS[options.size] | vars(SHAPES[options.size])).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    if options.precision is None:
        options.precision = "float32" if options.device == "numpy" else "bfloat16"
    return options


def _of_sizes(name: str) -> str:
    return ", ".join(f"{(DEFAULTS[size] | vars(SHAPES[size]))[name]} of {size}" for size in SHAPES)


def settings(options: argparse.Namespace, attention: str, text: Corpus) -> Settings:
    """What the command line asks for, with one attention."""
    shape = Shape(options.layers, options.heads, options.width, options.context, options.vocabulary)
    return Settings(
        shape=shape,
        text=options.text,
        digest=text.digest,
        batch=options.batch,
        steps=options.steps,
        warmup=max(1, options.steps // 20),
        rate=options.rate,
        decay=0.1,
        clip=1.0,
        tests=options.tests,
        test_every=-(-options.steps // 6),
        seed=options.seed,
        attention=attention,
        precision=options.precision,
        device=options.device,
        deterministic=not options.fast_gradients,
    )


def train(options: argparse.Namespace, attention: str, text: Corpus) -> Training:
    """A training, run to its end or to --until."""
    training = Training(settings(options, attention, text), text)
    checkpoint = options.out / f"{attention}.npz"
    if options.resume and checkpoint.exists():
        training.load(checkpoint)
        print(f"{attention}: going on after step {training.step} of {checkpoint}")
    elif options.resume:
        print(f"{attention}: no checkpoint at {checkpoint}, so this begins at step 0")
    until = min(options.steps, options.until or options.steps)
    training.run(until, checkpoint, options.checkpoint_every)
    return training


def table(trainings: Mapping[str, Training]) -> str:
    """Losses, time and memory, a row for each attention."""
    lines = ["attention   train    test   ms/step  tokens/s   seconds   memory of a step"]
    for name, training in trainings.items():
        history = training.history
        test = f"{history.tests[-1][1]:.4f}" if history.tests else "-"
        lines.append(
            f"{name:<9}  {history.running[-1]:.4f}  {test:>6}  "
            f"{1e3 * np.median(history.seconds):8.1f}  {training.rate():8.0f}  "
            f"{sum(history.seconds):8.1f}   {history.step_bytes / 1e6:.1f} MB"
        )
    return "\n".join(lines)


def difference(first: History, second: History) -> float:
    """The largest difference of two running losses."""
    return float(np.abs(first.running - second.running).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, sample, draw; 0 when what was promised holds."""
    start = time.perf_counter()
    options = parse(arguments)
    try:
        text = corpus(options.text, options.context)
        names = list(LAYERS) if options.compare else [options.attention]
        entropy = text.unigram_entropy
        print(
            f"text {options.text!r}: {len(text.train)} bytes to train, {len(text.test)} to test, "
            f"unigram entropy {entropy:.3f} nats per byte"
        )
        trainings = {name: train(options, name, text) for name in names}
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))

    last = trainings[names[0]]
    print(f"\n{table(trainings)}")
    good = True
    if options.compare:
        apart = difference(*(training.history for training in trainings.values()))
        wide = options.precision == "float32" and options.device == "numpy"
        good = apart < TOLERANCE or not wide
        allowed = f"allowed {TOLERANCE}" if wide else f"rounding of {options.precision}"
        print(f"largest difference of the running loss: {apart:.1e} ({allowed})")
    if last.history.tests:
        loss = last.history.tests[-1][1]
        print(f"test loss {loss:.3f}, unigram entropy {entropy:.3f} nats per byte")
        good = good and loss < entropy
    curves = {name: training.history for name, training in trainings.items()}
    print(loss_curves(options.out / "loss.svg", curves, entropy))
    if options.sample:
        print(f"\n{last.sample(options.prompt, options.sample, options.temperature)}")
    # A machine that is busy with other work shows in the first number, not in the second.
    print(
        f"\n{time.perf_counter() - start:.0f} s in all, {time.process_time():.0f} s of one core's time"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
