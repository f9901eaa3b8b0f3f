"""A run whose newest checkpoint was damaged goes on from the one before, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TinyData, assert_same_state, record

from fastmrcnn import train
from fastmrcnn.errors import UserError
from fastmrcnn.weights.checkpoint import read_checkpoint


def test_the_one_before_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = TinyData(tmp_path)
    whole, broken = (data.run(tmp_path / name) for name in ("whole", "broken"))
    newest = broken / "checkpoints" / "step_0000008.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0x10
    newest.write_bytes(content)
    with pytest.raises(UserError, match=r"step_0000008\.pt: is damaged.* before it, .*step_0000004\.pt, "):
        train.main(["--resume", str(newest)])
    capsys.readouterr()
    train.main(["--resume", str(broken)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{newest} is damaged: its checksum is ")
    assert lines[1] == "Going on from the one before, step_0000004.pt."
    assert_same_state(read_checkpoint(whole), read_checkpoint(broken))
    assert record(whole) == record(broken)
