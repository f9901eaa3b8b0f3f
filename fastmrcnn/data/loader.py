"""Batches for training, evaluation and prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.buckets import bucket_or_new, choose_buckets, resolve_buckets
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import MIN_MASK_BYTES, MIN_SLOTS, collate, make_sample
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.order import WHOLE, BatchPlan, Share, TrainSampler
from fastmrcnn.data.padding import target_needs
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.slot_sizes import pixel_bytes, table_bytes
from fastmrcnn.data.transforms import Augment, Plan, Size, resize, resized_size
from fastmrcnn.data.transport import Transport
from fastmrcnn.data.worker import EvalSamples, LoadedBatch, TrainSamples
from fastmrcnn.errors import UserError
from fastmrcnn.structures import Batch

__all__ = [
    "EvalLoader",
    "LoadedBatch",
    "TrainLoader",
    "choose_buckets",
    "collate",
    "largest_targets",
    "prepare_image",
]


class TrainLoader:
    """Batches of the global steps start_step .. steps - 1, each a function of the seed and its step.

    An image that cannot be read is left out: another, which seed and sample decide, stands in for it. The
    first batch that met it has its fault in `left_out`. With a share the batches are this process's
    micro-batches, `share.accumulate` of them a step.

    Args:
        dataset: from `read_coco`.
        batch: images a step.
        short_sides, long_side_max, buckets: as in the configuration's `data` section.
        augment: random changes; None for none.
        workers: loader processes; 0 loads in this one.
        max_objects: most objects an image may have.
        pin_memory: for copies to a GPU that do not wait.
        min_slots, min_mask_bytes: lower limits of the padded sizes; with the set's own largest values
            (`largest_targets`) every batch of a bucket has one shape.
        polygons: give the batches the objects' polygons, in tables of at least these sizes (as those of
            `largest_polygons`); None: leave them out.
        max_broken: largest share of the images that may be left out. Of several processes each sees only its
            own; who knows of all calls `check_left_out`.
        share: of this process.
        raw: leave resizing, turning and colours to the device: batches have `raw` images, of which
            `kernels.resize_pad` makes the pixels.
    Raises:
        UserError: an image fits into no bucket, or has too many objects; `batch` cannot be shared out; while
            iterating, more images than `max_broken` allows cannot be read.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        batch: int,
        short_sides: Sequence[int],
        long_side_max: int,
        buckets: Sequence[Size] | Literal["auto"] = "auto",
        augment: Augment | None = None,
        seed: int = 0,
        start_step: int = 0,
        steps: int,
        workers: int = 0,
        max_objects: int = 512,
        pin_memory: bool = False,
        min_slots: int = MIN_SLOTS,
        min_mask_bytes: int = MIN_MASK_BYTES,
        polygons: PolygonSizes | None = None,
        max_broken: float = 0.0,
        share: Share = WHOLE,
        raw: bool = False,
    ) -> None:
        flat = flat_records(dataset.records)
        if not len(flat):
            raise UserError(f"{dataset.annotations}: no image to train on")
        if not short_sides or min(short_sides) <= 0:
            raise UserError(f"data.short_side: expected lengths above 0, got {list(short_sides)}")
        for index in np.flatnonzero(flat.object_counts > max_objects)[:1].tolist():
            record = flat[index]
            raise UserError(
                f"{dataset.annotations}: image {record.image_id} ({record.file_name}) has "
                f"{len(record.objects)} objects, more than data.max_objects = {max_objects}; raise it"
            )
        augment = augment or Augment()
        sizes = [(height, width) for height, width in flat.sizes.tolist()]
        turns = augment.rotate90 > 0
        if augment.crop is not None and buckets == "auto":
            self.buckets = [bucket_or_new(augment.crop, [])]
        else:
            self.buckets = resolve_buckets(buckets, sizes, short_sides, long_side_max, turns=turns)
        self.sampler = TrainSampler(
            flat,
            batch=batch,
            short_sides=short_sides,
            long_side_max=long_side_max,
            buckets=self.buckets,
            augment=augment,
            seed=seed,
            start_step=start_step,
            steps=steps,
            share=share,
            needs=target_needs(dataset, polygons is not None, augment.layers) if share.size > 1 else None,
        )
        self.share = share
        self.images, self.max_broken = len(flat), max_broken
        samples = TrainSamples(
            dataset, short_sides, long_side_max, augment, seed, min_slots, min_mask_bytes, polygons, raw
        )
        images = batch // share.parts
        room = pixel_bytes(dataset, images, self.buckets, raw) + table_bytes(
            images, min_slots, min_mask_bytes, dataset.num_keypoints or 0, polygons
        )
        self.loader = Transport(samples, self.sampler, workers, pin_memory, room)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[LoadedBatch]:
        left_out: set[int] = set()
        for loaded in self.loader:
            new = {image_id: fault for image_id, fault in loaded.left_out.items() if image_id not in left_out}
            left_out |= new.keys()
            if new and self.share.size == 1:
                self.check_left_out(len(left_out), next(iter(new.values())))
            yield loaded._replace(left_out=new)

    def check_left_out(self, broken: int, fault: str) -> None:
        """UserError if so many images that cannot be read are too many; `fault` is that of the last one."""
        if broken <= self.max_broken * self.images:
            return
        share = math.ceil(1000 * broken / self.images) / 1000
        count = f"; {broken} of {self.images} images could not be read so far" if broken > 1 else ""
        raise UserError(
            f"{fault}{count}, or leave such images out with data.max_broken={share:g} or more (the share of "
            f"the images that may be, now {self.max_broken:g})"
        )


