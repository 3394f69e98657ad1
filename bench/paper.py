"""`python -m bench.run --suite paper`: the sweep of the FlashAttention papers, all methods in one run.

heads * head dim = 2048, batch * length = 16384, lengths 512 to 16k, head dims 64, 128, 256, causal and
not, forward and backward, in both 16-bit formats: cuflash with the kernels it would choose and held
to its portable family, and every peer that can be imported. Then shapes of decoding, in GB/s. All
methods of a cell take turns (`bench.timing`). The results go to one JSON, and from that alone
`bench.paper_report` makes the tables and the plots.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

import cuflash
from bench import baselines, paper_report, portable, report, roofline, timing
from bench.baselines import Calls, Inputs, NotHere
from bench.cases import Case, sweep

LENGTHS = (1, 4, 16)  # queries of a decoding step: one token, and a few guessed ones
FORMATS = ("bfloat16", "float16")
# Data sheet, bytes per second.
BANDWIDTH = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12}


def decode_cases(dtype: str = "bfloat16") -> list[Case]:
    """A few queries against a long past; 32 heads share 8 of keys and values."""
    shapes = ((1, 8192), (1, 131072), (8, 32768), (64, 4096))
    return [
        Case(batch, 32, 8, queries, keys, 128, dtype)
        for batch, keys in shapes
        for queries in LENGTHS
    ]


def ours_portable(case: Case, x: Inputs) -> Calls:
    """cuflash held to the portable family."""
    from cuflash import _cupy_device

    if not portable.has_another(_cupy_device.device_of(x.q)):
        raise NotHere("what cuflash chooses on this GPU is the portable family")

    def held(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with portable.portable():
                return call()

        return run

    with portable.portable():
        calls = baselines.ours(case, x)
    return {direction: held(call) for direction, call in calls.items()}


def methods() -> dict[str, Callable[[Case, Inputs], Calls]]:
    """What is compared."""
    others = ("torch cuDNN", "torch flash", "Triton", "JAX cuDNN", "plain CuPy")
    found = {"cuflash": baselines.ours, "cuflash portable": ours_portable}
    return found | {name: baselines.PEERS[name] for name in others}


def decode_methods() -> dict[str, Callable[[Case, Inputs], Calls]]:
    """What is compared on a few queries. JAX's calls cannot be separated by a flushed cache."""
    return {name: peer for name, peer in methods().items() if name != "JAX cuDNN"}


def kernels(x: Inputs, case: Case) -> dict[str, str]:
    """Which kernels cuflash runs, by method and direction."""
    found = {}

    def add(method: str) -> None:
        for direction in ("forward", "backward"):
            account = cuflash.explain(
                x.q, x.k, x.v, causal=case.causal, backward=direction == "backward"
            )
            names = (launch.spec.name for launch in account.plan.launches) if account.plan else ()
            found[f"{method} {direction}"] = " ".join(names)

    add("cuflash")
    with portable.portable():
        add("cuflash portable")
    return found


def cell(
    case: Case,
    direction: str,
    method: str,
    times: timing.Times,
    peak: roofline.Peak | None,
) -> dict[str, Any]:
    """One measurement as kept."""
    flops = case.flops(direction)
    tflops = flops / times.median / 1e12
    return {
        **{"dtype": case.dtype, "head_dim": case.head_dim, "causal": case.causal},
        **{"batch": case.batch, "heads": case.heads, "heads_kv": case.heads_kv},
        **{"len_q": case.len_q, "len_k": case.len_k, "direction": direction, "method": method},
        **{"us": times.median * 1e6, "spread": times.spread, "tflops": tflops},
        "of_peak": tflops / peak.tflops if peak else None,
        "gb_per_s": case.bytes_moved() / times.median / 1e9,
        "all_us": [seconds * 1e6 for seconds in times.seconds],
    }


