"""What loader processes leave unsaid."""

from __future__ import annotations

import sys
from multiprocessing.connection import Client
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest

from fastmrcnn.data.processes import tell_but_of_lost_connections


def test_a_parent_that_ends_while_it_takes_a_batch_is_no_news(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It connects to the thread that shares files, and is gone before it has said who it is."""
    seen: list[type[BaseException]] = []

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        tell_but_of_lost_connections(kind, error, trace)
        seen.append(kind)

    monkeypatch.setattr(sys, "excepthook", hook)
    with (tmp_path / "shared").open("w") as file:
        handle = DupFd(file.fileno())
        Client(handle._id[0]).close()  # type: ignore[attr-defined]
        handle.detach()  # answered after the other, so that one has been met
    assert len(seen) == 1
    assert issubclass(seen[0], (OSError, EOFError))
    assert capsys.readouterr().err == ""


def test_other_errors_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    tell_but_of_lost_connections(ValueError, ValueError("odd"), None)
    assert capsys.readouterr().err == "ValueError: odd\n"
