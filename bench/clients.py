"""Clients of a running service, which all ask at once: images a second, and how long each waits.

python bench/clients.py http://127.0.0.1:8000 DIR --clients 16 --requests 400
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np


class Answered(NamedTuple):
    status: int
    seconds: float
    objects: int


class Asker:
    """Sends images in turn, each thread over a connection of its own that it keeps."""

    def __init__(self, url: str, images: list[bytes], query: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._images, self._path = images, f"/predict?{query}"
        self._own = threading.local()

    def __call__(self, number: int) -> Answered:
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(self._host, self._port, timeout=600)
        connection: http.client.HTTPConnection = self._own.connection
        body = self._images[number % len(self._images)]
        began = time.perf_counter()
        connection.request("POST", self._path, body, {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        content = response.read()
        seconds = time.perf_counter() - began
        found = json.loads(content).get("results", []) if response.status == 200 else []
        return Answered(response.status, seconds, len(found))


def summary(answers: list[Answered], seconds: float) -> str:
    """Of those that were answered with 200; the others are counted by status."""
    good = [answer for answer in answers if answer.status == 200]
    others = Counter(answer.status for answer in answers if answer.status != 200)
    if not good:
        return f"none of {len(answers)} was answered with 200: {dict(others)}"
    p50, p99 = np.percentile([answer.seconds * 1000 for answer in good], [50, 99])
    return (
        f"{len(good) / seconds:.1f} images/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms, "
        f"{sum(answer.objects for answer in good) / len(good):.1f} objects an image"
        + (f"; others by status: {dict(others)}" if others else "")
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="How fast a running service answers clients who all ask at once."
    )
    parser.add_argument("url", help="of the service, such as http://127.0.0.1:8000")
    parser.add_argument("images", type=Path, help="folder of images, which are sent in turn")
    parser.add_argument("--clients", type=int, default=16, help="16")
    parser.add_argument("--requests", type=int, default=400, help="of all clients together (400)")
    parser.add_argument("--query", default="score=0.5", help="score=0.5")
    arguments = parser.parse_args(argv)
    images = [path.read_bytes() for path in sorted(arguments.images.iterdir()) if path.is_file()]
    if not images:
        parser.error(f"{arguments.images}: has no files")
    asker = Asker(arguments.url, images, arguments.query)
    with ThreadPoolExecutor(arguments.clients) as pool:
        list(pool.map(asker, range(arguments.clients)))  # connections are made, shapes are met
        began = time.perf_counter()
        answers = list(pool.map(asker, range(arguments.requests)))
        seconds = time.perf_counter() - began
    print(f"{arguments.clients} clients: {summary(answers, seconds)}")


if __name__ == "__main__":
    main()
