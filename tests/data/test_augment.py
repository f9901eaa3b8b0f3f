"""Random changes of images: masks, boxes and keypoints lie where the pixels are, and each sample is a
function of seed and index."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coloured import FILL, check_agreement, coloured, object_map

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import make_sample, read_objects
from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.transforms import Augment, Plan, apply_plan, draws, image_to_input, plan_image, resize

FLIPS = Augment(0.5, 0.5, 0.5, fill=FILL)
KINDS = {
    "crop": dataclasses.replace(FLIPS, crop=(64, 96)),
    "jitter": dataclasses.replace(FLIPS, crop=(96, 64), scale=(0.3, 2.0)),
    "rotate": dataclasses.replace(FLIPS, rotate=30),
    "everything": dataclasses.replace(FLIPS, crop=(96, 96), scale=(0.5, 2.0), rotate=20),
    "copy-paste": dataclasses.replace(FLIPS, copy_paste=0.7),
    "mosaic": dataclasses.replace(FLIPS, crop=(160, 128), scale=(0.9, 1.6), mosaic=0.7),
    "all of it": dataclasses.replace(
        FLIPS, crop=(160, 160), scale=(0.8, 1.5), rotate=20, mosaic=0.5, copy_paste=0.7
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coloured(tmp_path_factory.mktemp("coloured"))


def loader(dataset: CocoDataset, augment: Augment, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {"batch": 2, "short_sides": [60, 90], "long_side_max": 160, "steps": 12}
    return TrainLoader(dataset, augment=augment, seed=4, **(defaults | options))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_boxes_lie_on_the_pixels(images: CocoDataset, kind: str) -> None:
    found = [check_agreement(loaded.batch, row) for loaded in loader(images, KINDS[kind]) for row in range(2)]
    assert sum(found) >= len(found) * 1.2, "hardly an object is left"


@pytest.mark.parametrize("kind", KINDS)
def test_keypoints_lie_on_their_spots(tmp_path: Path, kind: str) -> None:
    """`left` is on white and `right` on black, and the other way round in a mirror image."""
    dataset = coloured(tmp_path, keypoints=True)
    found = mirrored = covered = 0
    for loaded in loader(dataset, KINDS[kind], steps=20):
        batch, targets = loaded.batch, loaded.batch.targets
        assert targets is not None
        assert targets.keypoints is not None
        for row, slot in np.argwhere(targets.valid.numpy()):
            mirror = np.linalg.det(object_map(batch, row, slot)[:, :2]) < 0
            for point, colour in zip(
                targets.keypoints[row, slot], (0, 255) if mirror else (255, 0), strict=True
            ):
                if point[2] < 2:  # not within the image, or covered
                    covered += int(point[2])
                    continue
                found, mirrored = found + 1, mirrored + int(mirror)
                height, width = batch.sizes[row].tolist()
                x, y = int(min(point[0], width - 1)), int(min(point[1], height - 1))
                spot = batch.pixels[row, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].float()
                assert (spot - colour).abs().amin(dim=(1, 2)).max() < 70
    assert found > 20
    assert 0 < mirrored < found
    assert (covered > 0) == (KINDS[kind].copy_paste > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_seed_and_index_alone(images: CocoDataset, kind: str) -> None:
    augment = dataclasses.replace(KINDS[kind], brightness=0.2, contrast=0.2, saturation=0.3, hue=0.1)

    def rows(**options: Any) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        loaded = loader(images, augment, buckets=[(160, 160)], **options)
        return [
            (found.image_ids[row], found.batch.pixels[row], targets.boxes[row, :3])
            for found in loaded
            if (targets := found.batch.targets) is not None
            for row in range(len(found.image_ids))
        ]

    one = rows(batch=1, steps=12)
    for other in (rows(batch=3, steps=4), rows(batch=2, steps=6, workers=2)):
        for kept, found in zip(one, other, strict=True):
            assert kept[0] == found[0]
            assert torch.equal(kept[1], found[1])
            assert torch.equal(kept[2], found[2])
    resumed = rows(batch=2, steps=6, start_step=4)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one[8:], resumed, strict=True))
    plain = loader(images, Augment(), batch=1, steps=12, buckets=[(160, 160)])
    assert [entry[0] for entry in one] == [loaded.image_ids[0] for loaded in plain]


def test_what_was_drawn_before_is_drawn_again() -> None:
    """New kinds of changes draw from a stream of their own: these are numbers of version 0.1."""
    generator = np.random.Philox(key=[7, 0], counter=5 * 8 // 4)
    expected = (generator.random_raw(8) >> np.uint64(11)) * 2.0**-53
    np.testing.assert_array_equal(draws(7, 5)[0, :8], expected)
    layers = [draws(7, 5, layer=layer)[0] for layer in range(4)]
    assert len(np.unique(layers)) == 4 * len(layers[0])


def test_large_scale_jitter_draws_scales_and_places() -> None:
    augment = Augment(crop=(100, 80), scale=(0.1, 2.0))
    plans = [plan_image(60, 80, row, [16], 99, augment) for row in draws(1, 0, 3000)]
    widths = np.array([plan.resized[1] for plan in plans])
    assert (widths.min(), widths.max()) == (8, 160)
    assert abs(widths.mean() - 84) < 4.5  # 4 standard deviations, and rounding
    assert all(plan.resized[0] == pytest.approx(0.75 * plan.resized[1], abs=0.9) for plan in plans)
    crops = np.array([plan.crop for plan in plans])
    assert all(plan.size == tuple(np.minimum(plan.resized, (100, 80))) for plan in plans)
    room = np.stack([widths, [plan.resized[0] for plan in plans]], axis=1) - crops[:, 2:]
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, :2] <= room).all()
    for axis in (0, 1):  # every place has the same chance
        places = crops[room[:, axis] > 10, axis] / room[room[:, axis] > 10, axis]
        assert abs(places.mean() - 0.5) < 4 * 0.29 / np.sqrt(len(places))
        assert places.min() == 0
        assert places.max() == 1
    turned = [
        plan_image(60, 80, row, [16], 99, dataclasses.replace(augment, rotate90=1)) for row in draws(1, 0, 9)
    ]
    for plan, other in zip(plans, turned, strict=False):  # fitted as it lies
        assert other.resized[1] == pytest.approx(plan.resized[1] * 1.25, abs=1)


@pytest.mark.parametrize(
    "changes", [{}, {"turns": 1}, {"turns": 3, "flip_horizontal": True}, {"flip_vertical": True}]
)
@pytest.mark.parametrize("resized", [(130, 170), (60, 80), (30, 41)])
def test_a_crop_is_a_part_of_the_whole(changes: dict[str, Any], resized: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    whole = Plan(resized, **changes)
    height, width = whole.size
    cut = dataclasses.replace(whole, crop=(width // 3, height // 4, width // 2, height // 2))
    part = apply_plan(resize(pixels, resized, cut.region), cut)
    expected = apply_plan(resize(pixels, resized), whole)
    expected = expected[height // 4 :][: height // 2, width // 3 :][:, : width // 2]
    assert part.shape == expected.shape
    # Pillow keeps the corners of what it resizes in float32: on noise, a few pixels are rounded otherwise
    assert np.abs(part.astype(int) - expected).max() <= 2
    assert (part != expected).mean() < 0.1


def test_rotation_turns_counterclockwise_about_the_centre() -> None:
    pixels = np.full((41, 61, 3), 100, np.uint8)
    pixels[18:23, 50:55] = 255  # right of the centre
    plan = Plan((41, 61), rotation=30, fill=FILL)
    turned = apply_plan(pixels, plan)
    y, x = np.nonzero(turned[..., 0] > 200)
    angle = np.degrees(np.arctan2(20.5 - (y.mean() + 0.5), x.mean() + 0.5 - 30.5))
    assert angle == pytest.approx(30, abs=0.5)
    assert turned[0, 0].tolist() == list(FILL)
    corner = image_to_input(plan, 41, 61) @ [30.5, 20.5, 1]
    np.testing.assert_allclose(corner, [30.5, 20.5])


def test_boxes_of_turned_objects_are_tight(tmp_path: Path) -> None:
    """A diamond's box shrinks under an eighth of a turn; a box of turned corners would grow."""
    dataset = coloured(tmp_path, images=1)
    record = dataset.records[0]
    diamond = np.array([40.0, 10, 60, 30, 40, 50, 20, 30])
    item = dataclasses.replace(record.objects[0], segmentation=[diamond], box=(20, 10, 60, 50))
    record = dataclasses.replace(record, objects=[item])
    plan = Plan((60, 80), rotation=45)
    for polygons in (True, False):
        sample = make_sample(
            np.zeros((60, 80, 3), np.uint8), plan, (60, 80), read_objects(record, polygons=polygons)
        )
        side = 20 / np.sqrt(2)
        expected = [40 - side, 30 - side, 40 + side, 30 + side]
        assert sample.boxes is not None
        np.testing.assert_allclose(sample.boxes[0], expected, atol=1e-4 if polygons else 1.5)


def test_objects_that_are_hardly_there_are_neither_learnt_nor_punished(tmp_path: Path) -> None:
    record = coloured(tmp_path, images=1).records[0]
    left, top, right, bottom = (int(side) for side in record.objects[0].box)
    pixels = np.zeros((60, 80, 3), np.uint8)
    # a quarter of the square's width is left, the triangle is gone
    plan = Plan((60, 80), crop=(0, 0, left + (right - left) // 4, 60))
    for least, crowd in ((0.2, False), (0.3, True)):
        sample = make_sample(
            pixels[:, : plan.size[1]], plan, (60, 80), read_objects(record), min_visible=least
        )
        assert sample.objects is not None
        assert sample.objects.crowd.tolist() == [crowd]
        assert sample.boxes is not None
        assert sample.boxes.tolist() == [[left, top, left + (right - left) // 4, bottom]]
