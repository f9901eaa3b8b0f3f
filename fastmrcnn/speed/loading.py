"""What the loader costs: the trainer's step on batches from it, and on one of them again and again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import train_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.device import choose_precision
from fastmrcnn.errors import UserError
from fastmrcnn.pixels import with_pixels
from fastmrcnn.speed.markdown import table
from fastmrcnn.speed.step_workload import changed, fit_frozen_norms
from fastmrcnn.speed.timing import waited_for
from fastmrcnn.structures import Batch, to_device
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.run import prepare_run
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.start import new_model


def measure_loading(config: Config, device: torch.device, images: int, steps: int) -> dict[str, Any]:
    """Images a second with and without the loader, and how long the host waited for data.

    Args:
        config: with data.train, or none for the embedded shapes, resized by the recipe's data section.
        images: of a step.

    Raises:
        UserError: half of data.train is set, or the data has mistakes.
    """
    split = config.data.train
    if (split.images is None) != (split.annotations is None):
        raise UserError("data.train needs both images and annotations, or neither for the embedded shapes")
    with tempfile.TemporaryDirectory() as folder:
        if split.annotations is None:
            config = changed(config, "data.shapes", True)
        # Longer than what is timed, so that the workers never run dry before the end.
        config = changed(changed(config, "train.batch", images), "train.steps", 2 * steps + 16)
        config, _, train_set, _ = prepare_run(config, Path(folder))
        return _measure(config, train_set, device, steps)


def _measure(config: Config, train_set: CocoDataset, device: torch.device, steps: int) -> dict[str, Any]:
    torch.manual_seed(config.train.seed)
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    model = new_model(card, device)
    precision = choose_precision(config.runtime.precision, device, config.runtime.cpu_precision)
    execution = choose_execution(config, device)
    make_step = TrainingStep(model, config.optim, precision, execution, seed=config.train.seed)
    loader = train_loader(train_set, config, 0, pin_memory=device.type == "cuda")
    batches = (loaded.batch for loaded in loader)
    first = with_pixels(to_device(next(batches), device))
    fit_frozen_norms(model.eval(), first)
    model.train()
    make_step.warm_up(first, loader.buckets)

    waits: list[float] = []

    def from_loader() -> Batch:
        started = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - started)
        return make_step.upload(batch)

    loaded_s = _run(make_step, from_loader, config, steps)
    batches.close()  # and with it the workers
    resident_s = _run(make_step, lambda: first, config, steps)
    height, width = first.pixels.shape[-2:]
    return {
        "data": "embedded shapes" if config.data.shapes else str(config.data.train.annotations),
        "images": config.train.images,
        "height": height,
        "width": width,
        "steps": steps,
        "workers": config.data.workers,
        "execution": execution.description,
        "precision": precision.name,
        "waited_s": sum(waits),
        "with_loader": config.train.images * steps / loaded_s,
        "without_loader": config.train.images * steps / resident_s,
    }


def _run(make_step: TrainingStep, get: Callable[[], Batch], config: Config, steps: int) -> float:
    """Seconds of so many steps."""

    def run() -> None:
        for number in range(steps):
            rate = learning_rate(config.optim, number, config.train.steps, config.train.images)
            make_step(get(), number, rate)

    return waited_for(run, make_step.device)[1] / 1e3


def loading_table(found: dict[str, Any]) -> str:
    shape = f"{found['images']} of {found['height']}x{found['width']}"
    head = ["data", "images", "workers", "images/s with the loader", "without", "waited for data"]
    line = [
        found["data"],
        shape,
        str(found["workers"]),
        f"{found['with_loader']:.2f}",
        f"{found['without_loader']:.2f}",
        f"{found['waited_s']:.2f} s in {found['steps']} steps",
    ]
    return table(head, [line])
