"""What a loader process does: decode, resize, augment, pad."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import (
    RasterisedObjects,
    Sample,
    collate,
    make_sample,
    read_objects,
    stack_input_to_image,
    without_polygons,
)
from fastmrcnn.data.compose import Source, choice_of, compose, plan_composition
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.images import read_image
from fastmrcnn.data.order import BatchPlan, substitutes
from fastmrcnn.data.padding import raised
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.raw_images import Room, device_resizes
from fastmrcnn.data.records import ImageProposals
from fastmrcnn.data.saved_pipeline import BITS, Pipeline, PipelineError
from fastmrcnn.data.transforms import (
    PIPELINE_DRAW,
    Augment,
    Plan,
    Size,
    Window,
    draws,
    jittered_size,
    plan_image,
    resize,
    resized_size,
)
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
        self,
        dataset: CocoDataset,
        short_sides: Sequence[int],
        long_side_max: int,
        polygons: bool = False,
        original: bool = False,
    ) -> None:
        """
        Args:
            polygons: gather those too.
            original: keep images as they are decoded, since each sample resizes them otherwise.
        """
        self.records = dataset.records
        self.polygons = polygons
        self.schema, self.masks = dataset.keypoints, dataset.masks
        self.proposals, self.proposal_slots = dataset.proposals, dataset.proposal_slots
        flat = flat_records(dataset.records)
        sides = [None] if original else short_sides
        pixels = sum(
            times
            * math.prod((height, width) if side is None else resized_size(height, width, side, long_side_max))
            for (height, width), times in Counter(map(tuple, flat.sizes.tolist())).items()
            for side in sides
        )
        self.original = original
        self.keep_pixels = 3 * pixels <= CACHE_BYTES
        boxes = flat.objects["box"]
        self.keep_objects = bool(np.prod(boxes[:, 2:] - boxes[:, :2], 1).sum() <= CACHE_BYTES)
        self._pixels: dict[tuple[int, Size | None], NDArray[np.uint8]] = {}
        self._objects: dict[int, RasterisedObjects] = {}
        self._clipped: dict[int, str] = {}

    def resized(self, index: int, size: Size, region: Window | None = None) -> NDArray[np.uint8]:
        """As `transforms.resize` gives it."""
        return resize(self._kept(index, size, None), size, region)

    def decoded(self, index: int, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As it is annotated, perhaps at the beginning of `memory`; of a store of originals."""
        assert self.original
        return self._kept(index, (0, 0), memory)

    def _kept(self, index: int, size: Size, memory: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        key = (index, None if self.original else size)
        found = self._pixels.get(key)
        if found is None:
            record = self.records[index]
            found, note = read_image(record, None if self.keep_pixels else memory)
            if note is not None and note.clipped:
                self._clipped[record.image_id] = f"{record.file_name}: {note.text}"
            if not self.original:
                found = resize(found, size)
            if self.keep_pixels:
                self._pixels[key] = found
        return found

    def pixels(
        self, index: int, plan: Plan, bucket: Size, room: Room | None
    ) -> tuple[NDArray[np.uint8], Plan | None]:
        """What `make_sample` takes, and what of the plan it leaves to the device; with a room the image is
        there."""
        record = self.records[index]
        if room is None or plan.rotation:
            return self.resized(index, plan.resized, plan.region), None
        if device_resizes((record.height, record.width), plan, bucket):
            return room.place(self.decoded(index, room.rest)), plan
        smaller = self.resized(index, plan.resized, plan.region)
        return room.place(smaller), replace(plan, resized=smaller.shape[:2], crop=None)

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


class TrainSamples:
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
        raw: bool = False,
    ) -> None:
        self.store = SampleStore(
            dataset,
            short_sides,
            long_side_max,
            polygons=min_polygons is not None or augment.rotate > 0,  # outlines to be turned
            original=raw or augment.reads_originals,
        )
        self.sizes = [(height, width) for height, width in flat_records(dataset.records).sizes.tolist()]
        self.short_sides, self.long_side_max = list(short_sides), long_side_max
        self.augment, self.seed = augment, seed
        self.pipeline = None if augment.albumentations is None else Pipeline(augment.albumentations)
        self.min_slots, self.min_mask_bytes = min_slots, min_mask_bytes
        self.min_polygons = min_polygons
        self.raw = raw

    def load(self, plan: BatchPlan, memory: NDArray[np.uint8] | None = None) -> LoadedBatch | Failure:
        """
        Args:
            memory: flat; the pixels are put at its beginning, if it is large enough.
        """
        left_out: dict[int, str] = {}
        room = Room(memory) if self.raw else None
        # What is small is done for all images together, before and after the pixels: one by one, each would
        # find that decoding the last has driven its code out of the processor's cache.
        plans = [self._plan(index, number) for index, number in plan.samples]
        try:
            read = [
                self._readable(index, number, one, plan.bucket, left_out, room)
                for (index, number), one in zip(plan.samples, plans, strict=True)
            ]
        except UserError as error:
            return Failure(str(error))
        samples = [finish() for _, finish in read]
        batch = collate(
            samples,
            plan.bucket,
            min_slots=self.min_slots,
            min_mask_bytes=max(self.min_mask_bytes, plan.floors.mask_bytes),
            proposal_slots=self.store.proposal_slots,
            min_polygons=raised(self.min_polygons, plan.floors),
            memory=memory,
            raw=room,
            coloured=self.augment.colours,
            maps_of_objects=self.augment.composes,
        )
        ids = [self.store.records[index].image_id for index, _ in read]
        return _loaded(batch, samples, ids, left_out, self.store.take_clipped())

    def _readable(
        self,
        index: int,
        number: int,
        plan: Plan,
        bucket: Size,
        left_out: dict[int, str],
        room: Room | None,
    ) -> tuple[int, Callable[[], Sample]]:
        """The index of the sample's image, which is another one if that cannot be read, and what makes the
        sample."""
        faults: list[str] = []
        for candidate in itertools.chain([index], self._substitutes(index, number, bucket)):
            try:
                own = plan if candidate == index else self._plan(candidate, number)
                return candidate, self._read(candidate, number, own, bucket, left_out, room)
            except PipelineError:
                raise
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
        numbers, (height, width) = draws(self.seed, number)[0], self.sizes[index]
        return plan_image(height, width, numbers, self.short_sides, self.long_side_max, self.augment)

    def _read(
        self, index: int, number: int, plan: Plan, bucket: Size, left_out: dict[int, str], room: Room | None
    ) -> Callable[[], Sample]:
        done = None
        if self.pipeline is not None:
            done = self._through(self.pipeline, index, number)
        elif self.augment.composes:
            done = self._composed(index, number, left_out)
        if done is not None:
            placed = self._placed(done, room)
            return lambda: placed
        objects = self.store.objects(index)
        pixels, left = self.store.pixels(index, plan, bucket, room)
        return partial(self._single, index, plan, pixels, left, objects, room)

    def _single(
        self,
        index: int,
        plan: Plan,
        pixels: NDArray[np.uint8],
        left: Plan | None,
        objects: RasterisedObjects,
        room: Room | None,
    ) -> Sample:
        proposals, schema = self.store.proposed(index), self.store.schema
        least = self.augment.min_visible
        sample = make_sample(pixels, plan, self.sizes[index], objects, schema, proposals, least, left)
        return self._placed(sample, room)

    def _placed(self, sample: Sample, room: Room | None) -> Sample:
        if room is not None and sample.left is None:
            sample = sample._replace(pixels=room.place(sample.pixels))
        return sample if self.min_polygons is not None else without_polygons(sample)

    def _through(self, pipeline: Pipeline, index: int, number: int) -> Sample:
        """A sample of what the pipeline makes of an image."""
        schema, numbers = self.store.schema, draws(self.seed, number)[0]
        seed = int(numbers[PIPELINE_DRAW] * 2**BITS)
        image, objects = self.store.resized(index, self.sizes[index]), self.store.objects(index)
        pixels, objects = pipeline(image, objects, schema, seed)
        size, plan = (pixels.shape[0], pixels.shape[1]), self._plan(index, number)
        if size != self.sizes[index]:  # fits where the image as it was would have fitted
            sides = (self.short_sides, self.long_side_max)
            if self.augment.crop is None:
                plan = replace(plan, resized=jittered_size(*size, plan.resized, 1.0))
            else:
                plan = plan_image(*size, numbers, *sides, self.augment)
        resized, least = resize(pixels, plan.resized, plan.region), self.augment.min_visible
        return make_sample(resized, plan, size, objects, schema, None, least)

    def _composed(self, index: int, number: int, left_out: dict[int, str]) -> Sample | None:
        """A sample of several images, if this is one. Where another image cannot be read, the sample's own
        stands in for it."""
        broken: set[int] = set()
        while True:
            composition = plan_composition(
                index,
                self.sizes,
                self.seed,
                number,
                self.short_sides,
                self.long_side_max,
                self.augment,
                broken,
            )
            if composition is None:
                return None
            sources: list[Source] = []
            for layer in composition.layers:
                try:
                    resized = self.store.resized(layer.image, layer.plan.resized, layer.plan.region)
                except UserError as error:
                    if layer.image == index:
                        raise
                    broken.add(layer.image)
                    left_out[self.store.records[layer.image].image_id] = str(error)
                    break
                sources.append(Source(resized, self.sizes[layer.image], self.store.objects(layer.image)))
            else:
                break
        schema, augment = self.store.schema, self.augment
        return compose(
            composition,
            sources,
            mirror=None if schema is None else schema.mirror,
            min_visible=augment.min_visible,
            fill=augment.fill,
            choice=choice_of(self.seed, number),
        )


