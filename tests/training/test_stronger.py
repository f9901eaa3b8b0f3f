"""Runs with a cascade, a network of timm and layer-wise rates: learn, resume to the same bits, are used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import (
    TREE,
    CrashError,
    TinyData,
    assert_same_state,
    break_at,
    never_saves_first,
    newest_run,
    record,
    refusal,
)

import fastmrcnn
from fastmrcnn import convert, train
from fastmrcnn.errors import UserError
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint

CASCADE = ["model.box_head.cascade=true", "optim.layer_decay=0.8", "optim.ema=0.9"]
TIMM = ["optim.layer_decay=0.8", "optim.ema=0.9"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("stronger"))


@pytest.fixture
def timm_recipe(tiny: TinyData, monkeypatch: pytest.MonkeyPatch) -> TinyData:
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    backbone = {"name": "timm:convnext_atto", "norm": "bn", "frozen_stages": 0, "drop_path": 0.3}
    model = {**TREE["model"], "backbone": backbone}
    recipe = tiny.recipe.with_name("timm.yaml")
    recipe.write_text(yaml.safe_dump({**TREE, "model": model}), encoding="utf-8")
    monkeypatch.setattr(tiny, "recipe", recipe)
    return tiny


def resumed_to_the_same_bits(
    tiny: TinyData, folder: Path, changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> Path:
    whole = tiny.run(folder / "whole", *changes, "train.steps=6")
    never_saves_first(monkeypatch)
    break_at(monkeypatch, 5, CrashError())
    with pytest.raises(CrashError):
        tiny.run(folder / "cut", *changes, "train.steps=6")
    train.main(["--resume", str(folder / "cut" / "run_001")])
    first, second = (read_checkpoint(find_checkpoint(run)) for run in (whole, newest_run(folder / "cut")))
    assert first["step"] == second["step"] == 6
    assert_same_state(first, second)
    return whole


def test_a_cascade_is_resumed_to_the_same_bits_and_used(
    tiny: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resumed_to_the_same_bits(tiny, tmp_path, CASCADE, monkeypatch)
    assert "Layer-wise rates: 10 layers are trained" in capsys.readouterr().out
    row = record(run)[0]
    names = {f"loss_{part}_stage{stage}" for part in ("cls", "box_reg") for stage in range(3)}
    assert names <= row.keys()
    assert row["total_loss"] == pytest.approx(
        sum(value for key, value in row.items() if key.startswith("loss_"))
    )
    found = fastmrcnn.load(run, "cpu")(tiny.paths["val_images"] / "00001.png", score=0.0)
    assert len(found.boxes) == 10
    # To detectron2's names and back it is the same model.
    convert.main([str(run), str(tmp_path / "theirs.pkl"), "--to", "detectron2"])
    convert.main(
        [str(tmp_path / "theirs.pkl"), str(tmp_path / "ours.pt"), "--config", str(run / "config.yaml")]
    )
    first, second = (fastmrcnn.load(path, "cpu").model.state_dict() for path in (run, tmp_path / "ours.pt"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_cascade_starts_from_another_ones_classes(
    tiny: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny.run(tmp_path / "first", CASCADE[0], "train.steps=1")
    capsys.readouterr()
    tiny.run(tmp_path / "second", CASCADE[0], "train.steps=1", f"model.weights={first}", "optim.lr=1e-12")
    said = capsys.readouterr().out
    assert "Taken over by name, 5 of 5 classes" in said
    assert "Left out" not in said
    one, two = (fastmrcnn.load(path, "cpu").model for path in (first, newest_run(tmp_path / "second")))
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_network_of_timm_is_resumed_to_the_same_bits_and_used(
    timm_recipe: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = resumed_to_the_same_bits(timm_recipe, tmp_path, TIMM, monkeypatch)
    said = capsys.readouterr().out
    assert "Backbone timm:convnext_atto: maps of 40, 80, 160, 320 channels" in said
    assert "Layer-wise rates: 7 layers are trained" in said
    image = timm_recipe.paths["val_images"] / "00001.png"
    assert len(fastmrcnn.load(run, "cpu")(image, score=0.0).boxes) == 10
    for program in ("torchvision", "detectron2"):
        with pytest.raises(UserError, match=f"{program} has no place for a backbone of timm"):
            convert.main([str(run), str(tmp_path / program), "--to", program])
        assert not (tmp_path / program).exists()
    # On a machine without timm, one line.
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs timm, which is not installed: pip install") as told:
        fastmrcnn.load(run, "cpu")
    assert "\n" not in str(told.value)


def test_dry_run_of_a_network_of_timm(
    timm_recipe: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*timm_recipe.arguments(tmp_path, *TIMM), "--dry-run"])
    said = capsys.readouterr().out
    assert "Backbone timm:convnext_atto" in said
    assert "Layer-wise rates" in said
    assert "memory" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.backbone.name=resnet5"], ["model.backbone.name", "did you mean resnet50?"]),
        (["model.backbone.name=timm:"], ["timm:NAME"]),
        (["model.backbone.drop_path=0.1"], ["drop_path", "timm"]),
        (["model.backbone.weights=pretrained"], ["pretrained is for networks of timm"]),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tiny: TinyData,
    tmp_path: Path,
    changes: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = refusal(tiny.arguments(tmp_path, *changes), capsys, monkeypatch)
    for word in words:
        assert word in line


def test_without_timm_one_line_says_what_to_install(
    tiny: TinyData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    arguments = tiny.arguments(tmp_path, "model.backbone.name=timm:convnext_atto", "model.backbone.width=64")
    assert "pip install 'fastmrcnn[timm]'" in refusal(arguments, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["model.backbone.norm=gn"], "keeps its own norms"),
        (["model.backbone.width=32"], "model.backbone.width"),
        (
            ["model.backbone.stride_in_1x1=true", "model.backbone.norm_eps=0"],
            "stride_in_1x1, model.backbone.norm_eps",
        ),
        (["model.channel_order=bgr"], "read rgb"),
        (["model.architecture=c4", "model.anchors.sizes=[[8]]"], "c4 needs a ResNet"),
        (["model.backbone.norm=frozen_bn"], "use bn"),
    ],
)
def test_what_a_network_of_timm_does_not_take_is_refused(
    timm_recipe: TinyData,
    tmp_path: Path,
    changes: list[str],
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert word in refusal(timm_recipe.arguments(tmp_path, *changes), capsys, monkeypatch)
