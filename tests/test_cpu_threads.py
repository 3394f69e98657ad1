"""The NumPy backend on several threads: the same bits, no limit left behind, nobody waits for ever."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuflash import _cpu, _cpu_backward, _cpu_forward, _cpu_threads, _cpu_tiles
from cuflash._cpu_products import Scratch
from cuflash._cpu_threads import BLAS, Blas, run, threads_for
from cuflash._cpu_tiles import Call, Extras, Shape
from cuflash._options import Options
from tests.cases import Case


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with the threads and the limits that it began with."""
    before = threading.active_count(), BLAS.threads()
    yield
    assert (threading.active_count(), BLAS.threads()) == before
    assert BLAS.users == 0


@pytest.fixture
def use_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let every call, however small, run on so many threads."""

    def use(threads: int) -> None:
        for module in (_cpu_forward, _cpu_backward):
            monkeypatch.setattr(module, "threads_for", lambda items, pairs: min(items, threads))

    return use


def everything(data: Any, options: Options) -> list[bytes]:
    """out, lse and all gradients of a call."""
    out, lse = _cpu.forward(data.q, data.k, data.v, options)
    wrt = ["q", "k", "v"] + ["alibi_slopes"] * (options.alibi_slopes is not None)
    grads = _cpu.backward(data.dout, data.q, data.k, data.v, out, lse, options, wrt=wrt)
    return [x.tobytes() for x in (out, lse, *grads.values())]


CASES = [
    Case(len_q=33, len_k=50, head_dim=8, heads=6, heads_kv=3, batch=(2,), causal=True),
    Case(len_q=33, len_k=50, head_dim=8, heads=4, heads_kv=4, batch=(3,), broadcast_kv=True),
    Case(len_q=50, len_k=33, head_dim=5, heads=5, heads_kv=5, softcap=3.0, alibi="H"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_on_any_number_of_threads(
    case: Case, dtype: str, use_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(_cpu_tiles, "TILE_KEYS", 16)
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    data = replace(case, dtype=dtype).data()
    right = 0 if case.causal else None
    options = Options(0.3, 2, None, right, case.softcap, data.alibi_slopes)
    use_threads(1)
    want = everything(data, options)
    for threads in (2, 5):
        use_threads(threads)
        assert everything(data, options) == want


def test_same_bits_at_the_size_of_real_tiles(use_threads: Callable[[int], None]) -> None:
    """Products as large as these BLAS splits by itself, and float64 ones then round differently."""
    data = Case(dtype="float64", len_q=700, len_k=900, head_dim=32, heads=3, batch=()).data()
    options = Options(0.2, 200, None, 0)
    use_threads(1)
    with BLAS.single():
        want = everything(data, options)
    for threads in (2, 3):
        use_threads(threads)
        assert everything(data, options) == want


@pytest.mark.parametrize("heads", [1, 4])
def test_work_is_shared(heads: int, use_threads: Callable[[int], None]) -> None:
    """One long head too: forward has rows to share. Each of three threads has BLAS for itself."""
    seen: dict[str, set[Any]] = {"threads": set(), "blas": set()}
    together = threading.Barrier(3, timeout=60)

    def worker(stopped: Callable[[], bool]) -> Callable[[int], None]:
        def do(item: int) -> None:
            if item < 3:
                together.wait()  # breaks if fewer than three work at once
            seen["threads"].add(threading.get_ident())
            seen["blas"].update(BLAS._counts())

        return do

    run(iter(range(50)), worker, 3)
    assert len(seen["threads"]) == 3
    assert seen["blas"] <= {1}

    counts: list[int] = []
    use_threads(3)
    data = Case(dtype="float32", len_q=600, len_k=600, heads=heads, batch=()).data()

    def scratch(dtype: np.dtype) -> Scratch:
        counts.append(1)
        return Scratch(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu_forward, "Scratch", scratch)
        _cpu.forward(data.q, data.k, data.v, Options(0.125, 0))
    assert len(counts) == 3


def test_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as BLAS may use; and nobody is asked when the call is small."""
    monkeypatch.setattr(BLAS, "threads", lambda: 4)
    monkeypatch.setattr(
        _cpu_threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False
    )
    large = _cpu_threads.PAIRS
    assert [threads_for(n, large) for n in (1, 2, 4, 9)] == [1, 2, 4, 4]
    monkeypatch.setattr(_cpu_threads.os, "sched_getaffinity", lambda pid: {5})
    assert threads_for(9, large) == 1
    monkeypatch.delattr(_cpu_threads.os, "sched_getaffinity")
    assert threads_for(9, large) == 4
    monkeypatch.delattr(BLAS, "threads")
    monkeypatch.setattr(BLAS, "lock", None)
    assert threads_for(1, 1 << 60) == 1
    assert threads_for(1000, large - 1) == 1


