"""What the service counts of itself, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Counts:
    """Of one service.

    Args:
        waiting: how many images wait for the model.
        in_hand: how many requests are being answered.
    """

    def __init__(self, waiting: Callable[[], int], in_hand: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        disable_created_metrics()  # of each the time when it began, which nobody asks for
        own = self._registry = CollectorRegistry()
        self._requests = Counter(
            "fastmrcnn_requests", "Requests by path and status.", ["path", "status"], registry=own
        )
        self._seconds = Histogram(
            "fastmrcnn_request_seconds",
            "From a request's headers to the start of its answer, of images.",
            buckets=SECONDS,
            registry=own,
        )
        self._batches = Histogram(
            "fastmrcnn_batch_images",
            "Images that went through the model together.",
            buckets=BATCHES,
            registry=own,
        )
        self._model_seconds = Histogram(
            "fastmrcnn_batch_seconds", "The model's time for a batch.", buckets=SECONDS, registry=own
        )
        self._images = Counter("fastmrcnn_images", "Images in which the model looked.", registry=own)
        self._objects = Counter("fastmrcnn_objects", "Objects in the answers.", registry=own)
        self._failed = Counter("fastmrcnn_model_errors", "Images on which the model failed.", registry=own)
        Gauge("fastmrcnn_queue_length", "Images that wait for the model.", registry=own).set_function(waiting)
        Gauge("fastmrcnn_requests_in_hand", "Requests being answered.", registry=own).set_function(in_hand)

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def answered_in(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def objects(self, number: int) -> None:
        self._objects.inc(number)

    def batch(self, images: int, seconds: float, failed: int) -> None:
        self._batches.observe(images)
        self._model_seconds.observe(seconds)
        self._images.inc(images - failed)
        self._failed.inc(failed)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
