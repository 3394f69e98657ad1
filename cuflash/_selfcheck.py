"""The main job of `python -m cuflash`: is attention right and worth using on this very machine?

Forward and backward at a realistic size on the GPU, or on NumPy where there is none. Every result
is checked against float64 and set beside the plain matmul-softmax-matmul formula on the same
device.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

import cuflash
from cuflash import _plain
from cuflash._dtypes import BY_NAME
from cuflash._system import cupy_or_reason

# A result may be this many times as wrong as the plain formula in the same precision.
FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
LSE_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """One size at which everything is measured.

    Parameters
    ----------
    heads, length, head_dim : int
    dtype : str
    causal : bool
    """

    heads: int
    length: int
    head_dim: int
    dtype: str
    causal: bool

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return (
            f"{self.dtype}, {self.heads} heads, {self.length} queries and keys, "
            f"head dim {self.head_dim}, {kind}"
        )

    def flops(self, backward: bool) -> float:
        """Floating-point operations as FlashAttention counts them: causal is half, backward 2.5."""
        forward = 4 * self.heads * self.length**2 * self.head_dim * (0.5 if self.causal else 1)
        return forward * (2.5 if backward else 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report.

    Parameters
    ----------
    direction, method : str
    seconds, tflops : float or None
        None where the method did not fit into memory.
    memory : int or None
        Peak bytes while it ran, its results included.
    error : float
        Largest absolute error against float64, over all results.
    verdict : str
        "ok", or what is wrong; empty for the plain formula, which is not on trial.
    """

    direction: str
    method: str
    seconds: float | None
    tflops: float | None
    memory: int | None
    error: float
    verdict: str

    def __str__(self) -> str:
        if self.seconds is None or self.tflops is None or self.memory is None:
            measured = f"{'does not fit into memory':>38}"
        else:
            measured = f"{self.seconds * 1e3:9.1f} ms {self.tflops:9.3f} TFLOP/s"
            measured += f" {self.memory / 1e6:7.0f} MB"
        names = f"{self.direction:<9} {self.method:<8}"
        return f"  {names} {measured}   error {self.error:.1e}  {self.verdict}".rstrip()


def cases(quick: bool) -> list[Case]:
    """What to run on this machine: one attention layer of a small model, full and causal."""
    if cupy_or_reason()[0] is not None:
        sizes, dtype = (16, 1024 if quick else 4096, 128), "float16"
    else:
        sizes, dtype = (12, 512 if quick else 2048, 64), "float32"
    return [Case(*sizes, dtype, causal) for causal in (False, True)]


def missing() -> str | None:
    """Why nothing can be compared with on this machine, if so: CuPy's own products are cuBLAS's."""
    cupy, _ = cupy_or_reason()
    if cupy is None:
        return None
    try:
        _ = cupy.ones((1, 1)) @ cupy.ones((1, 1))
    except ImportError as error:
        name = "nvidia-cublas" + ("-cu12" if runtime_generation(cupy) == 12 else "")
        return (
            "The check compares with CuPy's own matrix products, and those need cuBLAS "
            f"(cuflash does not): pip install {name}\n  {str(error).splitlines()[0]}"
        )
    return None


def runtime_generation(cupy: Any) -> int:
    """12 or 13: which CUDA this CuPy was built for."""
    return cupy.cuda.driver.get_build_version() // 1000


def run(quick: bool) -> Iterator[Case | Row]:
    """Each case, then its rows, with a progress bar on standard error."""
    cupy, _ = cupy_or_reason()
    machine = Machine(cupy or np)
    todo = cases(quick)
    # Per case: two steps for every head (float64, plain formula) and one for each measurement.
    steps = sum(2 * case.heads + 4 for case in todo)
    with tqdm(total=steps, unit="step", leave=False, delay=2, mininterval=1) as bar:
        for case in todo:
            bar.set_description(case.dtype + (" causal" if case.causal else ""))
            yield case
            yield from measure(case, machine, bar.update)


def measure(case: Case, machine: Machine, step: Callable[[], Any]) -> Iterator[Row]:
    """The four rows of one case."""
    xp, causal = machine.xp, case.causal
    q, k, v, dout = inputs(case, xp)
    gold = _plain.exact(xp, q, k, v, dout, causal, step)
    honest = plain_by_head(xp, q, k, v, dout, causal, step)

    def errors(ours: dict[str, Any], factor: float) -> dict[str, Error]:
        return {n: Error.of(x, gold[n], honest[n], factor, case.dtype) for n, x in ours.items()}

    fast = machine.measure(lambda: cuflash.attention(q, k, v, causal=causal, return_lse=True))
    step()
    slow = machine.try_measure(lambda: _plain.forward(xp, q, k, v, causal))
    step()
    out, lse = fast.result
    found = errors({"out": out}, FORWARD_FACTOR)
    yield row(case, "forward", "cuflash", fast, found, lse_verdict(lse, gold["lse"]))
    yield row(case, "forward", "plain", slow, found)

    fast = machine.measure(
        lambda: cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal)
    )
    step()
    if slow is not None:
        plain_out, _, weights = slow.result
        slow = machine.try_measure(lambda: _plain.backward(xp, dout, q, k, v, plain_out, weights))
    step()
    found = errors(dict(zip("qkv", fast.result[:3], strict=True)), GRADIENT_FACTOR)
    yield row(case, "backward", "cuflash", fast, found)
    yield row(case, "backward", "plain", slow, found)


