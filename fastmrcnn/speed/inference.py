"""Inference on synthetic images: the model, then its masks pasted to the full size of the images."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastmrcnn.data.synthetic import synthetic_batch
from fastmrcnn.detection.paste import paste_masks
from fastmrcnn.device import choose_precision
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.speed.report import table
from fastmrcnn.speed.timing import summary, wait
from fastmrcnn.speed.workload import Workload, changed
from fastmrcnn.structures import Batch, Detections, to_device
from fastmrcnn.weights.start import new_model

BATCHES = (1, 8)
WARM_UP = 3
# How the model is run, and the mode of torch.compile. reduce-overhead replays CUDA graphs.
EAGER, COMPILED, GRAPHS = "eager", "compiled", "compiled, CUDA graphs"
_MODES = {COMPILED: "default", GRAPHS: "reduce-overhead"}


def measure_inference(
    workload: Workload, *, compiled: bool, report: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Milliseconds of a batch of 1 and of 8, and images a second.

    Weights are random, so the score threshold is 0 to have as many detections as there are slots.

    Args:
        compiled: measure the compiled model too, on CUDA also with CUDA graphs.
    """
    device = workload.device
    config = changed(workload.config, "model.box_head.score_threshold", 0.0)
    card = Workload(config, device, workload.shape, 1, 1, num_classes=workload.num_classes).card
    model = new_model(card, device, imagenet=False, detector=False)
    model.load_state_dict(workload.start)
    model.eval()
    ways = [EAGER]
    if compiled:
        ways += [COMPILED, GRAPHS] if device.type == "cuda" else [COMPILED]
    found = []
    for images in BATCHES:
        batch = synthetic_batch(images, workload.shape, workload.objects, workload.num_classes, workload.seed)
        batch = to_device(batch._replace(targets=None), device)
        for way in ways:
            report(f"inference, batch {images}, {way}")
            row: dict[str, Any] = {"batch": images, "way": way}
            try:
                row |= _measure(model, batch, config.runtime.precision, way, workload.steps)
            except Exception as error:  # that one way breaks is a result too
                row["failure"] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            found.append(row)
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
        run = torch.compile(detect, fullgraph=True, dynamic=False, mode=_MODES[way])
    height, width = batch.pixels.shape[-2:]
    model_ms, paste_ms = [], []
    detections = 0
    for number in range(WARM_UP + steps):
        wait(device)
        started = time.perf_counter()
        found = run(batch)
        wait(device)
        detected = time.perf_counter()
        if found.masks is not None:
            paste_masks(found.masks.flatten(0, 1), found.boxes.flatten(0, 1), height, width)
        wait(device)
        pasted = time.perf_counter()
        if number >= WARM_UP:
            model_ms.append(1e3 * (detected - started))
            paste_ms.append(1e3 * (pasted - detected))
        detections = int(found.valid.sum())
    model_times, paste_times = summary(model_ms), summary(paste_ms)
    both = summary(a + b for a, b in zip(model_ms, paste_ms, strict=True))
    return {
        "precision": precision.name,
        "detections_per_image": detections / len(batch.pixels),
        "model_ms": model_times.p50_ms,
        "paste_ms": paste_times.p50_ms,
        "p20_ms": both.p20_ms,
        "p50_ms": both.p50_ms,
        "p80_ms": both.p80_ms,
        "images_per_second": 1e3 * len(batch.pixels) / both.p50_ms,
    }


def inference_table(rows: list[dict[str, Any]]) -> str:
    both = "both ms (p20 to p80)"
    head = ["batch", "way", "precision", "model ms", "paste ms", both, "images/s", "detections"]
    lines = []
    for row in rows:
        cells = [str(row["batch"]), row["way"]]
        if "failure" in row:
            lines.append([*cells, f"FAILED: {row['failure']}".replace("|", "/"), *[""] * 5])
            continue
        lines.append(
            [
                *cells,
                row["precision"],
                f"{row['model_ms']:.1f}",
                f"{row['paste_ms']:.1f}",
                f"{row['p50_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})",
                f"{row['images_per_second']:.1f}",
                f"{row['detections_per_image']:.0f} an image",
            ]
        )
    return table(head, lines)
