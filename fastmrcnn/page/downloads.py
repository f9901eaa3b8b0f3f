"""What was found as files: COCO JSON, a label image, the picture, a table."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from fastmrcnn.detection.draw import save_picture
from fastmrcnn.errors import UserError
from fastmrcnn.files import replacing, write_json, write_text
from fastmrcnn.page.found import Found
from fastmrcnn.page.picture import draw_found
from fastmrcnn.page.tables import as_csv
from fastmrcnn.page.units import PixelSize
from fastmrcnn.weights.card import ModelCard

JSON, LABELS, PICTURE, TABLE = "json", "labels", "picture", "table"
_MOST_IN_PNG = 65_535


def write_download(
    kind: str,
    folder: Path,
    found: Found,
    places: NDArray[np.int64],
    card: ModelCard,
    size: PixelSize | None,
    parts: Collection[str],
) -> tuple[Path, str]:
    """Write one file about the objects at `places`; its path, and what there is to say of it, or "".

    Raises:
        UserError: there are no masks for a label image; or the file cannot be written.
    """
    stem = Path(found.name).stem or "image"
    if kind == JSON:
        path = folder / f"{stem}_coco.json"
        write_json(path, [found.entries[place] for place in places.tolist()])
        return path, ""
    if kind == TABLE:
        path = folder / f"{stem}_table.csv"
        write_text(path, as_csv(found, places, card, size))
        return path, ""
    if kind == PICTURE:
        path = folder / f"{stem}_overlay.png"
        save_picture(path, draw_found(found, places, card, parts, None))
        return path, ""
    labels, hidden = label_image(found, places)
    narrow = labels.dtype == np.uint16
    path = folder / f"{stem}_labels.{'png' if narrow else 'tif'}"
    with replacing(path) as stream:
        Image.fromarray(labels).save(stream, format="PNG" if narrow else "TIFF")
    if not hidden:
        return path, ""
    some = ", ".join(map(str, hidden[:10])) + (", ..." if len(hidden) > 10 else "")
    return path, f"Others cover these objects, which are not in it: {some}."


def label_image(
    found: Found, places: NDArray[np.int64]
) -> tuple[NDArray[np.uint16] | NDArray[np.int32], list[int]]:
    """The number of the object at each pixel, 0 where there is none.

    Where objects overlap, a pixel is of the one with the higher score.

    Returns:
        (h, w) uint16, or int32 if a number is above 65,535; and the numbers of those objects that have
        pixels of which others cover all.
    Raises:
        UserError: the model makes no masks.
    """
    if not found.has_masks:
        raise UserError("this model makes no masks, so there is no label image; its boxes are in the JSON")
    numbers = (places + 1).tolist()
    wide = max(numbers, default=0) > _MOST_IN_PNG
    labels = np.zeros((found.objects.height, found.objects.width), np.int32 if wide else np.uint16)
    for number in reversed(numbers):  # those with higher scores come last, and stay
        labels[coco_mask.decode(found.entries[number - 1]["segmentation"]).astype(bool)] = number
    seen = set(np.unique(labels).tolist())
    return labels, [number for number in numbers if number not in seen and found.areas[number - 1] > 0]
