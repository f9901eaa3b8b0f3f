"""python -m fastmrcnn.predict: draw what a checkpoint sees in images, and write it as COCO JSON."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrcnn.data.image_files import image_suffixes, looks_like_image
from fastmrcnn.data.image_ids import CocoIds, KnownImage, match_categories, match_images, read_ids, size_fault
from fastmrcnn.data.images import fitted, read_noted
from fastmrcnn.data.pixel_range import RangeNote, Reading, note_lines
from fastmrcnn.detection.detector import Detector, Prepared, load
from fastmrcnn.detection.drawing import Artists
from fastmrcnn.detection.fetch import Fetched
from fastmrcnn.detection.objects import Objects, coco_results, encoded
from fastmrcnn.detection.pipeline import MOST_PIXELS, Behind, ahead, reading_threads
from fastmrcnn.detection.run import device_of
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import expanded, make_folder, to_write, write_json
from fastmrcnn.training.stopping import Requests, signal_of

RESULTS = "predictions.json"
UNREAD = (".heic", ".heif", ".jxl")  # images that Pillow cannot read: not to be passed over in silence


class Task(NamedTuple):
    """An image to predict in."""

    path: Path
    overlay: Path
    image_id: int
    known: KnownImage | None  # what --annotations says of it


class Loaded(NamedTuple):
    """An image as it was read, and as the model takes it."""

    pixels: NDArray[np.uint8]
    note: RangeNote | None
    prepared: Prepared

    @property
    def weight(self) -> int:
        """Its pixels."""
        return self.pixels.shape[0] * self.pixels.shape[1]


class Left(NamedTuple):
    """What was asked for and is left out."""

    path: Path
    reason: str


@dataclass
class Run:
    """Images are read ahead of the model, encoded and drawn behind it."""

    output: Path
    score: float
    coco: CocoIds | None
    detector: Detector
    category_ids: Sequence[int]
    reading: Reading
    artists: Artists
    left: list[Left]
    done: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, RangeNote]] = field(default_factory=list)

    def perform(self, tasks: Sequence[Task]) -> None:
        """What was found in images that are done is kept, whatever ends this."""
        threads = reading_threads(device_of(self.detector.model).type == "cuda")
        with (
            Requests("what was found is saved") as requests,
            tqdm(total=len(tasks), unit="img", desc="predict", dynamic_ncols=True) as bar,
            Behind[list[dict[str, Any]]](self.artists.threads, MOST_PIXELS) as behind,
            contextlib.closing(ahead(tasks, self.load, threads)) as loaded,
        ):

            def add(results: Iterable[list[dict[str, Any]]]) -> None:
                for entries in results:
                    self.entries += entries
                    self.done += 1
                    bar.update()

            try:
                try:
                    for task, future in loaded:
                        try:
                            image = future.result()
                        except UserError as error:
                            self.left.append(Left(task.path, str(error).removeprefix(f"{task.path}: ")))
                            bar.update()
                            continue
                        if image.note is not None:
                            self.notes.append((str(task.path), image.note))
                        fetched = self.detector.begin(image.prepared, self.score, encode=True)
                        make_folder(self.output)
                        with requests.held():  # what is drawn is counted
                            add(behind.put(self.finish, task, image.pixels, fetched, weight=image.weight))
                    with requests.held():
                        add(behind.rest())
                finally:
                    requests.hold()
                    add(behind.whatever_works())
            except KeyboardInterrupt as stop:
                bar.close()
                number, by = signal_of(stop)
                kept = f"; what was found in them is in {self.output}" if self.done else ""
                line = f"\nstopped{by} after {self.done} of {count(len(tasks), 'image')}{kept}"
                print(line, file=sys.stderr)
                raise SystemExit(128 + number) from None
            finally:
                if self.done:
                    write_json(self.output / RESULTS, self.entries)

    def load(self, task: Task) -> Loaded:
        pixels, note = read_task(task, self.coco, self.reading)
        return Loaded(pixels, note, self.detector.prepare([pixels]))

    def finish(self, task: Task, pixels: NDArray[np.uint8], fetched: Fetched) -> list[dict[str, Any]]:
        """Encode and draw what was found in an image; returns its entries once the overlay is there."""
        card = self.detector.card
        threshold = card.config.model.mask_head.threshold
        try:
            [found] = encoded(fetched.objects(), threshold)
            entries = as_entries(found, task, self.detector, self.category_ids)
            self.artists.draw(task.overlay, pixels, found, card.class_names, card.keypoints, threshold)
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(f"{task.path}: what was found in it could not be drawn") from error
        return entries


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    output = to_write(arguments.output)
    images, left = find_images(arguments.images)
    coco = None if arguments.annotations is None else read_ids(expanded(arguments.annotations))
    tasks = make_tasks(images, output, coco, left)
    if not tasks:
        refuse(left)
    check_output(output, [task.overlay for task in tasks])
    with Artists(len(tasks)) as artists:
        detector = load(arguments.checkpoint, arguments.device)
        if arguments.no_graphs:
            detector = detector.without_graphs()
        category_ids = detector.card.category_ids
        if coco is not None:
            category_ids = match_categories(detector.class_names, category_ids, coco, arguments.checkpoint)
        reading = detector.reading
        if arguments.max_pixels is not None:
            reading = reading._replace(max_pixels=arguments.max_pixels)
        run = Run(output, arguments.score, coco, detector, category_ids, reading, artists, left)
        run.perform(tasks)
    done, entries, notes = run.done, run.entries, run.notes
    untrained = "" if reading.pixel_range else "; the model was not trained with a data.pixel_range"
    for line in note_lines(notes):
        print(line + untrained)
    if not done:
        refuse(left)
    if not entries:
        print(f"Nothing with a score of {arguments.score:g} or more; try a lower --score")
    print(f"{count(done, 'image')}, {count(len(entries), 'object')}")
    print(f"Overlays and {RESULTS} are in {output}")
    print(what_ids_mean(coco, done))
    if left:
        unique = dict.fromkeys(left)
        print(f"Left out: {len(unique)}", file=sys.stderr)
        for path, reason in unique:
            print(f"  {path}: {reason}", file=sys.stderr)
        raise SystemExit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "predict",
        "Find objects in images; write overlays as PNG and one COCO results file. Exit code 1: some images "
        "were left out, and are listed with the reason; 2: nothing was done.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, and folders of them"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument("--output", required=True, help=f"folder for the overlays and {RESULTS}")
    parser.add_argument("--score", type=float, default=0.5, help="least score of an object, in 0..1 (0.5)")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO file whose ids the results get, its images found by file_name; with --score 0 they are "
        "ready for pycocotools (default: images are numbered from 1)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    parser.add_argument(
        "--max-pixels", type=int, help="larger images are refused (default: the model's data.max_pixels)"
    )
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU: replay nothing as CUDA graphs")
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.score <= 1:
        raise UserError(f"--score {arguments.score:g}: must be in 0..1")
    return arguments


def find_images(inputs: Sequence[str]) -> tuple[list[Path], list[Left]]:
    """The files, and those in the folders that look like images, each once; and what cannot be taken."""
    found: dict[Path, Path] = {}
    left: list[Left] = []
    for name in inputs:
        path = expanded(name)
        try:
            if path.is_dir():
                images = look_into(path, left)
            else:
                path.stat()
                images = [path]
        except FileNotFoundError:
            left.append(Left(path, "no such image file or folder"))
        except OSError as error:
            left.append(Left(path, f"cannot be read ({error.strerror})"))
        else:
            for file in images:
                found.setdefault(file.resolve(), file)
    return list(found.values()), left


def look_into(folder: Path, left: list[Left]) -> list[Path]:
    """The images of a folder. What has an image's name and is none is added to `left`, the rest is told."""
    images = []
    hidden, folders, others = 0, 0, Counter[str]()
    before = len(left)
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            hidden += 1
        elif looks_like_image(path) or (suffix in UNREAD and path.is_file()):
            images.append(path)
        elif suffix in image_suffixes() or suffix in UNREAD:
            left.append(Left(path, "is a folder" if path.is_dir() else "is no file, or a link to none"))
        elif path.is_dir():
            folders += 1
        else:
            others[suffix or "no suffix"] += 1
    rest = [count(hidden, "hidden file")] if hidden else []
    rest += [count(folders, "folder")] if folders else []
    if others:
        some = ", ".join(sorted(others)[:5]) + (", ..." if len(others) > 5 else "")
        rest.append(f"{count(others.total(), 'file')} without the name of an image ({some})")
    passed = f"passed over {', '.join(rest)}" if rest else ""
    if images and passed:
        print(f"{folder}: {passed}")
    if not images and len(left) == before:
        left.append(Left(folder, "no image in this folder" + (f"; {passed}" if passed else "")))
    return images


