"""What `bench.gpu_check` runs, in portions."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

PYTHON = sys.executable
ROOT = Path(__file__).resolve().parents[1]

# Small, and of every kind: full and cut tiles, both directions, every option. Without a pool every array is an
# allocation of its own, and one byte past its end is seen.
SANITIZED = """
import cupy, cuflash
cupy.cuda.set_allocator(None)
rng = cupy.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape, dtype="f4").astype("f2")
keep = cupy.arange(70 * 150).reshape(70, 150) % 3 > 0
mask = cuflash.BlockMask.from_dense(keep.get(), block_size=32)
for dim, options in (
    (64, {}),
    (128, {"causal": True}),
    (40, {"window": (17, 5), "softcap": 9.0}),
    (64, {"mask": keep, "dropout_p": 0.3, "seed": 1}),
    (64, {"mask": mask, "sinks": normal(2)}),
    (128, {"bias": normal(2, 70, 150), "wrt": ("q", "k", "v", "bias")}),
):
    q, k, v = (normal(1, 2, n, dim) for n in (70, 150, 150))
    for deterministic in (False, True):
        out, pullback = cuflash.attention_vjp(q, k, v, deterministic=deterministic, **options)
        pullback(out)
ends = cupy.asarray([0, 30, 70], dtype="i4")
q = normal(2, 70, 64)
cuflash.attention_varlen_vjp(q, q, q, ends, ends, causal=True)[1](q)
cuflash.attention(normal(8, 1, 64), normal(2, 2000, 64), normal(2, 2000, 64))
cupy.cuda.Device().synchronize()
"""

# Peak memory of the pool from 64 k to 1 M keys: bytes per key must not grow.
MEMORY = """
import cupy, cuflash
pool = cupy.get_default_memory_pool()
found = []
for length in (1 << 16, 1 << 18, 1 << 20):
    pool.free_all_blocks()
    q = cupy.ones((1, 256, 128), "f2")
    k = cupy.ones((1, length, 128), "f2")
    inputs = pool.used_bytes()
    out, pullback = cuflash.attention_vjp(q, k, k)
    pullback(out)
    cupy.cuda.Device().synchronize()
    found.append((pool.total_bytes() - inputs) / length)
    print(length, "keys:", found[-1], "bytes per key beside inputs")
    del q, k, out, pullback
raise SystemExit(found[-1] > 1.05 * found[0])
"""

# The portions, in the order of a whole run, and the minutes that a whole run has for each.
PARTS = {"goldens": 3.0, "tests": 8.0, "sanitizer": 3.0, "bench": 7.0, "examples": 4.0}
# Asked for by name: it takes all of a portion, and the tests load most kernels anyway.
EXTRA_PARTS = {"kernels": 9.5}
PORTION = 9.5  # minutes that one portion may take when it is run by itself


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
    part : str
        The portion it belongs to.
    missing : str
        Why it cannot run here; "" when it can.
    passes : tuple of int
        Exit codes that are no failure.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    why: str
    part: str = ""
    missing: str = ""
    passes: tuple[int, ...] = (0,)


def steps() -> list[Step]:
    """Everything, portion by portion, most telling first."""
    return [*goldens(), *tests(), *sanitizer(), *bench(), *examples(), *kernels()]


def goldens() -> list[Step]:
    """What this machine is, whether the main job is right, and what its instructions compute."""
    record = ("--gpu", "--record-goldens", "-q", "tests/test_instructions.py")
    what = "instruction outputs of this GPU into tests/golden, to hold the emulator to"
    return [
        Step(
            "config",
            (PYTHON, "-m", "cuflash", "--config"),
            1,
            "device, driver, versions",
            "goldens",
        ),
        Step(
            "main job", (PYTHON, "-m", "cuflash"), 3, "forward, backward against float64", "goldens"
        ),
        Step("goldens", (PYTHON, "-m", "pytest", *record), 5, what, "goldens"),
    ]


def tests() -> list[Step]:
    """The tests on the device. Compiling is most of their time, so several run at once."""
    several: tuple[str, ...] = ()
    if importlib.util.find_spec("xdist") is not None:
        several = ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal")
    command = (
        PYTHON,
        "-m",
        "pytest",
        "--gpu",
        "-m",
        "gpu",
        "-q",
        "-rfE",
        "--durations=10",
        *several,
    )
    return [Step("tests", command, PORTION, "the tests on the device", "tests")]


def sanitizer() -> list[Step]:
    """compute-sanitizer on small cases."""
    prefix, missing = find_sanitizer()
    return [
        Step(
            f"sanitizer {tool}",
            (*prefix, "--tool", tool, "--error-exitcode", "9", PYTHON, "-c", SANITIZED),
            4,
            f"compute-sanitizer {tool} on small cases",
            "sanitizer",
            missing,
        )
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ]


def find_sanitizer() -> tuple[tuple[str, ...], str]:
    """The command, from a toolkit or from NVIDIA's wheel; and why there is none."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(found).exists():
        return (found,), ""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        wheel = Path(folder) / "cuda_sanitizer_api"
        program = wheel / "bin" / "compute-sanitizer"
        if program.exists():
            # Wheels carry it without the permission to run it.
            copy = Path(tempfile.mkdtemp(prefix="sanitizer")) / program.name
            shutil.copy(program, copy)
            copy.chmod(0o755)
            return (str(copy), "--injection-path", str(wheel / "lib")), ""
    return ("compute-sanitizer",), "not installed: pip install nvidia-cuda-sanitizer-api-cu12"