def plain_by_head(
    xp: Any, q: Any, k: Any, v: Any, dout: Any, causal: bool, step: Callable[[], Any]
) -> dict[str, Any]:
    """The plain formula's out and gradients, in memory for one head: the error that is normal."""
    results: dict[str, list[Any]] = {name: [] for name in ("out", *"qkv")}
    for x, keys, values, dy in zip(q, k, v, dout, strict=True):
        out, _, weights = _plain.forward(xp, x, keys, values, causal)
        grads = _plain.backward(xp, dy, x, keys, values, out, weights)
        for name, result in zip(results, (out, *grads), strict=True):
            results[name].append(result)
        step()
    return {name: xp.stack(parts) for name, parts in results.items()}


def inputs(case: Case, xp: Any) -> list[Any]:
    """q, k, v, dout from a normal distribution, the same in every run."""
    rng = np.random.default_rng(0)
    shape = (case.heads, case.length, case.head_dim)
    dtype = BY_NAME[case.dtype].numpy
    return [xp.asarray(rng.standard_normal(shape, dtype=np.float32).astype(dtype)) for _ in "qkvo"]


@dataclass(frozen=True, slots=True)
class Error:
    """Largest errors of a result and of the plain formula, and how large the first may be."""

    ours: float
    plain: float
    limit: float

    @classmethod
    def of(cls, ours: Any, gold: Any, plain: Any, factor: float, dtype: str) -> Error:
        """Compare two results with float64; a NaN makes an infinite error."""
        largest = [float(abs(x.astype(np.float64) - gold).max()) for x in (ours, plain)]
        fast, slow = (e if e == e else float("inf") for e in largest)
        # Both round once more on the way out: a unit in the last place of the largest element.
        floor = BY_NAME[dtype].eps * float(abs(gold).max())
        return cls(fast, slow, factor * slow + floor)


def lse_verdict(lse: Any, gold: Any) -> str:
    """Empty when lse is right to 1e-5, absolute and relative."""
    excess = float((abs(lse.astype(np.float64) - gold) - LSE_TOLERANCE * (1 + abs(gold))).max())
    return "" if excess <= 0 else f"FAILED: lse is off by {excess:.1e} more than {LSE_TOLERANCE}"


def row(
    case: Case,
    direction: str,
    method: str,
    measured: Measured | None,
    errors: dict[str, Error],
    verdict: str = "",
) -> Row:
    """A line of the report; only cuflash is on trial."""
    ours = method == "cuflash"
    worst = max(error.ours if ours else error.plain for error in errors.values())
    if measured is None:
        return Row(direction, method, None, None, None, worst, "")
    for name, error in errors.items():
        if ours and not error.ours <= error.limit:
            verdict = f"FAILED: error {error.ours:.1e} in {name}, allowed {error.limit:.1e}"
    tflops = case.flops(direction == "backward") / measured.seconds / 1e12
    verdict = (verdict or "ok") if ours else ""
    return Row(direction, method, measured.seconds, tflops, measured.memory, worst, verdict)


@dataclass(frozen=True, slots=True)
class Measured:
    """A result with the median time and the peak memory of computing it."""

    result: Any
    seconds: float
    memory: int


class Machine:
    """How to time a call and to see its memory, on NumPy or CuPy arrays.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.is_gpu = xp is not np

    def measure(self, call: Callable[[], Any]) -> Measured:
        """Run once for memory (and to compile), then for time."""
        result, memory = self._memory(call)
        return Measured(result, self._seconds(call), memory)

    def try_measure(self, call: Callable[[], Any]) -> Measured | None:
        """`measure`, or None when memory does not suffice."""
        try:
            return self.measure(call)
        except MemoryError:  # CuPy's is one too
            return None

    def _memory(self, call: Callable[[], Any]) -> tuple[Any, int]:
        gc.collect()
        if self.is_gpu:
            # A pool of its own never shrinks, so its size afterwards is the peak.
            pool = self.xp.cuda.MemoryPool()
            with self.xp.cuda.using_allocator(pool.malloc):
                result = call()
            self.xp.cuda.Device().synchronize()
            return result, pool.total_bytes()
        tracemalloc.start()
        try:
            result = call()
            return result, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def _seconds(self, call: Callable[[], Any]) -> float:
        times: list[float] = []
        budget = time.perf_counter() + 1.0
        while len(times) < (10 if self.is_gpu else 3):
            times.append(self._once(call))
            if time.perf_counter() > budget:
                break
        return statistics.median(times)

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return self.xp.cuda.get_elapsed_time(begin, end) / 1e3
