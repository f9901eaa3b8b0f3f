"""Gathers images of one padded shape into batches, and runs them one batch after the other in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger("fastmrcnn.service")


class ModelError(Exception):
    """The model failed on an item; the cause is its own error."""


class _Waiting(NamedTuple):
    item: Any
    answer: asyncio.Future[Any]
    since: float  # on the loop's clock


class Batcher(Generic[Item, Result]):
    """Items of one key go through `run` together, up to `batch` of them.

    A batch starts when it is full or its oldest item has waited for `max_delay` seconds; of those that may
    start, the one with the oldest item does, so that no key waits for ever behind a busier one. If `run`
    fails, its items are run one by one, so that one of them does no harm to the others.

    Args:
        run: gives a result for each item of a list. It is called in one thread, always the same.
        observe: is told, on the loop's thread, of each batch: its items, seconds, and how many failed.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        batch: int,
        max_delay: float,
        observe: Callable[[int, float, int], None] = lambda items, seconds, failed: None,
    ) -> None:
        self.busy_since: float | None = None  # on the monotonic clock; None: the thread is idle
        self._run, self._batch, self._max_delay, self._observe = run, batch, max_delay, observe
        self._waiting: dict[Hashable, list[_Waiting]] = defaultdict(list)
        self._news = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._seconds_per_item: float | None = None

    def __len__(self) -> int:
        """How many items wait."""
        return sum(not one.answer.done() for group in self._waiting.values() for one in group)

    def seconds_to_wait(self) -> float:
        """What a new item would wait for those before it, judged by the last batches."""
        return (len(self) + self._batch) * (self._seconds_per_item or 0)

    async def submit(self, key: Hashable, item: Item) -> Result:
        """Its result. Cancelled before its batch has begun, it is not run.

        Raises:
            ModelError: `run` failed on it.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        self._waiting[key].append(_Waiting(item, answer, loop.time()))
        self._news.set()
        return await answer

    async def in_thread(self, call: Callable[[], None]) -> None:
        """Call something else in the thread."""
        await self._in_thread(call)

    async def work(self) -> None:
        """Run batches until cancelled."""
        while True:
            self._news.clear()
            self._drop_cancelled()
            key, wait = self._next()
            if key is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), wait)
                continue
            group = self._waiting.pop(key)
            if rest := group[self._batch :]:
                self._waiting[key] = rest
            await self._run_batch(group[: self._batch])

    def _drop_cancelled(self) -> None:
        for key, group in list(self._waiting.items()):
            group[:] = [one for one in group if not one.answer.done()]
            if not group:
                del self._waiting[key]

    def _next(self) -> tuple[Hashable | None, float | None]:
        """The key whose batch may start; or None, and the seconds until one may, None if there is none."""
        now = asyncio.get_running_loop().time()
        ends = {
            key: now if len(group) >= self._batch else group[0].since + self._max_delay
            for key, group in self._waiting.items()
        }
        ready = [key for key, end in ends.items() if end <= now]
        if ready:
            return min(ready, key=lambda key: self._waiting[key][0].since), None
        return None, min(ends.values()) - now if ends else None

    async def _run_batch(self, group: list[_Waiting]) -> None:
        started = time.monotonic()
        items = [one.item for one in group]
        results = await self._in_thread(lambda: self._results(items))
        seconds = time.monotonic() - started
        before, now = self._seconds_per_item, seconds / len(group)
        self._seconds_per_item = now if before is None else 0.8 * before + 0.2 * now
        self._observe(len(group), seconds, sum(isinstance(result, ModelError) for result in results))
        for one, result in zip(group, results, strict=True):
            if one.answer.done():  # the client went away, or its time is up
                continue
            if isinstance(result, ModelError):
                one.answer.set_exception(result)
            else:
                one.answer.set_result(result)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        def timed() -> Any:  # by the thread, which goes on when nobody waits for it any more
            self.busy_since = time.monotonic()
            try:
                return call()
            finally:
                self.busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)

    def _results(self, items: Sequence[Item]) -> list[Result | ModelError]:
        try:
            return list(self._run(items))
        except Exception as error:
            if len(items) == 1:
                log.exception("the model failed on an image")
                failed = ModelError(str(error))
                failed.__cause__ = error
                return [failed]
            log.warning("the model failed on %d images, which are run one by one", len(items))
        return [result for item in items for result in self._results([item])]
