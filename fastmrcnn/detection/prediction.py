"""From a model's padded detections to what a person asks for: objects in the pixels of their own image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from fastmrcnn.data.images import rgb_pixels
from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.data.loader import prepare_image
from fastmrcnn.detection.draw import draw_instances
from fastmrcnn.detection.objects import ImageDetections, split_detections
from fastmrcnn.detection.paste import paste_to_host
from fastmrcnn.detection.run import run_model
from fastmrcnn.errors import UserError
from fastmrcnn.files import replacing
from fastmrcnn.weights.card import ModelCard, card_of


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
    detections = run_model(model, batch, config.runtime.precision)
    return split_detections(detections, torch.from_numpy(affine)[None], [pixels.shape[:2]], score)[0]


def require_detector(model: nn.Module) -> None:
    """UserError for a model that needs proposals from a file, or makes nothing else."""
    parts = card_of(model).config.model
    if not (parts.rpn.enabled and parts.box_head.enabled):
        raise UserError("this model is half a detector (its RPN or its heads alone) and finds no objects")


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
