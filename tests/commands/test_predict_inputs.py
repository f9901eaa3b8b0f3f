"""What predict does with folders as they are, with images that cannot be read, and with a COCO file's ids."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import small_config
from PIL import Image
from planted import CATEGORIES, SIZES, PlantedModel, write_set
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import fastmrcnn.predict as command
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.image_files import image_suffixes, looks_like_image
from fastmrcnn.data.image_ids import CocoIds, KnownImage, match_categories, match_images
from fastmrcnn.detection import drawing, prediction
from fastmrcnn.detection.detector import Detector, Prepared
from fastmrcnn.detection.pipeline import Behind
from fastmrcnn.errors import UserError, run_main
from fastmrcnn.evaluation.run import run_evaluation
from fastmrcnn.training.stopping import STOP
from fastmrcnn.weights.card import ModelCard


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    return write_set(tmp_path / "data")


@pytest.fixture
def images(dataset: CocoDataset) -> Path:
    return dataset.records[0].path.parent


@pytest.fixture
def planted(dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> Detector:
    """Finds the objects of the set, a little beside them; the command gets it in place of a checkpoint's."""
    config = small_config(data={"short_side_test": 75, "long_side_max": 130})
    card = ModelCard(config, dataset.class_names, dataset.category_ids)
    model = PlantedModel(dataset, change=lambda boxes, classes, scores: (boxes * 0.93 + 2, classes, scores))
    detector = Detector(model, card)  # type: ignore[arg-type]
    monkeypatch.setattr(command, "load", lambda path, device: detector)
    return detector


class Run:
    """The command as from the shell: its exit code, what it printed and what it wrote."""

    def __init__(self, *arguments: str | Path, to: Path, patch: pytest.MonkeyPatch, capsys: Any) -> None:
        words = ["predict", *map(str, arguments), "--checkpoint", "x", "--output", str(to)]
        patch.setattr(sys, "argv", words)
        self.code = 0
        capsys.readouterr()
        try:
            run_main(command.main)
        except SystemExit as end:
            self.code = int(end.code or 0)
        self.out, self.err = capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        results = to / "predictions.json"
        self.entries = json.loads(results.read_text()) if results.exists() else None
        self.names = sorted(path.name for path in to.iterdir()) if to.exists() else []

    @property
    def left(self) -> dict[str, str]:
        """The reasons by the names of what was left out."""
        lines = self.err.partition("Left out: ")[2].splitlines()
        assert lines[0] == str(len(lines) - 1)
        return {Path(path.strip()).name: why for path, _, why in (line.partition(": ") for line in lines[1:])}


@pytest.fixture
def run(planted: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    def act(*arguments: str | Path, to: str = "out") -> Run:
        return Run(*arguments, to=tmp_path / to, patch=monkeypatch, capsys=capsys)

    return act


def test_which_files_are_images(tmp_path: Path) -> None:
    for name in ("a.gif", "a.JFIF", "a.jpe", "a.PNG", "a.jp2", "a.ppm", "a.tga", "a.webp", "a.ico"):
        (tmp_path / name).touch()
        assert looks_like_image(tmp_path / name), name
    for name in ("a.txt", "a.pdf", "a.h5", "a.mpg", "a", "._a.png", ".a.png", ".DS_Store", "gone.png"):
        if name != "gone.png":
            (tmp_path / name).touch()
        assert not looks_like_image(tmp_path / name), name
    (tmp_path / "frames.png").mkdir()
    assert not looks_like_image(tmp_path / "frames.png")
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in image_suffixes())


def test_a_folder_as_it_is(images: Path, run: Any) -> None:
    for name in ("._2.png", ".DS_Store", "notes.txt", "set.JSON"):
        (images / name).write_bytes(b"\0\5\x16\7")
    (images / "inner").mkdir()
    done = run(images)
    assert done.code == 0
    assert "Left out" not in done.err
    assert (
        f"{images}: passed over 2 hidden files, 1 folder, 2 files without the name of an image (.json, .txt)"
        in done.out
    )
    assert done.names == ["11.png", "2.png", "5.png", "8.png", "predictions.json"]


