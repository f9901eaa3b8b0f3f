"""What a loader process does: decode, resize, augment, pad."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import (
    RasterisedObjects,
    Sample,
    collate,
    make_sample,
    read_objects,
    stack_input_to_image,
)
from fastmrcnn.data.images import read_image
from fastmrcnn.data.order import BatchPlan, substitutes
from fastmrcnn.data.padding import raised
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.records import ImageProposals
from fastmrcnn.data.transforms import Augment, Plan, Size, draws, plan_image, resize, resized_size
from fastmrcnn.errors import UserError
from fastmrcnn.structures import Batch

CACHE_BYTES = 256 * 2**20  # sets whose resized images fit in here are decoded once per process
MOST_TRIES = 20  # images that cannot be read, one after the other, before the folder is at fault


class LoadedBatch(NamedTuple):
    batch: Batch
    image_ids: list[int]  # of the real images
    real: int  # images that are not repetitions; all of them in training
    original_sizes: list[Size]  # height and width of the real images as they are
    input_to_image: Tensor  # (N, 2, 3) float32, input pixels -> pixels of the original
    left_out: dict[int, str]  # id and fault of each image that others stand in for
    clipped: dict[int, str]  # id and note of each image whose values reach beyond the range of the set


class Failure(NamedTuple):
    """A worker's UserError. Raised there, it would come out wrapped in a traceback."""

    message: str


class SampleStore:
    """Resized images and rasterised objects of a set, kept if they are few."""

    def __init__(
        self, dataset: CocoDataset, short_sides: Sequence[int], long_side_max: int, polygons: bool = False
    ) -> None:
        self.records = dataset.records
        self.polygons = polygons
        self.schema, self.masks = dataset.keypoints, dataset.masks
        self.proposals, self.proposal_slots = dataset.proposals, dataset.proposal_slots
        sizes = [
            resized_size(record.height, record.width, side, long_side_max)
            for record in dataset.records
            for side in short_sides
        ]
        self.keep_pixels = 3 * sum(h * w for h, w in sizes) <= CACHE_BYTES
        boxes = (o.box for record in dataset.records for o in record.objects)
        self.keep_objects = sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes) <= CACHE_BYTES
        self._pixels: dict[tuple[int, Size], NDArray[np.uint8]] = {}
        self._objects: dict[int, RasterisedObjects] = {}
        self._clipped: dict[int, str] = {}

    def resized(self, index: int, size: Size) -> NDArray[np.uint8]:
        found = self._pixels.get((index, size))
        if found is None:
            record = self.records[index]
            pixels, note = read_image(record)
            if note is not None and note.clipped:
                self._clipped[record.image_id] = f"{record.file_name}: {note.text}"
            found = resize(pixels, size)
            if self.keep_pixels:
                self._pixels[index, size] = found
        return found

    def take_clipped(self) -> dict[int, str]:
        """Id and note of each image read since the last call whose values were clipped."""
        clipped, self._clipped = self._clipped, {}
        return clipped

    def proposed(self, index: int) -> ImageProposals | None:
        return None if self.proposals is None else self.proposals[self.records[index].image_id]

    def objects(self, index: int) -> RasterisedObjects:
        found = self._objects.get(index)
        if found is None:
            found = read_objects(self.records[index], self.schema, self.polygons, self.masks)
            if self.keep_objects:
                self._objects[index] = found
        return found


