"""The race with torchvision: the clock, what the contenders are given, and what is said of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from with_torchvision import torchvision

from fastmrcnn import experiments
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError
from fastmrcnn.study import heats, race
from fastmrcnn.study.document import Items, Table, as_markdown
from fastmrcnn.study.peer import Examples, build_peer, peer_results
from fastmrcnn.study.places import race_file
from fastmrcnn.study.race import DEFAULTS, OURS, TUNED, drive, places
from fastmrcnn.study.race_section import race_section, read_race, time_to

needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not here")
TINY = (
    "data.short_side=[64]",
    "data.short_side_test=64",
    "data.long_side_max=64",
    "model.backbone.width=8",
    "model.fpn.channels=16",
    "model.box_head.hidden=16",
    "model.mask_head.convs=1",
    "model.mask_head.channels=8",
    "train.batch=2",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded shapes, laid out as nuclei are."""
    folder = tmp_path_factory.mktemp("shapes")
    made = write_shapes(folder / "drawn", seed=0, train=6, val=3)
    images = folder / "images"
    images.mkdir()
    for split in ("train", "val"):
        tree = json.loads(Path(made[f"{split}_annotations"]).read_text(encoding="utf-8"))
        for entry in tree["images"]:
            name = f"{split}_{entry['file_name']}"
            (images / name).write_bytes((Path(made[f"{split}_images"]) / entry["file_name"]).read_bytes())
            entry["file_name"] = name
        (folder / f"{split}.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def test_the_clock_counts_training_alone() -> None:
    now = [0.0]
    shares: list[float] = []

    def step(share: float) -> None:
        shares.append(share)
        now[0] += 25.0

    def judge() -> dict[str, float]:
        now[0] += 1000.0
        return {"segm/AP": float(len(shares)), "segm/APs": float("nan")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race.time, "perf_counter", lambda: now[0])
        marks = drive(step, judge, [1.0, 2.0], 2.0)
    assert [(mark.minutes, mark.steps) for mark in marks] == [(1.0, 3), (2.0, 5)]
    assert marks[1].metrics == {"segm/AP": 5.0}
    assert shares == pytest.approx([0.0, 25 / 120, 50 / 120, 75 / 120, 100 / 120])


def test_layouts_of_sets(tmp_path: Path, shapes: Path) -> None:
    assert {path.name for _, _, path in places(shapes)} == {"images", "train.json", "val.json"}
    with pytest.raises(UserError, match="holds neither"):
        places(tmp_path)
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_annotations.coco.json").touch()
    assert [path.parent.name for _, kind, path in places(tmp_path) if kind == "annotations"] == [
        "train",
        "valid",
    ]


def test_ours_trains_and_is_judged(shapes: Path) -> None:
    torch.manual_seed(0)
    train, judge = race.ours(race.course("nuclei", shapes, 0, TINY))
    for number in range(2):
        train(number / 2)
    assert {"segm/AP", "bbox/AP"} <= judge().keys()


def test_the_rate_follows_the_clock(shapes: Path) -> None:
    config = race.course("nuclei", shapes, 0, TINY).config
    full = config.optim.lr * config.train.batch / config.optim.reference_batch
    late = config.optim.warmup_steps
    assert race.rate(config, late, 0.0) == pytest.approx(full)
    assert race.rate(config, late, 0.5) == pytest.approx(full / 2)
    assert race.rate(config, late, 1.5) == pytest.approx(0.0)
    assert race.rate(config, 0, 0.0) == pytest.approx(full * config.optim.warmup_factor)


def test_examples_agree_with_the_annotations_flipped_or_not(shapes: Path) -> None:
    track = race.course("nuclei", shapes, 0, TINY)
    examples = Examples(track.train_set, seed=0)
    for images, targets in itertools.islice(examples.batches(2), 6):
        for image, target in zip(images, targets, strict=True):
            assert image.shape[1:] == target["masks"].shape[1:]
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = np.nonzero(mask.numpy())
                around = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                np.testing.assert_allclose(box.numpy(), around, atol=1.5)


@needs_torchvision
@pytest.mark.torchvision
@pytest.mark.parametrize("contender", [DEFAULTS, TUNED])
def test_torchvision_trains_and_is_judged(shapes: Path, contender: str) -> None:
    track = race.course("nuclei", shapes, 0, TINY)
    train, judge = race.torchvision(track, contender == TUNED)
    for number in range(2):
        train(number / 2)
    assert {"segm/AP", "bbox/AP"} <= judge().keys()


@needs_torchvision
@pytest.mark.torchvision
def test_the_peer_has_our_network(shapes: Path) -> None:
    from fastmrcnn.model.build import build_model

    track = race.course("nuclei", shapes, 0, TINY)
    peer = build_peer(track.config, track.card)
    own = build_model(track.config.model, len(track.card.class_names), None)
    assert own.fpn is not None

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(peer.backbone) == count(own.backbone) + count(own.fpn)  # type: ignore[arg-type]
    box, mask = track.config.model.box_head, track.config.model.mask_head
    of_background = 4 * (box.hidden + 1) + mask.channels + 1  # never trained
    assert count(peer) == count(own) + of_background
    results = peer_results(peer, track.val_set, 0.5)
    ids = {record.image_id for record in track.val_set.records}
    assert all(one["image_id"] in ids and 0 <= one["score"] <= 1 for one in results)


def write_heat(folder: Path, contender: str, seed: int, values: dict[float, float]) -> None:
    path = race_file(folder, "nuclei", contender, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = [{"minutes": m, "steps": 9, "metrics": {"segm/AP": v}} for m, v in values.items()]
    machine: dict[str, Any] = {"device": "cpu", "commit": "abc1234", "processor": "a processor"}
    path.write_text(json.dumps({"marks": marks, "environment": machine}), encoding="utf-8")


def test_section_tells_how_much_sooner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmrcnn.study.race_section.origin", lambda machine: machine["commit"])
    assert race_section(tmp_path, "en") == []
    write_heat(tmp_path, OURS, 0, {1: 40.0, 2: 50.0, 10: 60.0})
    write_heat(tmp_path, OURS, 1, {1: 42.0, 2: 52.0, 10: 62.0})
    write_heat(tmp_path, DEFAULTS, 0, {1: 10.0, 2: 20.0, 10: 30.0})
    write_heat(tmp_path, TUNED, 0, {1: 35.0, 2: 45.0, 10: 51.0})
    blocks = race_section(tmp_path, "en")
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.head == ["segm/AP", "1", "2", "10"]
    assert table.rows[0][1] == "41.0 ± 1.4"
    (lines,) = [block.texts for block in blocks if isinstance(block, Items)]
    assert "at least 10.0 times as fast: the aim, 6 times, is met" in lines[0]
    assert "5.0 times as fast: the aim, 6 times, is not met" in lines[1]  # 51 after exactly 2 minutes
    for language in ("en", "zh"):
        assert "metrics/race/" in as_markdown(race_section(tmp_path, language), "figures")  # type: ignore[arg-type]
    write_heat(tmp_path, TUNED, 0, {1: 35.0, 2: 45.0, 10: 70.0})
    (lines,) = [block.texts for block in race_section(tmp_path, "en") if isinstance(block, Items)]
    assert "does not reach" in lines[1]
    (damaged,) = read_race(tmp_path)
    assert damaged.minutes() == [1, 2, 10]
    race_file(tmp_path, "nuclei", OURS, 0).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is no metrics file"):
        read_race(tmp_path)


def test_time_to_a_level_lies_between_marks() -> None:
    curve = {1.0: 10.0, 2.0: 20.0, 8.0: 40.0}
    assert time_to(curve, 5.0) == 1.0
    assert time_to(curve, 20.0) == pytest.approx(2.0)
    assert time_to(curve, 30.0) == pytest.approx(4.0)  # half way in the logarithm of the time
    assert time_to(curve, 41.0) is None


def test_heats_run_once_and_failures_are_named(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    class Ended:
        returncode = 0

    def ended(command: list[str], **_: object) -> Ended:
        asked.append(command)
        _, _, _, _, contender, _, output, _, seed = command
        if contender == TUNED:
            Ended.returncode = 1
        else:
            write_heat(Path(output), contender, int(seed), {1.0: 1.0})
        return Ended()

    monkeypatch.setattr(heats.subprocess, "run", ended)
    given = {"nuclei": shapes}
    all_heats = heats.heats_of(given, seeds=1)
    assert [heat.contender for heat in all_heats] == [OURS, DEFAULTS, TUNED]
    assert all_heats[0].seconds == 18 * 60
    with pytest.raises(UserError, match="torchvision_tuned, seed 0: exit code 1"):
        heats.run_heats(all_heats, given, tmp_path, tmp_path / "work", 1, tell=lambda line: None)
    assert [heat.contender for heat in heats.waiting(all_heats, tmp_path)] == [TUNED]


def test_the_command_says_why_there_is_no_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--only race: it needs a real set: --data NAME=DIR"):
        experiments.main(["--only", "race", "--plan", "--output", str(tmp_path)])
    experiments.main(["--plan", "--output", str(tmp_path)])
    assert "The race with torchvision is left out: it needs a real set" in capsys.readouterr().out
    with pytest.raises(UserError, match="no comparison nothing"):
        experiments.main(["--only", "nothing", "--plan", "--output", str(tmp_path)])
