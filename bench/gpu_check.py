"""`python -m bench.gpu_check`: everything a GPU is needed for, in one go.

Compiles all kernels of the device, runs the command's own check, all tests with --gpu, the
conformance tests that record golden instruction outputs, compute-sanitizer on small cases where it
is installed, the scaling of memory, and the benchmarks. Each step is a process of its own, so that
a fault ends one step and no more. One JSON and one log land in bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import host, report
from cuflash._system import cupy_or_reason

PYTHON = sys.executable
TAIL = 4000  # characters of a step's output kept in the JSON; the log has all

# Small, and of every kind: full and cut tiles, both directions, both variants.
SANITIZED = """
import cupy, cuflash
rng = cupy.random.default_rng(0)
for dim, options in ((64, {}), (128, {"causal": True}), (40, {"window": (17, 5), "softcap": 9.0})):
    q, k, v = (rng.standard_normal((1, 2, n, dim), dtype="f4").astype("f2") for n in (70, 150, 150))
    for deterministic in (False, True):
        out, pullback = cuflash.attention_vjp(q, k, v, deterministic=deterministic, **options)
        pullback(out)
cupy.cuda.Device().synchronize()
"""

# Peak memory of the pool from 64 k to 1 M keys: bytes per key must not grow.
MEMORY = """
import cupy, cuflash
pool = cupy.get_default_memory_pool()
for length in (1 << 16, 1 << 18, 1 << 20):
    pool.free_all_blocks()
    q = cupy.ones((1, 256, 128), "f2")
    k = cupy.ones((1, length, 128), "f2")
    inputs = pool.used_bytes()
    out, pullback = cuflash.attention_vjp(q, k, k)
    pullback(out)
    cupy.cuda.Device().synchronize()
    print(length, "keys:", (pool.total_bytes() - inputs) / length, "bytes per key beside inputs")
    del q, k, out, pullback
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to run.

    Parameters
    ----------
    name : str
    command : tuple of str
    minutes : float
        It is stopped after so many.
    why : str
        One line for a machine without a GPU.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    why: str


def steps() -> list[Step]:
    """What to run, most telling first."""
    found = [
        Step("config", (PYTHON, "-m", "cuflash", "--config"), 2, "device, driver, versions"),
        Step(
            "compile",
            (PYTHON, "-m", "bench.gpu_check", "--compile-all"),
            20,
            "every kernel that planning can choose for this device, loaded",
        ),
        Step("main job", (PYTHON, "-m", "cuflash"), 5, "forward and backward against float64"),
        Step(
            "tests",
            (PYTHON, "-m", "pytest", "--gpu", "-q", "-m", "gpu", "--durations=20"),
            30,
            "the tests on the device",
        ),
        Step(
            "goldens",
            (
                PYTHON,
                "-m",
                "pytest",
                "--gpu",
                "--record-goldens",
                "-q",
                "tests/test_instructions.py",
            ),
            10,
            "instruction outputs of this GPU into tests/golden, to hold the emulator to",
        ),
        Step("all tests", (PYTHON, "-m", "pytest", "--gpu", "-q"), 40, "and all others"),
        Step("memory", (PYTHON, "-c", MEMORY), 5, "bytes per key up to 1 M keys"),
        Step(
            "benchmarks",
            (PYTHON, "-m", "bench.run", "--suite", "sweep"),
            30,
            "the papers' sweep beside every peer",
        ),
        Step("options", (PYTHON, "-m", "bench.options"), 10, "masks, biases, dropout, scores"),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        found += [
            Step(
                f"sanitizer {tool}",
                (sanitizer, "--tool", tool, "--error-exitcode", "9", PYTHON, "-c", SANITIZED),
                15,
                f"compute-sanitizer {tool} on small cases",
            )
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 0 when all passed (or when there is no GPU and nothing to fail)."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--only", metavar="NAME", nargs="*", help="run these steps")
    parser.add_argument("--compile-all", action="store_true", help="the step `compile`")
    options = parser.parse_args(arguments)
    if options.compile_all:
        return compile_all()

    cupy, reason = cupy_or_reason()
    todo = [step for step in steps() if not options.only or step.name in options.only]
    if cupy is None:
        without_gpu(todo, str(reason))
        return 0
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    report.RESULTS.mkdir(parents=True, exist_ok=True)
    log = report.RESULTS / f"{stamp}-gpu-check.log"
    results: list[dict[str, Any]] = []
    for step in todo:
        print(f"{step.name} ...", end=" ", flush=True)
        results.append(run(step, log))
        print(f"{results[-1]['status']} in {results[-1]['seconds']:.0f} s", flush=True)
        # After every step: a machine that is lost later has lost nothing that was measured.
        path = report.RESULTS / f"{stamp}-gpu-check.json"
        content = {"environment": report.environment(), "log": log.name, "steps": results}
        report.write_to(path, content)
    print(f"kept in {path}")
    return 0 if all(result["status"] == "passed" for result in results) else 1


def without_gpu(todo: Sequence[Step], reason: str) -> None:
    """Say what is missing, and measure what is not."""
    print(f"no GPU: {reason}\nOn a GPU this would run, each step in its own process:")
    for step in todo:
        print(f"  {step.name:<12} {step.why} (at most {step.minutes:.0f} min)")
    print("\nWhat a CPU can measure:")
    calls = host.call_times("sm_90a")
    for name, times in calls.items():
        print(f"  {name:<24} {times['us']:6.1f} us of Python per warm call")
    compiles = host.compile_times("sm_90a", (128,))
    for row in compiles:
        print(f"  {row['kernel']:<44} {row['cold_s']:.2f} s, cached {row['disk_s'] * 1e3:.1f} ms")
    found = {"calls": calls, "compiles": compiles}
    content = {"environment": report.environment(), "no_gpu": reason, "host": found}
    print(f"kept in {report.write('gpu-check-cpu', content)}")


def run(step: Step, log: Path) -> dict[str, Any]:
    """Run one step, its output appended to the log."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            cwd=report.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.minutes * 60,
        )
        output, status = done.stdout, "passed" if done.returncode == 0 else "FAILED"
        code: int | None = done.returncode
    except subprocess.TimeoutExpired as error:
        captured: Any = error.stdout or b""  # bytes even with text=True, on some versions
        output = captured if isinstance(captured, str) else captured.decode(errors="replace")
        status, code = f"stopped after {step.minutes:.0f} min", None
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {step.name}: {' '.join(step.command)}\n{output}\n===== {status}\n")
    seconds = time.perf_counter() - start
    return {"name": step.name, "command": list(step.command), "status": status, "exit": code,
            "seconds": seconds, "tail": output[-TAIL:]}  # fmt: skip


def compile_all() -> int:
    """Compile and load every kernel of the current device."""
    import cupy
    from tqdm import tqdm

    from cuflash import _cupy_device, _plan

    device = _cupy_device.device(cupy.cuda.runtime.getDevice())
    start = time.perf_counter()
    specs = list(_plan.all_specializations(device.arch))
    for spec in tqdm(specs, unit="kernel", mininterval=5):
        device.load(spec)
    seconds = time.perf_counter() - start
    print(f"{len(specs)} kernels for {device.arch} on {device.name} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