def measure(
    todo: Sequence[Case],
    peers: dict[str, Callable[[Case, Inputs], Calls]],
    directions: Sequence[str],
    timer: Any,
    make: Callable[[Case], Inputs],
    rounds: int,
    peak: roofline.Peak | None,
    free: Callable[[], Any] = lambda: None,
    keep: Callable[[dict[str, Any]], Any] = lambda found: None,
) -> dict[str, Any]:
    """Rows of all cells, and what could not be measured, with the reason.

    Parameters
    ----------
    timer
        With `interleaved(calls, rounds)`, as `timing.GpuTimer`.
    make
        Inputs of a case.
    free
        Called between cases, when nothing of the last one is held any more.
    keep
        Called with what there is after every case: a run that ends early has not been for nothing.
    """
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    ran: dict[str, dict[str, str]] = {}
    for case in tqdm(todo, unit="case", leave=False, disable=None):
        x = make(case)
        calls, absent = baselines.collect(case, x, peers)
        missing += [{"case": case.name, "method": m, "why": why} for m, why in absent.items()]
        for direction in directions:
            found = calls.get(direction, {})
            for name, times in timer.interleaved(found, rounds).items() if found else ():
                rows.append(cell(case, direction, name, times, peak))
        if hasattr(x.q, "__cuda_array_interface__"):
            ran[case.name] = kernels(x, case)
        del x, calls
        free()
        keep({"rows": rows, "missing": missing, "kernels": ran})
    return {"rows": rows, "missing": missing, "kernels": ran}


def on_gpu(cupy: Any, rounds: int, found: dict[str, Any], keep: Callable[[], Any]) -> None:
    """The whole suite, into `found`; `keep` is called after every case."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    peak = roofline.peak(properties)
    gpu = properties["name"].decode()
    timer = timing.GpuTimer(cupy)

    def free() -> None:
        cupy.get_default_memory_pool().free_all_blocks()
        baselines.free_torch()

    def part(name: str, todo: Sequence[Case], decode: bool) -> None:
        peers = decode_methods() if decode else methods()
        directions = ("forward",) if decode else ("forward", "backward")

        def keep_part(content: dict[str, Any]) -> None:
            found[name] = content
            keep()

        def make(case: Case) -> Inputs:
            return baselines.make_inputs(case, cupy)

        measure(todo, peers, directions, timer, make, rounds, peak, free, keep_part)

    found |= {"gpu": gpu, "peak": peak and {"tflops": peak.tflops, "source": peak.source}}
    found["bandwidth"] = next((b for name, b in BANDWIDTH.items() if name in gpu), None)
    found["clocks"] = {"before": timing.clocks()}
    nothing: dict[str, Any] = {"rows": [], "missing": [], "kernels": {}}
    found |= {"sweep": nothing, "decode": nothing}
    part("decode", decode_cases(), True)  # a minute at most, and the sweep may run out of time
    part("sweep", [case for dtype in FORMATS for case in sweep(dtype)], False)
    found["clocks"]["after"] = timing.clocks()
    keep()


def without_gpu(reason: str) -> dict[str, Any]:
    """What would run."""
    cases = [case for dtype in FORMATS for case in sweep(dtype)]
    print(f"no GPU: {reason}\nOn a GPU this would time, forward and backward, in one run:")
    for case in cases:
        print(f"  {case.name}   {case.flops('forward') / 1e12:.2f} TFLOP forward")
    print("and forward, in GB/s:")
    for case in decode_cases():
        print(f"  {case.name}   {case.bytes_moved() / 1e6:.1f} MB")
    print(f"by {', '.join(methods())} (those that can be imported).")
    return {"no_gpu": reason, "cases": [case.name for case in [*cases, *decode_cases()]]}


def main(cupy: Any, reason: str | None, options: argparse.Namespace) -> int:
    """Measure, keep, and draw what was kept."""
    found: dict[str, Any] = {"environment": report.environment()}
    if cupy is None:
        found |= without_gpu(str(reason))
        print(f"\nkept in {report.write('paper-cpu', found)}")
        return 0
    path = report.path_for("paper")
    try:
        on_gpu(cupy, options.rounds, found, lambda: report.write_to(path, found))
    finally:  # of a run that was ended, what there is
        if "sweep" in found:
            print(paper_report.markdown(found))
            for made in paper_report.write_beside(path, found):
                print(f"drawn in {made}")
            print(f"kept in {path}")
    return 0
