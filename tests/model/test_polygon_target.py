"""Mask targets from polygons, within the model: detectron2's loss, one graph, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import SMALL, random_batch, small_config, small_model
from nosync import NoSync
from pycocotools import mask as coco_mask
from test_parity import build
from tiny import TinyData, record
from torch._dynamo.testing import CompileCounter

from fastmrcnn.data.polygons import ImagePolygons, PolygonSizes, polygon_tables
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch, PackedPolygons

# The polygons that the golden file's bitmaps were made from; the test checks that they still are.
GOLDEN_POLYGONS = [
    [
        [[20, 30], [120, 24], [140, 110], [70, 150], [24, 100]],
        [[150, 60], [260, 70], [250, 180], [160, 170]],
    ],
    [[[40, 50], [150, 60], [130, 220], [30, 200]]],
]


def tables(images: list[list[Any]], slots: int) -> PackedPolygons:
    """Objects of one polygon each, or None; input pixels are annotation pixels."""
    packed = []
    for objects in images:
        polygons = [np.array(points, np.float64) for points in objects if points is not None]
        packed.append(
            ImagePolygons(
                vertices=np.concatenate([np.zeros((0, 2)), *polygons]),
                lengths=np.array([len(points) for points in polygons], np.int32),
                parts=np.array([points is not None for points in objects], np.int32),
                longest=max(map(len, polygons), default=0),
            )
        )
    return polygon_tables(packed, [np.eye(2, 3)] * len(images), slots, PolygonSizes(256, 16, 32))


def with_polygons(batch: Batch, every: int = 1) -> Batch:
    """An octagon about each object's box, or about every second one."""
    assert batch.targets is not None
    angle = np.arange(8) * np.pi / 4 + np.pi / 8
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    images = []
    for boxes, valid in zip(batch.targets.boxes.numpy(), batch.targets.valid.tolist(), strict=True):
        octagons = [circle * (box[2:] - box[:2]) / 2 + (box[2:] + box[:2]) / 2 for box in boxes]
        images.append([octagons[i] if real and i % every == 0 else None for i, real in enumerate(valid)])
    return batch._replace(targets=batch.targets._replace(polygons=tables(images, len(valid))))


def polygon_model() -> MaskRCNN:
    mask = {**SMALL["model"]["mask_head"], "target": "polygon"}
    return small_model(config=small_config(model={**SMALL["model"], "mask_head": mask})).train()


def test_detectron2s_loss() -> None:
    model, batch, data = build("detectron2")
    assert batch.targets is not None
    for image, objects in enumerate(GOLDEN_POLYGONS):
        height, width = batch.sizes[image].tolist()
        bitmaps = np.unpackbits(data[f"target{image}.bitmaps"], axis=-1)[..., :width]
        for points, bitmap in zip(objects, bitmaps, strict=True):
            flat = [float(number) for point in points for number in point]
            assert (coco_mask.decode(coco_mask.frPyObjects([flat], height, width))[..., 0] == bitmap).all()
    batch = batch._replace(targets=batch.targets._replace(polygons=tables(GOLDEN_POLYGONS, 2)))
    assert model.mask_head is not None
    model.mask_head.target = "polygon"
    keys = model.draw_keys(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses, counts = model.train()(batch, keys)
    assert counts.num_fg < model.sampler.foreground_slots  # so none was left out
    expected = float(data["loss.loss_mask_polygon"])
    assert losses.loss_mask.item() == pytest.approx(expected, rel=1e-4)
    assert float(data["loss.loss_mask"]) != pytest.approx(expected, rel=1e-4)  # what bitmaps would give


def test_one_graph_without_syncs() -> None:
    model = polygon_model()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for seed, counts in ((1, (3, 0)), (2, (0, 5))):
        batch = with_polygons(random_batch(seed, counts), every=2)
        keys = model.draw_keys(batch, torch.Generator().manual_seed(seed))
        with NoSync():
            losses, _ = model(batch, keys)
            losses.total().backward()
        assert losses.loss_mask > 0
        torch.testing.assert_close(compiled(batch, keys)[0].loss_mask, losses.loss_mask, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_objects_without_polygons_are_learnt_from_their_bitmaps() -> None:
    model = polygon_model()
    assert model.mask_head is not None
    batch = random_batch(4, (4, 3))
    assert batch.targets is not None
    keys = model.draw_keys(batch, torch.Generator().manual_seed(4))
    none = batch._replace(targets=batch.targets._replace(polygons=tables([[None] * 8] * 2, 8)))
    losses = {}
    with torch.no_grad():
        for name, one in {"none": none, "some": with_polygons(batch, 2), "all": with_polygons(batch)}.items():
            losses[name] = float(model(one, keys)[0].loss_mask)
        model.mask_head.target = "bitmap"
        losses["bitmap"] = float(model(batch, keys)[0].loss_mask)
    assert losses["none"] == losses["bitmap"]
    assert len({losses["none"], losses["some"], losses["all"]}) == 3


def test_a_batch_without_polygons_is_refused() -> None:
    model, batch = polygon_model(), random_batch(4)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="need targets with polygons"):
        model(batch, keys)


def test_a_run_from_polygons(tmp_path: Path) -> None:
    data = TinyData(tmp_path)
    rows = {}
    for target in ("polygon", "bitmap"):
        folder = data.run(tmp_path / target, f"model.mask_head.target={target}", "train.steps=4")
        rows[target] = record(folder)
    masks = {target: [row["loss_mask"] for row in found] for target, found in rows.items()}
    assert np.isfinite(masks["polygon"]).all()
    assert masks["polygon"] != masks["bitmap"]
    np.testing.assert_allclose(masks["polygon"], masks["bitmap"], rtol=0.1)
