"""Copies beside the step: with stand-ins for a GPU's streams, which run what they are given in any order that
events allow. Nothing is done when it is asked for, as on a GPU."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from batches import random_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.graphs import leaves
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.pixels import pixels_to_be, with_pixels
from fastmrcnn.structures import Batch, Counts, Losses, RawImages, tree_map
from fastmrcnn.training import cuda_graph
from fastmrcnn.training.cuda_graph import GraphedStep, Result, Run, Staging

CPU = torch.device("cpu")
MAIN, COPIES = "main", "copies"


class Device(TorchDispatchMode):
    """Two streams. Within this mode copies are queued in the current one; `run` does what is queued.

    Args:
        blind: events are waited for by nobody, to see that the tests would notice.
    """

    def __init__(self, *, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind
        self.current = MAIN
        self.queues: dict[str, deque[Callable[[], bool]]] = {MAIN: deque(), COPIES: deque()}

    def give(self, work: Callable[[], Any]) -> None:
        def do() -> bool:
            work()
            return True

        self.queues[self.current].append(do)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.current = COPIES
        yield
        self.current = MAIN

    def mark(self) -> list[int]:
        event: list[int] = []
        self.give(lambda: event.append(1))
        return event

    def wait(self, event: list[int]) -> None:
        self.queues[self.current].append(lambda: bool(event) or self.blind)

    def run(self, choose: Callable[[list[str]], str]) -> None:
        """Until nothing is left. `choose` says which stream goes on, of those that have something to do."""
        while ready := [name for name, queue in self.queues.items() if queue]:
            while ready:
                queue = self.queues[name := choose(ready)]
                if queue[0]():
                    queue.popleft()
                    break
                ready.remove(name)
            else:
                raise AssertionError("each stream waits for the other")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            self.give(lambda: func(*args, **kwargs))
            return args[0]
        if func is torch.ops.aten.clone.default:
            copy = torch.full_like(args[0], 0)
            self.give(lambda: copy.copy_(args[0]))
            return copy
        return func(*args, **kwargs)


class Recorder:
    """Stands for a CUDA graph, which adds up what it reads."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(self, run: Run, batch: Batch, keys: SamplingKeys) -> tuple[Result, Callable[[], None]]:
        loss = torch.zeros((), dtype=torch.float64)

        def replay() -> None:
            self.device.give(lambda: loss.fill_(digest(batch, keys)))

        return (Losses(loss_mask=loss), Counts()), replay


def digest(batch: Batch, keys: SamplingKeys) -> float:
    return float(sum(leaf.double().sum() for leaf in leaves((batch, keys))))


def keys_of(number: int) -> SamplingKeys:
    return SamplingKeys(torch.full((2, 3), float(number)), torch.full((2, 5), float(number)))


def unused(batch: Batch, keys: SamplingKeys) -> Result:
    raise AssertionError("it is replayed")


def steps(device: Device, batches: list[tuple[int, Batch]]) -> list[tuple[Tensor, float]]:
    """Ask for a step with each batch, by its number; returns what comes of it, and what should."""
    staging = Staging(CPU, device)
    step = GraphedStep(unused, nullcontext, Recorder(device), staging)
    found = []
    with device:
        for number, batch in batches:
            losses, _ = step(staging(batch), keys_of(number))
            assert losses.loss_mask is not None
            found.append((losses.loss_mask, digest(batch, keys_of(number))))
    return found


def orders() -> list[Callable[[list[str]], str]]:
    """Copies as early as they may be, as late, and by chance."""
    eager = [lambda ready: COPIES if COPIES in ready else MAIN, lambda ready: ready[0]]
    return [*eager, *(random.Random(seed).choice for seed in range(20))]


ONE_SHAPE = [(k, random_batch(k)) for k in range(6)]
TWO_SHAPES = [(k, random_batch(k, shape=(96, 128) if k in (1, 2, 4, 7) else (128, 96))) for k in range(9)]


@pytest.mark.parametrize("batches", [ONE_SHAPE, TWO_SHAPES, TWO_SHAPES[3:]], ids=["one", "two", "resumed"])
def test_each_step_reads_its_own_batch(batches: list[tuple[int, Batch]]) -> None:
    for choose in orders():
        device = Device()
        found = steps(device, batches)
        device.run(choose)
        assert [loss.item() for loss, _ in found] == [expected for _, expected in found]
    assert len({expected for _, expected in found}) == len(batches)


@pytest.mark.parametrize("batches", [ONE_SHAPE, TWO_SHAPES], ids=["one", "two"])
def test_without_events_it_would_not(batches: list[tuple[int, Batch]]) -> None:
    wrong = 0
    for choose in orders():
        device = Device(blind=True)
        found = steps(device, batches)
        device.run(choose)
        wrong += [loss.item() for loss, _ in found] != [expected for _, expected in found]
    assert wrong > len(orders()) / 2


