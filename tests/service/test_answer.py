"""From a batch's objects to each request's JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import small_config
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from fastmrcnn.detection.objects import Objects, coco_results
from fastmrcnn.service.answer import Answer, Image, Options, as_json, find

IDS, NAMES = [7, 3], ["disc", "box"]


def objects(seed: int, height: int = 40, width: int = 50, points: int = 0) -> Objects:
    """Five, by falling score."""
    draw = np.random.default_rng(seed)
    corner = draw.uniform(0, 20, (5, 2))
    boxes = np.concatenate([corner, corner + draw.uniform(5, 18, (5, 2))], axis=1).astype(np.float32)
    return Objects(
        height,
        width,
        boxes,
        draw.integers(0, 2, 5),
        np.linspace(0.9, 0.1, 5, dtype=np.float32),
        probabilities=torch.from_numpy(draw.random((5, 28, 28), dtype=np.float32)),
        keypoints=draw.uniform(0, 40, (5, points, 3)).astype(np.float32) if points else None,
    )


class Planted:
    """Finds what it is given, those with the score that it is asked for."""

    def __init__(self, found: list[Objects]) -> None:
        self.found, self.least = found, -1.0
        self.card = SimpleNamespace(config=small_config(), category_ids=IDS, class_names=NAMES)

    def detect_batch(self, images: list[np.ndarray], score: float) -> list[Objects]:
        assert len(images) == len(self.found)
        self.least = score
        return [one.first(int((one.scores >= score).sum())) for one in self.found]  # type: ignore[operator]


def ask(found: list[Objects], *options: Options) -> list[Any]:
    pixels = np.zeros((40, 50, 3), np.uint8)
    detector: Any = Planted(found)
    images = [Image(pixels, own, ("a note",)) for own in options]
    answers = [json.loads(as_json(one)) for one in find(detector, images)]
    assert detector.least == min(own.score for own in options)
    for answer in answers:
        Answer.model_validate(answer)
    return answers


def test_requests_of_one_batch_get_what_each_asked_for() -> None:
    found = [objects(1), objects(2), objects(3), objects(4)]
    options = (
        Options(score=0.5, image_id=4),
        Options(score=0.0, masks="none", image_id=9),
        Options(score=0.95),
        Options(score=0.25, masks="polygon", image_id=4),
    )
    answers = ask(found, *options)
    for answer, one, own, number in zip(answers, found, options, (3, 5, 0, 4), strict=True):
        assert answer["image"] == {"id": own.image_id, "width": 50, "height": 40}
        assert answer["notes"] == ["a note"]
        wanted = json.loads(json.dumps(coco_results([one.first(number)], [own.image_id], IDS)))
        assert len(wanted) == len(answer["results"]) == number
        for entry, other, label in zip(answer["results"], wanted, one.classes.tolist(), strict=False):
            assert entry.pop("category_name") == NAMES[label]
            mask, rle = entry.pop("segmentation", None), other.pop("segmentation")
            assert entry == other
            if own.masks == "polygon":
                again = coco_mask.merge(coco_mask.frPyObjects(mask, 40, 50))
                assert (coco_mask.decode(again) == coco_mask.decode(rle)).all()
            else:
                assert mask == (rle if own.masks == "rle" else None)


def test_keypoints_and_models_without_masks() -> None:
    one = objects(5, points=3)
    (answer,) = ask([one], Options(score=0))
    assert one.keypoints is not None
    for entry, points in zip(answer["results"], one.keypoints, strict=True):
        shift = small_config().data.keypoint_offset
        assert np.array(entry["keypoints"]).reshape(3, 3) == pytest.approx(points - [shift, shift, 0])
    for masks in ("rle", "polygon", "none"):
        (answer,) = ask([replace(one, probabilities=None)], Options(score=0, masks=masks))
        assert all("segmentation" not in entry for entry in answer["results"])


@pytest.mark.parametrize(
    "query", [{"score": "inf"}, {"score": "-0.1"}, {"masks": "RLE"}, {"image_id": 2**53}, {"a": 1}]
)
def test_options_that_make_no_sense(query: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options.model_validate(query)
