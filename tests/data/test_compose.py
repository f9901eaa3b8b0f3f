"""Copy-paste and mosaic: what is drawn, what the heads are taught, and what happens to images that cannot be
read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coloured import FILL, PER_IMAGE, coloured, near

from fastmrcnn.config.checks import check_trainable
from fastmrcnn.config.file import parse_config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.compose import NEAREST_EDGE, plan_composition
from fastmrcnn.data.loader import TrainLoader, largest_targets
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.transforms import Augment
from fastmrcnn.errors import UserError
from fastmrcnn.kernels import mask_targets, polygon_mask_targets

PASTE = Augment(0.5, copy_paste=1, fill=FILL)
MOSAIC = Augment(0.5, crop=(160, 160), scale=(0.8, 1.6), mosaic=1, fill=FILL)
BOTH = dataclasses.replace(MOSAIC, copy_paste=1, rotate=15)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coloured(tmp_path_factory.mktemp("coloured"), images=8)


def loader(dataset: CocoDataset, augment: Augment, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {"batch": 2, "short_sides": [60], "long_side_max": 160, "steps": 6, "seed": 2}
    return TrainLoader(dataset, augment=augment, **(defaults | options))


@pytest.mark.parametrize("augment", [PASTE, MOSAIC, BOTH], ids=["copy-paste", "mosaic", "both"])
def test_heads_are_taught_what_is_seen(images: CocoDataset, augment: Augment) -> None:
    """Mask targets, of bitmaps and of polygons, against the colours of the pixels within each box."""
    compared = 0
    for loaded in loader(images, augment, polygons=PolygonSizes()):
        batch, targets = loaded.batch, loaded.batch.targets
        assert targets is not None
        assert targets.polygons is not None
        slots = targets.valid.shape[1]
        assert targets.masks.to_annotation.shape == (2, slots, 2, 3)
        assert targets.masks.size.shape == (2, slots, 2)
        assert targets.polygons.to_input.shape == (2, slots, 2, 3)
        sides = targets.boxes[..., 2:] - targets.boxes[..., :2]
        image, matched = torch.nonzero(targets.valid & (sides > 14).all(dim=2), as_tuple=True)
        boxes = targets.boxes[image, matched]
        sizes = {"image_sizes": batch.sizes, "image_shape": tuple(batch.pixels.shape[2:])}
        soft = mask_targets(boxes, image, matched, *targets.masks, **sizes, resolution=14)
        drawn = polygon_mask_targets(boxes, image, matched, *targets.polygons, resolution=14)
        has_polygon = targets.polygons.parts[image, matched] > 0
        for row, (n, g) in enumerate(zip(image.tolist(), matched.tolist(), strict=True)):
            index = int(targets.classes[n, g])
            if (targets.classes[n][targets.valid[n]] == index).sum() > 1:
                continue  # an image that is there twice: colours do not tell which is which
            x1, y1, x2, y2 = boxes[row].tolist()
            x = (x1 + (np.arange(14) + 0.5) / 14 * (x2 - x1)).astype(int)
            y = (y1 + (np.arange(14) + 0.5) / 14 * (y2 - y1)).astype(int)
            pixels = batch.pixels[n].permute(1, 2, 0).numpy().astype(int)[np.ix_(y, x)]
            seen = near(pixels, index)
            certain = (soft[row] < 0.05) | (soft[row] > 0.95)
            assert (seen == (soft[row] > 0.5).numpy())[certain.numpy()].mean() > 0.9
            if has_polygon[row]:
                assert (drawn[row] == (soft[row] >= 0.5)).float().mean() > 0.9
            compared += 1
        assert not drawn[~has_polygon].any()
    assert compared > 20


def test_some_objects_are_pasted_and_hide_what_is_below(images: CocoDataset) -> None:
    counts, whole = [], []
    for loaded in loader(images, PASTE, batch=1, steps=60):
        targets = loaded.batch.targets
        assert targets is not None
        classes = targets.classes[0][targets.valid[0]].numpy() // PER_IMAGE
        own = classes == loaded.image_ids[0] - 1
        counts.append(int((~own).sum()))
        masks = targets.masks
        for slot in np.flatnonzero(targets.valid[0].numpy())[own]:
            start, area = int(masks.offset[0, slot]), int(masks.window[0, slot, 2:].prod())
            record = images.records[loaded.image_ids[0] - 1]
            before = record.objects[int(targets.classes[0, slot]) % PER_IMAGE].area
            whole.append(int(masks.buffer[start : start + area].sum()) / before)
    assert set(counts) == {1, 2, 3}
    assert max(whole) == 1
    assert np.mean(np.array(whole) < 0.9) > 0.3  # what is hidden is no part of a mask any more


def test_middles_of_mosaics_and_other_images(images: CocoDataset) -> None:
    sizes = [(record.height, record.width) for record in images.records]
    augment = dataclasses.replace(MOSAIC, crop=(200, 100), copy_paste=0.25, mosaic=0.5)
    made = [plan_composition(n % 8, sizes, 0, n, [60], 99, augment) for n in range(1200)]
    assert [made[n] == plan_composition(n % 8, sizes, 0, n, [60], 99, augment) for n in range(9)] == [
        True
    ] * 9
    layers = [[] if plan is None else plan.layers for plan in made]
    assert np.mean([len(some) >= 4 for some in layers]) == pytest.approx(0.5, abs=0.058)  # 4 deviations
    assert np.mean([bool(some) and some[-1].pasted for some in layers]) == pytest.approx(0.25, abs=0.05)
    assert {len(some) for some in layers} == {0, 2, 4, 5}
    others = [[layer.image - n % 8 for layer in some[1:]] for n, some in enumerate(layers)]
    assert {step % 8 for some in others for step in some} == set(range(1, 8))
    assert all(some[0].image == n % 8 for n, some in enumerate(layers) if some)
    covered = np.zeros((200, 100), int)
    for some in layers:
        for layer in some:
            left, top, right, bottom = layer.area
            assert 0 <= left < right <= 100
            assert 0 <= top < bottom <= 200
        if len(some) == 4:
            tiles = np.zeros((200, 100), int)
            for layer in some:
                left, top, right, bottom = layer.area
                tiles[top:bottom, left:right] += 1
            assert tiles.max() == 1  # tiles do not overlap
            covered += tiles
    assert (covered > 0).all()
    assert NEAREST_EDGE == 0.25


@pytest.mark.parametrize("augment", [PASTE, MOSAIC], ids=["copy-paste", "mosaic"])
def test_another_image_that_cannot_be_read_is_named_and_replaced(tmp_path: Path, augment: Augment) -> None:
    dataset = coloured(tmp_path)
    dataset.records[2].path.write_bytes(b"no image")
    plain = loader(dataset, augment, batch=1, steps=12, buckets=[(160, 160)], max_broken=0.3)
    found = list(plain)
    named = [image_id for loaded in found for image_id in loaded.left_out]
    assert named == [3]
    assert all(3 not in loaded.image_ids for loaded in found)
    again = list(loader(dataset, augment, batch=1, steps=12, buckets=[(160, 160)], max_broken=0.3, workers=2))
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one.batch.pixels, other.batch.pixels)
    with pytest.raises(UserError, match=r"2\.png"):
        list(loader(dataset, augment, batch=1, steps=12, buckets=[(160, 160)]))


def test_the_only_image_goes_with_itself(tmp_path: Path) -> None:
    dataset = coloured(tmp_path, images=1)
    for loaded in loader(dataset, BOTH, batch=1, steps=4):
        targets = loaded.batch.targets
        assert targets is not None
        assert targets.valid.any()


def test_images_without_objects(tmp_path: Path) -> None:
    dataset = coloured(tmp_path, images=3)
    for record in dataset.records[:2]:
        record.objects.clear()
    found = list(loader(dataset, BOTH, batch=2, steps=8, polygons=PolygonSizes()))
    assert any(loaded.batch.targets.valid.any() for loaded in found if loaded.batch.targets)
    for record in dataset.records:
        record.objects.clear()
    for loaded in loader(dataset, BOTH, batch=2, steps=2):
        assert loaded.batch.targets is not None
        assert not loaded.batch.targets.valid.any()


def test_padded_sizes_hold_the_objects_of_several_images(images: CocoDataset) -> None:
    assert largest_targets(images, 2)[0] == 8  # three, and the smallest number of slots
    assert largest_targets(images, 2, layers=5)[0] == 15
    slots, size = largest_targets(images, 2, layers=5)
    shapes = set()
    for loaded in loader(images, BOTH, min_slots=slots, min_mask_bytes=size, steps=10):
        assert loaded.batch.targets is not None
        shapes.add((loaded.batch.targets.boxes.shape, loaded.batch.targets.masks.buffer.shape))
    assert len(shapes) == 1


def test_configuration_is_refused_where_it_cannot_be_meant() -> None:
    with pytest.raises(UserError, match=r"mosaic needs data\.augment\.crop"):
        parse_config({"data": {"augment": {"mosaic": 0.5}}}, "x.yaml")
    with pytest.raises(UserError, match=r"scale needs data\.augment\.crop"):
        parse_config({"data": {"augment": {"scale": [0.1, 2.0]}}}, "x.yaml")
    with pytest.raises(UserError, match="the first factor must not exceed the second"):
        parse_config({"data": {"augment": {"scale": [2.0, 0.1], "crop": [64, 64]}}}, "x.yaml")
    config = parse_config(
        {
            "data": {
                "train": {"images": "a", "annotations": "b", "proposals": "c"},
                "augment": {"copy_paste": 0.5},
            },
            "model": {"rpn": {"enabled": False}},
        },
        "x.yaml",
    )
    with pytest.raises(UserError, match=r"copy_paste and data\.train\.proposals do not go"):
        check_trainable(config)
