"""One service: what it takes in hand, from bytes to JSON, and when it says no."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from fastmrcnn.detection.detector import Detector
from fastmrcnn.service.answer import Found, Image, Options, as_json, find
from fastmrcnn.service.batcher import Batcher, ModelError
from fastmrcnn.service.counts import Counts
from fastmrcnn.service.limits import Limits, RefusedError
from fastmrcnn.service.upload import ClientGoneError, Receive, check_headers, decode, read_body

LONGEST_RETRY = 60  # seconds that a client is asked to wait at most
_MOST_DECODERS = 4

T = TypeVar("T")


class Service:
    """A detector and its queue. Made and used on a running event loop, but for `stopping`.

    Args:
        on_ready: is called once, when the model is warmed up.
    """

    def __init__(
        self, detector: Detector, limits: Limits, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        self.detector, self.limits, self._on_ready = detector, limits, on_ready
        self.stopping = False  # finish what is begun, and take nothing new
        self.ready = False
        self.failure: BaseException | None = None  # the service cannot go on
        self.in_hand = 0  # requests
        self.counts = Counts(lambda: len(self.batcher), lambda: self.in_hand)
        self.batcher: Batcher[Image, Found] = Batcher(
            lambda images: find(detector, images), limits.batch, limits.max_delay, self.counts.batch
        )
        self._reading = detector.reading._replace(max_pixels=limits.max_pixels)
        self._decoders = ThreadPoolExecutor(min(_MOST_DECODERS, os.cpu_count() or 1), "decode")
        # Decoded images are large: no more of them are held than the next batches are made of.
        self._decoded = asyncio.Semaphore(2 * limits.batch + _MOST_DECODERS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Warm the model up, then take images."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def trouble(self) -> str | None:
        """Why no image is taken now; None: they are."""
        if self.stopping:
            return "the service is stopping"
        if self.failure is not None:
            return "the service has failed"
        if not self.ready:
            return "the model is being warmed up"
        since = self.batcher.busy_since
        if since is not None and time.monotonic() - since > self.limits.timeout:
            return "the model does not answer"
        return None

    async def predict(self, headers: Mapping[str, str], receive: Receive, options: Options) -> bytes:
        """The JSON of a request.

        Raises:
            RefusedError: it is not taken, or takes too long.
            ClientGoneError: nobody waits for the answer any more.
        """
        end = asyncio.get_running_loop().time() + self.limits.timeout
        if trouble := self.trouble():
            raise RefusedError(503, trouble, {"Retry-After": "2"})
        if self.in_hand >= self.limits.queue:
            wait = min(LONGEST_RETRY, max(1, math.ceil(self.batcher.seconds_to_wait())))
            raise RefusedError(
                503, f"all {self.limits.queue} places are taken; try again", {"Retry-After": str(wait)}
            )
        self.in_hand += 1
        try:
            content_type = check_headers(headers, self.limits.max_bytes)
            body = await read_body(receive, self.limits.max_bytes, self.limits.timeout)
            work = asyncio.create_task(self._answer(body, content_type, options))
            del body
            return await self._while_wanted(work, receive, end - asyncio.get_running_loop().time())
        finally:
            self.in_hand -= 1

    async def _while_wanted(self, work: asyncio.Task[bytes], receive: Receive, seconds: float) -> bytes:
        """What the task gives, which is cancelled if its client hangs up or its time is over."""
        gone = asyncio.create_task(_until_gone(receive))
        try:
            done, _ = await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                if not task.done():
                    task.cancel()
        if work in done:
            return work.result()
        await asyncio.wait({work})
        if gone in done:
            raise ClientGoneError
        raise RefusedError(504, f"there was no answer within {self.limits.timeout:g} s")

    async def _answer(self, body: bytes, content_type: str, options: Options) -> bytes:
        async with self._decoded:
            pixels, note = await self._in_pool(lambda: decode(body, content_type, self._reading))
            image = Image(pixels, options, () if note is None else (note.text,))
            key = self.detector.padded_shape(pixels.shape[:2])
            del pixels
            try:
                found = await self.batcher.submit(key, image)
            except ModelError:
                raise RefusedError(500, "the model failed on this image") from None
            self.counts.objects(len(found.entries))
            return await self._in_pool(lambda: as_json(found))

    async def _in_pool(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, call)

    async def _run(self) -> None:
        try:
            await self.batcher.in_thread(self._warm_up)
            self.ready = True
            self._on_ready()
            await self.batcher.work()
        except Exception as error:
            self.failure = error

    def _warm_up(self) -> None:
        """The first images take longest: kernels are compiled, memory is taken."""
        data = self.detector.card.config.data
        short, long = data.short_side_test, min(data.long_side_max, data.short_side_test * 4 // 3)
        grey = Image(np.full((short, long, 3), 128, np.uint8), Options(score=0))
        model = self.detector.model
        tensor = next(chain(model.parameters(), model.buffers()), None)
        on_cpu = tensor is None or tensor.device.type == "cpu"
        for number in (1,) if on_cpu else (1, self.limits.batch):
            images: Sequence[Image] = [grey] * number
            for found in find(self.detector, images):
                as_json(found)


async def _until_gone(receive: Receive) -> None:
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
