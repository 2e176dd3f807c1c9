"""Threads: how many a job uses, and how it runs in them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from ..errors import CkptError, UsageError

T = TypeVar("T")

MAX_THREADS = 256
"""More would help no disk, and each holds its own buffers."""


def check_threads(threads: int | None) -> None:
    """Refuse an invalid number of worker threads.

    Raises:
        UsageError: not an integer from 1 to MAX_THREADS.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise UsageError(f"`threads={threads!r}`: must be a whole number from 1 to {MAX_THREADS}.")


def default_threads() -> int:
    """Return the number of cores that this process may use, at most 16: more would wait for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


class HandedOut(Generic[T]):
    """An iterator for several threads: each item goes to one of them, and none once the job is to stop.

    Args:
        items: asked for one at a time.
        stop: see `in_threads`.
    """

    def __init__(self, items: Iterable[T], stop: threading.Event) -> None:
        self._items, self._stop, self._lock = iter(items), stop, threading.Lock()

    def __iter__(self) -> HandedOut[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            if self._stop.is_set():
                raise StopIteration
            return next(self._items)


def in_threads(
    work: Callable[[], None], threads: int | None, stop: threading.Event, *, on_tick: Callable[[], None] | None = None
) -> None:
    """Run a function in several threads and wait until all have returned.

    Args:
        work: called in each.
        threads: how many; `default_threads` if None.
        stop: set when it fails in one of them, when the caller is interrupted, and at the end.
        on_tick: called in this thread, a few times a second.

    Raises:
        CkptError: the system cannot start a thread. With fewer threads than asked for, the job takes longer.
    """
    threads = default_threads() if threads is None else threads

    def until_failure() -> None:
        try:
            work()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt") as pool:
        try:
            pending: set[Future[None]] = set()
            for _ in range(threads):
                try:
                    pending.add(pool.submit(until_failure))
                except RuntimeError as error:
                    if not pending:
                        raise CkptError(
                            f"{str(error).capitalize()}: the system has no more, or no memory for it. "
                            "Allow more (ulimit -u, -v)."
                        ) from error
                    break
            while pending:
                done, pending = wait(pending, timeout=0.1)
                if on_tick is not None:
                    on_tick()
                for future in done:
                    future.result()
        finally:
            stop.set()
