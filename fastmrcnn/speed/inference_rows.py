"""Inference on synthetic images: the model, then its masks pasted to the full size of the images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.data.synthetic import synthetic_batch
from fastmrcnn.detection.paste import paste_masks
from fastmrcnn.device import choose_precision
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.speed.apart import Apart, GoneError, one_line
from fastmrcnn.speed.markdown import spread, table
from fastmrcnn.speed.step_workload import Workload, changed, on_disk, read_workload
from fastmrcnn.speed.timing import summary, waited_for
from fastmrcnn.structures import Batch, Detections, to_device
from fastmrcnn.training.compile_cache import keep_compile_cache
from fastmrcnn.weights.start import new_model

BATCHES = (1, 8)
WARM_UP = 3
# How the model is run, and the mode of torch.compile. reduce-overhead replays CUDA graphs.
EAGER, COMPILED, GRAPHS = "eager", "compiled", "compiled, CUDA graphs"
_MODES = {COMPILED: "default", GRAPHS: "reduce-overhead"}


class Inference:
    """The model on synthetic images, one batch size and one way at a time."""

    def __init__(self, workload: Workload) -> None:
        device = workload.device
        # Weights are random: without a threshold there are as many detections as there are slots.
        config = changed(workload.config, "model.box_head.score_threshold", 0.0)
        card = Workload(config, device, workload.shape, 1, 1, num_classes=workload.num_classes).card
        self.workload = workload
        self.model = new_model(card, device)
        self.model.load_state_dict(workload.start)
        self.model.eval()

    def measure(self, images: int, way: str) -> dict[str, Any]:
        load = self.workload
        batch = synthetic_batch(images, load.shape, load.objects, load.num_classes, load.seed)
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
    """Milliseconds of a batch of 1 and of 8, and images a second.

    Args:
        compiled: measure the compiled model too, on CUDA also with CUDA graphs.
        measure: a batch size and a way; None: in this process.
        keep: is given the rows so far after each.
    """
    measure = measure or Inference(workload).measure
    ways = [EAGER]
    if compiled:
        ways += [COMPILED, GRAPHS] if workload.device.type == "cuda" else [COMPILED]
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
    precision = choose_precision(precision_name, device)

    def detect(batch: Batch) -> Detections:
        with torch.no_grad(), torch.autocast(device.type, dtype=precision.dtype, enabled=precision.autocast):
            return model.detect(batch)

    run: Callable[[Batch], Detections] = detect
    if way != EAGER:
        torch._dynamo.reset()
        keep_compile_cache()
        run = torch.compile(detect, fullgraph=True, dynamic=False, mode=_MODES[way])
    height, width = batch.pixels.shape[-2:]

    def paste(found: Detections) -> None:
        if found.masks is not None:
            paste_masks(found.masks.flatten(0, 1), found.boxes.flatten(0, 1), height, width)

    model_ms, paste_ms = [], []
    for _ in range(WARM_UP + steps):
        found, milliseconds = waited_for(lambda: run(batch), device)
        model_ms.append(milliseconds)
        paste_ms.append(waited_for(partial(paste, found), device)[1])
    both = summary(map(sum, zip(model_ms[WARM_UP:], paste_ms[WARM_UP:], strict=True)))
    return {
        "precision": precision.name,
        "detections_per_image": int(found.valid.sum()) / len(batch.pixels),
        "model_ms": summary(model_ms[WARM_UP:]).p50_ms,
        "paste_ms": summary(paste_ms[WARM_UP:]).p50_ms,
        **both._asdict(),
        "images_per_second": 1e3 * len(batch.pixels) / both.p50_ms,
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
                f"{row['model_ms']:.1f}",
                f"{row['paste_ms']:.1f}",
                spread(row),
                f"{row['images_per_second']:.1f}",
                f"{row['detections_per_image']:.0f} an image",
            ]
        )
    return table(head, lines)
