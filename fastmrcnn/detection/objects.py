"""The objects of an image, found or annotated; and how a model's padded detections become them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn.detection.heatmaps import decode_heatmaps
from fastmrcnn.detection.paste import encode_images, paste_to_host
from fastmrcnn.structures import Detections, tree_map


@dataclass(frozen=True)
class Objects:
    """n objects of one image, in its pixels. Those that were found come by falling score.

    Masks that a model found are `probabilities` at first, which stay on its device: encoded there
    (`coco_results`) they come as lengths of runs, and pasted there (`pasted`) as bits.

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
    keypoints: NDArray[np.float32] | None = None  # (n, J, 3) x, y, and score or, if annotated, visibility
    crowd: NDArray[np.bool_] | None = None  # (n,) a region of several objects; None: no such regions

    def __post_init__(self) -> None:
        count, masks, points = len(self), self.masks, self.keypoints
        if self.boxes.shape != (count, 4):
            raise ValueError(f"boxes must be (n, 4), got {self.boxes.shape}")
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


def split_detections(
    detections: Detections, input_to_image: Tensor, sizes: Sequence[tuple[int, int]], score: float = 0.0
) -> list[Objects]:
    """Take a padded batch apart.

    Args:
        input_to_image: (n, 2, 3), (x, y, 1) in input pixels -> (x, y) in the pixels of the original image;
            a scale and a shift. Images of the batch beyond the first n are padding.
        sizes: height and width of the n original images.
        score: detections below it are dropped, as are those whose box has no area within the image.
    """
    # Masks and heatmaps are large: they stay where they are, and of those only the kept detections' are read.
    host = tree_map(lambda tensor: tensor.cpu(), detections._replace(masks=None, heatmaps=None))
    maps = input_to_image.detach().cpu().float()
    found = []
    for index, (height, width) in enumerate(sizes):
        scale, shift = maps[index].diagonal()[[0, 1, 0, 1]], maps[index, :, 2][[0, 1, 0, 1]]
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum((host.boxes[index] * scale + shift).clamp(min=0), limit)
        some = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        keep = host.valid[index] & some & (host.scores[index] >= score)
        probabilities = keypoints = None
        if detections.masks is not None:
            kept = keep.nonzero()[:, 0].to(detections.masks.device)
            probabilities = detections.masks[index].index_select(0, kept).float()
        if detections.heatmaps is not None:
            own = detections.heatmaps[index][keep.to(detections.heatmaps.device)]
            places = decode_heatmaps(own, host.boxes[index][keep])[..., [0, 1, 3]].cpu()
            places[..., :2] = places[..., :2] * scale[:2] + shift[:2]
            keypoints = places.numpy()
        found.append(
            Objects(
                int(height),
                int(width),
                boxes[keep].numpy(),
                host.classes[index][keep].numpy(),
                host.scores[index][keep].float().numpy(),
                probabilities=probabilities,
                keypoints=keypoints,
            )
        )
    return found


def pasted(found: Objects, threshold: float) -> Objects:
    """The objects with masks in place of their probabilities; a pixel belongs to one from `threshold` on."""
    if found.probabilities is None:
        return found
    boxes, size = torch.from_numpy(found.boxes), (found.height, found.width)
    masks = paste_to_host(found.probabilities, boxes, *size, threshold)
    return replace(found, masks=masks, probabilities=None)


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
    masks = [one.probabilities for one in found if one.probabilities is not None]
    rles: Sequence[Sequence[Any]] = [[None] * len(one) for one in found]
    if masks:
        sizes = [(one.height, one.width) for one in found]
        rles = encode_images(masks, [torch.from_numpy(one.boxes) for one in found], sizes, threshold)
    entries = []
    for one, image_id, own in zip(found, image_ids, rles, strict=True):
        assert one.scores is not None, "annotated objects are no results"
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
