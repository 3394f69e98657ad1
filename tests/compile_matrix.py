"""Every kernel that planning can choose, compiled for every architecture: what it costs in registers
and local memory, and what the compiler had to say.

    python -m tests.compile_matrix             # compile everything and compare with the table
    python -m tests.compile_matrix --record    # write the table anew after an intended change
    python -m tests.compile_matrix --record --share    # of the kernels that pytest compiles
    python -m tests.compile_matrix --both      # every kernel by both generations of NVRTC
    python -m tests.compile_matrix --slowest 20 --only 'sm_90a .*_f64'   # what takes the compiler longest

By default each kernel is built by one of two generations of NVRTC (see `generation_of`). The table
is `tests/data/registers.json`; the tests record it too when CUFLASH_RECORD_REGISTERS is set. They
compile each kernel in one of its element types, and all with CUFLASH_COMPILE_EVERYTHING=1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fcntl
import functools
import json
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from cuflash import _candidates, _compile, _launch_merge, _nvrtc, _plan, _side_kernels
from cuflash._compile import Specialization
from tests.emulator.nvrtc import Nvrtc

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
GENERATIONS = (12, 13)
TABLE = Path(__file__).parent / "data" / "registers.json"
RECORD = "CUFLASH_RECORD_REGISTERS"
EVERYTHING = "CUFLASH_COMPILE_EVERYTHING"
# One in so many of the optional kernels is compiled by pytest.
OPTION_SHARE = 96
# The register file is handed out in units of 8 registers per thread; below that nothing changes.
REGISTER_UNIT = 8
# Up to this head dim the 16-bit kernels without options, and dK and dV of wide elements with any, keep
# everything in registers, on every architecture; all others must not spill more than recorded.
NO_SPILL_HEAD_DIM = 128
# Its compile time tells what the machine makes of the others.
YARDSTICK = "sm_80", "backward_dkdv_f16_d64_linear"


class Usage(NamedTuple):
    """What ptxas reports of one kernel."""

    registers: int
    spill_stores: int  # bytes
    spill_loads: int
    stack: int

    def worse_than(self, recorded: Usage) -> list[str]:
        """How this exceeds what was recorded."""
        found = []
        if -(-self.registers // REGISTER_UNIT) > -(-recorded.registers // REGISTER_UNIT):
            found.append(f"{self.registers} registers, recorded {recorded.registers}")
        for name in ("spill_stores", "spill_loads", "stack"):
            now, then = getattr(self, name), getattr(recorded, name)
            if now > then:
                found.append(f"{now} bytes of {name.replace('_', ' ')}, recorded {then}")
        return found


def kernels(arch: str) -> list[Specialization]:
    """Every kernel the package can launch on an architecture."""
    found = dict.fromkeys(_plan.all_specializations(arch))
    elements = sorted({spec.element for spec in found} - {"", "f32tf32"})
    merges = (_launch_merge.specialization(arch, element) for element in elements)
    return [*found, *merges, *_side_kernels.all_side_kernels(arch)]


def group_of(spec: Specialization) -> str:
    """The word under which kernels are compiled together: "forward", "backward_dq", ..., "rows"."""
    heavy = ("forward", "forward_sm90", "backward_dkdv", "backward_dq", "backward_sm90")
    return f"{spec.kernel} {spec.element}" if spec.kernel in heavy else "rows"


def groups(arch: str) -> dict[str, list[Specialization]]:
    """The kernels to compile for an architecture, in portions of a few seconds."""
    found: dict[str, list[Specialization]] = {}
    for spec in filter(in_tests, kernels(arch)):
        found.setdefault(group_of(spec), []).append(spec)
    return found


def in_tests(spec: Specialization) -> bool:
    """Whether pytest compiles this kernel; all of them would take it most of twenty minutes.

    Of the two element types, which differ in one instruction, it takes one for each kernel: head
    dims alternate, and the other way round on every third and fourth architecture. Of the kernels
    for masks, biases, dropout and packed sequences, which are many times as many, a share picked by
    name.
    """
    if os.environ.get(EVERYTHING):
        return True
    if spec.arch == "sm_75" and not is_optional(spec):
        return True
    if not spec.element:  # few enough
        return True
    if is_optional(spec):
        return zlib.crc32(f"{spec.arch} {spec.name}".encode()) % OPTION_SHARE == 0
    dims = spec.head_dim, spec.head_dim_v
    place = _candidates.DIM_PAIRS.index(dims) if spec.head_dim else 0  # merge has no head dim
    odd = (place + ARCHITECTURES.index(spec.arch) // 2) % 2 == 1
    return odd == (spec.element == "bf16")


def is_optional(spec: Specialization) -> bool:
    """Whether a kernel is one for masks, biases, sinks, dropout, packed sequences, parts of keys, or wide elements."""
    types = dict(spec.types)
    return (
        spec.element not in ("", "f16", "bf16")
        or types.get("Mask", "mask::Band") != "mask::Band"
        or types.get("Score", "").startswith("score::General")
        or any(dict(spec.constants).get(name) for name in ("SINKS", "DROPOUT", "PACKED", "SPLIT"))
    )


def generation_of(spec: Specialization) -> int:
    """The compiler that pytest uses for a kernel.

    Elements, score variants and architectures alternate, so that both compilers see every kernel
    and every head dim of each architecture in half of the time.
    """
    parts = (
        spec.element == "bf16",
        spec.variant.endswith("shaped"),
        ARCHITECTURES.index(spec.arch) % 2 == 1,
    )
    return GENERATIONS[sum(parts) % 2]


@functools.cache
def nvrtc(generation: int) -> Nvrtc:
    """The compiler of a CUDA generation."""
    _nvrtc.binding()  # lets CuPy choose before both generations are in this process
    return Nvrtc(generation)


def compile_one(spec: Specialization, generation: int) -> tuple[Usage, str, bytes]:
    """Resource usage, compiler log and cubin of a kernel, built as the package builds it."""
    compiler = nvrtc(generation)
    options = ("--ptxas-options=-v",)
    cubin = compiler.cubin(_compile.source(spec), spec.arch, options, f"{spec.name}.cu")
    return usage_in(compiler.log, spec.name), compiler.log, cubin


def usage_in(log: str, name: str) -> Usage:
    """The figures of kernel `name` in a log of `ptxas -v`."""
    section = log.split(f"Compiling entry function '{name}'", 1)
    if len(section) != 2:
        raise ValueError(f"no entry {name} in the log of ptxas:\n{log}")
    text = section[1].split("Compiling entry function", 1)[0]
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    )
    (registers,) = _numbers(r"Used (\d+) registers", text)
    return Usage(registers, stores, loads, stack)


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in:\n{text}")
    return [int(number) for number in match.groups()]


def must_not_spill(spec: Specialization) -> bool:
    """Whether a kernel has to keep everything in registers."""
    if max(spec.head_dim, spec.head_dim_v) > NO_SPILL_HEAD_DIM:
        return False
    wide = spec.element in ("f32", "f32tf32", "f64")
    return (wide and spec.kernel == "backward_dkdv") or not is_optional(spec)


def complaints(spec: Specialization, generation: int, usage: Usage, log: str) -> list[str]:
    """What is wrong with one kernel."""
    found = [line for line in log.splitlines() if "C75" in line or "warning" in line.lower()]
    if must_not_spill(spec):
        if usage.spill_stores or usage.spill_loads:
            found.append(f"spills ({usage}), and head dim {spec.head_dim} must not")
        if usage.stack:
            found.append(f"uses {usage.stack} bytes of local memory")
    if generation == generation_of(spec):
        recorded = table().get(spec.arch, {}).get(spec.name)
        if recorded is None:
            found.append("is not in the table of registers")
        else:
            found += usage.worse_than(Usage(*recorded))
    return [f"CUDA {generation}, {spec.arch}, {spec.name}: {text}" for text in found]


@functools.cache
def table() -> dict[str, dict[str, list[int]]]:
    """The recorded figures: architecture -> kernel -> fields of Usage."""
    return json.loads(TABLE.read_text())["kernels"] if TABLE.exists() else {}


class Found(NamedTuple):
    """The result of one portion of the matrix."""

    figures: dict[str, Usage]  # by the compiler of `generation_of`
    wrong: list[str]
    compiled: int
    seconds: dict[str, float]  # of CPU, by a line that names the kernel


def compile_group(arch: str, group: str, generations: tuple[int, ...], only: str = "") -> Found:
    """Build a portion of the matrix; with no `generations`, each kernel by its own compiler.

    `only`: a pattern to be found in "sm_80 forward_f16_d64_linear".
    """
    figures: dict[str, Usage] = {}
    wrong: list[str] = []
    seconds: dict[str, float] = {}
    compiled = 0
    for spec in groups(arch)[group]:
        if not re.search(only, f"{arch} {spec.name}"):
            continue
        for generation in generations or (generation_of(spec),):
            start = time.process_time()
            try:
                usage, log, _ = compile_one(spec, generation)
            except RuntimeError as error:
                text = str(error)[:2000]
                wrong.append(f"CUDA {generation}, {arch}, {spec.name}: {text}")
                continue
            compiled += 1
            spills = f"{usage.spill_stores:4d} + {usage.spill_loads:3d} bytes of spills"
            line = f"CUDA {generation}  {arch:6}  {usage.registers:3d} registers  {spills}  {spec.name}"
            seconds[line] = time.process_time() - start
            if generation == generation_of(spec):
                figures[spec.name] = usage
            wrong += complaints(spec, generation, usage, log)
    if os.environ.get(RECORD):
        record(arch, figures)
        wrong = [text for text in wrong if "recorded" not in text and "the table" not in text]
    return Found(figures, wrong, compiled, seconds)


def slowest(seconds: dict[str, float], count: int) -> str:
    """A table of the kernels that took longest, and what the machine takes for a known one."""
    arch, name = YARDSTICK
    (spec,) = (spec for spec in kernels(arch) if spec.name == name)
    compile_one(spec, 12)  # the first compilation of a process takes longer
    start = time.process_time()
    compile_one(spec, 12)
    rows = sorted(seconds.items(), key=lambda row: -row[1])[:count]
    lines = [f"{cpu:5.2f} s  {line}" for line, cpu in rows]
    return "\n".join([*lines, f"{time.process_time() - start:5.2f} s  yardstick: {arch} {name}"])


def record(arch: str, figures: dict[str, Usage]) -> None:
    """Put figures into the table: one kernel per line, sorted, so that a change reads well.

    Processes of one run may record at the same time. Kernels that no longer exist are dropped.
    """
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table.cache_clear()
        known = {name: dict(table().get(name, {})) for name in ARCHITECTURES}
        known[arch].update({name: list(usage) for name, usage in figures.items()})
        parts = []
        for name, rows in known.items():
            exist = {spec.name for spec in kernels(name)}
            lines = [
                f'   "{k}": {json.dumps(row)}' for k, row in sorted(rows.items()) if k in exist
            ]
            parts.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
        versions = {str(g): ".".join(map(str, nvrtc(g).version)) for g in GENERATIONS}
        temporary = TABLE.with_suffix(".new")
        temporary.write_text(
            f'{{\n "nvrtc": {json.dumps(versions)},\n "columns": {json.dumps(Usage._fields)},\n'
            ' "kernels": {\n' + ",\n".join(parts) + "\n }\n}\n"
        )
        temporary.replace(TABLE)


def main() -> int:
    """Compile everything; the exit status tells whether anything is wrong."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m tests.compile_matrix")
    parser.add_argument("--record", action="store_true", help="write the table anew")
    parser.add_argument("--both", action="store_true", help="both compilers for every kernel")
    parser.add_argument("--share", action="store_true", help="only what pytest compiles")
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="print the N slowest")
    parser.add_argument("--only", default="", help='pattern in "sm_80 forward_f16_d64_linear"')
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    start = time.perf_counter()
    if not options.share:
        os.environ[EVERYTHING] = "1"  # inherited by the processes below
    generations = GENERATIONS if options.both else ()
    if options.record:
        os.environ[RECORD] = "1"  # inherited by the processes below
    wrong: list[str] = []
    seconds: dict[str, float] = {}
    count = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        tasks = [(arch, group) for arch in ARCHITECTURES for group in groups(arch)]
        futures = [pool.submit(compile_group, *task, generations, options.only) for task in tasks]
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, total=len(futures), unit="group", mininterval=1):
            found = future.result()
            wrong += found.wrong
            count += found.compiled
            seconds |= found.seconds
    print("\n".join(wrong))
    if options.slowest:
        print(slowest(seconds, options.slowest))
    print(f"{count} compilations in {time.perf_counter() - start:.0f} s, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
