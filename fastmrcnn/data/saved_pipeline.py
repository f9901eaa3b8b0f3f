"""A saved pipeline of Albumentations, run on an image as it is annotated, before what this program changes.

Albumentations does not tell how it moves pixels, so bitmaps go through it like images: this is the one
place where masks are resampled, in the resolution of the annotation and by the nearest pixel. Where a
pipeline leaves an object's bitmap as it is, box, polygons and bitmap stay those of the annotation.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.collate import RasterisedObjects
from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.data.object_tables import select_objects, split_crops
from fastmrcnn.errors import UserError

BITS = 31  # of the seed of a sample
CENTRE = 0.5  # of a pixel, whose number Albumentations takes for the place of a keypoint in it
KEY = "data.augment.albumentations"


class PipelineError(UserError):
    """The pipeline is at fault, not the image."""


class Pipeline:
    """A pipeline as `albumentations.save` writes it.

    Its own settings of boxes and keypoints are not used: they are this program's.

    Raises:
        PipelineError: the package is not there, or the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # or else importing it asks a server for newer versions
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        try:
            import albumentations
        except ImportError as error:
            raise PipelineError(
                f"{KEY}={path} needs a package that is not there ({error}); "
                "pip install 'fastmrcnn[albumentations]'"
            ) from None
        kind = "yaml" if Path(path).suffix.lower() in (".yaml", ".yml") else "json"
        try:
            found = albumentations.load(path, data_format=kind)
        except Exception as error:  # whatever the constructors of the transforms raise
            raise PipelineError(
                f"{KEY}={path}: {type(error).__name__}: {error}; expected what albumentations.save writes"
            ) from None
        steps = found.transforms if isinstance(found, albumentations.Compose) else [found]
        boxes = albumentations.BboxParams("pascal_voc", label_fields=["box_index"], clip=True)
        points = albumentations.KeypointParams("xy", remove_invisible=False)
        with warnings.catch_warnings():  # where no step moves anything
            warnings.filterwarnings("ignore", "Got processor for")
            self.compose: Any = albumentations.Compose(steps, bbox_params=boxes, keypoint_params=points)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipeline, (self.path,)  # a loader process reads it anew

    def __call__(
        self,
        pixels: NDArray[np.uint8],
        objects: RasterisedObjects,
        schema: KeypointSchema | None,
        seed: int,
    ) -> tuple[NDArray[np.uint8], RasterisedObjects]:
        """An image (H, W, 3) and its objects after the pipeline; the size may be another.

        Args:
            seed: what the pipeline draws from.
        Raises:
            PipelineError: it fails, or does not give uint8 RGB.
        """
        height, width = pixels.shape[:2]
        masks = _whole_masks(objects, height, width)
        able = np.flatnonzero((objects.boxes[:, 2:] > objects.boxes[:, :2]).all(axis=1))
        # three points that tell whether left and right are exchanged, before those of the objects
        x, y = width / 2, height / 2
        points = np.array([[x, y], [x + 1, y], [x, y + 1]])
        if objects.keypoints is not None:
            points = np.concatenate([points, objects.keypoints[..., :2].reshape(-1, 2)])
        self.compose.set_random_seed(seed)
        try:
            found = self.compose(
                image=pixels,
                bboxes=objects.boxes[able],
                box_index=able.tolist(),
                keypoints=(points - CENTRE).astype(np.float32),
                **({"masks": masks} if len(masks) else {}),
            )
        except Exception as error:  # whatever the transforms raise
            raise PipelineError(f"{KEY}={self.path}: {type(error).__name__}: {error}") from None
        image = found["image"]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            what = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
            raise PipelineError(
                f"{KEY}={self.path} gives {what}, not uint8 (height, width, 3); save it without Normalize "
                "and ToTensorV2: this program does that itself"
            )
        boxes = objects.boxes.copy()
        boxes[able] = 0
        for box, index in zip(found["bboxes"], found["box_index"], strict=True):
            boxes[int(index)] = box[:4]
        places = np.asarray(found["keypoints"], np.float32).reshape(-1, 2) + np.float32(CENTRE)
        one, other = places[1] - places[0], places[2] - places[0]
        keypoints = objects.keypoints
        if keypoints is not None and schema is not None:
            keypoints = np.concatenate(
                [places[3:].reshape(*keypoints.shape[:2], 2), keypoints[..., 2:]], axis=2
            )
            if one[0] * other[1] < one[1] * other[0]:
                keypoints = keypoints[:, schema.mirror]
        moved = objects._replace(boxes=boxes, keypoints=keypoints)
        changed = [np.asarray(mask, np.uint8) for mask in found.get("masks", [])]
        return np.ascontiguousarray(image), _with_masks(moved, objects, masks, changed)


def _whole_masks(objects: RasterisedObjects, height: int, width: int) -> NDArray[np.uint8]:
    """(m, H, W) of the objects that have a bitmap."""
    able = np.flatnonzero((objects.windows[:, 2:] > 0).all(axis=1))
    crops, masks = split_crops(objects), np.zeros((len(able), height, width), np.uint8)
    for mask, i in zip(masks, able.tolist(), strict=True):
        x, y, w, h = objects.windows[i].tolist()
        mask[y : y + h, x : x + w] = crops[i]
    return masks


def _with_masks(
    moved: RasterisedObjects,
    before: RasterisedObjects,
    masks: NDArray[np.uint8],
    changed: list[NDArray[np.uint8]],
) -> RasterisedObjects:
    """The objects of which something is left: an object with a bitmap that changed has the bitmap's box."""
    boxes, windows, bitmaps = moved.boxes.copy(), moved.windows.copy(), {}
    able = np.flatnonzero((before.windows[:, 2:] > 0).all(axis=1)).tolist()
    for i, old, new in zip(able, masks, changed, strict=True):
        if np.array_equal(old, new):
            boxes[i] = before.boxes[i]
            continue
        rows, columns = np.flatnonzero(new.any(axis=1)), np.flatnonzero(new.any(axis=0))
        if not len(rows):
            boxes[i] = 0
            continue
        x, y, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        boxes[i] = windows[i] = (x, y, right, bottom)
        windows[i, 2:] -= windows[i, :2]
        bitmaps[i] = new[y:bottom, x:right]
    left = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    chosen = select_objects(before, left, bitmaps)  # windows and crops of before belong together
    points = None if moved.keypoints is None else moved.keypoints[left]
    return chosen._replace(boxes=boxes[left], windows=windows[left], keypoints=points)
