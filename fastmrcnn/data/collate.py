"""Prepared samples into one padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn.data.affine import transform_boxes
from fastmrcnn.data.buckets import power_of_two
from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.data.masks import Window, bitmap
from fastmrcnn.data.object_tables import select_objects, split_crops
from fastmrcnn.data.polygons import ImagePolygons, PolygonSizes, polygon_tables, read_polygons
from fastmrcnn.data.raw_images import Room, raw_images
from fastmrcnn.data.records import ImageProposals, ImageRecord
from fastmrcnn.data.transforms import (
    Plan,
    Size,
    apply_plan,
    image_to_input,
    input_to_image,
    transform_keypoints,
)
from fastmrcnn.data.visible import Seen, seen_objects
from fastmrcnn.structures import Batch, PackedMasks, Proposals, Targets

MIN_SLOTS = 8
MIN_MASK_BYTES = 4096


class RasterisedObjects(NamedTuple):
    """What does not change with the augmentation: the objects of one image, their masks as bitmaps."""

    boxes: NDArray[np.float32]  # (n, 4) xyxy in annotation pixels
    classes: NDArray[np.int64]  # (n,)
    crowd: NDArray[np.bool_]  # (n,) to be neither learnt nor punished
    crops: NDArray[np.uint8]  # bitmaps end to end
    windows: NDArray[np.int32]  # (n, 4) x, y, w, h; 0 where there is no bitmap
    keypoints: NDArray[np.float32] | None = None  # (n, J, 3) in annotation pixels
    polygons: ImagePolygons | None = None


class ObjectMaps(NamedTuple):
    """Of each object, where a sample is put together from several images."""

    image_to_input: NDArray[np.float64]  # (n, 2, 3)
    input_to_image: NDArray[np.float64]  # (n, 2, 3)
    annotated: NDArray[np.int64]  # (n, 2) height and width of its image


class Sample(NamedTuple):
    pixels: NDArray[np.uint8]  # (h, w, 3)
    image_to_input: NDArray[np.float64]  # (2, 3)
    input_to_image: NDArray[np.float64]  # (2, 3)
    annotated: Size
    boxes: NDArray[np.float32] | None = None  # (n, 4) in pixels of the sample
    objects: RasterisedObjects | None = None
    keypoints: NDArray[np.float32] | None = None  # (n, J, 3) in pixels of the sample
    proposals: ImageProposals | None = None  # boxes in pixels of the sample
    left: Plan | None = None  # what the device is to do to the pixels; None: nothing, if it does anything
    maps: ObjectMaps | None = None  # None: those above, for all objects


def read_objects(
    record: ImageRecord,
    schema: KeypointSchema | None = None,
    polygons: bool = False,
    masks: bool = True,
) -> RasterisedObjects:
    """The objects of an image: masks rasterised, polygons gathered, keypoints if there is a schema.

    Crowd regions have no bitmap. An object that turns out to cover no pixel has no mask that could be
    learnt, so it is treated as a crowd region: not learnt, and not punished.
    """
    crops: list[NDArray[np.uint8]] = []
    windows: list[Window] = []
    crowd = []
    for item in record.objects:
        crop, window = np.zeros((0, 0), np.uint8), (0, 0, 0, 0)
        if masks and not item.crowd and item.segmentation:
            crop, window = bitmap(item.segmentation, record.height, record.width)
        crops.append(crop.ravel())
        windows.append(window)
        crowd.append(item.crowd or (masks and bool(item.segmentation) and crop.size == 0))
    keypoints = None
    if schema is not None:
        keypoints = np.zeros((len(record.objects), len(schema.names), 3), np.float32)
        for row, item in zip(keypoints, record.objects, strict=True):
            row[:] = 0 if item.keypoints is None else item.keypoints
    return RasterisedObjects(
        boxes=np.array([item.box for item in record.objects], np.float32).reshape(-1, 4),
        classes=np.array([item.class_index for item in record.objects], np.int64),
        crowd=np.array(crowd, np.bool_),
        crops=np.concatenate([*crops, np.zeros(0, np.uint8)]),
        windows=np.array(windows, np.int32).reshape(-1, 4),
        keypoints=keypoints,
        polygons=read_polygons(record) if polygons else None,
    )


def make_sample(
    resized: NDArray[np.uint8],
    plan: Plan,
    annotated: Size,
    objects: RasterisedObjects | None = None,
    schema: KeypointSchema | None = None,
    proposals: ImageProposals | None = None,
    min_visible: float = 0.0,
    left: Plan | None = None,
) -> Sample:
    """Carry out a plan on a resized image, its boxes, keypoints and proposals; bitmaps stay as they are.

    Args:
        resized: what `apply_plan` takes.
        min_visible: objects of which a smaller share is left by a plan that cuts become crowd regions:
            neither learnt nor punished. Those of which nothing is left are gone.
        left: what of the plan the device is to do to the pixels, and not this.
    """
    forward = image_to_input(plan, *annotated)

    def move(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        height, width = plan.size
        moved = transform_boxes(boxes, forward).astype(np.float32)
        return moved.clip(0, np.array([width, height, width, height], np.float32))

    boxes = keypoints = None
    if objects is not None:
        if plan.cuts:
            height, width = plan.size
            shapes = (objects.boxes, split_crops(objects), objects.windows, objects.polygons)
            objects, boxes = select_seen(
                objects, seen_objects(*shapes, forward, (0, 0, width, height)), min_visible
            )
        else:
            boxes = move(objects.boxes)
        if objects.keypoints is not None and schema is not None:
            keypoints = transform_keypoints(objects.keypoints, plan, *annotated, schema.mirror)
    if proposals is not None:
        proposals = proposals._replace(boxes=move(proposals.boxes))
    return Sample(
        apply_plan(resized, plan) if left is None else resized,
        forward,
        input_to_image(plan, *annotated),
        annotated,
        boxes,
        objects,
        keypoints,
        proposals,
        left,
    )


def select_seen(
    objects: RasterisedObjects, seen: Seen, min_visible: float
) -> tuple[RasterisedObjects, NDArray[np.float32]]:
    """The objects that are seen, with what is left of their bitmaps, and their boxes in the sample."""
    keep = seen.keep
    if len(keep) == len(objects.classes) and not seen.bitmaps and (seen.share >= min_visible).all():
        return objects, seen.boxes
    some = select_objects(objects, keep, seen.bitmaps)
    return some._replace(crowd=some.crowd | (seen.share < min_visible)), seen.boxes


def without_polygons(sample: Sample) -> Sample:
    """The sample for a batch that has no tables of polygons."""
    if sample.objects is None or sample.objects.polygons is None:
        return sample
    return sample._replace(objects=sample.objects._replace(polygons=None))


def collate(
    samples: Sequence[Sample],
    bucket: Size,
    *,
    min_slots: int = MIN_SLOTS,
    min_mask_bytes: int = MIN_MASK_BYTES,
    proposal_slots: int = 0,
    min_polygons: PolygonSizes | None = None,
    memory: NDArray[np.uint8] | None = None,
    raw: Room | None = None,
    coloured: bool = False,
    maps_of_objects: bool = False,
) -> Batch:
    """Pad samples into a bucket; targets where the samples have objects, proposals where they have those.

    Args:
        bucket: (H, W); every sample must fit.
        min_slots, min_mask_bytes: lower limits of G and of the mask buffer, for equal shapes.
        proposal_slots: P.
        min_polygons: likewise of the tables of polygons.
        memory: flat; the pixels are put at its beginning, if it is large enough.
        raw: where the images are that the device is still to resize; None: there are none.
        coloured: as of `raw_images`.
        maps_of_objects: give each object maps of its own, since a sample may have them.
    Returns:
        pixels (N, 3, H, W) uint8 in channels_last memory format; G and the mask buffer are powers of
        two.
    """
    images = [sample.pixels for sample in samples]
    plans = [sample.left or Plan(sample.pixels.shape[:2]) for sample in samples]
    sizes = torch.tensor([plan.size for plan in plans], dtype=torch.int64)
    assert (sizes <= torch.tensor(bucket)).all()
    pixels = pad_images([] if raw else images, bucket, memory)
    targets = None
    if all(sample.objects is not None for sample in samples):
        least = min_polygons or PolygonSizes()
        targets = _collate_targets(samples, min_slots, min_mask_bytes, least, maps_of_objects)
    proposals = None
    if all(sample.proposals is not None for sample in samples):
        proposals = _collate_proposals(samples, proposal_slots)
    handed = None if raw is None else raw_images(images, plans, raw, coloured)
    return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), sizes, targets, proposals, handed)


def pad_images(
    images: Sequence[NDArray[np.uint8]], bucket: Size, memory: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """(n, *bucket, 3): images in the upper left, zeros in the rest; at the beginning of `memory` if it is
    large enough."""
    shape = (len(images), *bucket, 3)
    size = math.prod(shape)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
    pixels = memory[:size].reshape(shape)
    for own, image in zip(pixels, images, strict=True):
        height, width = image.shape[:2]
        own[:height, :width] = image
        own[:height, width:] = 0
        own[height:] = 0
    return pixels


def _collate_proposals(samples: Sequence[Sample], slots: int) -> Proposals:
    boxes = np.zeros((len(samples), slots, 4), np.float32)
    scores = np.zeros((len(samples), slots), np.float32)
    for row, sample in enumerate(samples):
        assert sample.proposals is not None
        count = len(sample.proposals.scores)
        boxes[row, :count], scores[row, :count] = sample.proposals
    valid = (boxes[..., 2:] > boxes[..., :2]).all(axis=-1)
    return Proposals(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(valid))


def _collate_targets(
    samples: Sequence[Sample],
    min_slots: int,
    min_mask_bytes: int,
    min_polygons: PolygonSizes,
    maps_of_objects: bool,
) -> Targets:
    objects = [sample.objects for sample in samples if sample.objects is not None]
    count = len(objects)
    slots = power_of_two(max(min_slots, *(len(o.classes) for o in objects)))
    size = power_of_two(max(min_mask_bytes, sum(o.crops.size for o in objects)))
    boxes = np.zeros((count, slots, 4), np.float32)
    classes = np.zeros((count, slots), np.int64)
    valid = np.zeros((count, slots), np.bool_)
    crowd = np.zeros((count, slots), np.bool_)
    window = np.zeros((count, slots, 4), np.int32)
    offset = np.zeros((count, slots), np.int64)
    buffer = np.zeros(size, np.uint8)
    points = None
    if samples[0].keypoints is not None:
        points = np.zeros((count, slots, *samples[0].keypoints.shape[1:]), np.float32)
    polygons = [own.polygons for own in objects if own.polygons is not None]
    to_input, to_annotation, annotated = _maps(samples, slots if maps_of_objects else None)
    start = 0
    for row, (sample, own) in enumerate(zip(samples, objects, strict=True)):
        n = len(own.classes)
        boxes[row, :n] = sample.boxes
        classes[row, :n] = own.classes
        crowd[row, :n] = own.crowd
        valid[row, :n] = ~own.crowd
        window[row, :n] = own.windows
        if points is not None:
            points[row, :n] = sample.keypoints
        sizes = own.windows[:, 2].astype(np.int64) * own.windows[:, 3]
        # a slot without a bitmap has offset 0, so that the tables of equal batches are equal
        offset[row, :n] = np.where(sizes > 0, start + np.cumsum(sizes) - sizes, 0)
        buffer[start : start + own.crops.size] = own.crops
        start += own.crops.size
    return Targets(
        boxes=torch.from_numpy(boxes),
        classes=torch.from_numpy(classes),
        valid=torch.from_numpy(valid),
        crowd=torch.from_numpy(crowd),
        masks=PackedMasks(
            buffer=torch.from_numpy(buffer),
            offset=torch.from_numpy(offset),
            window=torch.from_numpy(window),
            to_annotation=torch.from_numpy(to_annotation.astype(np.float32)),
            size=torch.from_numpy(annotated.astype(np.int32)),
        ),
        keypoints=None if points is None else torch.from_numpy(points),
        polygons=polygon_tables(polygons, to_input, slots, min_polygons) if polygons else None,
    )


def _maps(
    samples: Sequence[Sample], slots: int | None
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64], NDArray[np.int64]]:
    """image_to_input (2, 3) of each image, input_to_image (N, 2, 3) and annotated (N, 2); with slots those
    of each object."""
    images = [(s.image_to_input, s.input_to_image, np.array(s.annotated)) for s in samples]
    stacked = [np.stack(some) for some in zip(*images, strict=True)]
    if slots is not None:
        stacked = [np.repeat(some[:, None], slots, axis=1) for some in stacked]
        for row, sample in enumerate(samples):
            for table, own in zip(stacked, sample.maps or (), strict=False):
                table[row, : len(own)] = own
    to_input, to_annotation, annotated = stacked
    return list(to_input), to_annotation, annotated


def stack_input_to_image(samples: Sequence[Sample]) -> Tensor:
    """(N, 2, 3) float32."""
    return torch.from_numpy(np.stack([sample.input_to_image for sample in samples]).astype(np.float32))
