"""Which images make up which batch: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.buckets import smallest_bucket
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.data.transforms import Augment, Size, choose_side, choose_turns, draws, resized_size
from fastmrcnn.errors import UserError


class BatchPlan(NamedTuple):
    bucket: Size
    samples: list[tuple[int, int]]  # (index into the records, global sample index)


class TrainSampler:
    """The batches of steps start_step .. steps - 1.

    Sample i of the endless sequence is an image of permutation i // n, drawn from the seed. Each
    sample queues for its bucket; a full queue becomes the next batch, and what is left in a queue
    waits for the epochs to come. So no image is lost, and batches have one shape.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        *,
        batch: int,
        short_sides: Sequence[int],
        long_side_max: int,
        buckets: Sequence[Size],
        augment: Augment,
        seed: int,
        start_step: int,
        steps: int,
    ) -> None:
        self.buckets = list(buckets)
        self.batch, self.seed, self.start_step, self.steps = batch, seed, start_step, steps
        self.sides, self.rotate90 = len(short_sides), augment.rotate90
        if augment.crop is not None:  # whatever an image's size, the sample's is the crop's
            self.bucket_of = _bucket_of_crop(len(records), len(short_sides), augment.crop, buckets)
        else:
            self.bucket_of = _bucket_table(records, short_sides, long_side_max, buckets, augment.rotate90 > 0)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[BatchPlan]:
        waiting = [np.empty((0, 2), np.int64) for _ in self.buckets]
        step = epoch = 0
        while step < self.steps:
            samples, bucket = self._epoch(epoch)
            ready: list[tuple[int, int, NDArray[np.int64]]] = []
            for number, queue in enumerate(waiting):
                queue = np.concatenate([queue, samples[bucket == number]])
                full = len(queue) // self.batch * self.batch
                for start in range(0, full, self.batch):
                    group = queue[start : start + self.batch]
                    ready.append((int(group[-1, 1]), number, group))
                waiting[number] = queue[full:]
            # a batch is ready when its last sample comes
            for _, number, group in sorted(ready, key=lambda entry: entry[0])[: self.steps - step]:
                if step >= self.start_step:
                    yield BatchPlan(self.buckets[number], [(int(i), int(g)) for i, g in group])
                step += 1
            epoch += 1

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples (n, 2) of an epoch, and the bucket (n,) of each."""
        images = self.bucket_of.shape[0]
        order = np.random.Generator(np.random.Philox(key=[self.seed, 1], counter=[0, epoch, 0, 0]))
        image = order.permutation(images).astype(np.int64)
        numbers = draws(self.seed, epoch * images, images)
        turned = choose_turns(numbers, self.rotate90) % 2
        bucket = self.bucket_of[image, choose_side(numbers, self.sides), turned]
        return np.stack([image, epoch * images + np.arange(images)], axis=1), bucket


def substitutes(images: int, seed: int, sample: int) -> Iterator[int]:
    """The images of a set in the order in which they stand in for that of a sample: a function of the seed
    and the sample's global index alone."""
    order = np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, sample, 0, 0]))
    yield from order.permutation(images).tolist()


def _bucket_of_crop(images: int, sides: int, crop: Size, buckets: Sequence[Size]) -> NDArray[np.int64]:
    """As `_bucket_table`, the same for all."""
    bucket = smallest_bucket(crop, buckets)
    if bucket is None:
        raise UserError(
            f"data.augment.crop={list(crop)} (height, width): no entry of data.buckets holds that; add one, "
            "or set data.buckets=auto"
        )
    return np.full((images, sides, 2), list(buckets).index(bucket), np.int64)


def _bucket_table(
    records: Sequence[ImageRecord],
    short_sides: Sequence[int],
    long_side_max: int,
    buckets: Sequence[Size],
    turns: bool,
) -> NDArray[np.int64]:
    """Bucket number by image, short side, and whether it is turned: (n, sides, 2)."""
    table = np.zeros((len(records), len(short_sides), 2), np.int64)
    known: dict[tuple[int, int, int], list[int]] = {}
    for row, record in enumerate(records):
        for column, side in enumerate(short_sides):
            key = (record.height, record.width, side)
            if key not in known:
                size = resized_size(*key, long_side_max)
                ways = [size, size[::-1]] if turns else [size, size]
                found = [smallest_bucket(way, buckets) for way in ways]
                for way, bucket in zip(ways, found, strict=True):
                    if bucket is None:
                        raise UserError(
                            f"image {record.image_id} of {record.annotations}: {record.file_name} becomes "
                            f"{way[0]}x{way[1]} (height x width) by data.short_side and data.long_side_max, "
                            "and no entry of data.buckets holds that; add one, or set data.buckets=auto"
                        )
                known[key] = [list(buckets).index(b) for b in found if b is not None]
            table[row, column] = known[key]
    return table
