"""Pictures of what several cells find in the same images, side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastmrcnn.study.keepsakes import SHOWN, SIDE
from fastmrcnn.study.places import picture_folder, truth_folder

GAP = 8


def strip(folder: Path, suite: str, data: str, cells: Sequence[str]) -> Callable[[], bytes] | None:
    """What draws a row an image: ground truth, then the cells. None if a picture is missing."""
    folders = [truth_folder(folder, suite, data), *(picture_folder(folder, suite, cell) for cell in cells)]
    rows = [[place / f"{index}.png" for place in folders] for index in SHOWN]
    if not all(path.exists() for row in rows for path in row):
        return None

    def draw() -> bytes:
        width = len(rows[0]) * (SIDE + GAP) - GAP
        sheet = Image.new("RGB", (width, len(rows) * (SIDE + GAP) - GAP), "white")
        for row, paths in enumerate(rows):
            for column, path in enumerate(paths):
                with Image.open(path) as picture:
                    place = (column * (SIDE + GAP), row * (SIDE + GAP))
                    sheet.paste(Image.fromarray(np.asarray(picture.convert("RGB"))), place)
        file = io.BytesIO()
        sheet.quantize(128).save(file, format="PNG", optimize=True)
        return file.getvalue()

    return draw