def make_tasks(images: Sequence[Path], output: Path, coco: CocoIds | None, left: list[Left]) -> list[Task]:
    """What is to be done, in order. Images that `coco` does not know are added to `left`."""
    if coco is None:
        overlays = name_overlays(images, output)
        pairs = enumerate(zip(images, overlays, strict=True), start=1)
        return [Task(path, overlay, number, None) for number, (path, overlay) in pairs]
    matches = list(zip(images, match_images(images, coco), strict=True))
    left += [Left(path, match) for path, match in matches if isinstance(match, str)]
    known = [(path, match) for path, match in matches if isinstance(match, KnownImage)]
    overlays = name_overlays([path for path, _ in known], output)
    return [Task(path, at, one.image_id, one) for (path, one), at in zip(known, overlays, strict=True)]


def name_overlays(images: Sequence[Path], output: Path) -> list[Path]:
    """`output/<stem>.png` for each image; of images with the same stem the later ones get a number."""
    taken: set[str] = set()
    overlays = []
    for path in images:
        name, number = path.stem, 1
        while name.lower() in taken:  # some file systems take A and a for one
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.lower())
        overlays.append(output / f"{name}.png")
    return overlays


def check_output(output: Path, overlays: Sequence[Path]) -> None:
    """Refuse to write over anything, the images themselves included."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output must name a folder")
    for path in (output / RESULTS, *overlays):
        if path.exists():
            raise UserError(f"{path}: is already there; choose another --output or remove it")


def read_task(
    task: Task, coco: CocoIds | None, reading: Reading
) -> tuple[NDArray[np.uint8], RangeNote | None]:
    """(h, w, 3) pixels, and what there is to say of their values.

    Raises:
        UserError: they cannot be had, or are not of the image that `coco` means.
    """
    pixels, note = read_noted(task.path, reading)
    if coco is not None and task.known is not None:
        height, width = pixels.shape[:2]
        if fault := size_fault(task.known, width, height, coco.file):
            raise UserError(fault)
        if task.known.size != (None, None):
            width, height = task.known.size
            pixels = fitted(pixels, height, width)
    return pixels, note


def as_entries(
    found: Objects, task: Task, detector: Detector, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO's result entries of an image, and in each the class by name, the file and its overlay."""
    config, names = detector.card.config, detector.class_names
    threshold, offset = config.model.mask_head.threshold, config.data.keypoint_offset
    results = coco_results([found], [task.image_id], category_ids, threshold, offset)
    more = {"file_name": str(task.path), "overlay": task.overlay.name}
    return [
        {**entry, "category_name": names[label], **more}
        for entry, label in zip(results, found.classes.tolist(), strict=True)
    ]


def what_ids_mean(coco: CocoIds | None, done: int) -> str:
    if coco is None:
        return (
            f"image_id in {RESULTS} numbers the images from 1, and file_name tells which; with "
            "--annotations FILE it is the id in that COCO file"
        )
    others = len(coco.images) - done
    rest = f"; {count(others, 'image')} of it had no turn" if others else ""
    return f"image_id and category_id in {RESULTS} are those of {coco.file}{rest}"


def refuse(left: Sequence[Left]) -> NoReturn:
    """UserError: nothing could be done."""
    unique = list(dict.fromkeys(left))
    some = "; ".join(f"{path}: {reason}" for path, reason in unique[:5])
    raise UserError(some + (f"; and {len(unique) - 5} more" if len(unique) > 5 else ""))


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    run_main(main)
