"""Who goes through the model with whom, and when."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastmrcnn.service.batcher import Batcher, ModelError


class Recorder:
    """What ran together; each item's result is itself. The first batch waits for `free`."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.free, self.begun = threading.Event(), threading.Event()
        self.threads: set[str] = set()

    def __call__(self, items: Sequence[Any]) -> Sequence[Any]:
        self.threads.add(threading.current_thread().name)
        self.batches.append(list(items))
        self.begun.set()
        assert self.free.wait(30)
        if "bad" in items:
            raise ValueError("planted")
        return items


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


async def working(batcher: Batcher[Any, Any]) -> asyncio.Task[None]:
    return asyncio.create_task(batcher.work())


async def submitted(batcher: Batcher[Any, Any], *items: tuple[Any, Any]) -> list[asyncio.Task[Any]]:
    """Tasks of (key, item), in the queue."""
    tasks = [asyncio.create_task(batcher.submit(key, item)) for key, item in items]
    await asyncio.sleep(0)
    return tasks


async def begun(recorder: Recorder) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, recorder.begun.wait, 30)


def test_the_oldest_goes_first_with_its_like() -> None:
    async def body() -> None:
        recorder = Recorder()
        batcher: Batcher[Any, Any] = Batcher(recorder, batch=2, max_delay=0.0)
        work = await working(batcher)
        first = await submitted(batcher, ("a", 0))
        await begun(recorder)
        rest = await submitted(batcher, ("b", 1), ("a", 2), ("a", 3), ("b", 4), ("a", 5), ("c", 6))
        assert len(batcher) == 6
        recorder.free.set()
        assert await asyncio.gather(*first, *rest) == list(range(7))
        assert recorder.batches == [[0], [1, 4], [2, 3], [5], [6]]
        assert recorder.threads == {"model_0"}
        assert len(batcher) == 0
        work.cancel()

    run(body)


def test_an_idle_model_waits_for_a_full_batch_no_longer_than_it_may() -> None:
    async def body() -> None:
        recorder = Recorder()
        recorder.free.set()
        batcher: Batcher[Any, Any] = Batcher(recorder, batch=3, max_delay=0.2)
        work = await working(batcher)
        began = time.monotonic()
        await asyncio.gather(*await submitted(batcher, ("a", 0), ("a", 1)))
        assert time.monotonic() - began >= 0.19
        assert recorder.batches == [[0, 1]]
        patient: Batcher[Any, Any] = Batcher(recorder, batch=3, max_delay=60.0)
        other = await working(patient)
        full = await submitted(patient, ("b", 9), ("a", 2), ("a", 3), ("a", 4))
        assert await asyncio.wait_for(asyncio.gather(*full[1:]), 30) == [2, 3, 4]  # it is full
        assert len(patient) == 1
        for task in (work, other, full[0]):
            task.cancel()

    run(body)


def test_what_is_cancelled_is_not_run() -> None:
    async def body() -> None:
        recorder = Recorder()
        batcher: Batcher[Any, Any] = Batcher(recorder, batch=2, max_delay=0.0)
        work = await working(batcher)
        tasks = await submitted(batcher, ("a", 0))
        await begun(recorder)
        tasks += await submitted(batcher, ("a", 1), ("a", 2), ("b", 3))
        tasks[0].cancel()  # it is in the model: its result is dropped
        tasks[1].cancel()
        tasks[3].cancel()
        await asyncio.sleep(0)
        assert len(batcher) == 1
        recorder.free.set()
        assert await tasks[2] == 2
        assert recorder.batches == [[0], [2]]
        assert [task.cancelled() for task in tasks] == [True, True, False, True]
        recorder.begun.clear()
        recorder.free.clear()
        tasks += await submitted(batcher, ("a", 4))
        await begun(recorder)
        work.cancel()
        tasks[-1].cancel()
        await asyncio.sleep(0.05)
        assert batcher.busy_since is not None  # the thread cannot be stopped
        recorder.free.set()

    run(body)


def test_a_failure_is_of_one_item() -> None:
    async def body() -> None:
        recorder = Recorder()
        told: list[tuple[int, int]] = []
        batcher: Batcher[Any, Any] = Batcher(
            recorder,
            batch=3,
            max_delay=0.05,
            observe=lambda items, seconds, failed: told.append((items, failed)),
        )
        recorder.free.set()
        work = await working(batcher)
        tasks = await submitted(batcher, ("a", 0), ("a", "bad"), ("a", 2))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[::2] == [0, 2]
        assert isinstance(results[1], ModelError)
        assert isinstance(results[1].__cause__, ValueError)
        assert recorder.batches == [[0, "bad", 2], [0], ["bad"], [2]]
        assert told == [(3, 1)]
        assert await batcher.submit("a", 5) == 5
        work.cancel()

    run(body)


def test_how_long_to_wait_is_judged_by_the_last_batches() -> None:
    async def body() -> None:
        batcher: Batcher[Any, Any] = Batcher(
            lambda items: time.sleep(0.1 * len(items)) or items, batch=2, max_delay=0.0
        )
        assert batcher.seconds_to_wait() == 0
        work = await working(batcher)
        await batcher.submit("a", 0)
        assert batcher.seconds_to_wait() >= 0.19  # a batch that is not full is waited for as if it were
        assert batcher.busy_since is None
        work.cancel()

    run(body)
