"""What may be asked of an image, and the JSON that answers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pydantic import BaseModel, ConfigDict, Field

from fastmrcnn.detection.detector import Detector
from fastmrcnn.detection.objects import Objects, coco_results
from fastmrcnn.service.outlines import outlines

LARGEST_ID = 2**53 - 1  # that every reader of JSON holds exactly


class Options(BaseModel):
    """The query of a request. What it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="least score of an object")
    masks: Literal["rle", "polygon", "none"] = Field("rle", description="how masks are given")
    image_id: int = Field(1, ge=0, le=LARGEST_ID, description="what the results bear as image_id")


class Image(NamedTuple):
    """An image to find objects in."""

    pixels: NDArray[np.uint8]  # (h, w, 3) RGB
    options: Options
    notes: tuple[str, ...] = ()  # what there is to say of its values


class Found(NamedTuple):
    height: int
    width: int
    entries: list[dict[str, Any]]  # COCO's, masks as RLE or none
    image: Image


def find(detector: Detector, images: Sequence[Image]) -> list[Found]:
    """Objects in images of one padded shape, which go through the model together."""
    options = [image.options for image in images]
    pixels = [image.pixels for image in images]
    found = detector.detect_batch(pixels, min(own.score for own in options))
    found = [_with_score(objects, own.score) for objects, own in zip(found, options, strict=True)]
    if all(own.masks == "none" for own in options):
        found = [replace(objects, probabilities=None) for objects in found]
    card = detector.card
    ids, threshold = [own.image_id for own in options], card.config.model.mask_head.threshold
    entries = iter(coco_results(found, ids, card.category_ids, threshold, card.config.data.keypoint_offset))
    return [
        Found(objects.height, objects.width, _named(entries, objects, image, card.class_names), image)
        for objects, image in zip(found, images, strict=True)
    ]


def as_json(found: Found) -> bytes:
    """The body of the answer."""
    options = found.image.options
    if options.masks == "polygon":
        for entry in found.entries:
            if "segmentation" in entry:
                entry["segmentation"] = _polygons(entry["segmentation"])
    size = {"id": options.image_id, "width": found.width, "height": found.height}
    return orjson.dumps({"image": size, "results": found.entries, "notes": found.image.notes})


def _with_score(objects: Objects, score: float) -> Objects:
    assert objects.scores is not None, "what was found has them"
    return objects.first(int((objects.scores >= score).sum()))  # they come by falling score


def _named(
    entries: Iterator[dict[str, Any]], objects: Objects, image: Image, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The next entries, which are those of these objects, with their classes' names."""
    own = [
        {**entry, "category_name": names[label]}
        for entry, label in zip(islice(entries, len(objects)), objects.classes.tolist(), strict=True)
    ]
    if image.options.masks == "none":  # others of the batch want theirs
        for entry in own:
            entry.pop("segmentation", None)
    return own


def _polygons(rle: dict[str, Any]) -> list[list[float]]:
    return outlines(coco_mask.decode(rle).view(np.bool_))


# What is said of an answer in openapi.json.


class SizeOfImage(BaseModel):
    id: int
    width: int
    height: int


class RunLengths(BaseModel):
    """COCO's compressed RLE."""

    size: tuple[int, int] = Field(description="height and width")
    counts: str


class Result(BaseModel):
    image_id: int
    category_id: int
    category_name: str
    bbox: tuple[float, float, float, float] = Field(description="x, y, width, height, in pixels")
    score: float
    segmentation: RunLengths | list[list[float]] | None = Field(
        None, description="RLE, or polygons [x0, y0, x1, y1, ...]; left out where there is no mask"
    )
    keypoints: list[float] | None = Field(
        None, description="x, y and score of each; left out where there are none"
    )


class Answer(BaseModel):
    image: SizeOfImage
    results: list[Result]
    notes: list[str] = Field(description="what there is to say of the image's values, most often nothing")


class Error(BaseModel):
    error: str = Field(description="one line")


class Health(BaseModel):
    status: Literal["ready"]
    classes: list[str]