class EvalSamples:
    def __init__(
        self, dataset: CocoDataset, batch: int, short_side: int, long_side_max: int, raw: bool = False
    ) -> None:
        self.store = SampleStore(dataset, [short_side], long_side_max, original=raw)
        self.batch, self.short_side, self.long_side_max, self.raw = batch, short_side, long_side_max, raw

    def load(self, plan: BatchPlan, memory: NDArray[np.uint8] | None = None) -> LoadedBatch | Failure:
        """As of `TrainSamples`."""
        room = Room(memory) if self.raw else None
        try:
            samples = [self._sample(index, plan.bucket, room) for index, _ in plan.samples]
        except UserError as error:
            return Failure(str(error))
        ids = [self.store.records[index].image_id for index, _ in plan.samples]
        filled = [*samples, *[samples[-1]] * (self.batch - len(samples))]
        slots = self.store.proposal_slots
        batch = collate(filled, plan.bucket, proposal_slots=slots, memory=memory, raw=room)
        return _loaded(batch, samples, ids, {}, self.store.take_clipped())

    def _sample(self, index: int, bucket: Size, room: Room | None) -> Sample:
        record = self.store.records[index]
        plan = Plan(resized_size(record.height, record.width, self.short_side, self.long_side_max))
        pixels, left = self.store.pixels(index, plan, bucket, room)
        size, proposals = (record.height, record.width), self.store.proposed(index)
        return make_sample(pixels, plan, size, proposals=proposals, left=left)


def _loaded(
    batch: Batch,
    samples: Sequence[Sample],
    image_ids: list[int],
    left_out: dict[int, str],
    clipped: dict[int, str],
) -> LoadedBatch:
    repeated = [*samples, *[samples[-1]] * (batch.sizes.shape[0] - len(samples))]
    sizes = [sample.annotated for sample in samples]
    return LoadedBatch(
        batch, image_ids, len(samples), sizes, stack_input_to_image(repeated), left_out, clipped
    )
