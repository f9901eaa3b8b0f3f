"""From a model's padded detections to what a person asks for: objects in the pixels of their own image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.detection.draw import draw_instances
from fastmrcnn.detection.objects import ImageDetections
from fastmrcnn.detection.paste import paste_to_host
from fastmrcnn.files import replacing
from fastmrcnn.weights.card import ModelCard


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
