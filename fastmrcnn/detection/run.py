"""A model's detections of a batch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmrcnn.detection.recorded import Record, RecordedModel
from fastmrcnn.device import choose_precision
from fastmrcnn.pixels import with_pixels
from fastmrcnn.structures import Batch, Detections, pinned, to_device


def run_model(
    model: nn.Module,
    batch: Batch,
    precision: str,
    part: Callable[[Batch], Detections] | None = None,
) -> Detections:
    """Detections of a batch, under the autocast that `runtime.precision` means on the device.

    Args:
        part: what of the model detects; None: all of it.
    """
    device = device_of(model)
    chosen = choose_precision(precision, device)
    with torch.no_grad(), torch.autocast(device.type, dtype=chosen.dtype, enabled=chosen.autocast):
        return (part or model)(with_pixels(to_device(batch, device)))


class Inference:
    """Runs a model on batches. On a GPU the host does not wait, frequent shapes are replayed as CUDA graphs,
    the model is brought into channels_last, and threads take turns.

    Args:
        model: in eval mode.
        precision: as `runtime.precision`.
        part: what of the model detects; None: all of it.
        graphs: whether to record, on a GPU.
        record: as in `RecordedModel`, which then is used on any device.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        *,
        part: Callable[[Batch], Detections] | None = None,
        graphs: bool = True,
        record: Record | None = None,
    ) -> None:
        self.model = model
        self.precision = precision
        self.part = part
        self.graphs = graphs
        self.record = record
        self.recorded: RecordedModel | None = None
        self._lock = threading.Lock()
        self._places: Any = None

    def __call__(self, batch: Batch) -> Detections:
        """Detections on the model's device, which may not be there yet; no later call writes over them."""
        device = device_of(self.model)
        if device.type == "cpu" and self.record is None:
            return self._run(batch)
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with self._lock, current:
            self._settle(device)
            batch = pinned(batch, device)
            if batch.raw is not None:  # before a recording, for which buffers have too many sizes
                batch = with_pixels(to_device(batch, device))
            return self._run(batch) if self.recorded is None else self.recorded(batch)

    def _run(self, batch: Batch) -> Detections:
        return run_model(self.model, batch, self.precision, self.part)

    def _settle(self, device: torch.device) -> None:
        """Start anew if the model's tensors are not where they were: a graph would go on reading there."""
        if self._places == (places := places_of(self.model)):
            return
        if self.recorded is not None:
            self.recorded.forget()
        self.recorded = None
        if device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            places = places_of(self.model)
        self._places = places
        if self.graphs and (self.record is not None or device.type == "cuda"):
            self.recorded = RecordedModel(self._run, device, self.record)


def device_of(model: nn.Module) -> torch.device:
    """That of its first parameter or buffer; a model without any is on the CPU."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def places_of(model: nn.Module) -> tuple[Any, ...]:
    """Where the model's tensors are."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return (device_of(model), *(tensor.data_ptr() for tensor in tensors))
