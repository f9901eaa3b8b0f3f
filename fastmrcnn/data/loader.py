"""Batches for training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmrcnn.data.buckets import bucket_or_new, choose_buckets, resolve_buckets
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import (
    MIN_MASK_BYTES,
    MIN_SLOTS,
    Objects,
    Sample,
    affines,
    collate,
    make_sample,
    read_objects,
)
from fastmrcnn.data.images import read_image
from fastmrcnn.data.sampler import BatchPlan, TrainSampler
from fastmrcnn.data.transforms import (
    Augment,
    Plan,
    Size,
    draws,
    plan_image,
    resize,
    resized_size,
    to_annotation,
)
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

CACHE_BYTES = 256 * 2**20  # sets whose resized images fit in here are decoded once per process


class LoadedBatch(NamedTuple):
    batch: Batch
    image_ids: list[int]  # of the real images
    real: int  # images that are not repetitions; all of them in training
    original_sizes: list[Size]  # height and width of the real images as they are
    to_original: Tensor  # (N, 2, 3) float32, input pixels -> pixels of the original


class TrainLoader:
    """Batches of the global steps start_step .. steps - 1, each a function of the seed and its step.

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
    Raises:
        UserError: an image fits into no bucket, or has too many objects; while iterating, an image
            cannot be read.
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
    ) -> None:
        if not dataset.records:
            raise UserError(f"{dataset.annotations}: no image to train on")
        for record in dataset.records:
            if len(record.objects) > max_objects:
                raise UserError(
                    f"{dataset.annotations}: image {record.image_id} ({record.file_name}) has "
                    f"{len(record.objects)} objects, more than data.max_objects = {max_objects}; raise it"
                )
        augment = augment or Augment()
        sizes = {(record.height, record.width) for record in dataset.records}
        turns = augment.rotate90 > 0
        self.buckets = resolve_buckets(buckets, sizes, short_sides, long_side_max, turns=turns)
        self.sampler = TrainSampler(
            dataset.records,
            batch=batch,
            short_sides=short_sides,
            long_side_max=long_side_max,
            buckets=self.buckets,
            augment=augment,
            seed=seed,
            start_step=start_step,
            steps=steps,
        )
        samples = _TrainSamples(dataset, short_sides, long_side_max, augment, seed, min_slots, min_mask_bytes)
        self.loader = _data_loader(samples, self.sampler, workers, pin_memory)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[LoadedBatch]:
        return _unwrap(self.loader)


class EvalLoader:
    """All images of a set in order, without targets, grouped so that a batch has one bucket.

    The last batch of a bucket is filled up by repeating its last image; `LoadedBatch.real` counts the
    others. An image that fits into no bucket gets one of its own.
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
    ) -> None:
        sizes = {(record.height, record.width) for record in dataset.records}
        self.buckets = resolve_buckets(buckets, sizes, [short_side], long_side_max)
        self.plans = _plan_evaluation(dataset, batch, short_side, long_side_max, self.buckets)
        samples = _EvalSamples(dataset, batch, short_side, long_side_max)
        self.loader = _data_loader(samples, self.plans, workers, pin_memory)

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[LoadedBatch]:
        return _unwrap(self.loader)


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
        The batch, and the (2, 3) affine from its pixels to those of `pixels`.
    """
    height, width = pixels.shape[:2]
    plan = Plan(resized_size(height, width, short_side, long_side_max))
    sample = make_sample(resize(pixels, plan.resized), plan, (height, width))
    batch = collate([sample], bucket_or_new(plan.size, buckets or []))
    return batch, to_annotation(plan, height, width).astype(np.float32)


def largest_targets(dataset: CocoDataset, batch: int) -> tuple[int, int]:
    """Limits for `min_slots` and `min_mask_bytes` that no batch of the set is likely to exceed.

    Bitmaps are taken to be as large as their boxes, and a pixel more on either side.
    """
    slots = max(len(record.objects) for record in dataset.records)
    areas = [
        sum((o.box[2] - o.box[0] + 2) * (o.box[3] - o.box[1] + 2) for o in record.objects if not o.crowd)
        for record in dataset.records
    ]
    return max(slots, MIN_SLOTS), max(int(batch * max(areas)), MIN_MASK_BYTES)


class _Failure(NamedTuple):
    """A worker's UserError. Raised there, it would come out wrapped in a traceback."""

    message: str


