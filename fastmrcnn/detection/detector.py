"""A trained model that is called with an image, and how to get one from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.build import image_options
from fastmrcnn.data.images import rgb_pixels
from fastmrcnn.data.loader import padded_shape, prepare_images
from fastmrcnn.data.pixel_range import Reading
from fastmrcnn.data.transforms import Size
from fastmrcnn.detection.arguments import (
    ImageLike,
    checked_batch,
    checked_image,
    checked_path,
    checked_score,
)
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

    @overload
    def __call__(self, image: ImageLike, score: float = 0.5, *, batch: int = 8) -> Prediction: ...

    @overload
    def __call__(
        self, image: list[Any] | tuple[Any, ...], score: float = 0.5, *, batch: int = 8
    ) -> list[Prediction]: ...

    def __call__(
        self, image: ImageLike | list[Any] | tuple[Any, ...], score: float = 0.5, *, batch: int = 8
    ) -> Prediction | list[Prediction]:
        """Find the objects in an image, or in each of a list.

        Args:
            image: a file, a Pillow image, or uint8 pixels (h, w, 3) in RGB or (h, w) in grey, an array or a
                tensor on the CPU. A list or a tuple of such gives a list of predictions in its order.
            score: detections below it are left out. The model itself leaves out those below its
                configuration's model.box_head.score_threshold.
            batch: most images of a list, all of one padded shape, that go through the model together.
        Raises:
            UserError: the file is missing or not an image.
            ValueError: an argument is something else, such as pixels of another shape or dtype.
        """
        score, batch = checked_score(score), checked_batch(batch)
        if isinstance(image, list | tuple):
            return self._predict_all(image, score, batch)
        pixels = _pixels(checked_image(image), "image", self.reading)
        return as_prediction(self.detect(pixels, score), pixels, self.card)

    def detect(self, pixels: NDArray[np.uint8], score: float) -> Objects:
        """The detections in (h, w, 3) RGB pixels, resized by the rule in the model's card."""
        return self._detect([pixels], score)[0]

    def detect_batch(self, images: Sequence[NDArray[np.uint8]], score: float) -> list[Objects]:
        """As `detect`, in images of one `padded_shape`, which go through the model together."""
        return self._detect(images, score)

    def padded_shape(self, size: Size) -> Size:
        """(H, W) of the batch that an image of this height and width goes into."""
        data = self.card.config.data
        return padded_shape(size, data.short_side_test, data.long_side_max)

    def _detect(self, images: Sequence[NDArray[np.uint8]], score: float) -> list[Objects]:
        """Of images with one padded shape."""
        config = self.card.config
        batch, maps = prepare_images(images, config.data.short_side_test, config.data.long_side_max)
        detections = run_model(self.model, batch, config.runtime.precision)
        sizes = [pixels.shape[:2] for pixels in images]
        return split_detections(detections, torch.from_numpy(maps), sizes, score)

    def _predict_all(self, images: Sequence[Any], score: float, batch: int) -> list[Prediction]:
        data = self.card.config.data
        names = [f"image[{place}]" for place in range(len(images))]
        checked = [checked_image(image, name) for image, name in zip(images, names, strict=True)]
        found: dict[int, Prediction] = {}
        waiting: dict[Size, dict[int, NDArray[np.uint8]]] = {}

        def predict(group: dict[int, NDArray[np.uint8]]) -> None:
            objects = self._detect(list(group.values()), score)
            for (place, pixels), one in zip(group.items(), objects, strict=True):
                found[place] = as_prediction(one, pixels, self.card)

        for place, (image, name) in enumerate(zip(checked, names, strict=True)):
            pixels = _pixels(image, name, self.reading)
            shape = padded_shape(pixels.shape[:2], data.short_side_test, data.long_side_max)
            waiting.setdefault(shape, {})[place] = pixels
            if len(waiting[shape]) == batch:
                predict(waiting.pop(shape))
        for group in waiting.values():
            predict(group)
        return [found[place] for place in range(len(images))]


def _pixels(image: Path | NDArray[np.uint8] | Image.Image, name: str, reading: Reading) -> NDArray[np.uint8]:
    """(h, w, 3) RGB pixels of a checked image."""
    try:
        return rgb_pixels(image, reading)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow may decode its images only now
        raise ValueError(f"{name} cannot be used: {error}") from None


def load(path: str | Path, device: str | torch.device = "auto") -> Detector:
    """A detector from a run's folder (its last checkpoint), a checkpoint, or a published model's file.

    The averaged weights (EMA) are taken if the run kept them.

    Args:
        path: also a URL of a published detector of torchvision or detectron2, which is read with its recipe
            in configs/zoo/.
        device: auto (a GPU if there is one) | cpu | cuda | cuda:0 ...
    Raises:
        UserError: missing, damaged, or something else; the model is half a detector; no such device.
        ValueError: the path is neither text nor a Path, or empty.
    """
    checked_path(path, "path")
    trained = load_trained(path, device)
    return Detector(trained.model, trained.card)


load_checkpoint = load  # its earlier name


def predict(detector: Detector, image: ImageLike, score: float = 0.5) -> Prediction:
    """`detector(image, score)`, in its earlier form.

    Once the command is imported, its module has the name `fastmrcnn.predict`.
    """
    if not isinstance(detector, Detector):
        raise ValueError(f"detector must be what fastmrcnn.load gives, got a {type(detector).__name__}")
    return detector(image, score)
