"""All images of a set through a model, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import evaluation_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.worker import LoadedBatch
from fastmrcnn.detection.fetch import Fetched
from fastmrcnn.detection.run import Inference, device_of
from fastmrcnn.device import detecting_precision
from fastmrcnn.structures import Batch, Detections


def detect(
    model: nn.Module,
    dataset: CocoDataset,
    config: Config,
    part: Callable[[Batch], Detections] | None = None,
) -> Iterator[tuple[LoadedBatch, Fetched]]:
    """All images of a set, and what is on its way of their detections; the host waits for none of it.

    Args:
        part: what of the model detects; None: all of it.
    """
    runtime, threshold = config.runtime, config.model.mask_head.threshold
    device = device_of(model)
    precision = detecting_precision(runtime.precision, device, runtime.cpu_precision)
    infer = Inference(model, precision, part=part, graphs=runtime.graphs == "auto")
    for loaded in evaluation_loader(dataset, config, pin_memory=device.type == "cuda"):
        found = infer(loaded.batch)
        yield loaded, Fetched(found, loaded.input_to_image, loaded.original_sizes, encode=threshold)
