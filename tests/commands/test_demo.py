"""The command that shows the page: what it refuses, how it ends, and whom it calls."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from batches import small_config
from places import ROOT

from fastmrcnn import demo
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import save_checkpoint

ANY = ["--checkpoint", "x"]


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'fastmrcnn\[demo\]'$"):
        demo.main([*ANY, "--port", str(free_port())])


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind((demo.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot be had \(.*in use.*\); take another"):
            demo.main([*ANY, "--port", str(port)])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--port", "70000"], r"--port 70000: must be in 1\.\.65535"),
        (["--pixel-size", "0.25"], r"--pixel-size: pixel size '0\.25': give a number above 0 and a unit"),
        ([], "--checkpoint"),
    ],
)
def test_what_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        demo.main([*(ANY if words else []), *words])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((demo.HOST, 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_opens_calls_no_one_and_ends(tmp_path: Path, number: signal.Signals, code: int) -> None:
    pytest.importorskip("gradio")
    config = small_config(data={"short_side_test": 64, "long_side_max": 64, "shapes": True})
    card = ModelCard(config, ["circle", "square"], [1, 2])
    log, scratch = tmp_path / "calls", tmp_path / "scratch"
    torch.manual_seed(0)
    model = build_model(config.model, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, card=card, keep=1)
    scratch.mkdir()
    # Whatever asks for a name or connects to one, in any library, is written down.
    program = textwrap.dedent(f"""
        import sys
        def hear(event, arguments):
            if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
                place = arguments[1] if event == "socket.connect" else arguments
                with open({str(log)!r}, "a") as stream:
                    stream.write(f"{{event}} {{place}}\\n")
        sys.addaudithook(hear)
        from fastmrcnn import demo
        from fastmrcnn.errors import run_main
        run_main(demo.main)
    """)
    port = free_port()
    words = [sys.executable, "-c", program, "--checkpoint", str(checkpoint), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(scratch), "GRADIO_ANALYTICS_ENABLED": "True"}
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == f"http://{demo.HOST}:{port}  (Ctrl-C ends it)\n"
            with urllib.request.urlopen(first.split()[0], timeout=60) as answer:
                page = answer.read().decode()
            assert "Find objects in your images" in page
            assert list(scratch.glob("fastmrcnn_*/example_8.png"))
            time.sleep(1)  # what is called in the background would be called by now
            process.send_signal(number)
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, errors
    by = "" if number == signal.SIGINT else " by SIGTERM"
    assert errors == f"\nstopped{by}\n"
    assert out == ""
    assert not list(scratch.glob("fastmrcnn_*"))
    calls = log.read_text().splitlines()
    assert calls, "gradio asks itself whether it answers"
    assert not [call for call in calls if demo.HOST not in call]
