"""Training: steps, tests, the progress bar, checkpoints, and what a step costs in memory."""

from __future__ import annotations

import json
import os
import resource
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .attention import LAYERS, Layer, fused_attention, in_precision
from .data import Corpus
from .model import GPT, Arrays, Shape, initial_weights
from .optimizer import AdamW, Schedule, clip

RUNNING = 20  # steps that the running loss is a mean of


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run; a checkpoint is resumed only by the same settings.

    Attributes
    ----------
    shape : Shape
        Of the model.
    text, digest : str
        Name of the text, and what it contained.
    batch : int
        Windows of `shape.context` bytes in a step.
    steps, warmup : int
        Of the schedule.
    rate, decay, clip : float
        Largest learning rate, weight decay, largest norm of a gradient.
    tests, test_every : int
        Batches of a test; steps from one to the next.
    seed : int
        Of the first weights and of the order of the text.
    attention, precision, device : str
        A name of `attention.LAYERS`, a dtype, and "numpy" or "cupy".
    deterministic : bool
        Gradients bitwise equal from run to run on a GPU as well.
    """

    shape: Shape
    text: str
    digest: str
    batch: int
    steps: int
    warmup: int
    rate: float
    decay: float
    clip: float
    tests: int
    test_every: int
    seed: int
    attention: str
    precision: str
    device: str
    deterministic: bool

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.shape.context

    def layer(self) -> Layer:
        """The attention."""
        layer = LAYERS[self.attention]
        if layer is fused_attention:
            deterministic = self.deterministic

            def layer(qkv: Any) -> Any:
                return fused_attention(qkv, deterministic=deterministic)

        return in_precision(layer, precision(self.precision))


@dataclass
class History:
    """What has been measured: by step, and (step, loss) of the tests."""

    losses: list[float] = field(default_factory=list)
    tests: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_bytes: int = 0  # peak of one step's arrays, beyond weights and moments

    @property
    def running(self) -> np.ndarray:
        """Mean of the last `RUNNING` losses at every step."""
        sums = np.cumsum([0.0, *self.losses])
        ends = np.arange(1, len(sums))
        starts = np.maximum(0, ends - RUNNING)
        return (sums[ends] - sums[starts]) / (ends - starts)


def precision(name: str) -> np.dtype:
    """A NumPy dtype by name, bfloat16 too."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Training:
    """A model on its way.

    Parameters
    ----------
    settings : Settings
        What to do.
    corpus : Corpus
        The text.

    Attributes
    ----------
    step : int
        Steps done.
    history : History
        Measured so far.
    """

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings, self.corpus, self.xp = settings, corpus, module(settings.device)
        weights = initial_weights(settings.shape, settings.seed, self.xp)
        self.model = GPT(settings.shape, weights, settings.layer())
        self.optimizer = AdamW(weights, settings.decay)
        self.gradients = Arrays(weights.shapes, self.xp.zeros_like(weights.vector))
        self.schedule = Schedule(settings.rate, settings.warmup, settings.steps)
        self.step, self.history = 0, History()

    def run(self, until: int, checkpoint: Path, every: int) -> None:
        """Train.

        Parameters
        ----------
        until : int
            Step to stop before.
        checkpoint : Path
            Where to save.
        every : int
            Steps between two checkpoints; one more is written at the end.
        """
        settings = self.settings
        bar = tqdm(
            total=until * settings.tokens,
            initial=self.step * settings.tokens,
            desc=settings.attention,
            unit="token",
            unit_scale=True,
            disable=None,
        )
        saved = self.step
        with bar:
            while self.step < until:
                self._measured_step()
                bar.set_postfix_str(
                    f"loss {self.history.running[-1]:.3f}, {self._memory()}", refresh=False
                )
                bar.update(settings.tokens)
                if self.step % settings.test_every == 0 or self.step == settings.steps:
                    self.history.tests.append((self.step, self.test()))
                    bar.write(self.progress())
                if self.step % every == 0:
                    self.save(checkpoint)
                    saved = self.step
        if saved != self.step:
            self.save(checkpoint)

    def progress(self) -> str:
        """The last test in one line."""
        step, loss = self.history.tests[-1]
        return (
            f"{self.settings.attention:>8}  step {step:>6}  train {self.history.running[-1]:.3f}  "
            f"test {loss:.3f}  {self.rate():8.0f} tokens/s  {self._memory()}"
        )

    def rate(self) -> float:
        """Tokens per second of the median step, which a busy moment of the machine does not change."""
        return self.settings.tokens / float(np.median(self.history.seconds))

    def test(self) -> float:
        """Loss on the test part."""
        settings = self.settings
        batches = self.corpus.test_batches(settings.tests, settings.batch, settings.shape.context)
        losses = [float(self.model.loss(*self._on_device(batch))[0]) for batch in batches]
        return sum(losses) / len(losses)

    def sample(self, prompt: str, count: int, temperature: float) -> str:
        """`prompt` and `count` bytes that the model says after it."""
        rng = np.random.default_rng(self.settings.seed)
        text = list(prompt.encode())
        for _ in range(count):
            tokens = self.xp.asarray([text[-self.settings.shape.context :]])
            scores = self._on_host(self.model.next_logits(tokens))[0, :256].astype(np.float64)
            # The largest of scores with Gumbel noise is a draw from their softmax.
            text.append(int(np.argmax(scores / temperature + rng.gumbel(size=scores.shape))))
        return bytes(text).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write weights by name, moments, history and settings; an old file stays until it is done."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "settings": asdict(self.settings)} | asdict(self.history)
        arrays = {f"weights/{name}": self._on_host(x) for name, x in self.model.weights.items()}
        for name, moment in self._moments().items():
            arrays[name] = self._on_host(moment)
        unfinished = path.with_name(f"unfinished-{path.name}")
        np.savez(unfinished, state=np.array(json.dumps(state)), **arrays)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Parameters
        ----------
        path : Path
            Written by `save`.

        Raises
        ------
        ValueError
            It was written under other settings.
        """
        with np.load(path) as saved:
            state = json.loads(str(saved["state"]))
            self._check_settings(path, state["settings"])
            for name, weight in self.model.weights.items():
                weight[...] = self.xp.asarray(saved[f"weights/{name}"])
            for name, moment in self._moments().items():
                moment[...] = self.xp.asarray(saved[name])
        self.step = state["step"]
        tests = [(step, loss) for step, loss in state["tests"]]
        self.history = History(state["losses"], tests, state["seconds"], state["step_bytes"])

    def _check_settings(self, path: Path, found: dict[str, Any]) -> None:
        wanted = asdict(self.settings)
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"{path} was written with {name}={found.get(name)}, and this run has "
                f"{name}={wanted[name]}.\n"
                f"  different: {', '.join(different)}\n"
                "  Way out: the options of that run, or another folder (--out), or no --resume."
            )

    def _moments(self) -> dict[str, Any]:
        return {"first": self.optimizer.first, "second": self.optimizer.second}

    def _measured_step(self) -> None:
        """One step with its time; the first of a run with its memory too."""
        start = time.perf_counter()
        if self.history.step_bytes:
            self._one_step()
        else:
            self.history.step_bytes = self._peak_of_step()
        self.history.seconds.append(time.perf_counter() - start)

    def _one_step(self) -> None:
        settings = self.settings
        batch = self.corpus.batch(settings.batch, settings.shape.context, settings.seed, self.step)
        loss, pullback = self.model.loss(*self._on_device(batch))
        gradient = self.gradients.vector
        gradient[...] = 0
        pullback(self.gradients)
        clip(gradient, settings.clip)
        self.optimizer.step(gradient, self.schedule(self.step), self.step)
        # A GPU has now been given the whole step; reading its loss waits for it.
        self.history.losses.append(float(loss))
        self.step += 1

    def _peak_of_step(self) -> int:
        """Bytes that a step's arrays take at most, beyond weights, moments and gradient."""
        if self.xp is np:
            tracemalloc.start()
            self._one_step()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak
        pool = self.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        self._one_step()
        return pool.total_bytes() - before

    def _memory(self) -> str:
        """Of the process, or of the GPU's pool: the most so far."""
        if self.xp is np:
            return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
        return f"{self.xp.get_default_memory_pool().total_bytes() / 2**20:.0f} MB"

    def _on_device(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        return [self.xp.asarray(x) for x in arrays]

    def _on_host(self, x: Any) -> np.ndarray:
        return x if self.xp is np else x.get()


def module(device: str) -> Any:
    """`numpy` or `cupy`; on a GPU float32 products use its tensor cores (TF32).

    Parameters
    ----------
    device : str
        "numpy" or "cupy".

    Raises
    ------
    RuntimeError
        CuPy is missing or sees no GPU.
    """
    if device == "numpy":
        return np
    # CuPy reads it when it is imported. Attention has its own precision.
    os.environ.setdefault("CUPY_TF32", "1")
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise RuntimeError(
            f"CuPy finds no GPU: {error}.\n"
            "  device='cupy'\n"
            "  Way out: --device numpy, or pip install '.[cuda12]' on a machine with a GPU."
        ) from error
    return cupy
