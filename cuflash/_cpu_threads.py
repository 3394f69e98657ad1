"""Threads of the NumPy backend: whole tiles side by side, each with BLAS on one thread.

Left alone, BLAS splits every small product among its threads and waits for the slowest of them:
while another process holds one core, each of thousands of products waits for that core. And all
that is not a product (exp, maxima, sums) runs on one core. NumPy releases the interpreter's lock in
both, so Python threads that share nothing but a list of tiles use all cores and wait once, at the
end.

Threads live for one call: starting them costs 0.1 ms, and a fork between two calls finds none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")

# Pairs of query and key in a call from which threads pay: some 5 ms of work.
PAIRS = 1 << 21
# More would mostly wait for the interpreter's lock, and each has buffers of 2 MB.
MOST_THREADS = 16
# Whose number of threads is one number for the whole process. With OpenMP every Python thread has
# its own, which nobody else can restore.
PROCESS_WIDE = ("pthreads", "intel", "tbb", "gnu")


class Blas:
    """The number of threads of NumPy's BLAS, lowered to one while any call of ours runs threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.libraries: list[Any] | None = None
        self.before: list[int] = []  # of each library, while `users` is not 0
        self.users = 0

    def threads(self) -> int:
        """How many threads BLAS may use, as the user set it; 1 when that is not known."""
        with self.lock:
            counts = self.before if self.users else self._counts()
        return max(counts, default=1)

    @contextmanager
    def single(self) -> Iterator[None]:
        """One thread per product, until the last of all calls that asked for it has left."""
        entered = False
        try:
            with self.lock:
                if not self.users:
                    self.before = self._counts()
                    self._set([1] * len(self.before))
                self.users += 1
                entered = True
            yield
        finally:
            if entered:
                with self.lock:
                    self.users -= 1
                    if not self.users:
                        self._set(self.before)

    def after_fork(self) -> None:
        """In the child, where calls that other threads of the parent were in will never leave."""
        self.lock = threading.Lock()
        if self.users:
            self.users = 0
            self._set(self.before)

    def _counts(self) -> list[int]:
        if self.libraries is None:
            self.libraries = _blas_libraries()
        return [library.get_num_threads() for library in self.libraries]

    def _set(self, counts: list[int]) -> None:
        for library, count in zip(self.libraries or (), counts, strict=True):
            if library.get_num_threads() != count:
                library.set_num_threads(count)


def _blas_libraries() -> list[Any]:
    """NumPy's own BLAS if it came with NumPy, else every one that is loaded."""
    # Looking through all loaded libraries takes milliseconds, which only long calls should pay.
    from threadpoolctl import ThreadpoolController

    loaded = ThreadpoolController().select(user_api="blas").lib_controllers
    own = [
        library
        for library in loaded
        if {"numpy", "numpy.libs"}.intersection(Path(library.filepath).parts)
    ]
    if any(getattr(x, "threading_layer", None) not in PROCESS_WIDE for x in own or loaded):
        return []
    return own or loaded


BLAS = Blas()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BLAS.after_fork)


def threads_for(items: int, pairs: int) -> int:
    """How many threads a call of so many independent `items` gets; 1: it runs where it is."""
    if items < 2 or pairs < PAIRS:
        return 1
    threads = min(items, BLAS.threads(), MOST_THREADS)
    if hasattr(os, "sched_getaffinity"):  # not on Windows and macOS
        threads = min(threads, len(os.sched_getaffinity(0)))
    return threads


def run(
    items: Iterator[Item],
    worker: Callable[[Callable[[], bool]], Callable[[Item], None]],
    threads: int,
) -> None:
    """Do all `items`, taken in order, on `threads` threads, of which this one is the first.

    Parameters
    ----------
    items
        Independent of each other. Only one thread at a time runs the iterator.
    worker
        Called once per thread with a function that says whether to give up; returns what does an
        item, with buffers of its own.
    threads
        1: in this thread alone.

    Products have one thread of BLAS each, also in a call that has one thread: BLAS's sums depend on
    its threads, whose number another call may lower for the whole process at any time.

    Raises
    ------
    BaseException
        The first that an item raised, or KeyboardInterrupt; no thread is left running.
    """
    team = _Team(items, worker)
    with BLAS.single():
        team.work_with(threads - 1)
    error, team.error = team.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback knows this frame: a circle that would keep the arrays alive


class _Team:
    """The threads of one call, and what they share."""

    def __init__(
        self,
        items: Iterator[Any],
        worker: Callable[[Callable[[], bool]], Callable[[Any], None]],
    ) -> None:
        self.items, self.worker = items, worker
        self.lock = threading.Lock()
        self.stopped = False
        self.error: BaseException | None = None

    def work(self) -> None:
        """Items until there is none; the first error of any thread ends all."""
        try:
            # NaN, inf and overflow of the user's numbers are results here, not accidents worth a
            # warning. Every thread has an error state of its own.
            with np.errstate(all="ignore"):
                do = self.worker(lambda: self.stopped)
                while not self.stopped:
                    with self.lock:
                        item = next(self.items, None)
                    if item is None:
                        return
                    do(item)
        except BaseException as error:
            with self.lock:
                self.error = error if self.error is None else self.error
            self.stopped = True

    def work_with(self, helpers: int) -> None:
        """`work` in this thread and in so many more."""
        started = []
        try:
            for _ in range(helpers):
                thread = threading.Thread(target=self.work, name="cuflash")
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more: fewer do the same
                    break
                started.append(thread)
            self.work()
            for thread in started:
                thread.join()
        except BaseException:
            # Interrupted between two items: the others give up after the tile that they are at.
            self.stopped = True
            for thread in started:
                thread.join()
            raise
