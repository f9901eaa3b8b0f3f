"""python -m fastmrcnn.serve: find objects in images that are sent over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from fastmrcnn.detection.detector import Detector, load
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.service.limits import Limits
from fastmrcnn.service.server import Running, check_installed, is_loopback, listen, serve, url_of

DEFAULTS = Limits()


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    check_installed()
    server = listen(arguments.host, arguments.port)  # first, since a model takes its time to load
    detector = load(arguments.checkpoint, arguments.device)
    reading = detector.reading
    limits = Limits(
        batch=arguments.batch or batch_of(detector),
        max_delay=arguments.max_delay_ms / 1000,
        max_bytes=arguments.max_bytes,
        max_pixels=arguments.max_pixels or min(DEFAULTS.max_pixels, reading.max_pixels),
        timeout=arguments.timeout,
        queue=arguments.queue,
    )
    if not is_loopback(arguments.host):
        print(
            f"warning: --host {arguments.host} is open to whoever reaches this machine; there is no "
            "authentication",
            file=sys.stderr,
        )
    # Pillow warns of damaged files, whose senders get an answer.
    warnings.filterwarnings("ignore", module="PIL")
    url = url_of(server)
    print(f"warming up {arguments.checkpoint}, to serve it on {url}", flush=True)
    running = Running(lambda: print(f"ready: curl -F file=@IMAGE {url}/predict (see {url}/docs)", flush=True))
    serve(detector, limits, server, running)
    number, service = running.stop, running.service
    assert number is not None, "it ends by a signal"
    assert service is not None, "it has been made"
    print("stopped", file=sys.stderr)
    if service.batcher.busy_since is not None:  # by a batch that nobody waits for any more
        sys.stdout.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "serve",
        "Find objects in images that are sent over HTTP, and answer with COCO JSON. Ctrl-C or SIGTERM ends "
        "it when what is in hand is answered.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="8000; 0 takes a free one")
    parser.add_argument(
        "--batch",
        type=int,
        help=f"most images that go through the model together ({DEFAULTS.batch}, or an exported file's own)",
    )
    parser.add_argument(
        "--max-delay-ms",
        type=float,
        default=DEFAULTS.max_delay * 1000,
        help="how long an image waits for others of its padded shape while the model is idle "
        f"({DEFAULTS.max_delay * 1000:g})",
    )
    parser.add_argument(
        "--max-bytes", type=int, default=DEFAULTS.max_bytes, help=f"of a request ({DEFAULTS.max_bytes})"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        help=f"of an image ({DEFAULTS.max_pixels}, or the model's data.max_pixels if that is less)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULTS.timeout,
        help=f"seconds that a request may take ({DEFAULTS.timeout:g})",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=DEFAULTS.queue,
        help=f"most requests in hand at once; more are told to come again ({DEFAULTS.queue})",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def batch_of(detector: Detector) -> int:
    """Of a model whose graph has a fixed one, that; else the default."""
    own = getattr(detector.model, "batch", None)
    return own if isinstance(own, int) else DEFAULTS.batch


def check_arguments(arguments: argparse.Namespace) -> None:
    """UserError for a number that makes no sense."""
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: must be in 0..65535")
    for name in ("batch", "max_bytes", "max_pixels", "queue"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if not 0 <= arguments.max_delay_ms <= 60_000:
        raise UserError(f"--max-delay-ms {arguments.max_delay_ms:g}: must be in 0..60000")
    if not 0 < arguments.timeout <= 86_400:
        raise UserError(f"--timeout {arguments.timeout:g}: must be above 0, and 86400 (a day) at most")


if __name__ == "__main__":
    run_main(main)