def test_what_cannot_be_read_is_left_out_and_the_rest_done(images: Path, run: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:900])
    (images / "0.png").touch()
    (images / "text.gif").write_text("no image")
    (images / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (images / "frames.png").mkdir()
    (images / "link.png").symlink_to(images / "gone.png")
    empty = images.parent / "empty"
    empty.mkdir()
    done = run("nowhere.png", images, empty, "nowhere.png")
    assert done.code == 1
    assert done.names == ["11.png", "2.png", "5.png", "8.png", "predictions.json"]
    assert "4 images, 9 objects" in done.out
    assert len({entry["file_name"] for entry in done.entries}) == 3
    reasons = done.left
    assert set(reasons) == {
        *("nowhere.png", "empty", "cut.jpg", "0.png", "text.gif", "phone.HEIC", "frames.png", "link.png")
    }
    assert reasons["nowhere.png"] == "no such image file or folder"
    assert reasons["empty"] == "no image in this folder"
    assert reasons["frames.png"] == "is a folder"
    assert reasons["cut.jpg"].startswith("cannot be decoded")
    assert reasons["0.png"].startswith("not an image file that can be read")


def test_if_nothing_can_be_read_it_is_a_mistake(images: Path, run: Any, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    done = run(tmp_path / "a.png", tmp_path / "b.png", "nowhere")
    assert done.code == 2
    assert done.names == []
    error = done.err.splitlines()[-1]
    for part in ("error: ", "a.png: not an image", "b.png: not an image", "nowhere: no such image"):
        assert part in error
    (tmp_path / "folder" / "frames.png").mkdir(parents=True)
    assert "frames.png: is a folder" in run(tmp_path / "folder").err


def test_all_kinds_of_images_of_a_folder(images: Path, run: Any) -> None:
    picture = Image.open(images / "8.png")
    for name in ("a.gif", "b.jfif", "c.PPM", "d.jp2", "e.TIFF"):
        picture.save(images / name, format={".jfif": "JPEG"}.get(Path(name).suffix))
    done = run(images)
    assert done.code == 0
    assert "9 images" in done.out
    assert {Path(entry["file_name"]).name for entry in done.entries} >= {"a.gif", "b.jfif", "c.PPM", "d.jp2"}


@pytest.mark.parametrize(
    ("error", "code", "by"),
    [
        (KeyboardInterrupt(), 130, ""),
        (signal.SIGINT, 130, ""),
        (signal.SIGTERM, 143, " by SIGTERM"),
        (signal.SIGHUP, 129, " by SIGHUP"),
        (UserError("x: disk full"), 2, ""),
    ],
)
@pytest.mark.parametrize("processes", [False, True], ids=["here", "processes"])
def test_what_was_found_is_kept_when_the_rest_fails(
    error: BaseException | signal.Signals,
    code: int,
    by: str,
    processes: bool,
    images: Path,
    planted: Detector,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drawing, "WORTH_IT", 1 if processes else 100)
    real = Detector.begin

    def begin(self: Detector, images: Prepared, *arguments: Any, **more: Any) -> Any:
        if images.sizes == [SIZES[5]]:
            if isinstance(error, BaseException):
                raise error
            signal.raise_signal(error)
        return real(self, images, *arguments, **more)

    monkeypatch.setattr(Detector, "begin", begin)
    before = {number: signal.getsignal(number) for number in STOP}
    for number in STOP:  # a background job of a shell ignores some, and so would the command
        signal.signal(number, signal.default_int_handler)
    try:
        done = run(images)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done.code == code
    assert done.names == ["11.png", "2.png", "predictions.json"]
    assert {Path(entry["file_name"]).name for entry in done.entries} == {"11.png"}
    if code != 2:
        assert f"stopped{by} after 2 of 4 images; what was found in them is in " in done.err


@pytest.mark.parametrize("processes", [False, True], ids=["here", "processes"])
@pytest.mark.parametrize("error", [UserError("x: disk full"), ValueError("odd colour")])
def test_an_error_in_a_drawing_ends_the_run_and_names_its_image(
    error: Exception, processes: bool, images: Path, planted: Detector, monkeypatch: Any, tmp_path: Path
) -> None:
    """The others are kept, also those that come after it and were found already."""
    monkeypatch.setattr(drawing, "WORTH_IT", 1 if processes else 100)
    real = prediction.save_picture

    def save_picture(path: Path, picture: np.ndarray) -> None:
        if path.name == "2.png":
            raise error
        real(path, picture)

    monkeypatch.setattr(prediction, "save_picture", save_picture)  # forks take it over
    with pytest.raises((UserError, RuntimeError)) as caught:
        command.main([str(images), "--checkpoint", "x", "--output", str(tmp_path / "out")])
    text = str(caught.value)
    assert "2.png" in text or text == "x: disk full"
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    kept = {Path(entry["file_name"]).name for entry in entries}
    assert "11.png" in kept
    written = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert kept <= written <= {"11.png", "5.png", "8.png"}


def test_a_stop_while_pictures_are_drawn_waits_for_them(
    images: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so. The signal comes when all images have been seen."""
    all_seen = threading.Event()
    rest, save, write = Behind.rest, prediction.save_picture, os.write
    said: list[bytes] = []

    def noted(file: int, data: bytes) -> int:
        said.extend([data] if file == 2 else [])
        return write(file, data)

    def waiting(self: Behind[Any]) -> Any:
        all_seen.set()
        return rest(self)

    def save_picture(path: Path, picture: np.ndarray) -> None:
        if path.name == "8.png":
            all_seen.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
        save(path, picture)

    monkeypatch.setattr(os, "write", noted)
    monkeypatch.setattr(Behind, "rest", waiting)
    monkeypatch.setattr(prediction, "save_picture", save_picture)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run(images)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert done.names == ["11.png", "2.png", "5.png", "8.png", "predictions.json"]
    assert "stopped after 4 of 4 images" in done.err
    assert said == [b"\nstopping as soon as what was found is saved; once more stops at once\n"]


def test_a_stop_before_the_first_image_is_one_line(
    images: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, device: str) -> Detector:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", load)
    done = run(images)
    assert (done.code, done.names, done.err.strip()) == (130, [], "stopped")


def judge(file: Path, results: Path, kind: str) -> float:
    truth = COCO(str(file))
    judged = COCOeval(truth, truth.loadRes(str(results)), kind)
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    return float(judged.stats[0])


def test_with_the_ids_of_a_file_pycocotools_gives_the_numbers_of_evaluate(
    dataset: CocoDataset, planted: Detector, images: Path, run: Any, tmp_path: Path
) -> None:
    done = run(images, "--annotations", dataset.annotations, "--score", "0")
    assert done.code == 0
    assert f"image_id and category_id in predictions.json are those of {dataset.annotations}\n" in done.out
    assert {Path(e["file_name"]).stem: e["image_id"] for e in done.entries} == {"11": 11, "5": 5, "8": 8}
    reread = write_set(tmp_path / "again")
    values = run_evaluation(
        planted.model, reread, planted.card.config, output=tmp_path / "eval", pictures=0, progress=False
    )
    for kind in ("bbox", "segm"):
        found = judge(dataset.annotations, tmp_path / "out" / "predictions.json", kind)
        assert found * 100 == pytest.approx(values[f"{kind}/AP"], abs=1e-6)
        assert 5 < found * 100 < 95


def test_without_a_file_the_ids_are_said_to_be_its_own(images: Path, run: Any) -> None:
    done = run(images)
    assert "image_id in predictions.json numbers the images from 1, and file_name tells which" in done.out
    assert {e["image_id"] for e in done.entries} == {1, 3, 4}


def test_images_that_the_file_does_not_mean(
    dataset: CocoDataset, images: Path, run: Any, tmp_path: Path
) -> None:
    tree = json.loads(dataset.annotations.read_text())
    by_id = {image["id"]: image for image in tree["images"]}
    by_id[5]["width"] = 42
    by_id[11]["width"] += 1  # as some programs round
    by_id[8]["file_name"] = "eight.png"
    tree["images"].append({**by_id[2], "id": 3})
    (tmp_path / "other.json").write_text(json.dumps(tree))
    done = run(images, "--annotations", tmp_path / "other.json", "--score", "0")
    assert done.code == 1
    assert {e["image_id"] for e in done.entries} == {11}
    size = [by_id[11]["height"], by_id[11]["width"]]
    assert all(e["segmentation"]["size"] == size for e in done.entries)
    file = tmp_path / "other.json"
    assert done.left == {
        "5.png": f"has width 40, height 100, but {file} gives image 5 width 42, height 100",
        "8.png": f"{file} lists no image of this name",
        "2.png": f"{file} lists 2 images of this name (ids 2, 3)",
    }
    assert "4 images of it had no turn" in done.out
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "alone").mkdir()
    shutil.copy(images / "8.png", tmp_path / "alone")
    refused = run(tmp_path / "alone", "--annotations", file)
    assert refused.code == 2
    assert "8.png: " in refused.err
    assert refused.names == []


def test_images_by_name_and_folder() -> None:
    def known(*names: str) -> CocoIds:
        images = [
            KnownImage(k, tuple(name.replace("\\", "/").split("/")), (1, 1))
            for k, name in enumerate(names, start=1)
        ]
        return CocoIds(Path("set.json"), images, [])

    def ids(paths: list[str], *names: str) -> list[int | None]:
        found = match_images([Path(path) for path in paths], known(*names))
        return [None if isinstance(one, str) else one.image_id for one in found]

    assert ids(["b.png", "a.png"], "a.png", "b.png") == [2, 1]
    assert ids(["/x/val/1.png", "/x/train/1.png"], "train/1.png", "val/1.png") == [2, 1]
    assert ids(["/x/other/1.png"], "train/1.png", "val/1.png") == [None]
    assert ids(["/x/other/1.png"], "train/1.png") == [1]
    # Two files of which the list can mean but one.
    assert ids(["/x/a/1.png", "/x/b/1.png"], "1.png") == [None, None]
    assert ids(["/x/a/1.png", "/x/b/1.png"], "a/1.png") == [1, None]
    assert ids(["/x/a/1.png", "/x/b/1.png"], "b/1.png") == [None, 1]
    assert ids(["1.png"], "1.png", "1.png") == [None]


def test_names_as_other_systems_write_them(tmp_path: Path, images: Path, run: Any) -> None:
    names = {11: "images\\11.png", 5: "images/./5.png", 8: "8.PNG", 2: "cafe%CC%81.png"}
    (images / "2.png").rename(images / "caf\xe9.png")
    entries = [
        {"id": image, "file_name": name, "height": SIZES[image][0], "width": SIZES[image][1]}
        for image, name in names.items()
    ]
    (tmp_path / "test.json").write_text(json.dumps({"images": entries}))  # of test images: nothing else
    done = run(images, "--annotations", tmp_path / "test.json")
    assert done.code == 0
    assert {Path(e["file_name"]).stem: e["image_id"] for e in done.entries} == {"11": 11, "5": 5, "8": 8}


def test_classes_by_name() -> None:
    def known(*categories: tuple[int, str]) -> CocoIds:
        return CocoIds(Path("set.json"), [], list(categories))

    names, ids = ["box", "disc"], [3, 7]
    assert match_categories(names, ids, known((7, "disc"), (3, "box")), "run") == [3, 7]
    assert match_categories(names, ids, known((1, "disc"), (2, "box")), "run") == [2, 1]
    assert match_categories(names, ids, known((3, "disc"), (7, "box")), "run") == [7, 3]
    assert match_categories(names, ids, known((9, "disc")), "run") == [3, 9]  # no box in that file
    assert match_categories(names, ids, known((7, "disc"), (8, "disc")), "run") == [3, 7]
    assert match_categories(names, ids, known(), "run") == [3, 7]
    with pytest.raises(UserError, match="'box' is not there, and its id 3 is that of another category; give"):
        match_categories(names, ids, known((3, "disc")), "run")
    with pytest.raises(UserError, match="'disc' is the name of categories 1, 2"):
        match_categories(names, ids, known((1, "disc"), (2, "disc")), "run")


def test_results_have_the_category_ids_of_the_file(dataset: CocoDataset, images: Path, run: Any) -> None:
    tree = json.loads(dataset.annotations.read_text())
    other = {"disc": 1, "box": 2, "absent": 3}
    assert {category["name"] for category in CATEGORIES} == set(other)
    tree["categories"] = [{"id": k, "name": name} for name, k in other.items()]
    dataset.annotations.write_text(json.dumps(tree))
    done = run(images, "--annotations", dataset.annotations)
    assert {(e["category_name"], e["category_id"]) for e in done.entries} == {("disc", 1), ("box", 2)}


def test_a_file_that_training_reads_gives_its_ids(dataset: CocoDataset, images: Path, run: Any) -> None:
    """Ids and sizes as text and floats, lists in objects by id, and addresses for file names, as in LVIS."""
    tree = json.loads(dataset.annotations.read_text())
    for entry in tree["images"]:
        entry["coco_url"] = f"http://example.org/val/{entry.pop('file_name')}?size=1"
        entry |= {"id": str(entry["id"]), "width": str(entry["width"]), "height": float(entry["height"])}
    for entry in tree["categories"]:
        entry["id"] = float(entry["id"] + 100)
    for part in ("images", "categories"):
        tree[part] = {str(entry["id"]): entry for entry in tree[part]}
    dataset.annotations.write_text(json.dumps(tree))
    done = run(images, "--annotations", dataset.annotations)
    assert done.code == 0
    assert {Path(e["file_name"]).stem: e["image_id"] for e in done.entries} == {"11": 11, "5": 5, "8": 8}
    assert {e["category_name"]: e["category_id"] for e in done.entries} == {"disc": 107, "box": 103}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("[", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "lists no images"),
        ('{"images": {}}', "lists no images"),
        ('{"images": []}', "lists no images"),
        ('{"images": [1]}', "image number 1 has no id that is a whole number"),
        ('{"images": [{"id": "x", "file_name": "a"}]}', "image number 1 has no id that is a whole number"),
        ('{"images": [{"id": true, "file_name": "a"}]}', "image number 1 has no id that is a whole number"),
        (
            '{"images": [{"id": "7", "file_name": "a"}, {"id": 7.0, "file_name": "b"}]}',
            "image 7 is there twice",
        ),
        ('{"images": [{"id": 7}]}', "image 7 has no file_name"),
        ('{"images": [{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]}', "image 7 is there twice"),
        ('{"images": [{"id": 7, "file_name": "a"}], "categories": [{}]}', "category number 1 has no id"),
    ],
)
def test_files_without_ids(text: str | None, message: str, images: Path, run: Any, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    if text is not None:
        file.write_text(text)
    done = run(images, "--annotations", file)
    assert done.code == 2
    assert done.names == []
    error = done.err.splitlines()[-1]
    assert error.startswith(f"error: {file}: ")
    assert message in error


def test_the_home_folder(images: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    os.rename(images, tmp_path / "pictures")
    done = run("~/pictures/8.png", "--annotations", "~/data/set.json")
    assert done.code == 0
    assert {e["image_id"] for e in done.entries} == {8}
    with pytest.raises(UserError, match="no user nobody_here"):
        command.main(["~/pictures", "--checkpoint", "x", "--output", "~nobody_here/out"])
    assert not (tmp_path / "~").exists()