def test_a_copy_is_done_while_the_step_before_runs() -> None:
    """The host asks for steps 0 and 1; the first one reads its batch, and is then held up for good."""
    device = Device()
    staging = Staging(CPU, device)
    held = GraphedStep(unused, nullcontext, lambda *_: ((Losses(), Counts()), lambda: stop(device)), staging)
    with device:
        for number, batch in ONE_SHAPE[:2]:
            held(staging(batch), keys_of(number))
    with pytest.raises(AssertionError, match="waits for the other"):
        device.run(lambda ready: ready[0])
    assert not device.queues[COPIES]
    (buffer,) = staging.buffers.values()
    assert torch.equal(buffer.pixels, ONE_SHAPE[1][1].pixels)


def stop(device: Device) -> None:
    device.queues[device.current].append(lambda: False)


def test_batches_that_are_there_already_need_no_staging() -> None:
    """As in benchmarks, and when all shapes are warmed up."""
    device = Device()
    staging = Staging(CPU, device)
    step = GraphedStep(unused, nullcontext, Recorder(device), staging)
    with device:
        losses, _ = step(ONE_SHAPE[0][1], keys_of(0))
        staged = staging(ONE_SHAPE[1][1])
        step(ONE_SHAPE[2][1], keys_of(2))  # a warm-up of the same shapes before the step
        later, _ = step(staged, keys_of(1))
        staging(ONE_SHAPE[3][1])
    device.run(lambda ready: COPIES if COPIES in ready else MAIN)
    assert losses.loss_mask == digest(ONE_SHAPE[0][1], keys_of(0))
    assert later.loss_mask == digest(ONE_SHAPE[1][1], keys_of(1))


def raw_batch(number: int) -> Batch:
    """Two images of one level, mirrored, in a buffer of one of two sizes."""
    batch = random_batch(number)
    sizes = batch.sizes.int()
    nothing = torch.zeros((2, 2), dtype=torch.int32)
    buffer = torch.full((3 * int(sizes.prod(1).sum()) + 99 * (number % 2),), 7 + number, dtype=torch.uint8)
    offset = torch.tensor([0, 3 * int(sizes[0].prod())])
    flips = torch.tensor([[True, False]] * 2)
    raw = RawImages(buffer, offset, sizes, sizes, nothing[:, 0], flips, nothing)
    return batch._replace(pixels=batch.pixels[:0], raw=raw)


RAW = [(k, raw_batch(k) if k != 3 else random_batch(k)) for k in range(7)]


@pytest.mark.parametrize("blind", [False, True])
def test_pixels_are_made_beside_the_step_before(blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the images of their own batch, which are overwritten only when that is done."""
    wrong = 0
    for choose in orders():
        device = Device(blind=blind)

        def queued(batch: Batch, device: Device = device) -> Batch:
            made = torch.zeros_like(pixels_to_be(batch), device="cpu")
            device.give(lambda: made.copy_(with_pixels(batch).pixels))
            return batch._replace(pixels=made, raw=None)

        monkeypatch.setattr(cuda_graph, "with_pixels", queued)
        expected = [digest(with_pixels(batch), keys_of(number)) for number, batch in RAW]
        found = steps(device, RAW)
        if blind:
            with contextlib.suppress(ValueError):  # of sizes that have not arrived
                device.run(choose)
            wrong += [loss.item() for loss, _ in found] != expected
        else:
            device.run(choose)
            assert [loss.item() for loss, _ in found] == expected
    assert len({digest(with_pixels(batch), keys_of(0)) for _, batch in RAW}) == len(RAW)
    assert wrong > len(orders()) / 2 or not blind


@pytest.mark.gpu
def test_on_a_gpu_batches_arrive_in_order() -> None:
    device = torch.device("cuda")
    staging = Staging(device)
    total = torch.zeros((), device=device, dtype=torch.float64)

    def run(batch: Batch, keys: SamplingKeys) -> Result:
        heavy = torch.ones(2048, 2048, device=device)
        for _ in range(20):
            heavy = heavy @ heavy * 1e-4
        total.copy_(sum(leaf.double().sum() for leaf in leaves((batch, keys))) + 0 * heavy.sum())
        return Losses(loss_mask=total), Counts()

    step = GraphedStep(run, nullcontext, staging=staging)
    found = []
    for number, batch in [*TWO_SHAPES, *RAW] * 3:
        pinned = tree_map(Tensor.pin_memory, batch._replace(targets=None))
        own = SamplingKeys(*(key.to(device) for key in keys_of(number)))
        expected = digest(with_pixels(batch._replace(targets=None)), keys_of(number))
        found.append((step(staging(pinned), own)[0].loss_mask, expected))
    for loss, expected in found:
        assert loss is not None
        assert loss.item() == expected
