"""Answers that come before the whole request has, so that the client gets to read them; and their count."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from fastmrcnn.service.counts import Counts

LINGER = 2.0  # seconds
OTHER = "other"

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Polite:
    """An ASGI application around another.

    A client that is still sending, say a body that is too long, may not look for an answer before it is
    done, and never sees one if the connection is closed on it. So after such an answer what still comes is
    thrown away as it comes, for two seconds at most; then the connection is closed.

    Args:
        timed: the path whose answers are timed.
        known: the paths that are counted by name.
    """

    def __init__(self, app: Any, counts: Counts, timed: str, known: Collection[str]) -> None:
        self.app, self._counts, self._timed, self._known = app, counts, timed, known

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        headers = dict(scope["headers"])
        pending = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        asked = b"expect" in headers  # the client waits to be told to send
        closing = False

        async def receiving() -> Message:
            nonlocal pending, asked
            asked = False
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                pending = False
            return message

        async def sending(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._known else OTHER
                self._counts.request(path, message["status"])
                if path == self._timed:
                    self._counts.answered_in(time.monotonic() - started)
                closing = pending
                if closing:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            if closing and not asked and not message.get("more_body", False) and "body" in message:
                await send({**message, "more_body": True})
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_throw_away(receiving, lambda: pending), LINGER)
                message = {**message, "body": b""}
            await send(message)

        await self.app(scope, receiving, sending)


async def _throw_away(receive: Receive, pending: Callable[[], bool]) -> None:
    while pending():
        await receive()
