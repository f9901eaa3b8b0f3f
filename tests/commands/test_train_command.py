"""python -m fastmrcnn.train as a user meets it: what it writes, what it says, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from places import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CrashError, TinyData, assert_same_state, break_at, newest_run, record, refusal

from fastmrcnn import train
from fastmrcnn.config.file import load_config, parse_config
from fastmrcnn.evaluation.run import RESULTS
from fastmrcnn.training import run as preparation
from fastmrcnn.weights.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("command"))


def test_a_whole_run(data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("optim.ema=0.9", "train.checkpoint_every=3", "train.keep_checkpoints=2", "evaluate.pictures=2")
    run = data.run(tmp_path, *changes, val=True)
    printed = capsys.readouterr()
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.json",
        "tensorboard",
        "checkpoints",
        "evaluation",
        "losses.png",
    }
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last_checkpoint", "step_0000006.pt", "step_0000008.pt"]
    rows = record(run)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 5, 7, 7]
    assert {"total_loss", "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "lr"} <= {
        *rows[0]
    }
    assert {"bbox/AP", "segm/AP", "segm/AP50"} <= {*rows[-1]}
    results = json.loads((run / "evaluation" / RESULTS).read_text())
    ids = {entry["id"] for entry in json.loads(data.paths["val_annotations"].read_text())["categories"]}
    assert {entry["category_id"] for entry in results} <= ids
    pictures = list((run / "evaluation" / "pictures").glob("*.png"))
    assert len(pictures) == 2
    for picture in (*pictures, run / "losses.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 60
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"total_loss", "segm/AP", "lr"} <= set(events.Tags()["scalars"])
    # what the bar, the tables and the last lines say
    for part in ("loss ", "lr ", "img/s", "step/s"):
        assert part in printed.err
    assert "COCO evaluation, mask (3 images)" in printed.out + printed.err
    assert f"fastmrcnn.predict {data.paths['val_images']}" in printed.out
    assert f"--checkpoint {run / 'checkpoints' / 'step_0000008.pt'}" in printed.out


def test_the_written_configuration_gives_the_same_run_in_a_new_folder(data: TinyData, tmp_path: Path) -> None:
    first = data.run(tmp_path, "train.steps=2", "train.seed=5", "data.augment.rotate90=0.5")
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    train.main(["--config", str(first / "config.yaml")])
    second = newest_run(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run_001", "run_002"]
    assert load_config(first / "config.yaml") == load_config(second / "config.yaml")
    assert_same_state(read_checkpoint(first), read_checkpoint(second))
    assert record(first) == record(second)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_validation_file_that_lacks_a_class(data: TinyData, tmp_path: Path) -> None:
    """Numbers of classes stay the training set's; ids in the results are those of the files, gaps too."""
    sets = []
    tree = json.loads(data.paths["train_annotations"].read_text())
    for split, gone in (("train", None), ("val", tree["annotations"][0]["category_id"])):
        for part, key in (("categories", "id"), ("annotations", "category_id")):
            tree[part] = [{**x, key: x[key] if gone else 10 * x[key] + 3} for x in tree[part]]
            tree[part] = [x for x in tree[part] if gone is None or x[key] != 10 * gone + 3]
        (tmp_path / f"{split}.json").write_text(json.dumps(tree))
        sets += [f"data.{split}.images={data.paths['train_images']}"]
        sets += [f"data.{split}.annotations={tmp_path / split}.json"]
    run = data.run(tmp_path, *sets, "train.steps=3", "model.box_head.score_threshold=0.0")
    results = json.loads((run / "evaluation" / RESULTS).read_text())
    assert results
    assert {entry["category_id"] for entry in results} <= {13, 23, 33, 43, 53}
    assert len({category["id"] for category in tree["categories"]}) == 4
    assert record(run)[-1]["segm/AP"] is not None