class TrainSamples(Dataset[LoadedBatch | Failure]):
    """The batches of a training set. Where an image cannot be read another stands in for it, which seed and
    sample decide."""

    def __init__(
        self,
        dataset: CocoDataset,
        short_sides: Sequence[int],
        long_side_max: int,
        augment: Augment,
        seed: int,
        min_slots: int,
        min_mask_bytes: int,
        min_polygons: PolygonSizes | None,
    ) -> None:
        self.store = SampleStore(dataset, short_sides, long_side_max, polygons=min_polygons is not None)
        self.short_sides, self.long_side_max = list(short_sides), long_side_max
        self.augment, self.seed = augment, seed
        self.min_slots, self.min_mask_bytes = min_slots, min_mask_bytes
        self.min_polygons = min_polygons

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch | Failure:
        left_out: dict[int, str] = {}
        try:
            read = [self._readable(index, number, plan.bucket, left_out) for index, number in plan.samples]
        except UserError as error:
            return Failure(str(error))
        samples = [sample for _, sample in read]
        batch = collate(
            samples,
            plan.bucket,
            min_slots=self.min_slots,
            min_mask_bytes=max(self.min_mask_bytes, plan.floors.mask_bytes),
            proposal_slots=self.store.proposal_slots,
            min_polygons=raised(self.min_polygons, plan.floors),
        )
        ids = [self.store.records[index].image_id for index, _ in read]
        return _loaded(batch, samples, ids, left_out, self.store.take_clipped())

    def _readable(
        self, index: int, number: int, bucket: Size, left_out: dict[int, str]
    ) -> tuple[int, Sample]:
        """The sample and the index of its image, which is another one if that cannot be read."""
        faults: list[str] = []
        for candidate in itertools.chain([index], self._substitutes(index, number, bucket)):
            try:
                return candidate, self._sample(candidate, number)
            except UserError as error:
                faults.append(str(error))
                left_out[self.store.records[candidate].image_id] = faults[-1]
                if len(faults) == MOST_TRIES:
                    break
        others = f", nor can {len(faults) - 1} others that were to stand in for it" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{others or '; no other image can stand in for it'}")

    def _substitutes(self, index: int, number: int, bucket: Size) -> Iterator[int]:
        """Other images that fit into the bucket."""
        for other in substitutes(len(self.store.records), self.seed, number):
            height, width = self._plan(other, number).size
            if other != index and height <= bucket[0] and width <= bucket[1]:
                yield other

    def _plan(self, index: int, number: int) -> Plan:
        record, numbers = self.store.records[index], draws(self.seed, number)[0]
        return plan_image(
            record.height, record.width, numbers, self.short_sides, self.long_side_max, self.augment
        )

    def _sample(self, index: int, number: int) -> Sample:
        record, plan = self.store.records[index], self._plan(index, number)
        resized, objects = self.store.resized(index, plan.resized), self.store.objects(index)
        size, schema = (record.height, record.width), self.store.schema
        return make_sample(resized, plan, size, objects, schema, self.store.proposed(index))


class EvalSamples(Dataset[LoadedBatch | Failure]):
    def __init__(self, dataset: CocoDataset, batch: int, short_side: int, long_side_max: int) -> None:
        self.store = SampleStore(dataset, [short_side], long_side_max)
        self.batch, self.short_side, self.long_side_max = batch, short_side, long_side_max

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch | Failure:
        try:
            samples = [self._sample(index) for index, _ in plan.samples]
        except UserError as error:
            return Failure(str(error))
        ids = [self.store.records[index].image_id for index, _ in plan.samples]
        filled = [*samples, *[samples[-1]] * (self.batch - len(samples))]
        batch = collate(filled, plan.bucket, proposal_slots=self.store.proposal_slots)
        return _loaded(batch, samples, ids, {}, self.store.take_clipped())

    def _sample(self, index: int) -> Sample:
        record = self.store.records[index]
        plan = Plan(resized_size(record.height, record.width, self.short_side, self.long_side_max))
        resized, size = self.store.resized(index, plan.resized), (record.height, record.width)
        return make_sample(resized, plan, size, proposals=self.store.proposed(index))


def _loaded(
    batch: Batch,
    samples: Sequence[Sample],
    image_ids: list[int],
    left_out: dict[int, str],
    clipped: dict[int, str],
) -> LoadedBatch:
    repeated = [*samples, *[samples[-1]] * (batch.pixels.shape[0] - len(samples))]
    sizes = [sample.annotated for sample in samples]
    return LoadedBatch(
        batch, image_ids, len(samples), sizes, stack_input_to_image(repeated), left_out, clipped
    )
