"""The objects of an image, found or annotated; their masks as bitmaps and as COCO's run lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn.detection.paste import encode_images, paste_all_to_host


@dataclass(frozen=True)
class Objects:
    """n objects of one image, in its pixels. Those that were found come by falling score.

    Masks that a model found are `probabilities` at first, which stay on its device (`pasted` makes bitmaps of
    them, `encoded` run lengths), or have been encoded there.

    Raises:
        ValueError: for other shapes.
    """

    height: int
    width: int
    boxes: NDArray[np.float32]  # (n, 4) xyxy
    classes: NDArray[np.int64]  # (n,)
    scores: NDArray[np.float32] | None = None  # (n,) in 0..1; None: annotated
    masks: NDArray[np.bool_] | None = None  # (n, height, width)
    probabilities: Tensor | None = None  # (n, M, M) float32, of the mask within the box
    rles: tuple[dict[str, Any], ...] | None = None  # n masks as COCO's compressed RLE
    keypoints: NDArray[np.float32] | None = None  # (n, J, 3) x, y, and score or, if annotated, visibility
    crowd: NDArray[np.bool_] | None = None  # (n,) a region of several objects; None: no such regions

    def __post_init__(self) -> None:
        count, masks, points = len(self), self.masks, self.keypoints
        if self.boxes.shape != (count, 4):
            raise ValueError(f"boxes must be (n, 4), got {self.boxes.shape}")
        if self.rles is not None and len(self.rles) != count:
            raise ValueError(f"{count} boxes need as many rles, got {len(self.rles)}")
        for name, values in (("classes", self.classes), ("scores", self.scores), ("crowd", self.crowd)):
            if values is not None and values.shape != (count,):
                raise ValueError(f"{count} boxes need as many {name}, got {len(values)}")
        if masks is not None and masks.shape != (count, self.height, self.width):
            raise ValueError(f"masks must be {(count, self.height, self.width)}, got {masks.shape}")
        if points is not None and (points.ndim != 3 or len(points) != count or points.shape[2] != 3):
            raise ValueError(f"keypoints must be ({count}, J, 3), got {points.shape}")

    def __len__(self) -> int:
        return len(self.boxes)

    def first(self, count: int) -> Objects:
        """The first `count` of them."""
        arrays = {name: value for name, value in vars(self).items() if name not in ("height", "width")}
        cut: dict[str, Any] = {name: value[:count] for name, value in arrays.items() if value is not None}
        return replace(self, **cut)


def pasted(found: Objects, threshold: float) -> Objects:
    """The objects with bitmaps for masks; a pixel belongs to one from `threshold` on."""
    return all_pasted([found], threshold)[0]


def all_pasted(found: Sequence[Objects], threshold: float) -> list[Objects]:
    """`pasted` for each of several images, whose bitmaps come from their device in one copy."""
    bitmaps = iter(paste_all_to_host(*_masks_in_boxes(found), threshold))
    return [
        replace(one, masks=next(bitmaps), probabilities=None)
        if one.probabilities is not None
        else _decoded(one)
        for one in found
    ]


def _masks_in_boxes(found: Sequence[Objects]) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """Probabilities, boxes and image size of those whose masks are still probabilities."""
    masks, boxes, sizes = [], [], []
    for one in found:
        if one.probabilities is not None:
            masks.append(one.probabilities)
            boxes.append(torch.from_numpy(one.boxes))
            sizes.append((one.height, one.width))
    return masks, boxes, sizes


def _decoded(found: Objects) -> Objects:
    """With bitmaps in place of run lengths."""
    if found.rles is None:
        return found
    masks = np.zeros((len(found), found.height, found.width), dtype=np.bool_)
    for mask, rle in zip(masks, found.rles, strict=True):
        mask[:] = coco_mask.decode(rle)
    return replace(found, masks=masks, rles=None)


def encoded(found: Sequence[Objects], threshold: float) -> list[Objects]:
    """Objects with run lengths in place of probabilities, those of all images made at once."""
    rles = iter(encode_images(*_masks_in_boxes(found), threshold))
    return [
        one if one.probabilities is None else replace(one, rles=tuple(next(rles)), probabilities=None)
        for one in found
    ]


def coco_results(
    found: Sequence[Objects],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    threshold: float = 0.5,
    keypoint_offset: float = 0.5,
) -> list[dict[str, Any]]:
    """Detections as COCO's result entries, image by image.

    Args:
        found: of some images, with scores. Their masks are encoded together, on the device where their
            probabilities are.
        category_ids: the data set's id of each class.
        threshold: of a pasted mask.
        keypoint_offset: taken off x and y of keypoints, as COCO numbers pixels.
    Returns:
        Dictionaries with image_id, category_id, bbox (x, y, width, height), score and, where there are
        masks, segmentation (compressed RLE); where there are keypoints, keypoints (x, y and score of
        each).
    """
    entries = []
    for one, image_id in zip(encoded(found, threshold), image_ids, strict=True):
        assert one.scores is not None, "annotated objects are no results"
        own: Sequence[Any] = [None] * len(one) if one.rles is None else one.rles
        points: Sequence[Any] = [None] * len(one)
        if one.keypoints is not None:
            shift = np.array([keypoint_offset, keypoint_offset, 0], np.float32)
            points = (one.keypoints - shift).reshape(len(one), 3 * one.keypoints.shape[1]).tolist()
        rows = zip(coco_boxes(one.boxes), one.scores.tolist(), one.classes.tolist(), own, points, strict=True)
        for box, score, label, rle, places in rows:
            entry = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            if rle is not None:
                entry["segmentation"] = rle
            if places is not None:
                entry["keypoints"] = places
            entries.append(entry)
    return entries


def coco_boxes(boxes: NDArray[np.float32]) -> list[list[float]]:
    """(n, 4) xyxy as COCO's x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