def bench() -> list[Step]:
    """Times, and memory."""

    def run(name: str, minutes: float, why: str, *words: str) -> Step:
        return Step(name, (PYTHON, "-m", *words), minutes, why, "bench")

    suite = ("bench.run", "--suite")
    return [
        run("quick", 1, "the sizes that acceptance is stated for", *suite, "quick"),
        run("paper", 7, "the papers' sweep beside every peer", *suite, "paper", "--rounds", "12"),
        Step("memory", (PYTHON, "-c", MEMORY), 1, "bytes per key up to 1 M keys", "bench"),
        run("history", 2, "published experiments again", *suite, "history", "--rounds", "10"),
        run("options", 2, "masks, biases, dropout, scores", "bench.options", "--rounds", "10"),
        run("tune", 2, "tiles of the portable forward", "bench.tune", "--kernel", "forward"),
        run("tune hopper", 2, "and of Hopper's", "bench.tune", "--kernel", "forward_sm90"),
    ]


def examples() -> list[Step]:
    """The examples at the sizes that need a GPU, a few steps each."""

    def run(name: str, minutes: float, why: str, *words: str) -> Step:
        path = ROOT / "examples" / f"{words[0]}.py"
        missing = "" if path.exists() else f"no {path.name}"
        command = (PYTHON, f"examples/{words[0]}.py", *words[1:])
        return Step(name, command, minutes, why, "examples", missing)

    gpu = ("--device", "cupy")
    small = (*gpu, "--compare", "--out", tempfile.gettempdir())
    gpt2 = (
        *gpu,
        "--size",
        "gpt2",
        "--steps",
        "30",
        "--sample",
        "0",
        "--out",
        tempfile.gettempdir(),
    )
    return [
        run("minilm", 1, "sentence embeddings", "minilm", "--gpu"),
        run("gradcheck", 1, "finite differences in float64", "gradcheck", *gpu),
        run("train small", 2, "both attentions, from one seed", "train_gpt", *small),
        run(
            "pathfinder 128",
            1,
            "a measured step of 16k tokens",
            "pathfinder",
            "--side",
            "128",
            *gpu,
        ),
        run(
            "pathfinder 256",
            2,
            "a measured step of 64k tokens",
            "pathfinder",
            "--side",
            "256",
            *gpu,
        ),
        run("genome", 2, "64k bases at once", "genome", *gpu),
        # Too short to beat the unigram entropy, which its exit status says; its times are what counts.
        replace(
            run("train gpt2", 2, "30 steps of 124M parameters", "train_gpt", *gpt2), passes=(0, 1)
        ),
    ]


def kernels() -> list[Step]:
    """All kernels of the device."""
    command = (PYTHON, "-m", "bench.gpu_check", "--compile-all")
    what = "every kernel that planning can choose for this device, compiled and loaded"
    return [Step("compile", command, PORTION, what, "kernels")]
