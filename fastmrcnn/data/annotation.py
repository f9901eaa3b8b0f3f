"""One annotation of a COCO file: what is wrong with it, its box and area, and why it may be left out."""

from __future__ import annotations

from typing import Any

from fastmrcnn.data.masks import all_finite, mask_area, segmentation_problem
from fastmrcnn.data.records import Box, ImageRecord


def annotation_fault(
    entry: dict[str, Any], records: dict[Any, ImageRecord], index_of: dict[Any, int], require_masks: bool
) -> str | None:
    """Why an annotation cannot be used, or None."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not isinstance(image_id, int | float) or image_id not in records:
        return f"image_id {image_id!r} is not among the images"
    if not isinstance(category_id, int | float) or category_id not in index_of:
        return f"category_id {category_id!r} is not among the categories"
    bbox, crowd, shape = entry.get("bbox"), entry.get("iscrowd", 0), entry.get("segmentation")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all_finite(bbox):
        return f"bbox {bbox!r} is not four finite numbers [x, y, width, height]"
    if crowd not in (0, 1):
        return f"iscrowd is {crowd!r}, not 0 or 1"
    if shape:
        record = records[image_id]
        return segmentation_problem(shape, record.height, record.width)
    if require_masks and not crowd:
        return "no segmentation; add one, or train without masks (model.mask_head.enabled=false)"
    return None


def corners(bbox: list[float]) -> Box:
    x, y, w, h = bbox
    return float(x), float(y), float(x + w), float(y + h)


def clip(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
        min(max(x2, 0.0), width),
        min(max(y2, 0.0), height),
    )


def annotated_area(given: Any, shape: Any, inside: Box, record: ImageRecord) -> float:
    if all_finite([given]):
        return float(given)
    if shape is not None:
        return float(mask_area(shape, record.height, record.width))
    return (inside[2] - inside[0]) * (inside[3] - inside[1])


def reason_to_skip(
    box: Box, inside: Box, area: float, shape: Any, record: ImageRecord, min_box_side: float, crowd: bool
) -> str | None:
    if box[2] <= box[0] or box[3] <= box[1]:
        return "without area"
    width, height = inside[2] - inside[0], inside[3] - inside[1]
    if width <= 0 or height <= 0:
        return "outside the image"
    if min(width, height) < min_box_side:
        return f"with a side under {min_box_side:g} px"
    # Rasterise only what may well come out empty: doing so for all of COCO would take a minute.
    suspicious = area < 4 or min(width, height) < 2
    if suspicious and shape is not None and not crowd and not mask_area(shape, record.height, record.width):
        return "whose mask covers no pixel"
    return None
