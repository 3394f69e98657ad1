"""`python -m bench.tune`: which tile sizes are fastest on the GPU at hand, as a row for the table.

    python -m bench.tune --kernel forward --head-dim 128 --length 8192 --causal

Every tile worth trying is compiled; those that spill or do not fit are left out; the others are checked
against the tile in use, and take turns in one measurement. Printed is the row for the table that
planning reads, with the GPU and the date. Without a GPU the tiles are compiled, and what they take is
listed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

import cuflash
from bench import baselines, portable, report, resources, timing
from bench.cases import Case
from bench.host import NullDevice
from bench.tune_tables import TUNABLES, Dims, Tunable, shown_tile
from cuflash import _candidates
from cuflash._device import use_device
from cuflash._dtypes import BY_NAME
from cuflash._errors import UnsupportedError
from cuflash._system import cupy_or_reason

HEAD = ("tile", "", "registers", "spilled", "shared KiB", "blocks/SM")
TIMED = ("us", "TFLOP/s")
# Largest difference of two right results, relative to the largest element: some units in the last place.
TOLERANCE = {"bfloat16": 2.0**-6, "float16": 2.0**-9}


def specialization(tunable: Tunable, arch: str, dims: Dims, tile: Any, case: Case) -> Any:
    """The kernel that a plan of the case would take with a tile."""
    shape = (case.batch, case.heads, case.len_q, case.head_dim)
    kv = (case.batch, case.heads_kv, case.len_k, case.head_dim)
    dtype = BY_NAME[case.dtype].numpy
    q, k = np.empty(shape, dtype), np.empty(kv, dtype)  # never touched
    with use_device(NullDevice(arch)), tunable.using(arch, dims, tile):
        account = cuflash.explain(
            q,
            k,
            k,
            causal=case.causal,
            backward=tunable.direction == "backward",
            deterministic=tunable.deterministic,
        )
    if account.plan is None:
        raise UnsupportedError(str(account))
    names = [launch.spec.kernel for launch in account.plan.launches]
    if tunable.kernel not in names:
        raise UnsupportedError(f"the plan runs {' '.join(names)}, not {tunable.kernel}")
    return account.plan.launches[names.index(tunable.kernel)].spec


def tried(tunable: Tunable, arch: str, dims: Dims, case: Case) -> list[dict[str, Any]]:
    """Every tile that can run, with what it takes; the one in use is first."""
    current = tunable.current(arch, dims)
    tiles = dict.fromkeys([current, *tunable.tiles(arch, dims)])
    memory = resources.limits(arch)[0]
    found = []
    for tile in tqdm(tiles, unit="tile", leave=False, disable=None):
        row: dict[str, Any] = {"tile": shown_tile(tile), "current": tile == current}
        try:
            spec = specialization(tunable, arch, dims, tile, case)
            if spec.constant("SHARED_BYTES") + resources.RESERVED > memory:
                continue
            used = resources.usage(spec)
        except (RuntimeError, AssertionError) as error:
            row["why"] = f"{error}".splitlines()[0][:100]
            found.append(row)
            continue
        row |= {name: getattr(used, name) for name in ("registers", "spilled", "shared", "blocks")}
        if used.blocks == 0:
            row["why"] = "does not fit"
        row["value"] = tile
        found.append(row)
    return found


def worth_timing(row: dict[str, Any]) -> bool:
    """The tile in use, and what keeps everything in registers."""
    return "why" not in row and (row["current"] or row["spilled"] == 0)


def twin(device: Any, arch: str, number: int) -> Any:
    """A view of a device that has prepared calls of its own."""
    made = copy.copy(device)
    made.arch, made.key = arch, (*device.key, "tune", arch, number)
    return made


def calls(
    tunable: Tunable, arch: str, dims: Dims, case: Case, x: Any, rows: Sequence[dict[str, Any]]
) -> dict[str, Callable[[], Any]]:
    """A call per tile; planned once, here, with that tile."""
    causal = case.causal
    if tunable.direction == "backward":
        out, lse = cuflash.attention(x.q, x.k, x.v, return_lse=True, causal=causal)
    made: dict[str, Callable[[], Any]] = {}
    for number, row in enumerate(rows):

        def view(device: Any, number: int = number) -> Any:
            return twin(device, arch, number)

        def call(view: Callable[[Any], Any] = view) -> Any:
            with portable.seen_as(view):
                if tunable.direction == "forward":
                    return cuflash.attention(x.q, x.k, x.v, causal=causal)
                return cuflash.attention_backward(
                    *(x.dout, x.q, x.k, x.v, out, lse),
                    deterministic=tunable.deterministic,
                    causal=causal,
                )

        with tunable.using(arch, dims, row["value"]):
            call()
        made[row["tile"]] = call
    return made


def results(found: Any) -> tuple[Any, ...]:
    """The arrays of a call."""
    return tuple(found[:3]) if isinstance(found, tuple) else (found,)


def time_tiles(
    cupy: Any,
    tunable: Tunable,
    arch: str,
    dims: Dims,
    case: Case,
    rows: list[dict[str, Any]],
    rounds: int,
) -> None:
    """Add times to the rows, and say which are wrong."""
    x = baselines.make_inputs(case, cupy)
    todo = [row for row in rows if worth_timing(row)]
    made = calls(tunable, arch, dims, case, x, todo)
    right = results(next(iter(made.values()))())
    for row in todo:
        for got, want in zip(results(made[row["tile"]]()), right, strict=True):
            want = want.astype(cupy.float32)
            error = float(abs(got.astype(cupy.float32) - want).max() / abs(want).max())
            if not error <= TOLERANCE[case.dtype]:
                row["why"] = f"WRONG by {error:.1e} of the largest element"
                made.pop(row["tile"], None)
    for name, times in timing.GpuTimer(cupy).interleaved(made, rounds).items():
        row = next(row for row in todo if row["tile"] == name)
        row["us"], row["spread"] = times.median * 1e6, times.spread
        row["tflops"] = case.flops(tunable.direction) / times.median / 1e12


def shown(row: dict[str, Any], timed: bool) -> tuple[str, ...]:
    """A line of the table."""
    name, mark = row["tile"], "in use" if row["current"] else ""
    blank = ("",) * len(TIMED) if timed else ()
    if "registers" not in row:
        return (name, row["why"], "", "", "", "", *blank)
    line: tuple[str, ...] = (name, row.get("why", mark), str(row["registers"]), str(row["spilled"]))
    line += (f"{row['shared'] / 1024:.0f}", str(row["blocks"]))
    if not timed:
        return line
    return (*line, *((f"{row['us']:.1f}", f"{row['tflops']:.0f}") if "us" in row else blank))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    add = parser.add_argument
    add("--kernel", choices=tuple(TUNABLES), default="forward")
    add("--head-dim", type=int, default=128)
    add("--dtype", choices=tuple(TOLERANCE), default="bfloat16")
    add("--causal", action="store_true")
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--heads-kv", type=int, help="as many as heads when not given")
    add("--length", type=int, default=8192)
    add("--rounds", type=int, default=20)
    add("--arch", default="sm_80", help="to compile for, without a GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, time, print and keep."""
    options = parse(arguments)
    tunable, length = TUNABLES[options.kernel], options.length
    heads_kv = options.heads_kv or options.heads
    case = Case(
        *(options.batch, options.heads, heads_kv, length, length, options.head_dim),
        *(options.dtype, options.causal),
    )
    cupy, reason = cupy_or_reason()
    name, arch = "no GPU", options.arch
    if cupy is not None:
        from cuflash import _cupy_device

        device = _cupy_device.device(cupy.cuda.Device().id)
        name, arch = device.name, device.arch
    if tunable.portable:
        arch = arch.rstrip("af")  # as `bench.portable`
    elif arch != "sm_90a":
        print(f"{tunable.kernel} needs sm_90a, this is {arch}")
        return 1
    dims = _candidates.dim_pair(case.head_dim, case.head_dim)
    if tunable.current(arch, dims) is None:
        print(f"{tunable.where} has no row for head dim {dims[0]} on {arch}")
        return 1
    rows = tried(tunable, arch, dims, case)
    if cupy is not None and any(map(worth_timing, rows)):
        time_tiles(cupy, tunable, arch, dims, case, rows, options.rounds)
    rows.sort(
        key=lambda row: (row.get("us", 1e30), row.get("spilled", 1e30), -row.get("blocks", 0))
    )
    head = (*HEAD, *TIMED) if cupy is not None else HEAD
    print(f"{options.kernel} for {arch}, {case.name}, on {name}\n")
    print(report.table(head, [shown(row, cupy is not None) for row in rows]))
    content: dict[str, Any] = {"environment": report.environment(), "case": case.name, "arch": arch}
    content |= {"kernel": options.kernel, "device": name}
    content["rows"] = [{k: v for k, v in row.items() if k != "value"} for row in rows]
    if cupy is None:
        content["no_gpu"] = reason
        print(f"\nno GPU: {reason}\nOn a GPU those that do not spill would be timed.")
    else:
        content["row"] = verdict(tunable, arch, dims, rows, name)
        print(f"\n{content['row']}")
    print(f"\nkept in {report.write('tune' if cupy is not None else 'tune-cpu', content)}")
    return 0


def verdict(
    tunable: Tunable, arch: str, dims: Dims, rows: Sequence[dict[str, Any]], gpu: str
) -> str:
    """The row for the table."""
    best = rows[0]
    if "tflops" not in best:
        return "nothing could be timed"
    used = next(row for row in rows if row["current"])
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    gain = f"{best['tflops']:.0f} TFLOP/s"
    if best is not used and "tflops" in used:
        gain += f", {shown_tile(used['value'])} {used['tflops']:.0f}"
    return (
        f"{tunable.where}\n    {tunable.row(arch, dims, best['value'])}  # {today}, {gpu}: {gain}"
    )


if __name__ == "__main__":
    sys.exit(main())
