"""python -m fastmrcnn.predict: draw what a checkpoint sees in images, and write it as COCO JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastmrcnn.data.images import read_noted
from fastmrcnn.data.pixel_range import RangeNote, note_lines
from fastmrcnn.detection.detector import load
from fastmrcnn.detection.objects import coco_results
from fastmrcnn.detection.prediction import as_prediction
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import write_json

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
RESULTS = "predictions.json"


def main(argv: list[str]) -> None:
    parser = Parser("predict", "Find objects in images; write overlays as PNG and one COCO results file.")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, and folders of them"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument("--output", required=True, help="folder for the overlays and predictions.json")
    parser.add_argument("--score", type=float, default=0.5, help="least score of an object, in 0..1 (0.5)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    parser.add_argument(
        "--max-pixels", type=int, help="larger images are refused (default: the model's data.max_pixels)"
    )
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.score <= 1:
        raise UserError(f"--score {arguments.score:g}: must be in 0..1")
    images = find_images(arguments.images)
    output = Path(arguments.output)
    overlays = name_overlays(images, output)
    check_output(output, overlays)
    detector = load(arguments.checkpoint, arguments.device)
    card, reading = detector.card, detector.reading
    if arguments.max_pixels is not None:
        reading = reading._replace(max_pixels=arguments.max_pixels)
    notes: list[tuple[str, RangeNote]] = []
    for path in images:  # so that a broken image stops the run before anything is written
        _, note = read_noted(path, reading)
        if note is not None:
            notes.append((str(path), note))
    untrained = "" if reading.pixel_range else "; the model was not trained with a data.pixel_range"
    for line in note_lines(notes):
        print(line + untrained)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror}); choose another --output") from None
    threshold, offset = card.config.model.mask_head.threshold, card.config.data.keypoint_offset
    entries: list[dict[str, Any]] = []
    for number, (path, overlay) in enumerate(
        zip(tqdm(images, unit="img", desc="predict", dynamic_ncols=True), overlays, strict=True), start=1
    ):
        pixels, _ = read_noted(path, reading)
        found = detector.detect(pixels, arguments.score)
        as_prediction(found, pixels, card).save(overlay)
        names = [card.class_names[label] for label in found.classes.tolist()]
        results = coco_results([found], [number], card.category_ids, threshold, offset)
        for entry, name in zip(results, names, strict=True):
            entries.append({**entry, "category_name": name, "file_name": str(path), "overlay": overlay.name})
    write_json(output / RESULTS, entries)
    if not entries:
        print(f"Nothing with a score of {arguments.score:g} or more; try a lower --score")
    counts = (len(images), "image"), (len(entries), "object")
    print(", ".join(f"{number} {thing}{'' if number == 1 else 's'}" for number, thing in counts))
    print(f"Overlays and {RESULTS} are in {output}")


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The files, and those in the folders that look like images, each once."""
    found: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no image in this folder (looked for {', '.join(SUFFIXES)})")
        elif path.exists():
            inside = [path]
        else:
            raise UserError(f"{path}: no such image file or folder")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


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


if __name__ == "__main__":
    run_main(main)
