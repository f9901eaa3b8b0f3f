"""bench/faults.py: that it sees what is lost, and, slowly, that runs lose nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import breaking
import fault_files
import faults
import pytest
import torch
from breaking import NotTriedError, same_run, saved_step, steps_shown
from fault_kinds import FAULTS, Fault
from places import ROOT
from tiny import TinyData

from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return TinyData(folder).run(folder, "train.steps=4", "train.checkpoint_every=2")


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_bit_of_difference_counts(run: Path, part: str, tmp_path: Path) -> None:
    other = copied(run, tmp_path)
    same_run(run, other)
    file = find_checkpoint(other)
    state = read_checkpoint(file)
    held: Any = state[part] if part == "model" else state[part]["state"][0]
    name = next(name for name, value in held.items() if value.dim() > 1)
    held[name].view(-1)[3] = torch.nextafter(held[name].view(-1)[3], torch.tensor(torch.inf))
    torch.save(state, file)
    with pytest.raises(AssertionError, match=f"{part}: other numbers"):
        same_run(run, other)


def test_rows_and_steps_count_too(run: Path, tmp_path: Path) -> None:
    other = copied(run, tmp_path)
    (other / "checkpoints" / "last_checkpoint").write_text("step_0000002.pt\n")
    with pytest.raises(AssertionError, match="it ended at step 2"):
        same_run(run, other)
    shutil.rmtree(other)
    other = copied(run, tmp_path)
    state = read_checkpoint(other)
    state["config"]["runtime"]["cpu_precision"] = "bf16"
    torch.save(state, find_checkpoint(other))
    with pytest.raises(AssertionError, match=r"another run: runtime\.cpu_precision differ"):
        same_run(run, other)
    shutil.rmtree(other)
    other = copied(run, tmp_path)
    record = other / "metrics.json"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(AssertionError, match=r"metrics\.json: other rows"):
        same_run(run, other)


def test_the_last_checkpoint_must_be_whole(run: Path, tmp_path: Path) -> None:
    assert saved_step(run) == 4
    assert saved_step(tmp_path) == 0
    other = copied(run, tmp_path)
    find_checkpoint(other).write_bytes(b"PK")
    with pytest.raises(AssertionError, match=r"step_0000004\.pt is incomplete or damaged"):
        saved_step(other)


def test_damage_that_is_not_seen_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(whole=run, root=tmp_path)
    monkeypatch.setattr(fault_files, "fault_of", lambda path: None)
    with pytest.raises(AssertionError, match="damage number 0 was not seen"):
        fault_files.flipped(world, 1, random.Random(0))


def test_steps_are_read_from_the_bar() -> None:
    bar = f"train:   0%|   | 0/{breaking.STEPS} [00:00<?]\rtrain:  12%|#  | 3/{breaking.STEPS} [00:01<00:07]"
    running: Any = SimpleNamespace(text=lambda: bar)
    assert steps_shown(running) == 3


def test_the_table_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(world: Any, tries: int, draw: random.Random) -> str:
        return f"tried {tries} times, {draw.randrange(1000)}"

    def cannot(world: Any, tries: int, draw: random.Random) -> str:
        raise NotTriedError("there is no disk")

    def loses(world: Any, tries: int, draw: random.Random) -> str:
        raise AssertionError("a step")

    kinds = {name: Fault(f"a {name}", 2, what) for name, what in
             (("good", act), ("strange", cannot), ("bad", loses))}  # fmt: skip
    monkeypatch.setattr(faults, "FAULTS", kinds)
    monkeypatch.setattr(faults, "World", lambda root: SimpleNamespace(seconds=1.0))
    monkeypatch.setattr(faults, "RESULTS", tmp_path / "results")
    before = torch.get_num_threads()
    assert faults.main(["--only", "good", "strange", "--tries", "5", "--seed", "7", "--record"]) == 0
    shown = capsys.readouterr().out
    drawn = random.Random(7).randrange(1000)
    assert f"| a good | 5 | nothing | tried 5 times, {drawn} | " in shown
    assert "| a strange | 0 |  | not tried here: there is no disk | " in shown
    [path] = (tmp_path / "results").iterdir()
    recorded = json.loads(path.read_text())
    assert [row["tries"] for row in recorded["results"]] == [5, 0]
    assert recorded["versions"]["torch"] == torch.__version__
    faults.main(["--only", "strange", "--seed", "7", "--record"])
    faults.main(["--only", "good", "--tries", "6", "--seed", "7", "--record"])
    assert [row["tries"] for row in json.loads(path.read_text())["results"]] == [6, 0]
    capsys.readouterr()
    assert faults.main([]) == 1
    assert "| a bad | 2 | a step |  | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        faults.main(["--only", "none"])
    torch.set_num_threads(before)


def test_the_page_shows_what_was_recorded() -> None:
    recorded = json.loads((ROOT / "bench" / "results" / "faults" / "linux.json").read_text())
    assert [row["fault"] for row in recorded["results"]] == [fault.words for fault in FAULTS.values()]
    assert faults.markdown(recorded["results"]) in (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_runs_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.main(["--only", "killed", "flipped", "--tries", "2"]) == 0, capsys.readouterr().out
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert ["| 2 | nothing | " in row for row in rows[1:]] == [False, True, True]  # the line comes first