def test_pairs_are_those_of_the_mask() -> None:
    q = np.zeros((2, 6, 1000, 8), np.float32)
    k = np.zeros((2, 3, 1000, 8), np.float32)
    shape = Shape.of(q, k, k)

    def pairs(options: Options) -> int:
        return Call.of(shape, Extras.of(options, shape.axes, np.dtype(np.float32))).pairs()

    assert pairs(Options(1.0, 0)) == 12_000_000
    window = pairs(Options(1.0, 0, 10, 0))
    assert 12 * 1000 * 11 * 0.9 < window < 12_000_000 / 4


@pytest.mark.parametrize("where", ["item", "iterator", "buffers"])
def test_errors_come_out(where: str) -> None:
    def items() -> Iterator[int]:
        for i in itertools.count():
            if where == "iterator" and i == 7:
                raise MemoryError(where)
            yield i

    def worker(stopped: Callable[[], bool]) -> Callable[[int], None]:
        if where == "buffers" and threading.current_thread() is not threading.main_thread():
            raise MemoryError(where)

        def do(item: int) -> None:
            if where == "item" and item == 7:
                raise MemoryError(where)

        return do

    with pytest.raises(MemoryError, match=where):
        run(items(), worker, 3)


def test_interrupted() -> None:
    """Ctrl-C in the middle of long work."""
    main = threading.main_thread()
    # A process started in the background may ignore SIGINT, and so its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def worker(stopped: Callable[[], bool]) -> Callable[[int], None]:
        def do(item: int) -> None:
            if item > 20 and threading.current_thread() is main:
                signal.raise_signal(signal.SIGINT)

        return do

    try:
        with pytest.raises(KeyboardInterrupt):
            run(iter(range(10**6)), worker, 3)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_system_without_threads(
    use_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Case(dtype="float32", len_q=300, len_k=300, heads=4, batch=()).data()
    use_threads(3)
    want = everything(data, Options(0.125, 0))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert everything(data, Options(0.125, 0)) == want


def test_numbers_do_not_warn_in_threads(use_threads: Callable[[int], None]) -> None:
    """Every thread has an error state of its own, and the caller's is left alone."""
    data = Case(dtype="float32", len_q=300, len_k=300, heads=4, batch=()).data()
    data.q[:, ::3], data.v[:, 5], data.k[:, 9] = 1e30, np.inf, np.nan
    use_threads(4)
    with np.errstate(all="raise"):
        state = np.geterr()
        everything(data, Options(0.125, 0))
        assert np.geterr() == state


def test_calls_from_several_threads_at_once(use_threads: Callable[[int], None]) -> None:
    data = Case(dtype="float32", len_q=300, len_k=300, heads=4, batch=()).data()
    options = Options(0.125, 0, None, 0)
    use_threads(2)
    want = everything(data, options)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: everything(data, options), range(12)))
    assert all(result == want for result in results)


class Library:
    """Stands for a BLAS that has a number of threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def get_num_threads(self) -> int:
        return self.threads

    def set_num_threads(self, threads: int) -> None:
        self.threads = threads


def test_the_limit_is_for_as_long_as_anyone_needs_it() -> None:
    blas, library = Blas(), Library(8)
    blas.libraries = [library]
    first, second = blas.single(), blas.single()
    first.__enter__()
    second.__enter__()
    assert (library.threads, blas.threads()) == (1, 8)
    first.__exit__(None, None, None)
    assert library.threads == 1
    second.__exit__(None, None, None)
    assert library.threads == 8
    library.threads = 3  # the user's
    with blas.single():
        assert (library.threads, blas.threads()) == (1, 3)
        blas.after_fork()
        assert library.threads == 3
        blas.users = 1
    assert library.threads == 3


def test_import_does_not_look_for_libraries() -> None:
    code = "import sys, cuflash, cuflash._cpu; print('threadpoolctl' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
