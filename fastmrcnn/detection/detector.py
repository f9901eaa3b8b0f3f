"""A trained model that is called with an image, and how to get one from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.build import image_options
from fastmrcnn.data.images import rgb_pixels
from fastmrcnn.data.loader import prepare_image
from fastmrcnn.data.pixel_range import Reading
from fastmrcnn.detection.objects import Objects, split_detections
from fastmrcnn.detection.prediction import Prediction, as_prediction
from fastmrcnn.detection.run import run_model
from fastmrcnn.errors import UserError
from fastmrcnn.weights.trained import TrainedModel, load_trained


@dataclass(frozen=True)
class Detector(TrainedModel):
    """A trained model that finds objects in images. `load` gets one from a file.

    Raises:
        UserError: the model needs proposals from a file, or makes nothing else.
    """

    def __post_init__(self) -> None:
        parts = self.card.config.model
        if not (parts.rpn.enabled and parts.box_head.enabled):
            raise UserError("this model is half a detector (its RPN or its heads alone) and finds no objects")

    @property
    def class_names(self) -> list[str]:
        """Of classes 0..K-1."""
        return self.card.class_names

    @property
    def reading(self) -> Reading:
        """How image files become pixels: as in its training."""
        options = image_options(self.card.config)
        return Reading(options.pixel_range, options.max_pixels)

    def __call__(self, image: str | Path | NDArray[np.uint8] | Image.Image, score: float = 0.5) -> Prediction:
        """Find the objects in an image.

        Args:
            image: a file, a Pillow image, or uint8 pixels (h, w, 3) in RGB or (h, w) in grey.
            score: detections below it are left out. The model itself leaves out those below its
                configuration's model.box_head.score_threshold.
        Raises:
            UserError: the file is missing or not an image.
            ValueError: pixels of another shape or dtype.
        """
        pixels = rgb_pixels(image, self.reading)
        return as_prediction(self.detect(pixels, score), pixels, self.card)

    def detect(self, pixels: NDArray[np.uint8], score: float) -> Objects:
        """The detections in (h, w, 3) RGB pixels, resized by the rule in the model's card."""
        config = self.card.config
        batch, input_to_image = prepare_image(pixels, config.data.short_side_test, config.data.long_side_max)
        detections = run_model(self.model, batch, config.runtime.precision)
        return split_detections(
            detections, torch.from_numpy(input_to_image)[None], [pixels.shape[:2]], score
        )[0]


def load(path: str | Path, device: str | torch.device = "auto") -> Detector:
    """A detector from a run's folder (its last checkpoint), a checkpoint, or a published model's file.

    The averaged weights (EMA) are taken if the run kept them.

    Args:
        path: also a URL of a published detector of torchvision or detectron2, which is read with its recipe
            in configs/zoo/.
        device: auto (a GPU if there is one) | cpu | cuda | cuda:0 ...
    Raises:
        UserError: missing, damaged, or something else; the model is half a detector; no such device.
    """
    trained = load_trained(path, device)
    return Detector(trained.model, trained.card)


load_checkpoint = load  # its earlier name


def predict(
    detector: Detector, image: str | Path | NDArray[np.uint8] | Image.Image, score: float = 0.5
) -> Prediction:
    """`detector(image, score)`, in its earlier form.

    Once the command is imported, its module has the name `fastmrcnn.predict`.
    """
    return detector(image, score)
