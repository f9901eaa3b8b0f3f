"""The best weights are kept, and a run that gets no better ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CrashError, TinyData, assert_same, break_at, newest_run, record, refusal

from fastmrcnn import train
from fastmrcnn.config.file import load_config
from fastmrcnn.data.build import read_split
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.metric_names import metric_names
from fastmrcnn.evaluation.run import run_evaluation
from fastmrcnn.training.best import Best, kept_metric
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint
from fastmrcnn.weights.trained import load_trained

KEY = "segm/AP"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("best"))


def judge_by(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> list[dict[str, torch.Tensor]]:
    """Evaluations give these, one after another; returns the weights that they were given."""
    seen: list[dict[str, torch.Tensor]] = []
    left = list(values.values())

    def judge(model: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {**run_evaluation(model, *arguments, **named), KEY: left.pop(0)}

    monkeypatch.setattr(train, "run_evaluation", judge)
    return seen


def test_the_best_weights_of_a_run(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["train.evaluate_every=2", f"train.keep_best={KEY}", "optim.ema=0.9"]
    values = {2: 10.0, 4: 30.0, 6: 30.0, 8: float("nan")}
    seen = judge_by(monkeypatch, values)
    run = data.run(tmp_path, *changes, val=True)
    best = run / "checkpoints" / "best.pt"
    state = read_checkpoint(best)
    assert state["step"] == 4
    assert state["extra"]["best"]["metric"] == KEY
    assert state["extra"]["best"]["value"] == state["extra"]["best"]["metrics"][KEY] == 30.0
    assert "bbox/AP50" in state["extra"]["best"]["metrics"]
    assert state["optimizer"] is None
    assert_same(state["model"], seen[1])  # the average: what was judged
    assert f"The best {KEY}, 30.0 after step 4, is in {best}" in capsys.readouterr().out
    trained = load_trained(best, "cpu")
    assert_same(dict(trained.model.state_dict()), seen[1])
    assert find_checkpoint(run).name == "step_0000008.pt"  # the run goes on from its last one
    with pytest.raises(UserError, match="without an optimizer"):
        train.main(["--resume", str(best)])


def test_patience_ends_a_run_and_an_interruption_changes_nothing(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["train.steps=20", "train.evaluate_every=2", f"train.keep_best={KEY}", "train.patience=2"]
    values = {2: 10.0, 4: 20.0, 6: 20.0, 8: 15.0, 9: 1.0}
    judge_by(monkeypatch, values)
    whole = data.run(tmp_path / "whole", *changes, val=True)
    assert f"{KEY} has not risen above 20.0, after step 4, in 2 evaluations" in capsys.readouterr().out
    evaluated = {row["iteration"] + 1: row[KEY] for row in record(whole) if KEY in row}
    assert evaluated == values
    assert read_checkpoint(whole)["step"] == 9
    assert load_config(whole / "config.yaml").train.steps == 9
    assert (whole / "evaluation" / "pictures").is_dir()

    judge_by(monkeypatch, values)
    with monkeypatch.context() as patch:
        break_at(patch, 7, CrashError())
        with pytest.raises(CrashError):
            data.run(tmp_path / "broken", *changes, val=True)
    broken = newest_run(tmp_path / "broken")
    train.main(["--resume", str(broken)])
    assert record(broken) == record(whole)
    for name in ("best.pt", "step_0000009.pt"):
        a, b = (read_checkpoint(run / "checkpoints" / name) for run in (whole, broken))
        assert_same(a["model"], b["model"])
    train.main(["--resume", str(broken)])  # is at its end
    assert read_checkpoint(broken)["step"] == 9


def test_what_is_refused_before_the_first_step(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(*changes: str, val: bool = True) -> str:
        found = refusal(data.arguments(tmp_path / "runs", *changes, val=val), capsys, monkeypatch)
        assert not list((tmp_path / "runs").glob("*"))
        return found

    found = line("train.keep_best=segm/ap")
    assert "give no 'segm/ap'; they give bbox/AP, bbox/AP50" in found
    assert "segm/APl" in found
    assert "needs a validation set: data.val.images" in line(f"train.keep_best={KEY}", val=False)
    assert "train.patience needs train.keep_best" in line("train.patience=2", "train.evaluate_every=2")
    assert "train.evaluate_every" in line("train.patience=2", f"train.keep_best={KEY}")


def tree() -> dict[str, Any]:
    return {"step": 1, "extra": {}}


def test_what_counts_as_better(tmp_path: Path) -> None:
    best = Best(KEY, 3, tmp_path, [])
    taken = [
        best.take(step, {KEY: value}, tree) for step, value in enumerate([math.nan, 0.0, -1.0, 0.0, 0.1])
    ]
    assert taken == [False, True, False, False, True]
    assert (best.value, best.step, best.since) == (0.1, 4, 0)
    assert kept_metric(tmp_path / "best.pt") == KEY
    rows = [{"iteration": step, KEY: value} for step, value in enumerate([None, 5.0, 4.0, 3.0])]
    again = Best(KEY, 3, tmp_path, rows)
    assert (again.value, again.step, again.since, again.exhausted) == (5.0, 2, 2, False)
    assert not again.take(5, {KEY: 2.0}, tree)
    assert again.exhausted
    again.writes = False  # another process of the run does
    assert again.take(6, {KEY: 9.0}, dict)
    assert (again.value, kept_metric(tmp_path / "best.pt")) == (9.0, KEY)
    # Where nothing has been kept by this number, the next one is, whatever the rows say.
    other = Best("bbox/AP", None, tmp_path, [{"iteration": 1, "bbox/AP": 50.0}])
    assert other.take(3, {"bbox/AP": 1.0}, tree)
    (tmp_path / "best.pt").write_bytes(b"PK" + bytes(100))
    assert kept_metric(tmp_path / "best.pt") is None


def test_the_names_of_all_numbers(data: TinyData, tmp_path: Path) -> None:
    """What keep_best may name is what metrics.json has."""
    run = data.run(tmp_path, "train.steps=1", val=True)
    row = json.loads((run / "metrics.json").read_text().splitlines()[-1])
    card = load_trained(run, "cpu").card
    assert metric_names(read_split(card.config, "val"), card.config) == [*row][1:]
