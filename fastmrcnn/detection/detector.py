"""A trained model that is called with an image, and how to get one from a file."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

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
from fastmrcnn.detection.fetch import Fetched
from fastmrcnn.detection.objects import Objects
from fastmrcnn.detection.pipeline import ahead, reading_threads
from fastmrcnn.detection.prediction import Prediction, all_predictions, as_prediction
from fastmrcnn.detection.run import Inference, device_of
from fastmrcnn.device import detecting_precision
from fastmrcnn.errors import UserError
from fastmrcnn.graphs import beside
from fastmrcnn.structures import Batch, pinned
from fastmrcnn.weights.trained import TrainedModel, load_trained

IN_FLIGHT = 2  # batches of a list that a GPU is given before the host takes up what came of the one before


class Prepared(NamedTuple):
    """Images of one padded shape, as the model takes them."""

    batch: Batch
    input_to_image: torch.Tensor  # (n, 2, 3)
    sizes: list[Size]  # height and width of each as it is


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
        return self.begin(self.prepare([pixels]), score).objects()[0]

    def detect_batch(self, images: Sequence[NDArray[np.uint8]], score: float) -> list[Objects]:
        """As `detect`, in images of one `padded_shape`, which go through the model together."""
        return self.begin(self.prepare(images), score, encode=True).objects()

    def padded_shape(self, size: Size) -> Size:
        """(H, W) of the batch that an image of this height and width goes into."""
        data = self.card.config.data
        return padded_shape(size, data.short_side_test, data.long_side_max)

    def prepare(self, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """Resize (h, w, 3) RGB pixels and pad them to one shape, which must be the same for all of them."""
        data = self.card.config.data
        batch, maps = prepare_images(images, data.short_side_test, data.long_side_max)
        sizes = [(pixels.shape[0], pixels.shape[1]) for pixels in images]
        return Prepared(pinned(batch, device_of(self.model)), torch.from_numpy(maps), sizes)

    def begin(self, images: Prepared, score: float, *, encode: bool = False) -> Fetched:
        """Detect; on a GPU without waiting, so that the next images can be begun before these are fetched.

        Args:
            encode: masks on a GPU come as run lengths.
        """
        threshold = self.card.config.model.mask_head.threshold if encode else None
        return Fetched(
            self._inference(images.batch), images.input_to_image, images.sizes, score, encode=threshold
        )

    def without_graphs(self) -> Detector:
        """The same model, which on a GPU replays nothing as CUDA graphs."""
        config = self.card.config
        runtime = config.runtime.model_copy(update={"graphs": "off"})
        card = replace(self.card, config=config.model_copy(update={"runtime": runtime}))
        return Detector(self.model, card)

    @cached_property
    def _inference(self) -> Inference:
        runtime = self.card.config.runtime
        precision = detecting_precision(runtime.precision, device_of(self.model), runtime.cpu_precision)
        return Inference(self.model, precision, graphs=runtime.graphs == "auto")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # graphs stay here

    def _predict_all(self, images: Sequence[Any], score: float, batch: int) -> list[Prediction]:
        data = self.card.config.data
        names = [f"image[{place}]" for place in range(len(images))]
        checked = [checked_image(image, name) for image, name in zip(images, names, strict=True)]
        found: dict[int, Prediction] = {}
        waiting: dict[Size, dict[int, NDArray[np.uint8]]] = {}
        begun: deque[tuple[dict[int, NDArray[np.uint8]], Fetched]] = deque()
        device = device_of(self.model)
        on_gpu = device.type == "cuda"

        def begin(group: dict[int, NDArray[np.uint8]]) -> None:
            begun.append((group, self.begin(self.prepare(list(group.values())), score)))
            if len(begun) > (IN_FLIGHT if on_gpu else 0):
                fetch()

        def fetch() -> None:
            group, fetched = begun.popleft()
            with beside(device):
                objects = all_predictions(fetched.objects(), list(group.values()), self.card)
            found.update(zip(group, objects, strict=True))

        def read(place: int) -> NDArray[np.uint8]:
            return _pixels(checked[place], names[place], self.reading)

        with contextlib.closing(ahead(range(len(images)), read, reading_threads(on_gpu))) as pixels_ahead:
            for place, future in pixels_ahead:
                pixels = future.result()
                shape = padded_shape(pixels.shape[:2], data.short_side_test, data.long_side_max)
                waiting.setdefault(shape, {})[place] = pixels
                if len(waiting[shape]) == batch:
                    begin(waiting.pop(shape))
        for group in waiting.values():
            begin(group)
        while begun:
            fetch()
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
