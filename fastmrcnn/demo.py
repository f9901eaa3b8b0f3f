"""python -m fastmrcnn.demo: a web page on this machine, to try a model on images."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from fastmrcnn.detection.detector import load
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import expanded
from fastmrcnn.page.examples import find_examples
from fastmrcnn.page.layout import build_page, import_gradio
from fastmrcnn.page.style import CSS, theme
from fastmrcnn.page.units import parse_pixel_size
from fastmrcnn.training.stopping import Requests, Stopped, signal_of

HOST = "127.0.0.1"  # this machine alone
VISITORS = 30  # whose image is kept in memory


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    check_port(arguments.port)
    opened = False
    try:
        # Uploads and pictures are in the folder, and are gone when the page is closed.
        temporary = tempfile.TemporaryDirectory(prefix="fastmrcnn_", ignore_cleanup_errors=True)
        with Requests(), temporary as folder:
            scratch = Path(folder)
            gr = import_gradio(scratch)
            detector = load(arguments.checkpoint, arguments.device)
            examples = find_examples(arguments.examples, detector, scratch)
            title = expanded(arguments.checkpoint).resolve().name
            page = build_page(gr, detector, examples, scratch, arguments.pixel_size, title)
            opened = True
            open_page(page, gr, arguments.port)
            print(f"http://{HOST}:{arguments.port}  (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except Stopped as stop:
        number, by = signal_of(stop)
        print(f"\nstopped{by}", file=sys.stderr)
        if opened:
            # Threads of the server would be waited for as long as a page is open, and torch ends the process
            # with an error if one is in the model.
            sys.stdout.flush()
            os._exit(128 + number)
        raise SystemExit(128 + number) from None


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "demo",
        "Show a web page on this machine: drop an image, see, count and measure what a model finds in it, "
        "and save that. Nothing is sent anywhere.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument("--port", type=int, default=7860, help=f"of {HOST} (7860)")
    parser.add_argument(
        "--examples",
        metavar="DIR",
        help="folder of images to begin with (default: validation images of the run)",
    )
    parser.add_argument(
        "--pixel-size",
        metavar="SIZE",
        default="",
        help="such as 0.25um, for areas in um² (nm, um, mm, cm, m, km; default: areas in pixels)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: must be in 1..65535")
    if arguments.pixel_size:
        try:
            parse_pixel_size(arguments.pixel_size)
        except UserError as error:
            raise UserError(f"--pixel-size: {error}") from None
    return arguments


def check_port(port: int) -> None:
    """Refuse one that is taken before a model is read for it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            other = port + 1 if port < 65535 else port - 1
            raise UserError(
                f"--port {port}: cannot be had ({error.strerror}); take another, such as --port {other}"
            ) from None


def open_page(page: Any, gr: Any, port: int) -> None:
    """Serve gradio's Blocks from threads of this process; nothing of it leaves the machine."""
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            pwa=False,
            state_session_capacity=VISITORS,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=theme(gr),
            css=CSS,
        )
    except OSError as error:
        raise UserError(f"--port {port}: the page cannot be opened there ({error})") from None


if __name__ == "__main__":
    run_main(main)
