"""Batches of decoded images, of which the device makes the pixels: in a run, a step, an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import random_batch, small_config, small_model
from tiny import TIMES, TinyData, assert_same_state, record

from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.detection.run import Inference
from fastmrcnn.device import choose_precision
from fastmrcnn.graphs import leaves
from fastmrcnn.pixels import pixels_to_be, with_pixels
from fastmrcnn.structures import Batch, Detections, RawImages
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint

MOVES = ["data.augment.flip_vertical=0.5", "data.augment.rotate90=0.5", "data.short_side=[40, 96]"]


def raw_batch(seed: int = 0, spare: int = 0) -> tuple[Batch, Batch]:
    """Decoded images that are to be mirrored, and what is to become of them.

    Args:
        spare: bytes of the buffer behind the images.
    """
    batch = random_batch(seed)
    parts = [image[:, :h, :w] for image, (h, w) in zip(batch.pixels, batch.sizes.tolist(), strict=True)]
    pixels = torch.zeros_like(batch.pixels, memory_format=torch.channels_last)  # as loaders make them
    for row, part in zip(pixels, parts, strict=True):
        row[:, : part.shape[1], : part.shape[2]] = part.flip(2)
    sizes = batch.sizes.int()
    raw = RawImages(
        torch.cat([*(part.permute(1, 2, 0).flatten() for part in parts), torch.full((spare,), 9)]).byte(),
        torch.tensor([0, parts[0].numel()]),
        sizes,
        sizes,
        torch.zeros(2, dtype=torch.int32),
        torch.tensor([[True, False]] * 2),
        torch.zeros((2, 2), dtype=torch.int32),
    )
    return batch._replace(pixels=batch.pixels[:0], raw=raw), batch._replace(pixels=pixels)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("raw"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_the_same_wherever_images_are_resized(data: TinyData, workers: int, tmp_path: Path) -> None:
    found = []
    for where in ("worker", "device", "auto"):
        changes = [*MOVES, "train.steps=3", f"data.workers={workers}", f"data.resize={where}"]
        if where == "auto" and workers:
            continue
        folder = data.run(tmp_path / where, *changes, val=True)
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in record(folder)]
        found.append((lines, read_checkpoint(find_checkpoint(folder))))
    for lines, state in found[1:]:
        assert lines == found[0][0]
        assert_same_state(state, found[0][1])


def test_pixels_are_made_and_their_shape_is_known_before() -> None:
    raw, expected = raw_batch()
    made = with_pixels(raw)
    assert made.raw is None
    assert made.pixels.equal(expected.pixels)
    to_be = pixels_to_be(raw)
    assert (to_be.shape, to_be.dtype, to_be.stride()) == (
        made.pixels.shape,
        made.pixels.dtype,
        made.pixels.stride(),
    )
    assert with_pixels(expected) is expected
    assert pixels_to_be(expected).stride() == expected.pixels.stride()


def test_a_step_takes_one_or_several() -> None:
    step = TrainingStep(
        small_model().train(), OptimConfig(), choose_precision("fp32", torch.device("cpu")), Execution()
    )
    raw, expected = raw_batch()
    uploaded = step.upload(raw)
    assert uploaded.pixels.equal(expected.pixels)
    assert [one.pixels.equal(expected.pixels) for one in step.upload([raw, expected])] == [True, True]
    losses = [step(one, 1, 0.0)[0].total() for one in (uploaded, expected)]
    assert losses[0].equal(losses[1])


def test_detection_is_recorded_for_the_shape_of_the_pixels() -> None:
    """However large the buffer of the decoded images is."""
    model = small_model(config=small_config()).eval()
    recorded: list[Batch] = []

    def record_it(run: Callable[[Batch], Detections], batch: Batch) -> tuple[Detections, Callable[[], None]]:
        recorded.append(batch)
        result = run(batch)

        def replay() -> None:
            for own, new in zip(leaves(result), leaves(run(batch)), strict=True):
                own.copy_(new)

        return result, replay

    infer, plain = Inference(model, "fp32", record=record_it), Inference(model, "fp32", graphs=False)
    for number in range(6):
        raw, expected = raw_batch(number, spare=2**number)
        for own, given in zip(leaves(infer(raw)), leaves(plain(expected)), strict=True):
            assert own.equal(given)
        assert all(
            own.equal(given) for own, given in zip(leaves(plain(raw)), leaves(plain(expected)), strict=True)
        )
    assert len(recorded) == 1
    assert recorded[0].raw is None
