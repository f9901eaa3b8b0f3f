"""Inference on synthetic images: the model with its masks pasted to full size, and all of it from Python.

The rows of the model begin with a batch on the device, and end with bitmaps of all its detections there.
The row "from Python" is what a program gets: `detector([...])` on decoded images in memory, to objects with
bitmaps on the host, about as many as there are objects in an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmrcnn.data.synthetic import synthetic_batch
from fastmrcnn.detection.detector import Detector
from fastmrcnn.detection.paste import paste_masks
from fastmrcnn.detection.prediction import Prediction
from fastmrcnn.detection.recorded import BEFORE, RecordedModel
from fastmrcnn.detection.run import device_of
from fastmrcnn.device import choose_precision, detecting_precision
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.speed.apart import Apart, GoneError, one_line
from fastmrcnn.speed.markdown import spread, table
from fastmrcnn.speed.step_workload import Workload, changed, on_disk, read_workload
from fastmrcnn.speed.timing import summary, waited_for
from fastmrcnn.structures import Batch, Detections, to_device
from fastmrcnn.training.compile_cache import keep_compile_cache
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.start import new_model

BATCHES = (1, 8)
WARM_UP = 3
# How the model is run, and the mode of torch.compile. reduce-overhead replays CUDA graphs.
EAGER, COMPILED, GRAPHS = "eager", "compiled", "compiled, CUDA graphs"
RECORDED = "CUDA graphs"  # as a detector does: what runs eagerly, recorded
PYTHON = "from Python"
_MODES = {COMPILED: "default", GRAPHS: "reduce-overhead"}
LISTS = 4  # batches in a list, from Python: while one is on the device, the host is at work on another


class Inference:
    """The model on synthetic images, one batch size and one way at a time."""

    def __init__(self, workload: Workload) -> None:
        device = workload.device
        # Weights are random: without a threshold there are as many detections as there are slots.
        config = changed(workload.config, "model.box_head.score_threshold", 0.0)
        card = Workload(config, device, workload.shape, 1, 1, num_classes=workload.num_classes).card
        self.workload = workload
        self.card = card
        self.model = new_model(card, device)
        self.model.load_state_dict(workload.start)
        self.model.eval()

    def measure(self, images: int, way: str) -> dict[str, Any]:
        load = self.workload
        batch = synthetic_batch(images, load.shape, load.objects, load.num_classes, load.seed)
        if way == PYTHON:
            return _from_python(self.model, self.card, batch, load.steps, load.objects)
        batch = to_device(batch._replace(targets=None), load.device)
        return _measure(self.model, batch, load.config.runtime.precision, way, load.steps)


def inference_from(file: Path) -> Inference:
    return Inference(read_workload(file))


def measure_inference_apart(
    workload: Workload,
    *,
    compiled: bool,
    report: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """As `measure_inference`, each row in a process of its own."""
    with on_disk(workload) as file:

        def measure(images: int, way: str) -> dict[str, Any]:
            with Apart(inference_from, file) as process:
                found: dict[str, Any] = process.ask("measure", images, way)
            return found

        return measure_inference(workload, compiled=compiled, measure=measure, report=report, keep=keep)


def measure_inference(
    workload: Workload,
    *,
    compiled: bool,
    measure: Callable[[int, str], dict[str, Any]] | None = None,
    report: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """Milliseconds of a batch of 1 and of 8, and images a second; of the model, and from Python.

    Args:
        compiled: measure the compiled model too, on CUDA also with CUDA graphs.
        measure: a batch size and a way; None: in this process.
        keep: is given the rows so far after each.
    """
    measure = measure or Inference(workload).measure
    cuda = workload.device.type == "cuda"
    ways = [EAGER, RECORDED, PYTHON] if cuda else [EAGER, PYTHON]
    if compiled:
        ways += [COMPILED, GRAPHS] if cuda else [COMPILED]
    found = []
    for images in BATCHES:
        for way in ways:
            report(f"inference, batch {images}, {way}")
            row: dict[str, Any] = {"batch": images, "way": way}
            try:
                row |= measure(images, way)
            except GoneError as error:
                row["failure"] = str(error)
            except Exception as error:  # that one way breaks is a result too
                row["failure"] = one_line(error)
            found.append(row)
            keep(found)
    return found


def _measure(model: MaskRCNN, batch: Batch, precision_name: str, way: str, steps: int) -> dict[str, Any]:
    device = batch.pixels.device
    precision = choose_precision(detecting_precision(precision_name, device), device)

    def detect(batch: Batch) -> Detections:
        with torch.no_grad(), torch.autocast(device.type, dtype=precision.dtype, enabled=precision.autocast):
            return model.detect(batch)

    run: Callable[[Batch], Detections] = detect
    warm_up = WARM_UP
    if way == RECORDED:
        recorded = RecordedModel(detect, device)
        run, warm_up = recorded, BEFORE + WARM_UP
    elif way != EAGER:
        torch._dynamo.reset()
        keep_compile_cache()
        run = torch.compile(detect, fullgraph=True, dynamic=False, mode=_MODES[way])
    height, width = batch.pixels.shape[-2:]

    def paste(found: Detections) -> None:
        if found.masks is not None:
            paste_masks(found.masks.flatten(0, 1), found.boxes.flatten(0, 1), height, width)

    model_ms, paste_ms = [], []
    for _ in range(warm_up + steps):
        found, milliseconds = waited_for(lambda: run(batch), device)
        model_ms.append(milliseconds)
        paste_ms.append(waited_for(partial(paste, found), device)[1])
    if way == RECORDED and recorded.failed:
        raise RuntimeError("the model could not be recorded")
    both = summary(map(sum, zip(model_ms[warm_up:], paste_ms[warm_up:], strict=True)))
    return {
        "precision": precision.name,
        "detections_per_image": int(found.valid.sum()) / len(batch.pixels),
        "model_ms": summary(model_ms[warm_up:]).p50_ms,
        "paste_ms": summary(paste_ms[warm_up:]).p50_ms,
        **both._asdict(),
        "images_per_second": 1e3 * len(batch.pixels) / both.p50_ms,
    }


def _from_python(model: MaskRCNN, card: ModelCard, batch: Batch, steps: int, objects: int) -> dict[str, Any]:
    """`detector([image, ...])`: milliseconds of a batch, of several in a list.

    Args:
        objects: the threshold is chosen so that there are so many in an image, on average.
    """
    height, width = batch.pixels.shape[-2:]
    config = changed(card.config, "data.short_side_test", min(height, width))
    config = changed(config, "data.long_side_max", max(height, width))  # so that nothing is resized
    detector = Detector(model, replace(card, config=config))
    images = [pixels.permute(1, 2, 0).contiguous().numpy() for pixels in batch.pixels] * LISTS
    device = device_of(model)
    number = len(batch.pixels)
    scores = np.sort(np.concatenate([one.scores for one in detector(images[:number], 0.0, batch=number)]))
    threshold = float(scores[-min(objects * number, len(scores))]) if len(scores) else 0.0

    def predict() -> list[Prediction]:
        return detector(images, score=threshold, batch=number)

    warm_up = 1 + BEFORE // LISTS + 1  # lists, after which the batch has its graph
    times = []
    for _ in range(warm_up + steps):
        found, milliseconds = waited_for(predict, device)
        times.append(milliseconds / LISTS)
    taken = summary(times[warm_up:])
    return {
        "precision": detecting_precision(config.runtime.precision, device),
        "detections_per_image": sum(map(len, found)) / len(found),
        **taken._asdict(),
        "images_per_second": 1e3 * number / taken.p50_ms,
    }


def inference_table(rows: list[dict[str, Any]]) -> str:
    both = "both ms (p20 to p80)"
    head = ["batch", "way", "precision", "model ms", "paste ms", both, "images/s", "detections"]
    lines = []
    for row in rows:
        cells = [str(row["batch"]), row["way"]]
        if "failure" in row:
            lines.append([*cells, f"FAILED: {row['failure']}"])
            continue
        lines.append(
            [
                *cells,
                row["precision"],
                *(f"{row[name]:.1f}" if name in row else "" for name in ("model_ms", "paste_ms")),
                spread(row),
                f"{row['images_per_second']:.1f}",
                f"{row['detections_per_image']:.0f} an image",
            ]
        )
    return table(head, lines)
