"""The command `serve`: what it refuses, and how it begins and ends."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import TinyData

import fastmrcnn.serve as command
from fastmrcnn.errors import UserError
from fastmrcnn.service import server


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--batch", "0"], "--batch 0"),
        (["--max-bytes", "-1"], "--max-bytes -1"),
        (["--max-pixels", "0"], "--max-pixels 0"),
        (["--queue", "0"], "--queue 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--max-delay-ms", "-1"], "--max-delay-ms -1"),
        (["--bach", "2"], "--bach"),
    ],
)
def test_mistaken_options(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        command.main(["--checkpoint", "nowhere.pt", *words])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else real(name, *more)
    )
    with pytest.raises(UserError, match=r"uvicorn.*pip install 'fastmrcnn\[serve\]'"):
        command.main(["--checkpoint", "nowhere.pt"])


def test_addresses() -> None:
    assert all(map(server.is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(server.is_loopback, ("0.0.0.0", "::", "192.168.0.7", "example.org")))
    with server.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert server.url_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there"):
            server.listen("127.0.0.1", port)
    for host in ("192.0.2.1", "no such host", "x" * 70):
        with pytest.raises(UserError, match=r"cannot listen there"):
            server.listen(host, 0)


def test_a_graph_with_a_fixed_batch_says_it() -> None:
    model = SimpleNamespace()
    detector: Any = SimpleNamespace(model=model)
    assert command.batch_of(detector) == 8
    model.batch = 3
    assert command.batch_of(detector) == 3


def test_a_second_signal_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    running = server.Running()
    running.on_signal(signal.SIGINT)
    assert running.stop == signal.SIGINT
    assert "once more stops at once" in capfd.readouterr().err

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        running.on_signal(signal.SIGTERM)
    assert end.value.code == 143


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_from_the_shell(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """A trained model, open to the network, asked as predict asks it, and stopped by a signal."""
    for name in server.NEEDED:
        pytest.importorskip(name)
    data = TinyData(tmp_path)
    run = data.run(tmp_path / "runs")
    image = next(Path(data.paths["val_images"]).glob("*.png"))
    words = [sys.executable, "-m", "fastmrcnn.serve", "--checkpoint", str(run), "--port", "0"]
    with subprocess.Popen(
        [*words, "--host", "0.0.0.0"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        try:
            port = int(re.search(r"ready: curl -F file=@IMAGE http://0\.0\.0\.0:(\d+)/predict", lines[1])[1])  # type: ignore[index]
            url = f"http://127.0.0.1:{port}/predict?score=0&image_id=1"
            post = urllib.request.Request(url, image.read_bytes(), {"Content-Type": "image/png"})
            with urllib.request.urlopen(post, timeout=60) as answer:
                found = json.load(answer)["results"]
            idle = socket.create_connection(("127.0.0.1", port))  # keeps nothing from ending
            process.send_signal(number)
            told = process.communicate(timeout=60)[1]
            idle.close()
        finally:
            process.kill()
    assert process.returncode == code
    output = tmp_path / "predicted"
    predict = [
        sys.executable,
        "-m",
        "fastmrcnn.predict",
        str(image),
        "--checkpoint",
        str(run),
        "--score",
        "0",
    ]
    subprocess.run([*predict, "--output", str(output)], check=True, capture_output=True)
    wanted = json.loads((output / "predictions.json").read_text())
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)
        assert one["category_name"] == other["category_name"]
    assert "warning: --host 0.0.0.0" in told
    assert told.splitlines()[-1] == "stopped"
    assert "Traceback" not in told
