"""Images to begin with: those of a folder, the validation images of the model's run, or drawn shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastmrcnn.data.image_files import find_files, looks_like_image
from fastmrcnn.data.image_ids import read_ids
from fastmrcnn.data.images import read_noted
from fastmrcnn.data.shapes import draw_image
from fastmrcnn.detection.detector import Detector
from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded

MOST = 8
_SMALL = 160  # long side of the small pictures


class Example(NamedTuple):
    path: Path
    small: Path  # a small picture of it, which any browser shows


def find_examples(folder: str | None, detector: Detector, scratch: Path) -> list[Example]:
    """Up to 8 images, from all over the set; those that cannot be read are passed over.

    Args:
        folder: of --examples; None: the validation images of the model's run, where they still are, or
            shapes for a model of the demo.
        scratch: where small pictures and drawn shapes are written.
    Raises:
        UserError: there is no such folder, or no image in it that can be read.
    """
    if folder is not None:
        place = expanded(folder)
        if not place.is_dir():
            raise UserError(f"--examples {place}: no such folder")
        found = _readable(
            [path for path in sorted(place.iterdir()) if looks_like_image(path)], detector, scratch
        )
        if not found:
            raise UserError(f"--examples {place}: no image in it that can be read")
        return found
    found = _readable(_validation_images(detector), detector, scratch)
    if not found and detector.card.config.data.shapes:
        found = _readable(_drawn(scratch), detector, scratch)
    return found


def _validation_images(detector: Detector) -> list[Path]:
    """Those that the annotation file lists, which may be a part of its folder; none if either is gone."""
    val = detector.card.config.data.val
    if val.images is None or val.annotations is None or not expanded(val.images).is_dir():
        return []
    try:
        names = ["/".join(image.parts) for image in read_ids(expanded(val.annotations)).images]
    except UserError:
        return []
    return [Path(path) for path in find_files(names, expanded(val.images)).paths.values()]


def _drawn(scratch: Path) -> list[Path]:
    paths = []
    for number, seed in enumerate(np.random.SeedSequence([0, 2]).spawn(MOST), start=1):
        pixels, _ = draw_image(np.random.default_rng(seed), 128)
        paths.append(scratch / f"shapes_{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def _readable(paths: Sequence[Path], detector: Detector, scratch: Path) -> list[Example]:
    """Some of them, evenly spread; the neighbours of those that cannot be read."""
    found: list[Example] = []
    step = max(1, len(paths) // MOST)
    order = [*paths[::step], *(path for place, path in enumerate(paths) if place % step)]
    for path in order[: 4 * MOST]:
        if len(found) == MOST:
            break
        try:
            pixels, _ = read_noted(path, detector.reading)
        except UserError:
            continue
        small = Image.fromarray(pixels)
        small.thumbnail((_SMALL, _SMALL))
        found.append(Example(path, scratch / f"example_{len(found) + 1}.png"))
        small.save(found[-1].small)
    return found
