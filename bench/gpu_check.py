"""`python -m bench.gpu_check`: everything a GPU is needed for, in one go or in portions.

    python -m bench.gpu_check                        # all portions, about 25 minutes
    python -m bench.gpu_check --part tests           # one of them, at most 10 minutes
    python -m bench.gpu_check --part bench --results /elsewhere

Portions, in their order: `goldens` (the machine, the main job, instruction outputs for the emulator),
`tests` (with --gpu), `sanitizer` (compute-sanitizer on small cases), `bench` (every suite, memory,
tuning), `examples` (at the sizes that need a GPU); and by name alone `kernels` (all of them compiled and
loaded). Each step is a process of its own: a fault ends one step and no more. One JSON and one log per
run; both are written as the run goes on, so that a machine that is lost has lost nothing it had measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import host, report
from bench.gpu_steps import EXTRA_PARTS, PARTS, PORTION, PYTHON, Step, steps
from cuflash._system import cupy_or_reason

__all__ = ["PYTHON", "Step", "main", "run", "steps"]

TAIL = 4000  # characters of a step's output kept in the JSON; the log has all
TRACEBACK = "Traceback (most recent call last)"
LEAST = 5.0  # seconds under which a step is not begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 0 when all passed (or when there is no GPU and nothing to fail)."""
    options = parse(arguments)
    if options.results:
        # Steps are processes, and write their results there too.
        os.environ[report.RESULTS_VARIABLE] = str(Path(options.results).resolve())
    if options.compile_all:
        return compile_all()
    cupy, reason = cupy_or_reason()
    todo = chosen(options.part, options.only)
    if cupy is None:
        without_gpu(todo, str(reason))
        return 0
    results = run_all(todo, budgets(options.part, options.minutes), options.part or "all")
    return 0 if all(result["status"] == "passed" for result in results) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", choices=(*PARTS, *EXTRA_PARTS), help="one portion")
    add("--only", metavar="NAME", nargs="*", help="of its steps, these")
    add("--minutes", type=float, help=f"for the portion (default {PORTION:g}), or for all of them")
    add("--results", metavar="DIR", help=f"instead of {report.RESULTS}")
    add("--compile-all", action="store_true", help="the step `compile`")
    return parser.parse_args(arguments)


def chosen(part: str | None, only: Sequence[str] | None) -> list[Step]:
    """The steps of a portion, or of all that a whole run has."""
    parts = (part,) if part else (PARTS if not only else (*PARTS, *EXTRA_PARTS))
    return [s for s in steps() if s.part in parts and (not only or s.name in only)]


def budgets(part: str | None, minutes: float | None) -> dict[str, float]:
    """Minutes for each portion. What one leaves over, the next may use."""
    if part:
        return {part: minutes or PORTION}
    scale = (minutes or sum(PARTS.values())) / sum(PARTS.values())
    return {**{name: scale * share for name, share in PARTS.items()}, **EXTRA_PARTS}


def run_all(todo: Sequence[Step], minutes: dict[str, float], name: str) -> list[dict[str, Any]]:
    """Run steps within their portions' time; the JSON is written after each."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = report.results()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{stamp}-gpu-check-{name}"
    log, path = folder / f"{stem}.log", folder / f"{stem}.json"
    environment = report.environment()
    results: list[dict[str, Any]] = []
    deadline = time.perf_counter()
    parts = list(dict.fromkeys(step.part for step in todo))
    for part in parts:
        deadline += 60 * minutes[part]
        for step in (step for step in todo if step.part == part):
            print(f"{step.name} ...", end=" ", flush=True)
            results.append(run(step, log, deadline - time.perf_counter()))
            print(f"{results[-1]['status']} in {results[-1]['seconds']:.0f} s", flush=True)
            content = {"environment": environment, "log": log.name, "steps": results}
            report.write_to(path, content)
        if part == "goldens":
            keep_goldens(folder)
    print(f"kept in {path}")
    return results


def run(step: Step, log: Path, seconds: float = float("inf")) -> dict[str, Any]:
    """Run one step in at most so many seconds, its output appended to the log as it comes."""
    limit = min(step.minutes * 60, seconds)
    start, code = time.perf_counter(), None
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
        file.flush()
        begin = file.tell()
        if step.missing:
            status = f"not run: {step.missing}"
        elif limit < LEAST:
            status = "not run: no time left in its portion"
        else:
            status, code = run_process(step, file, limit)
    output = log.read_bytes()[begin:].decode(errors="replace")
    if code and status == "passed" and TRACEBACK in output:  # Python's own exit status is 1, too
        status = "FAILED"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {status}\n")
    return {"name": step.name, "part": step.part, "command": list(step.command), "status": status,
            "exit": code, "seconds": time.perf_counter() - start, "tail": output[-TAIL:]}  # fmt: skip


def run_process(step: Step, file: Any, limit: float) -> tuple[str, int | None]:
    """Status and exit code; after the limit it is ended, with all processes it has started."""
    try:
        process = subprocess.Popen(
            step.command,
            cwd=report.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        return f"not run: {error}", None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        end(process)
        return f"stopped after {limit / 60:.1f} min", None
    except BaseException:  # interrupted: nothing stays behind on the GPU
        end(process)
        raise
    return ("passed" if code in step.passes else "FAILED"), code


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and its group: asked first, since pytest then still says what it has found."""
    for sign, patience in ((signal.SIGINT, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def keep_goldens(folder: Path) -> None:
    """Copy what was recorded to where the other results are."""
    recorded = report.ROOT / "tests" / "golden"
    if recorded.is_dir() and folder != report.RESULTS:
        archive = shutil.make_archive(str(folder / "golden"), "gztar", recorded)
        print(f"golden outputs in {archive}")


def without_gpu(todo: Sequence[Step], reason: str) -> None:
    """Say what is missing, and measure what is not."""
    print(f"no GPU: {reason}\nOn a GPU this would run, each step in its own process:")
    for step in todo:
        missing = f"   ({step.missing})" if step.missing else ""
        print(
            f"  {step.part:<10} {step.name:<20} {step.why}, at most {step.minutes:g} min{missing}"
        )
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


def compile_all() -> int:
    """Compile every kernel of the current device in all processes, then load each."""
    import cupy
    from tqdm import tqdm

    from cuflash import _compile, _cupy_device, _plan

    device = _cupy_device.device(cupy.cuda.runtime.getDevice())
    start = time.perf_counter()
    specs = list(dict.fromkeys(_plan.all_specializations(device.arch)))
    failed = []
    # Fresh processes: a CUDA context does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        built = {pool.submit(_compile.build, spec): spec for spec in specs}
        for future in tqdm(concurrent.futures.as_completed(built), total=len(specs), mininterval=5):
            spec = built[future]
            try:
                future.result()
                device.load(spec)
            except Exception as error:  # one kernel more or less says nothing of the others
                failed.append(f"{spec.name}: {error}")
    print(
        f"{len(specs)} kernels for {device.arch} on {device.name} in {time.perf_counter() - start:.0f} s"
    )
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