def test_mistakes_end_in_one_line_and_leave_nothing(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"

    def line(*changes: str, base: list[str] | None = None) -> str:
        arguments = data.arguments(runs, *changes) if base is None else [*base, *changes]
        found = refusal(arguments, capsys, monkeypatch)
        assert found.startswith("error: ")
        assert not list(runs.glob("*")), changes
        return found

    found = line("train.stepz=3", "optim.lr=fast", "evaluate")
    assert "unknown key 'train.stepz' (did you mean 'train.steps'?)" in found
    assert "optim.lr: " in found
    assert "'evaluate' is not key=value" in found
    missing = tmp_path / "none.json"
    assert str(missing) in line(f"data.train.annotations={missing}")
    assert "data.val.annotations" in line(f"data.val.annotations={missing}", *data.val[:1])
    assert str(missing) in line(base=["--config", str(missing)])
    assert "data.val needs both" in line(data.val[0])
    assert "frozen_bn needs model.backbone.weights" in line("model.backbone.norm=frozen_bn")
    assert "frozen_stages" in line("model.backbone.frozen_stages=1")
    assert "--config configs/small.yaml" in line(f"output={runs}", base=[data.train[0]])
    bare = line(f"output={runs}", base=["--config", str(data.recipe)])
    assert "data.train.images and data.train.annotations must be given" in bare
    assert "device 'toaster' is not one" in line("runtime.device=toaster")
    assert "no such" in line("model.backbone.weights=" + str(tmp_path / "none.pth"))
    assert "data.buckets" in line("data.buckets=[[32, 32]]")
    assert "unrecognized arguments: --epochs" in line(base=["--epochs", "3"])
    assert "given as key=value" in line(base=["--epochs", "3"])


def test_a_resumed_run_keeps_its_model(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = data.run(tmp_path, "train.steps=2")
    changes = ["train.steps=4", "model.fpn.channels=16", "model.box_head.nms_iou=0.4"]
    found = refusal(["--resume", str(run), *changes], capsys, monkeypatch)
    assert "but model.fpn.channels, model.box_head.nms_iou changed" in found
    assert "fpn.lateral" in found


def test_an_image_that_cannot_be_read_stops_a_run_before_it_starts(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for source in data.paths["train_images"].iterdir():
        (images / source.name).write_bytes(source.read_bytes())
    victim = sorted(images.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:200])
    for workers in (0, 1):
        changes = (f"data.train.images={images}", f"data.workers={workers}", "train.log_every=50")
        found = refusal(data.arguments(tmp_path / "runs", *changes), capsys, monkeypatch)
        assert f"image 3: {victim.name}: image file is truncated" in found
        assert not list((tmp_path / "runs").glob("*"))


def test_a_run_that_has_a_record_is_kept_when_it_fails(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, 3, CrashError())
    with pytest.raises(CrashError):
        data.run(tmp_path)
    assert [row["iteration"] for row in record(newest_run(tmp_path))] == [1]


def test_dry_run_says_what_it_would_cost_and_leaves_nothing(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["--dry-run", *data.arguments(tmp_path / "runs", val=True)])
    out = capsys.readouterr().out
    assert "The configuration is valid." in out
    assert "train.json: 6 images" in out
    assert "val.json: 3 images" in out
    assert "On cpu (extrapolated from one image of 32x32, half size, by 8; a rough guide):" in out
    assert "GiB at 2 images a step" in out
    assert "for 8 steps" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("step", "saved"), [(0, False), (6, True)])
def test_an_interruption_says_how_to_go_on(
    step: int,
    saved: bool,
    data: TinyData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_at(monkeypatch, step, KeyboardInterrupt())
    found = refusal(data.arguments(tmp_path), capsys, monkeypatch, code=130)
    if not saved:
        assert found.startswith("stopped; nothing was saved yet, and ")
        assert f"{tmp_path / 'run_001'} has been removed" in found
        assert not list(tmp_path.glob("*"))
        return
    run = newest_run(tmp_path)
    command = f"python -m fastmrcnn.train --resume {run}"
    assert found == f"stopped; saved after step 6; go on from step_0000006.pt with: {command}"
    train.main(command.split()[3:])
    assert [row["iteration"] for row in record(run)] == [1, 3, 5, 7]


@pytest.mark.parametrize("shapes", [True, False])
def test_a_stop_before_the_first_step_leaves_nothing(
    shapes: bool,
    data: TinyData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_sets(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(preparation, "read_sets", read_sets)
    own = ["--config", str(data.recipe), "data.shapes=true", f"output={tmp_path}"]
    found = refusal(own if shapes else data.arguments(tmp_path), capsys, monkeypatch, code=143)
    assert found == "stopped by SIGTERM; nothing was begun"
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("number", "code", "by"),
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, " by SIGTERM"), (signal.SIGHUP, 129, " by SIGHUP")],
)
def test_signals_to_the_whole_group(
    number: signal.Signals, code: int, by: str, data: TinyData, tmp_path: Path
) -> None:
    """As from a terminal or a scheduler: they go to the loader processes too."""
    arguments = data.arguments(
        tmp_path, "train.steps=100000", "data.workers=2", "train.checkpoint_every=99999"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmrcnn.train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore the signal, and so would this one.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("run_001/metrics.json")) or not record(tmp_path / "run_001"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert "Traceback" not in errors
    step = read_checkpoint(tmp_path / "run_001")["step"]
    assert step >= 2
    assert errors.strip().split("\n")[-1] == (
        f"stopped{by}; saved after step {step}; go on from step_{step:07d}.pt with: "
        f"python -m fastmrcnn.train --resume {tmp_path / 'run_001'}"
    )


@pytest.mark.parametrize(
    ("slots", "most", "dropped", "expected"),
    [
        (None, 0, 0, None),  # nothing seen yet
        (None, 40, 0, "slots_per_image=4 would be faster"),  # 16 images: 2.5, rounded up, and a quarter more
        (None, 1500, 0, None),  # of 2048 that there are
        (7, 40, 0, None),
        (8, 40, 0, "ran 128 slots a step, of which at most 40 were filled"),
        (2, 40, 9, "9 foreground RoIs found no slot .*slots_per_image=3 would have held them all"),
    ],
)
def test_advice_on_mask_slots(slots: int | None, most: int, dropped: int, expected: str | None) -> None:
    config = parse_config({"model": {"mask_head": {"slots_per_image": slots}}}, "the test")
    found = train.mask_slot_advice(config, most, dropped)
    assert found is None if expected is None else re.search(expected, found or "")


def test_no_advice_without_a_mask_head() -> None:
    config = parse_config({"model": {"mask_head": {"enabled": False}}}, "the test")
    assert train.mask_slot_advice(config, 40, 0) is None
