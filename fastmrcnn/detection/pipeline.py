"""Work before and after the model, beside it: what is read ahead, what is drawn behind.

Order is kept, and only so much waits at a time, however long the list.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")

MOST_PIXELS = 64_000_000  # of the images that wait to be drawn; one that is larger waits alone


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_threads(on_gpu: bool) -> int:
    """How many are worth it. A model on the CPU needs the cores itself."""
    return min(4, max(1, cores() - 1)) if on_gpu else 1


def ahead(
    items: Iterable[A], work: Callable[[A], B], threads: int
) -> Generator[tuple[A, Future[B]], None, None]:
    """Items in their order, each with what `work` makes of it, or will: threads work ahead on the next ones.

    Close it (`contextlib.closing`) if it may not be read to its end.
    """
    waiting: deque[tuple[A, Future[B]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > threads + 1:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


class Behind(Generic[B]):
    """Work in threads, its results in the order in which it was put in.

    Args:
        threads: work on so many at once; as many more may wait.
        most: sum of the weights of all that is worked on or waits; one that is heavier goes in alone.
    """

    def __init__(self, threads: int, most: float = float("inf")) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="behind")
        self.places, self.most = 2 * threads, most
        self.waiting: deque[tuple[float, Future[B]]] = deque()

    def __enter__(self) -> Behind[B]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def put(self, work: Callable[..., B], *arguments: Any, weight: float = 0.0) -> Generator[B, None, None]:
        """Begin some work; yields the results of what was to be finished first, and of what is done anyway.

        Raises:
            Whatever an earlier piece of work raised, in its turn.
        """
        while self.waiting and (len(self.waiting) >= self.places or self._weight() + weight > self.most):
            yield self._next()
        self.waiting.append((weight, self.pool.submit(work, *arguments)))
        while self.waiting and self.waiting[0][1].done():
            yield self._next()

    def rest(self) -> Generator[B, None, None]:
        """The results of all that is left, in order."""
        while self.waiting:
            yield self._next()

    def whatever_works(self) -> Generator[B, None, None]:
        """As `rest`, without what fails."""
        while self.waiting:
            with contextlib.suppress(Exception):
                yield self._next()

    def _next(self) -> B:
        # It stays until it is done: an interruption of this wait loses nothing.
        try:
            return self.waiting[0][1].result()
        finally:
            if self.waiting[0][1].done():
                self.waiting.popleft()

    def _weight(self) -> float:
        return sum(weight for weight, _ in self.waiting)


def in_turn(items: Iterable[A], work: Callable[[A], B], threads: int) -> Generator[B, None, None]:
    """What `work` makes of each item, in order, in threads beside what gives the items."""
    with Behind[B](threads) as behind:
        for item in items:
            yield from behind.put(work, item)
        yield from behind.rest()
