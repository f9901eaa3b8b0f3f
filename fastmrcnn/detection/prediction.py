"""From a model's padded detections to what a person asks for: objects in the pixels of their own image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.detection.arguments import checked_path
from fastmrcnn.detection.draw import draw_objects, save_picture
from fastmrcnn.detection.objects import Objects, all_pasted
from fastmrcnn.weights.card import ModelCard


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one image, by falling score."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB
    objects: Objects
    class_names: list[str]  # of all classes that the model knows
    keypoint_schema: KeypointSchema | None = None  # names of the J keypoints, and how they are joined

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(n, 4) xyxy in pixels of the image."""
        return self.objects.boxes

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """(n, h, w); None: the model has no mask head."""
        return self.objects.masks

    @property
    def scores(self) -> NDArray[np.float32]:
        """(n,) in 0..1."""
        assert self.objects.scores is not None, "what was found has them"
        return self.objects.scores

    @property
    def classes(self) -> NDArray[np.int64]:
        """(n,)."""
        return self.objects.classes

    @property
    def keypoints(self) -> NDArray[np.float32] | None:
        """(n, J, 3) x, y, score; None: the model has no such head."""
        return self.objects.keypoints

    @property
    def names(self) -> list[str]:
        """Of the n objects' classes."""
        return [self.class_names[label] for label in self.classes.tolist()]

    def draw(self) -> NDArray[np.uint8]:
        """(h', w', 3): the image with masks, boxes, keypoints, names and scores; small ones are enlarged.

        Colours tell the classes apart, or the objects if there is but one class.
        """
        skeleton = () if self.keypoint_schema is None else self.keypoint_schema.skeleton
        return draw_objects(self.image, self.objects, self.class_names, skeleton)

    def save(self, path: str | Path) -> None:
        """Write the drawing as PNG. What stood there is replaced.

        Raises:
            UserError: the file cannot be written.
            ValueError: the path is neither text nor a Path, or empty.
        """
        save_picture(checked_path(path, "path"), self.draw())


def as_prediction(found: Objects, pixels: NDArray[np.uint8], card: ModelCard) -> Prediction:
    return all_predictions([found], [pixels], card)[0]


def all_predictions(
    found: Sequence[Objects], images: Sequence[NDArray[np.uint8]], card: ModelCard
) -> list[Prediction]:
    """Of several images, whose masks come from their device in one copy."""
    each = zip(images, all_pasted(found, card.config.model.mask_head.threshold), strict=True)
    return [Prediction(pixels, objects, card.class_names, card.keypoints) for pixels, objects in each]
