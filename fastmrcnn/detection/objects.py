"""From a model's padded detections to the objects of each image, in the pixels of that image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmrcnn.detection.heatmaps import decode_heatmaps
from fastmrcnn.detection.paste import encode_images
from fastmrcnn.structures import Detections, tree_map


class ImageDetections(NamedTuple):
    """The detections of one image, by falling score, in the pixels of that image.

    All but the masks are on the host. Masks stay on the device of the model: pasted there, they come as bits,
    and encoded there, as lengths of runs.
    """

    boxes: Tensor  # (n, 4) float32 xyxy, within the image
    scores: Tensor  # (n,) float32
    classes: Tensor  # (n,) int64
    masks: Tensor | None  # (n, M, M) float32 probabilities within the box
    height: int
    width: int
    keypoints: Tensor | None = None  # (n, J, 3) float32 x, y, score


def split_detections(
    detections: Detections, affine: Tensor, sizes: Sequence[tuple[int, int]], score: float = 0.0
) -> list[ImageDetections]:
    """Take a padded batch apart.

    Args:
        affine: (n, 2, 3), (x, y, 1) in input pixels -> (x, y) in the pixels of the original image; a
            scale and a shift. Images of the batch beyond the first n are padding.
        sizes: height and width of the n original images.
        score: detections below it are dropped, as are those whose box has no area within the image.
    """
    # Masks and heatmaps are large: they stay where they are, and of those only the kept detections' are read.
    host = tree_map(lambda tensor: tensor.cpu(), detections._replace(masks=None, heatmaps=None))
    affine = affine.detach().cpu().float()
    found = []
    for index, (height, width) in enumerate(sizes):
        scale, shift = affine[index].diagonal()[[0, 1, 0, 1]], affine[index, :, 2][[0, 1, 0, 1]]
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum((host.boxes[index] * scale + shift).clamp(min=0), limit)
        some = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        keep = host.valid[index] & some & (host.scores[index] >= score)
        kept = keep.nonzero()[:, 0]
        masks = None
        if detections.masks is not None:
            masks = detections.masks[index].index_select(0, kept.to(detections.masks.device)).float()
        scores, classes = host.scores[index][keep].float(), host.classes[index][keep]
        keypoints = None
        if detections.heatmaps is not None:
            own = detections.heatmaps[index][keep.to(detections.heatmaps.device)]
            keypoints = decode_heatmaps(own, host.boxes[index][keep])[..., [0, 1, 3]].cpu()
            keypoints[..., :2] = keypoints[..., :2] * scale[:2] + shift[:2]
        found.append(ImageDetections(boxes[keep], scores, classes, masks, int(height), int(width), keypoints))
    return found


def coco_results(
    found: Sequence[ImageDetections],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    threshold: float = 0.5,
    keypoint_offset: float = 0.5,
) -> list[dict[str, Any]]:
    """Detections as COCO's result entries, image by image.

    Args:
        found: of some images. Their masks are encoded together, on the device where they are.
        category_ids: the data set's id of each class.
        threshold: of a pasted mask.
        keypoint_offset: taken off x and y of keypoints, as COCO numbers pixels.
    Returns:
        Dictionaries with image_id, category_id, bbox (x, y, width, height), score and, where there are
        masks, segmentation (compressed RLE); where there are keypoints, keypoints (x, y and score of
        each).
    """
    rles: Sequence[list[dict[str, Any]] | None] = [None] * len(found)
    masks = [one.masks for one in found if one.masks is not None]
    if masks:
        sizes = [(one.height, one.width) for one in found]
        rles = encode_images(masks, [one.boxes for one in found], sizes, threshold)
    entries = []
    for one, image_id, own in zip(found, image_ids, rles, strict=True):
        entries += _entries(one, image_id, category_ids, own, keypoint_offset)
    return entries


def _entries(
    found: ImageDetections,
    image_id: int,
    category_ids: Sequence[int],
    rles: list[dict[str, Any]] | None,
    keypoint_offset: float,
) -> list[dict[str, Any]]:
    boxes = torch.cat((found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]), dim=1)
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in zip(
            boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True
        )
    ]
    if rles is not None:
        for entry, rle in zip(entries, rles, strict=True):
            entry["segmentation"] = rle
    if found.keypoints is not None:
        places = found.keypoints - torch.tensor([keypoint_offset, keypoint_offset, 0])
        for entry, one in zip(entries, places.flatten(1).tolist(), strict=True):
            entry["keypoints"] = one
    return entries
