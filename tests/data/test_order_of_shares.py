"""Which images a step has, and which of them a process: the same whoever asks."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.collate import power_of_two
from fastmrcnn.data.loader import EvalLoader, TrainLoader
from fastmrcnn.data.order import WHOLE, BatchPlan, Share, TrainSampler
from fastmrcnn.data.padding import target_needs
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.data.transforms import Augment
from fastmrcnn.errors import UserError
from fastmrcnn.structures import tree_map

BATCH, STEPS = 8, 12
SHARES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 8)]  # processes, batches to a step


def records(sizes: list[tuple[int, int]]) -> list[ImageRecord]:
    path = Path("set.json")
    item = ObjectRecord(1, 0, (0, 0, 9, 9), False, None, 81)
    return [ImageRecord(100 + i, path, "x", w, h, [item], path) for i, (h, w) in enumerate(sizes)]


MIXED = records([(30, 80)] * 11 + [(80, 30)] * 5 + [(34, 34)] * 3)


def sampler(share: Share = WHOLE, **changes: Any) -> TrainSampler:
    options: dict[str, Any] = {
        "batch": BATCH,
        "short_sides": [30, 26],
        "long_side_max": 80,
        "buckets": [(32, 96), (96, 32)],
        "augment": Augment(rotate90=0.3),
        "seed": 4,
        "start_step": 0,
        "steps": STEPS,
    }
    return TrainSampler(MIXED, **(options | changes), share=share)


def steps_of_all(size: int, accumulate: int, **changes: Any) -> list[BatchPlan]:
    """The steps of a run, put together from what each of its processes has."""
    each = [list(sampler(Share(rank, size, accumulate), **changes)) for rank in range(size)]
    whole = []
    for start in range(0, len(each[0]), accumulate):
        parts = [plans[start + turn] for turn in range(accumulate) for plans in each]
        assert len({part.bucket for part in parts}) == 1
        assert len({len(part.samples) for part in parts}) == 1
        whole.append(BatchPlan(parts[0].bucket, [sample for part in parts for sample in part.samples]))
    return whole


@pytest.mark.parametrize(("size", "accumulate"), SHARES)
def test_a_step_has_the_same_images_whoever_shares_it(size: int, accumulate: int) -> None:
    alone = list(sampler())
    assert len(alone) == STEPS
    assert steps_of_all(size, accumulate) == alone
    assert steps_of_all(size, accumulate, start_step=5) == alone[5:]
    assert len(sampler(Share(0, size, accumulate), start_step=5)) == (STEPS - 5) * accumulate


@pytest.mark.parametrize("buckets", [[(96, 96)], [(32, 96), (96, 32)]])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_epoch_loses_an_image(buckets: list[tuple[int, int]], size: int) -> None:
    """Over 50 epochs, in four pieces: what has been drawn and not come yet waits in the queues."""
    images, epochs = len(MIXED), 50
    steps = images * epochs // BATCH
    cuts = [0, steps // 5, steps // 2, steps - 1, steps]
    seen: list[int] = []
    for start, end in itertools.pairwise(cuts):
        plans = steps_of_all(size, 1, buckets=buckets, start_step=start, steps=end)
        seen += [number for plan in plans for _, number in plan.samples]
    assert len(seen) == len(set(seen)) == steps * BATCH
    # Sample i is an image of epoch i // n; each bucket's queue holds back less than a batch.
    waiting = max(seen) + 1 - len(seen)
    assert 0 <= waiting < len(buckets) * BATCH + images
    full = [number for number in seen if number < (epochs - 2 * BATCH) * images]
    assert sorted(full) == list(range(len(full)))
    whole = list(sampler(buckets=buckets, steps=steps))
    image_of = {number: index for plan in whole for index, number in plan.samples}
    for epoch in range(epochs - 2 * BATCH):
        drawn = Counter(image_of[number] for number in range(epoch * images, (epoch + 1) * images))
        assert drawn == dict.fromkeys(range(images), 1)


def test_a_batch_that_cannot_be_shared_out() -> None:
    for share, text in (
        (
            Share(0, 3),
            "to 3 processes; it can with 1, 2, 4, 8 processes, or make train.batch a multiple of 3",
        ),
        (Share(0, 4, 4), "in train.accumulate=4 turns each; it can with 1, 2 processes"),
        (
            Share(0, 1, 3),
            "cannot be taken in train.accumulate=3 equal turns; make train.batch a multiple of 3",
        ),
    ):
        with pytest.raises(UserError, match=r"train\.batch=8 images a step") as caught:
            sampler(share)
        assert text in str(caught.value)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = write_shapes(tmp_path_factory.mktemp("shapes"), seed=3, train=12, val=1, size=64)
    return read_coco(paths["train_images"], paths["train_annotations"])


def test_all_processes_pad_to_the_same_shapes(shapes: CocoDataset) -> None:
    """With few objects in some images and a hundred in others, where each would come to sizes of its own."""
    crowded = [
        replace(record, objects=list(record.objects) * (1 if index % 3 else 41))
        for index, record in enumerate(shapes.records)
    ]
    shapes = replace(shapes, records=crowded)
    alike = []
    for floors in (True, False):
        of_processes = []
        for rank in range(4):
            options: dict[str, Any] = {"short_sides": [64], "long_side_max": 64, "steps": 6}
            own = TrainLoader(
                shapes, batch=4, polygons=PolygonSizes(), min_slots=128, share=Share(rank, 4), **options
            )
            if not floors:
                own.sampler.needs = None
            found = []
            for loaded in own:
                sizes: list[Any] = []
                tree_map(lambda tensor, into=sizes: into.append(tuple(tensor.shape)), loaded.batch)
                found.append(tuple(sizes))
            of_processes.append(found)
        alike.append(all(len(set(step)) == 1 for step in zip(*of_processes, strict=True)))
    assert alike == [True, False]  # without the floors they differ


def test_what_targets_need_is_an_upper_bound(shapes: CocoDataset) -> None:
    needs = target_needs(shapes, polygons=True)
    for index, (bytes_, vertices, parts) in enumerate(needs.tolist()):
        one = CocoDataset(
            [shapes.records[index]], shapes.class_names, shapes.category_ids, shapes.annotations
        )
        options: dict[str, Any] = {"short_sides": [64], "long_side_max": 64, "steps": 1, "batch": 1}
        loaded = next(iter(TrainLoader(one, polygons=PolygonSizes(1, 1, 1), min_mask_bytes=1, **options)))
        targets = loaded.batch.targets
        assert targets is not None
        assert targets.polygons is not None
        used = int(targets.masks.window[..., 2:].prod(-1).sum())
        assert used <= bytes_ <= 2 * used + 500
        assert len(targets.polygons.vertices) == power_of_two(vertices)
        assert len(targets.polygons.part_start) == power_of_two(parts) + 1


def test_each_image_is_evaluated_once(shapes: CocoDataset) -> None:
    options: dict[str, Any] = {"batch": 5, "short_side": 64, "long_side_max": 64}
    alone = [loaded.image_ids for loaded in EvalLoader(shapes, **options)]
    for size in (2, 3, 7):
        each = [
            [one.image_ids for one in EvalLoader(shapes, **options, share=Share(rank, size))]
            for rank in range(size)
        ]
        assert sorted(itertools.chain(*each)) == sorted(alone)
        for rank, own in enumerate(each):
            assert own == alone[rank::size]
    ids = [image_id for batch in alone for image_id in batch]
    assert sorted(ids) == sorted(record.image_id for record in shapes.records)
