"""From a model's padded detections to what a person asks for: objects in the pixels of their own image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastmrcnn.data.images import rgb_pixels
from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.data.loader import prepare_image
from fastmrcnn.device import choose_precision
from fastmrcnn.errors import UserError
from fastmrcnn.files import replacing
from fastmrcnn.heatmaps import decode_heatmaps
from fastmrcnn.paste import encode_images, paste_to_host
from fastmrcnn.structures import Batch, Detections, to_device, tree_map
from fastmrcnn.visualize import draw_instances
from fastmrcnn.weights.card import ModelCard, card_of


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


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one image, by falling score."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB
    boxes: NDArray[np.float32]  # (n, 4) xyxy in pixels of the image
    masks: NDArray[np.bool_] | None  # (n, h, w); none: the model has no mask head
    scores: NDArray[np.float32]  # (n,)
    classes: NDArray[np.int64]  # (n,)
    class_names: list[str]  # of all classes that the model knows
    keypoints: NDArray[np.float32] | None = None  # (n, J, 3) x, y, score; none: the model has no such head
    keypoint_schema: KeypointSchema | None = None  # names of the J keypoints, and how they are joined

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Of the n objects' classes."""
        return [self.class_names[label] for label in self.classes.tolist()]

    def draw(self) -> NDArray[np.uint8]:
        """(h', w', 3): the image with masks, boxes, keypoints, names and scores; small ones are enlarged.

        Colours tell the classes apart, or the objects if there is but one class.
        """
        classes = self.classes.tolist() if len(self.class_names) > 1 else None
        skeleton = () if self.keypoint_schema is None else self.keypoint_schema.skeleton
        return draw_instances(
            self.image,
            self.boxes,
            self.masks,
            self.names,
            self.scores,
            classes,
            keypoints=self.keypoints,
            skeleton=skeleton,
        )

    def save(self, path: str | Path) -> None:
        """Write the drawing as PNG. What stood there is replaced.

        Raises:
            UserError: the file cannot be written.
        """
        with replacing(path) as stream:
            Image.fromarray(self.draw()).save(stream, format="PNG")


def predict(
    model: nn.Module, image: str | Path | NDArray[np.uint8] | Image.Image, score: float = 0.5
) -> Prediction:
    """Find the objects in an image.

    Args:
        model: from `load_checkpoint`, on any device.
        image: a file, a Pillow image, or uint8 pixels (h, w, 3) in RGB or (h, w) in grey.
        score: detections below it are left out. The model itself leaves out those below its
            configuration's model.box_head.score_threshold.
    Raises:
        UserError: the file is missing or not an image; the model carries no card.
        ValueError: pixels of another shape or dtype.
    """
    card = card_of(model)
    pixels = rgb_pixels(image)
    return as_prediction(detect(model, pixels, score), pixels, card)


def detect(model: nn.Module, pixels: NDArray[np.uint8], score: float) -> ImageDetections:
    """The detections in (h, w, 3) RGB pixels, resized by the rule in the model's card."""
    config = card_of(model).config
    require_detector(model)
    batch, affine = prepare_image(pixels, config.data.short_side_test, config.data.long_side_max)
    detections = run_model(model, batch, config.train.precision)
    return split_detections(detections, torch.from_numpy(affine)[None], [pixels.shape[:2]], score)[0]


def require_detector(model: nn.Module) -> None:
    """UserError for a model that needs proposals from a file, or makes nothing else."""
    parts = card_of(model).config.model
    if not (parts.rpn.enabled and parts.box_head.enabled):
        raise UserError("this model is half a detector (its RPN or its heads alone) and finds no objects")


def run_model(
    model: nn.Module, batch: Batch, precision: str, device: torch.device | None = None
) -> Detections:
    """Detections of a batch, under the autocast that `train.precision` means on the device.

    Args:
        device: of the model; none: that of its first parameter.
    """
    if device is None:
        device = next(itertools.chain(model.parameters(), model.buffers())).device
    chosen = choose_precision(precision, device)
    with torch.no_grad(), torch.autocast(device.type, dtype=chosen.dtype, enabled=chosen.autocast):
        return model(to_device(batch, device))


def as_prediction(found: ImageDetections, pixels: NDArray[np.uint8], card: ModelCard) -> Prediction:
    masks = None
    if found.masks is not None:
        threshold = card.config.model.mask_head.threshold
        masks = paste_to_host(found.masks, found.boxes, found.height, found.width, threshold)
    return Prediction(
        image=pixels,
        boxes=found.boxes.numpy(),
        masks=masks,
        scores=found.scores.numpy(),
        classes=found.classes.numpy(),
        class_names=card.class_names,
        keypoints=None if found.keypoints is None else found.keypoints.numpy(),
        keypoint_schema=card.keypoints,
    )
