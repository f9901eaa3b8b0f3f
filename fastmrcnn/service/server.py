"""The socket, the signals and the end of a service."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

from fastmrcnn.detection.detector import Detector
from fastmrcnn.errors import UserError
from fastmrcnn.service.app import make_app
from fastmrcnn.service.handler import Service
from fastmrcnn.service.limits import Limits

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_LAST_BYTES = 5  # seconds that clients have to read the last answers
_IDLE = 75  # seconds that a connection is kept for its next request: proxies keep theirs for 60


def check_installed() -> None:
    """UserError if something is missing that only the service needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'fastmrcnn[serve]'")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 is any free one.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
        except OSError:
            server.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another"
        ) from None
    server.set_inheritable(False)
    return server


def url_of(server: socket.socket) -> str:
    host, port = server.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Running:
    """What a service is doing, for whoever runs it.

    Args:
        on_ready: is called once, when the model is warmed up.
    """

    def __init__(self, on_ready: Callable[[], None] = lambda: None) -> None:
        self.on_ready = on_ready
        self.service: Service | None = None
        self.stop: int | None = None  # the signal that asked for it

    def on_signal(self, number: int, frame: FrameType | None = None) -> None:
        """The first one: finish what is begun, and take nothing new. The second: stop at once."""
        if self.stop is not None:
            os._exit(128 + number)  # the model's thread may be in the middle of something long
        self.stop = number
        in_hand = 0
        if self.service is not None:
            self.service.stopping, in_hand = True, self.service.in_hand
        # Not print: this may have interrupted one.
        line = f"\nstopping when what is in hand is answered ({in_hand}); once more stops at once\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())

    def finished(self) -> bool:
        service = self.service
        if service is None:
            return False
        return service.failure is not None or (service.stopping and service.in_hand == 0)


def serve(detector: Detector, limits: Limits, server: socket.socket, running: Running) -> None:
    """Serve until a signal, SIGINT or SIGTERM, and what is in hand then is answered.

    Raises:
        UserError: the model failed in its warm-up.
    """
    asyncio.run(_serve(detector, limits, server, running))
    if running.service is not None and (failure := running.service.failure) is not None:
        reason = " ".join(str(failure).split())[:300] or type(failure).__name__
        raise UserError(
            f"the model cannot be run ({type(failure).__name__}: {reason}); if memory is short, lower --batch"
        ) from failure


async def _serve(detector: Detector, limits: Limits, server: socket.socket, running: Running) -> None:
    import uvicorn

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the client is told what is wrong

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            running.on_signal(sig, frame)

        async def on_tick(self, counter: int) -> bool:
            return running.finished() or await super().on_tick(counter)

    service = running.service = Service(detector, limits, running.on_ready)
    if running.stop is not None:  # while it was made
        service.stopping = True
    config = uvicorn.Config(
        make_app(service),
        http="h11",  # the one that needs no compiler
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_LAST_BYTES,
    )
    service.start()
    try:
        await Server(config).serve(sockets=[server])
    finally:
        await service.close()