class _Store:
    """Resized images and rasterised objects of a set, kept if they are few."""

    def __init__(self, dataset: CocoDataset, short_sides: Sequence[int], long_side_max: int) -> None:
        self.records = dataset.records
        sizes = [
            resized_size(record.height, record.width, side, long_side_max)
            for record in dataset.records
            for side in short_sides
        ]
        self.keep_pixels = 3 * sum(h * w for h, w in sizes) <= CACHE_BYTES
        boxes = (o.box for record in dataset.records for o in record.objects)
        self.keep_objects = sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes) <= CACHE_BYTES
        self._pixels: dict[tuple[int, Size], NDArray[np.uint8]] = {}
        self._objects: dict[int, Objects] = {}

    def resized(self, index: int, size: Size) -> NDArray[np.uint8]:
        found = self._pixels.get((index, size))
        if found is None:
            found = resize(read_image(self.records[index]), size)
            if self.keep_pixels:
                self._pixels[index, size] = found
        return found

    def objects(self, index: int) -> Objects:
        found = self._objects.get(index)
        if found is None:
            found = read_objects(self.records[index])
            if self.keep_objects:
                self._objects[index] = found
        return found


class _TrainSamples(Dataset[LoadedBatch | _Failure]):
    def __init__(
        self,
        dataset: CocoDataset,
        short_sides: Sequence[int],
        long_side_max: int,
        augment: Augment,
        seed: int,
        min_slots: int,
        min_mask_bytes: int,
    ) -> None:
        self.store = _Store(dataset, short_sides, long_side_max)
        self.short_sides, self.long_side_max = list(short_sides), long_side_max
        self.augment, self.seed = augment, seed
        self.min_slots, self.min_mask_bytes = min_slots, min_mask_bytes

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch | _Failure:
        try:
            samples = [self._sample(index, number) for index, number in plan.samples]
        except UserError as error:
            return _Failure(str(error))
        batch = collate(samples, plan.bucket, min_slots=self.min_slots, min_mask_bytes=self.min_mask_bytes)
        return _loaded(batch, samples, [self.store.records[index].image_id for index, _ in plan.samples])

    def _sample(self, index: int, number: int) -> Sample:
        record = self.store.records[index]
        plan = plan_image(
            record.height,
            record.width,
            draws(self.seed, number)[0],
            self.short_sides,
            self.long_side_max,
            self.augment,
        )
        resized = self.store.resized(index, plan.resized)
        return make_sample(resized, plan, (record.height, record.width), self.store.objects(index))


class _EvalSamples(Dataset[LoadedBatch | _Failure]):
    def __init__(self, dataset: CocoDataset, batch: int, short_side: int, long_side_max: int) -> None:
        self.store = _Store(dataset, [short_side], long_side_max)
        self.batch, self.short_side, self.long_side_max = batch, short_side, long_side_max

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch | _Failure:
        try:
            samples = [self._sample(index) for index, _ in plan.samples]
        except UserError as error:
            return _Failure(str(error))
        ids = [self.store.records[index].image_id for index, _ in plan.samples]
        return _loaded(
            collate([*samples, *[samples[-1]] * (self.batch - len(samples))], plan.bucket), samples, ids
        )

    def _sample(self, index: int) -> Sample:
        record = self.store.records[index]
        plan = Plan(resized_size(record.height, record.width, self.short_side, self.long_side_max))
        return make_sample(self.store.resized(index, plan.resized), plan, (record.height, record.width))


def _loaded(batch: Batch, samples: Sequence[Sample], image_ids: list[int]) -> LoadedBatch:
    repeated = [*samples, *[samples[-1]] * (batch.pixels.shape[0] - len(samples))]
    sizes = [sample.annotated for sample in samples]
    return LoadedBatch(batch, image_ids, len(samples), sizes, torch.from_numpy(affines(repeated)))


def _plan_evaluation(
    dataset: CocoDataset, batch: int, short_side: int, long_side_max: int, buckets: Sequence[Size]
) -> list[BatchPlan]:
    waiting: dict[Size, list[tuple[int, int]]] = {}
    plans = []
    for index, record in enumerate(dataset.records):
        bucket = bucket_or_new(resized_size(record.height, record.width, short_side, long_side_max), buckets)
        waiting.setdefault(bucket, []).append((index, index))
        if len(waiting[bucket]) == batch:
            plans.append(BatchPlan(bucket, waiting.pop(bucket)))
    return plans + [BatchPlan(bucket, samples) for bucket, samples in waiting.items()]


def _data_loader(
    samples: _TrainSamples | _EvalSamples,
    plans: TrainSampler | list[BatchPlan],
    workers: int,
    pin_memory: bool,
) -> DataLoader[LoadedBatch | _Failure]:
    # A plan is a whole batch, so the loader's own batching is off.
    return DataLoader(
        samples,
        batch_size=None,
        sampler=plans,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def _as_it_is(loaded: LoadedBatch | _Failure) -> LoadedBatch | _Failure:
    """The default would turn the tuples within into lists."""
    return loaded


def _unwrap(loader: DataLoader[LoadedBatch | _Failure]) -> Iterator[LoadedBatch]:
    for loaded in loader:
        if isinstance(loaded, _Failure):
            raise UserError(loaded.message)
        yield loaded
