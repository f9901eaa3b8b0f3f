"""Whether a run on a CPU is to compute in bf16, decided once by its own first steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import train_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.device import Trial, choose_precision, try_both
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.step import TrainingStep

MOST_IMAGES = 2  # of the batch that is tried: at full size a step of a large recipe takes a CPU minutes


def decide_precision(
    config: Config,
    train_set: CocoDataset,
    model: MaskRCNN,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Config, str]:
    """The configuration with runtime.cpu_precision decided, and a line that says why.

    Steps on the first images of the run are timed in fp32 and in bf16, two each, in turns. They are made with
    the gate closed: the model stays as it is. They are not compiled, even if those of the run will be.

    Args:
        model: in training mode, on the CPU.
    """
    few = config.train.model_copy(update={"batch": min(config.train.images, MOST_IMAGES), "accumulate": 1})
    data = config.data.model_copy(update={"workers": 0})
    alone = config.model_copy(update={"train": few, "data": data})
    loaded = next(iter(train_loader(train_set, alone, 0, pin_memory=False)))

    def closed_step(name: str) -> Callable[[], None]:
        precision = choose_precision(name, torch.device("cpu"))
        make_step = TrainingStep(model, config.optim, precision, Execution(), seed=config.train.seed)

        def run() -> None:
            with make_step.update.closed():
                make_step(loaded.batch, 0, 0.0)

        return run

    trial = try_both(closed_step("fp32"), closed_step("bf16"), clock=clock)
    name = "bf16" if trial.faster else "fp32"
    return with_cpu_precision(config, name), describe_trial(trial, len(loaded.image_ids))


def with_cpu_precision(config: Config, name: str) -> Config:
    runtime = config.runtime.model_copy(update={"cpu_precision": name})
    return config.model_copy(update={"runtime": runtime})


def describe_trial(trial: Trial, images: int) -> str:
    """Both times, and what follows from them."""
    times = f"{trial.fp32:.3g} s in fp32 and {trial.bf16:.3g} s in bf16"
    chosen, other = ("bf16", "fp32") if trial.faster else ("fp32", "bf16")
    of = "an image" if images == 1 else f"{images} images"
    return (
        f"This CPU has instructions for bf16: a step of {of} takes {times}, so the run takes {chosen} "
        f"(runtime.precision={other} to do otherwise)."
    )
