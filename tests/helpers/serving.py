"""A service in a thread of this process, and a client."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from batches import small_config
from PIL import Image
from planted import PlantedModel, write_set

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.detection.detector import Detector
from fastmrcnn.service.handler import Service
from fastmrcnn.service.limits import Limits
from fastmrcnn.service.server import Running, listen, serve
from fastmrcnn.structures import Batch, Detections
from fastmrcnn.weights.card import ModelCard

PATIENCE = 30.0  # seconds that a test waits for what has to come
POISON = 250  # the grey of an image on which the model fails


class Held(PlantedModel):
    """A planted model that can be held up, and that fails on images of one grey."""

    def __init__(self, dataset: CocoDataset) -> None:
        super().__init__(dataset)
        self.records[13] = self.records[2]  # the grey of the warm-up: nothing is in it
        self.free, self.begun = threading.Event(), threading.Event()
        self.free.set()

    def forward(self, batch: Batch) -> Detections:
        self.begun.set()
        assert self.free.wait(PATIENCE)
        if (batch.pixels[:, 0, 0, 0] == POISON).any():
            raise RuntimeError("planted: a path such as /home/someone/model.py")
        return super().forward(batch)

    def hold(self) -> None:
        self.begun.clear()
        self.free.clear()


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Of a service on this machine."""

    def __init__(self, port: int, service: Service, running: Running, model: Any) -> None:
        self.port, self.service, self.running, self.model = port, service, running, model

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **query: Any
    ) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            target = f"{path}?{urlencode(query)}" if query else path
            with contextlib.suppress(
                BrokenPipeError, ConnectionResetError
            ):  # it may be answered before it is sent
                connection.request(method, target, body, headers or {})
            response = connection.getresponse()
            return Response(response.status, dict(response.getheaders()), response.read())

    def predict(self, image: bytes, kind: str = "image/png", **query: Any) -> Response:
        return self.ask("POST", "/predict", image, {"Content-Type": kind}, **query)

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        self.running.on_signal(signal.SIGTERM)


def form(content: bytes, field: str = "file", more: bytes = b"") -> tuple[bytes, str]:
    """The body of a form with a file, and its content type."""
    head = f'--xyz\r\nContent-Disposition: form-data; name="{field}"; filename="a.png"\r\n'
    body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + b"\r\n" + more + b"--xyz--\r\n"
    return body, "multipart/form-data; boundary=xyz"


def planted_detector(folder: Path) -> tuple[Detector, CocoDataset]:
    dataset = write_set(folder)
    card = ModelCard(
        small_config(data={"short_side_test": 75, "long_side_max": 130}),
        dataset.class_names,
        dataset.category_ids,
    )
    return Detector(Held(dataset), card), dataset  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


@contextlib.contextmanager
def served(detector: Any, ready: bool = True, **limits: Any) -> Iterator[Client]:
    """A client of a service, which is stopped at the end."""
    server = listen("127.0.0.1", 0)
    running = Running()
    faults: list[BaseException] = []

    def run() -> None:
        try:
            serve(detector, Limits(**limits), server, running)
        except BaseException as error:
            faults.append(error)

    port = server.getsockname()[1]
    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: running.service is not None)
        assert running.service is not None
        if ready:
            until(lambda: running.service.ready or bool(faults))
        yield Client(port, running.service, running, detector.model)
    finally:
        if running.stop is None:
            running.on_signal(signal.SIGTERM)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if faults:
        raise faults[0]


def poison() -> bytes:
    """An image on which `Held` fails."""
    return png(np.full((64, 64, 3), POISON, np.uint8))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def seen_images(model: Any) -> int:
    return sum(shape[0] for shape in model.seen)
