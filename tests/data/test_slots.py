"""Batches come out of shared memory whole, however long somebody keeps them."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmrcnn.data import transport
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.loader import EvalLoader, LoadedBatch, TrainLoader, largest_targets
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.data.slots import Place, Slots, put, shared_block
from fastmrcnn.data.transforms import Augment
from fastmrcnn.structures import tree_map

STEPS = 30  # more than there are slots


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = write_shapes(tmp_path_factory.mktemp("shapes"), seed=3, train=10, val=1, size=48)
    return read_coco(paths["train_images"], paths["train_annotations"])


def loader(dataset: CocoDataset, workers: int, **options: Any) -> TrainLoader:
    slots, mask_bytes = largest_targets(dataset, 3)
    defaults: dict[str, Any] = {
        "batch": 3,
        "short_sides": [40, 48],
        "long_side_max": 96,
        "steps": STEPS,
        "seed": 1,
        "augment": Augment(0.5, 0.5, 0.5, 0.2, 0.2),
        "min_slots": slots,
        "min_mask_bytes": mask_bytes,
    }
    return TrainLoader(dataset, workers=workers, **(defaults | options))


def tensors(loaded: LoadedBatch) -> list[Tensor]:
    found: list[Tensor] = [loaded.input_to_image]
    tree_map(found.append, loaded.batch)
    return found


def assert_equal(one: LoadedBatch, other: LoadedBatch) -> None:
    assert one.image_ids == other.image_ids
    assert one.original_sizes == other.original_sizes
    assert len(tensors(one)) > 10
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a, b)


def test_tensors_come_out_as_they_went_in() -> None:
    block = shared_block(2, 4000)
    assert block is not None
    assert block.is_shared()
    there = block[1][64 : 64 + 60].view(1, 4, 5, 3).permute(0, 3, 1, 2)
    there.copy_(torch.arange(60).view(1, 3, 4, 5))
    given = {
        "there": there,
        "images": torch.arange(60, dtype=torch.uint8).view(1, 4, 5, 3).permute(0, 3, 1, 2),
        "gaps": torch.arange(24, dtype=torch.float64).view(4, 6)[:, ::2],
        "flags": torch.tensor([True, False, True]),
        "none": (None, torch.zeros(2, 0, 4), torch.tensor(2**40), [1, "x"]),
    }
    places = put(block[1], given)
    assert places is not None
    assert places["there"].start == 64
    slots = Slots(block)
    found = slots.tensors(1, places)
    for name in ("there", "images", "gaps", "flags"):
        assert torch.equal(found[name], given[name])
        assert found[name].dtype == given[name].dtype
    assert found["images"].stride() == given["images"].stride()
    assert found["gaps"].is_contiguous()
    assert found["none"][0] is None
    assert found["none"][1].shape == (2, 0, 4)
    assert found["none"][2] == 2**40
    assert found["none"][3] == [1, "x"]
    starts = sorted(p.start for p in (places["images"], places["gaps"], places["flags"]))
    assert starts == [128, 192, 320]


def test_what_is_too_large_is_not_put() -> None:
    memory = torch.zeros(1000, dtype=torch.uint8)
    assert put(memory, [torch.ones(500, dtype=torch.uint8)]) is not None
    assert put(memory, [torch.ones(250), torch.ones(1)]) is None


def test_no_room_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    if os.path.isdir("/dev/shm"):
        before = os.listdir("/dev/shm")
        assert shared_block(1000, 2**50) is None
        assert os.listdir("/dev/shm") == before
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    assert shared_block(1, 100) is None


def place() -> Place:
    return Place(0, (4,), (1,), torch.uint8)


def test_a_slot_is_free_when_nothing_refers_to_it() -> None:
    block = shared_block(2, 64)
    assert block is not None
    slots = Slots(block)
    first, second = slots.take(), slots.take()
    assert {first, second} == {0, 1}
    assert first is not None
    assert slots.take() is None
    held = slots.tensors(first, [place(), place()])
    assert slots.take() is None
    view = held[1].view(2, 2).T[0]
    array = held[0].numpy()
    for name in ("held", "view"):  # one after the other goes
        assert slots.take() is None, name
        if name == "held":
            del held
        else:
            del view
    assert slots.take() is None
    del array
    gc.collect()
    assert slots.take() == first
    slots.give_back(first)
    assert slots.take() == first


class Device:
    """Does what it is given in order, and no sooner than it has to."""

    def __init__(self) -> None:
        self.given: deque[tuple[int, int]] = deque()
        self.begun = self.done = 0
        self.waited = 0

    def read(self, tensor: Tensor, expected: int) -> None:
        """It has an address, as a copy on its way has, and keeps nothing alive."""
        self.given.append((tensor.data_ptr(), expected))
        self.begun += 1

    def run(self, count: int) -> None:
        while self.done < count:
            address, expected = self.given.popleft()
            assert ctypes.string_at(address, 4) == bytes([expected] * 4), f"step {self.done} was overwritten"
            self.done += 1

    def mark(self) -> DeviceMark:
        return DeviceMark(self, self.begun)


class DeviceMark:
    def __init__(self, device: Device, count: int) -> None:
        self.device, self.count = device, count

    def query(self) -> bool:
        return self.device.done >= self.count

    def synchronize(self) -> None:
        self.device.waited += not self.query()
        self.device.run(self.count)


@pytest.mark.parametrize("marked", [True, False])
def test_a_device_that_lies_behind_reads_what_was_meant_for_it(marked: bool) -> None:
    block = shared_block(3, 64)
    assert block is not None
    device = Device()
    slots = Slots(block, device.mark if marked else None)

    def train() -> None:
        for step in range(20):
            slot = slots.take()
            assert slot is not None
            block[slot].fill_(step)
            device.read(slots.tensors(slot, place()), step)
            if step % 7 == 0:
                device.run(device.begun - 1)
        device.run(device.begun)

    if marked:
        train()
        assert device.waited > 5
    else:
        with pytest.raises(AssertionError, match="overwritten"):
            train()


@pytest.mark.parametrize("keep", [False, True])
def test_batches_are_those_of_one_process(shapes: CocoDataset, keep: bool) -> None:
    """Also if their user keeps them all: then there are too few slots, and the rest comes the slow way."""
    expected = loader(shapes, 0)
    one = loader(shapes, 2)
    if keep:
        kept = list(one)
        for wanted, found in zip(expected, kept, strict=True):
            assert_equal(wanted, found)
        assert 2 * transport.PREFETCH <= one.loader.by_slot <= 2 * transport.PREFETCH + transport.SPARE
    else:
        for wanted, found in zip(expected, one, strict=True):
            assert_equal(wanted, found)
        assert one.loader.by_slot == STEPS
    assert expected.loader.by_slot == 0


def test_batches_that_a_slot_cannot_hold(shapes: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []
    take = Slots.take

    def recorded(slots: Slots) -> int | None:
        given.append(take(slots))
        return given[-1]

    monkeypatch.setattr(Slots, "take", recorded)
    expected = list(loader(shapes, 0))
    pixels = expected[0].batch.pixels.numel()
    for room in (pixels // 2, pixels + 1000):  # not even the pixels; not the rest
        one = loader(shapes, 1)
        one.loader.slot_bytes = room
        for wanted, found in zip(expected, list(one), strict=True):
            assert_equal(wanted, found)
        assert one.loader.by_slot == 0
    assert len(given) == 2 * STEPS
    assert None not in given  # they came back
    monkeypatch.setattr(transport, "shared_block", lambda *_: None)
    for wanted, found in zip(expected, loader(shapes, 1), strict=True):
        assert_equal(wanted, found)


def test_passes_do_not_disturb_each_other(shapes: CocoDataset) -> None:
    one = loader(shapes, 1, steps=12)
    expected = list(loader(shapes, 0, steps=12))
    first = iter(one)
    early = [next(first), next(first)]
    late = []
    for wanted, found in zip(expected, one, strict=True):
        assert_equal(wanted, found)
        late += [next(first)] if len(late) < 10 else []
    for wanted, found in zip(expected, early + late, strict=True):
        assert_equal(wanted, found)


def test_evaluation_goes_by_slots_too(shapes: CocoDataset) -> None:
    options: dict[str, Any] = {"batch": 3, "short_side": 48, "long_side_max": 96}
    one = EvalLoader(shapes, workers=1, **options)
    for wanted, found in zip(EvalLoader(shapes, **options), one, strict=True):
        assert wanted.image_ids == found.image_ids
        assert torch.equal(wanted.batch.pixels, found.batch.pixels)
        assert torch.equal(wanted.input_to_image, found.input_to_image)
    assert one.loader.by_slot == len(one) == 4


class Cudart:
    def __init__(self, code: int) -> None:
        self.code, self.registered = code, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        if self.code == 0:
            self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def test_pinned_memory_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(0)
    waits: list[bool] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(bool(cudart.registered)))
    block = shared_block(2, 100)
    assert block is not None
    assert transport.pin(block)
    assert cudart.registered == {block.data_ptr(): 256}
    held = Slots(block).tensors(0, place())
    del block
    gc.collect()
    assert cudart.registered == {}
    assert waits == [True]  # before it is let go
    assert held.sum() == 0  # and the memory itself is there as long as somebody has it
    cudart.code = 1
    other = shared_block(1, 100)
    assert other is not None
    forgotten: list[bool] = []
    monkeypatch.setattr(transport, "_forget_error", lambda: forgotten.append(True))
    assert not transport.pin(other)
    assert forgotten == [True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_not_forked(shapes: CocoDataset, method: str) -> None:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        one = loader(shapes, 1)
        for wanted, found in zip(loader(shapes, 0), one, strict=True):
            assert_equal(wanted, found)
        assert one.loader.by_slot == STEPS
    finally:
        multiprocessing.set_start_method(before, force=True)
