"""Which images make up which batch: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.buckets import smallest_bucket
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.data.transforms import Augment, Size, choose_side, choose_turns, draws, resized_size
from fastmrcnn.errors import UserError


class Floors(NamedTuple):
    """Lower limits of the padded sizes of targets, for equal shapes; also what a batch needs of each."""

    mask_bytes: int = 0
    vertices: int = 0
    parts: int = 0


class BatchPlan(NamedTuple):
    bucket: Size
    samples: list[tuple[int, int]]  # (index into the records, global sample index)
    floors: Floors = Floors()


class Share(NamedTuple):
    """Which images of a step are one process's.

    With `accumulate` the step's images are made into as many micro-batches, one after the other, and each is
    dealt out to the processes: `rank` has, of micro-batch k, the images from (k * size + rank) * n on; n is
    batch / (size * accumulate).
    """

    rank: int = 0
    size: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Into which the images of a step are divided."""
        return self.size * self.accumulate


WHOLE = Share()


class TrainSampler:
    """The batches of steps start_step .. steps - 1.

    Sample i of the endless sequence is an image of permutation i // n, drawn from the seed. Each
    sample queues for its bucket; a full queue becomes the next batch, and what is left in a queue
    waits for the epochs to come. So no image is lost, and batches have one shape.

    Of each step it gives this process's share, as one plan for each micro-batch. What the targets of a step
    need is computed for all shares, so that all processes pad to the same shapes.

    Args:
        share: of this process.
        needs: (n, 3) what each image needs of `Floors`; None: shares are padded by themselves.
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
        share: Share = WHOLE,
        needs: NDArray[np.int64] | None = None,
    ) -> None:
        if batch % share.parts:
            raise UserError(cannot_divide(batch, share))
        self.share, self.needs = share, needs
        self.buckets = list(buckets)
        self.batch, self.seed, self.start_step, self.steps = batch, seed, start_step, steps
        self.sides, self.rotate90 = len(short_sides), augment.rotate90
        if augment.crop is not None:  # whatever an image's size, the sample's is the crop's
            self.bucket_of = _bucket_of_crop(len(records), len(short_sides), augment.crop, buckets)
        else:
            self.bucket_of = _bucket_table(records, short_sides, long_side_max, buckets, augment.rotate90 > 0)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.share.accumulate

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
                    yield from self._shares(self.buckets[number], group)
                step += 1
            epoch += 1

    def _shares(self, bucket: Size, group: NDArray[np.int64]) -> Iterator[BatchPlan]:
        """This process's micro-batches of a step, whose samples (batch, 2) are given."""
        rank, size, _ = self.share
        parts = group.reshape(self.share.parts, -1, 2)
        floors = Floors()
        if self.needs is not None:
            floors = Floors(*self.needs[parts[:, :, 0]].sum(axis=1).max(axis=0).tolist())
        for part in parts[rank::size]:
            yield BatchPlan(bucket, [(int(i), int(g)) for i, g in part], floors)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples (n, 2) of an epoch, and the bucket (n,) of each."""
        images = self.bucket_of.shape[0]
        order = np.random.Generator(np.random.Philox(key=[self.seed, 1], counter=[0, epoch, 0, 0]))
        image = order.permutation(images).astype(np.int64)
        numbers = draws(self.seed, epoch * images, images)
        turned = choose_turns(numbers, self.rotate90) % 2
        bucket = self.bucket_of[image, choose_side(numbers, self.sides), turned]
        return np.stack([image, epoch * images + np.arange(images)], axis=1), bucket


def cannot_divide(batch: int, share: Share) -> str:
    """The line on a batch that is no multiple of its shares: which numbers of processes would do."""
    accumulate = share.accumulate
    sizes = [size for size in range(1, batch + 1) if batch % (size * accumulate) == 0]
    text = f"train.batch={batch} images a step cannot be shared out evenly to {share.size} processes"
    if share.size == 1:
        text = f"train.batch={batch} images a step"
    if accumulate > 1:
        text += (
            f" in train.accumulate={accumulate} turns each"
            if share.size > 1
            else (f" cannot be taken in train.accumulate={accumulate} equal turns")
        )
    if not sizes:
        return f"{text}; make train.batch a multiple of {share.parts}"
    return (
        f"{text}; it can with {', '.join(map(str, sizes))} process{'' if sizes == [1] else 'es'}, or make "
        f"train.batch a multiple of {share.parts}"
    )


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
    sizes = flat_records(records).sizes.astype(np.int64)
    # two in one number: of rows numpy finds the different ones far more slowly
    _, first, which = np.unique(sizes[:, 0] << 32 | sizes[:, 1], return_index=True, return_inverse=True)
    table = np.zeros((len(first), len(short_sides), 2), np.int64)
    for row in np.argsort(first).tolist():  # by the first image of each size, which errors name
        for column, side in enumerate(short_sides):
            height, width = sizes[first[row]].tolist()
            height, width = resized_size(height, width, side, long_side_max)
            for turned, way in enumerate([(height, width), (width, height) if turns else (height, width)]):
                bucket = smallest_bucket(way, buckets)
                if bucket is None:
                    record = records[int(first[row])]
                    raise UserError(
                        f"image {record.image_id} of {record.annotations}: {record.file_name} becomes "
                        f"{way[0]}x{way[1]} (height x width) by data.short_side and data.long_side_max, "
                        "and no entry of data.buckets holds that; add one, or set data.buckets=auto"
                    )
                table[row, column, turned] = list(buckets).index(bucket)
    return table[which]
