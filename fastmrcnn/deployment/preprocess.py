"""From an image to the inputs of an exported file: the rule, as the file's users are told it, and its use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.config.schema import Config, DataConfig
from fastmrcnn.data.buckets import MULTIPLE
from fastmrcnn.data.transforms import Size, resize, resized_size
from fastmrcnn.weights.exported import ExportedCard


def default_shape(config: Config, sizes: Iterable[Size] | None) -> Size:
    """The smallest padded shape that holds images of these heights and widths, resized by the rule.

    Args:
        sizes: None: of any images.
    """
    data = config.data
    if sizes is None:
        height = width = data.long_side_max
    else:
        rule = (data.short_side_test, data.long_side_max)
        resized = [resized_size(*size, *rule) for size in set(sizes)]
        height, width = (max(sides) for sides in zip(*resized, strict=True))
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def fitted_size(size: Size, data: DataConfig, shape: Size) -> Size:
    """Height and width to which an image is resized: by the rule, or less where it would not fit."""
    scale = min(
        data.short_side_test / min(size),
        data.long_side_max / max(size),
        shape[0] / size[0],
        shape[1] / size[1],
    )
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return min(height, shape[0]), min(width, shape[1])


def as_inputs(
    images: Sequence[NDArray[np.uint8]], data: DataConfig, shape: Size
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Pixels (N, H, W, 3) and sizes (N, 2) of images (h, w, 3) in RGB."""
    pixels = np.zeros((len(images), *shape, 3), np.uint8)
    sizes = np.zeros((len(images), 2), np.int32)
    for index, image in enumerate(images):
        height, width = fitted_size((image.shape[0], image.shape[1]), data, shape)
        pixels[index, :height, :width] = resize(image, (height, width))
        sizes[index] = height, width
    return pixels, sizes


def noise(count: int, shape: Size, seed: int = 0) -> NDArray[np.uint8]:
    """Pixels (count, H, W, 3) of noise in which there is something to see: blobs of several sizes."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        layers = [random.integers(0, 256, (side, side, 3), np.uint8) for side in (4, 8, 16, 64)]
        images.append(np.mean([resize(layer, shape) for layer in layers], axis=0).astype(np.uint8))
    return np.stack(images)


def preprocessing(
    exported: ExportedCard, outputs: Sequence[str], compiled_for: str | None = None
) -> dict[str, Any]:
    """What preprocessing.json says.

    Args:
        outputs: names, in the order of the file.
        compiled_for: the kind of device that the file holds machine code for; None: it holds none.
    """
    config = exported.card.config
    height, width = exported.shape
    data = config.data
    return {
        "inputs": {
            "pixels": {
                "dtype": "uint8",
                "shape": [exported.batch, height, width, 3],
                "order": "image, row, column, channel; channels are red, green, blue",
            },
            "sizes": {
                "dtype": "int32",
                "shape": [exported.batch, 2],
                "order": "height and width of each image within its pixels, which lie at the top left",
            },
        },
        "resize": {
            "short_side": data.short_side_test,
            "long_side_max": data.long_side_max,
            "fit": [height, width],
            "rule": "scale by the least of short_side / short side, long_side_max / long side, "
            "fit[0] / height and fit[1] / width; sides are rounded to the nearest pixel, halves up",
            "filter": "bilinear with antialiasing (Pillow's BILINEAR)",
        },
        "pad": "zeros to the right and below",
        "outputs": list(outputs),
        "file": {"compiled": compiled_for is not None, "device": compiled_for or "cpu"},
        "normalize": "no: the file does it",
        "pixel_range": None if data.pixel_range == "auto" else list(data.pixel_range),
        "mask_threshold": config.model.mask_head.threshold if config.model.mask_head.enabled else None,
        "keypoints": None if exported.card.keypoints is None else exported.card.keypoints.names,
    }
