"""All images of a set through a model, without waiting for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import evaluation_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.order import Share
from fastmrcnn.data.worker import LoadedBatch
from fastmrcnn.detection.fetch import Fetched
from fastmrcnn.detection.run import Inference, device_of
from fastmrcnn.device import detecting_precision
from fastmrcnn.group import ALONE, Group
from fastmrcnn.structures import Batch, Detections

T = TypeVar("T")


def detect(
    model: nn.Module,
    dataset: CocoDataset,
    config: Config,
    part: Callable[[Batch], Detections] | None = None,
    group: Group = ALONE,
) -> Iterator[tuple[LoadedBatch, Fetched]]:
    """All images of a set, or of several processes this one's, and what is on its way of their detections.
    The host waits for none of it.

    Args:
        part: what of the model detects; None: all of it.
    """
    runtime, threshold = config.runtime, config.model.mask_head.threshold
    device = device_of(model)
    precision = detecting_precision(runtime.precision, device, runtime.cpu_precision)
    infer = Inference(model, precision, part=part, graphs=runtime.graphs == "auto")
    share, on_gpu = Share(group.rank, group.size), device.type == "cuda"
    for loaded in evaluation_loader(dataset, config, pin_memory=on_gpu, share=share):
        found = infer(loaded.batch)
        yield loaded, Fetched(found, loaded.input_to_image, loaded.original_sizes, encode=threshold)


def of_all(own: Sequence[T], group: Group) -> list[T]:
    """What came of each batch, in the order of one process with all of them; on the first process, the others
    get none. They took the batches in turn."""
    found = group.collect(own)
    rounds = itertools.zip_longest(*found, fillvalue=None)
    return [one for turn in rounds for one in turn if one is not None]