class EvalLoader:
    """All images of a set in order, without targets, grouped so that a batch has one bucket.

    The last batch of a bucket is filled up by repeating its last image; `LoadedBatch.real` counts the
    others. An image that fits into no bucket gets one of its own.

    Args:
        raw: as of `TrainLoader`.
        share: of several processes each takes every so many-th batch, so that a batch is the same whoever
            takes it, and each image is in one.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        batch: int,
        short_side: int,
        long_side_max: int,
        buckets: Sequence[Size] | Literal["auto"] = "auto",
        workers: int = 0,
        pin_memory: bool = False,
        raw: bool = False,
        share: Share = WHOLE,
    ) -> None:
        sizes = [(height, width) for height, width in flat_records(dataset.records).sizes.tolist()]
        self.buckets = resolve_buckets(buckets, sizes, [short_side], long_side_max)
        plans = _plan_evaluation(sizes, batch, short_side, long_side_max, self.buckets)
        self.plans = plans[share.rank :: share.size]
        samples = EvalSamples(dataset, batch, short_side, long_side_max, raw)
        room = pixel_bytes(dataset, batch, self.buckets, raw) + table_bytes(batch, dataset.proposal_slots, 0)
        self.loader = Transport(samples, self.plans, workers, pin_memory, room)

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[LoadedBatch]:
        return iter(self.loader)


def prepare_image(
    pixels: NDArray[np.uint8],
    short_side: int,
    long_side_max: int,
    buckets: Sequence[Size] | None = None,
) -> tuple[Batch, NDArray[np.float32]]:
    """One image as a batch.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        buckets: padded shapes to choose from; none, or none that fits: the smallest multiples of 32.
    Returns:
        The batch, and input_to_image (2, 3) from its pixels to those of `pixels`.
    """
    batch, maps = prepare_images([pixels], short_side, long_side_max, buckets)
    return batch, maps[0]


def prepare_images(
    images: Sequence[NDArray[np.uint8]],
    short_side: int,
    long_side_max: int,
    buckets: Sequence[Size] | None = None,
) -> tuple[Batch, NDArray[np.float32]]:
    """Images of one padded shape, `padded_shape`, as a batch; otherwise as `prepare_image`.

    Returns:
        The batch, and input_to_image (n, 2, 3).
    """
    samples = []
    for pixels in images:
        height, width = pixels.shape[:2]
        plan = Plan(resized_size(height, width, short_side, long_side_max))
        samples.append(make_sample(resize(pixels, plan.resized), plan, (height, width)))
    batch = collate(samples, bucket_or_new(samples[0].pixels.shape[:2], buckets or []))
    return batch, np.stack([sample.input_to_image for sample in samples]).astype(np.float32)


def padded_shape(
    size: Size, short_side: int, long_side_max: int, buckets: Sequence[Size] | None = None
) -> Size:
    """(H, W) of the batch that an image of this height and width goes into."""
    return bucket_or_new(resized_size(*size, short_side, long_side_max), buckets or [])


def largest_targets(dataset: CocoDataset, batch: int, layers: int = 1) -> tuple[int, int]:
    """Limits for `min_slots` and `min_mask_bytes` that hardly any batch of the set exceeds.

    Bitmaps are taken to be as large as their boxes and a pixel more on each side. The bytes of a batch
    are taken to stay within 6 standard deviations of their mean, and within `batch` times the largest
    image; the second alone would make COCO's batches several times larger than they need be.

    Args:
        layers: most images that a sample may be put together from. The objects of the others are taken to
            stay within 6 standard deviations of their mean.
    """
    images = batch * layers
    records = flat_records(dataset.records)
    boxes, crowd = records.objects["box"], records.objects["crowd"]
    areas = records.per_image(np.where(crowd, 0, np.prod(boxes[:, 2:] - boxes[:, :2] + 2, 1)))
    usual = images * areas.mean() + 6 * math.sqrt(images) * areas.std()
    counts = records.object_counts
    others = (layers - 1) * counts.mean() + 6 * math.sqrt(layers - 1) * counts.std()
    slots = int(counts.max() + min(others, (layers - 1) * counts.max()))
    if not dataset.masks:
        return max(slots, MIN_SLOTS), MIN_MASK_BYTES
    return max(slots, MIN_SLOTS), max(int(min(usual, images * areas.max())), MIN_MASK_BYTES)


def _plan_evaluation(
    sizes: Sequence[Size], batch: int, short_side: int, long_side_max: int, buckets: Sequence[Size]
) -> list[BatchPlan]:
    waiting: dict[Size, list[tuple[int, int]]] = {}
    plans = []
    for index, size in enumerate(sizes):
        bucket = bucket_or_new(resized_size(*size, short_side, long_side_max), buckets)
        waiting.setdefault(bucket, []).append((index, index))
        if len(waiting[bucket]) == batch:
            plans.append(BatchPlan(bucket, waiting.pop(bucket)))
    return plans + [BatchPlan(bucket, samples) for bucket, samples in waiting.items()]
