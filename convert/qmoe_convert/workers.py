"""Threads that work ahead, and settings of the process that must be put back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

# Bytes of memory that work in flight may take; one item is always let in.
IN_FLIGHT_BYTES = 256 << 20

Progress = Callable[[str, int, int], None]
"""Called with the stage ("convert" or "verify"), source bytes done, and source bytes in all."""

T = TypeVar("T")


class Restored(Generic[T]):
    """Restores a setting of the whole process once the last call that changes it is over.

    Calls may overlap in several threads: if each put back what it had found, the last to end would
    leave what another had set.
    """

    def __init__(self, get: Callable[[], T], set: Callable[[T], Any]) -> None:
        self._get, self._set = get, set
        self._lock = threading.Lock()
        self._before: list[T] = []
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = [self._get()]
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._set(*self._before)


_torch_threads = Restored(torch.get_num_threads, torch.set_num_threads)


def counting(progress: Progress, stage: str, total: int, done: int = 0) -> Callable[[int], None]:
    """A function that adds bytes to ``done`` and tells ``progress``."""

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(stage, done, total)

    return advance


def in_order(
    work: Callable[[Any], T], items: Iterable[Any], workers: int
) -> Generator[T, None, None]:
    """Yield ``work(item)`` in order while workers are ahead by at most `IN_FLIGHT_BYTES`.

    Items have a ``cost`` in bytes; one is let in whatever it costs. Close the generator, or threads
    go on working. They are the parallelism: in each, torch has one thread of its own.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    in_flight = 0
    with (
        _torch_threads,
        ThreadPoolExecutor(workers, "qmoe-convert", torch.set_num_threads, (1,)) as pool,
    ):
        try:
            for item in items:
                while waiting and in_flight + item.cost > IN_FLIGHT_BYTES:
                    cost, future = waiting.popleft()
                    yield future.result()
                    in_flight -= cost
                waiting.append((item.cost, pool.submit(work, item)))
                in_flight += item.cost
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
