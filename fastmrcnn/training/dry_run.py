"""--dry-run: check configuration and data, then estimate what training would cost."""

from __future__ import annotations

import resource
import sys
import time

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.transforms import Augment
from fastmrcnn.device import choose_device, choose_precision, set_up_cuda
from fastmrcnn.structures import to_device
from fastmrcnn.training.console import describe_start
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.start import load_start, new_model

STEPS = 2


def dry_run(config: Config, train_set: CocoDataset) -> None:
    """Run two steps, on a CPU of one image at half size, and print the cost of the whole run.

    On a CPU the figures are extrapolated by the number of pixels and images, and say so. On a GPU the
    steps are of the real size, and the figures are those of the second one.
    """
    device = choose_device(config.runtime.device)
    set_up_cuda(device)
    precision = choose_precision(config.runtime.precision, device, config.runtime.cpu_precision)
    on_cpu = device.type == "cpu"
    half = 2 if on_cpu else 1
    images = config.train.images // config.train.accumulate  # at once
    batch = 1 if on_cpu else images
    buckets, crop = config.data.buckets, config.data.augment.crop
    loader = TrainLoader(
        train_set,
        batch=batch,
        short_sides=[max(side // half, 32) for side in config.data.short_side],
        long_side_max=max(config.data.long_side_max // half, 32),
        buckets="auto" if on_cpu or buckets == "auto" else buckets,
        augment=None if crop is None else Augment(crop=(-(-crop[0] // half), -(-crop[1] // half))),
        seed=config.train.seed,
        steps=STEPS,
        max_objects=config.data.max_objects,
        polygons=PolygonSizes() if config.model.mask_head.reads_polygons else None,
        max_broken=config.data.max_broken,
    )
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    model = new_model(card, device)
    if config.model.weights is not None:  # a backbone's are not fetched for this
        load_start(model, card)
    execution = choose_execution(config, device)
    make_step = TrainingStep(model, config.optim, precision, execution, seed=config.train.seed)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in make_step.update.parameters)
    print(f"The configuration is valid. {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained.")
    for line in describe_start(model, config, make_step.optimizer):
        print(line)

    fixed = peak_memory(device)  # weights and libraries: what does not grow with the batch
    seconds, shape = 0.0, (0, 0)
    for step, loaded in enumerate(loader):
        one = to_device(loaded.batch, device)
        shape = (one.pixels.shape[2], one.pixels.shape[3])
        if (execution.compiled or execution.cuda_graphs) and make_step.is_new(one):
            make_step.warm_up(one, [shape])
        started = time.perf_counter()
        make_step(one, step, learning_rate(config.optim, step, STEPS, config.train.images))
        make_step.update.first_bad_step.item()  # wait for the device: this is what is timed
        seconds = time.perf_counter() - started
    growing = peak_memory(device) - fixed
    scale = half * half * images / batch
    label = "measured at full size"
    if on_cpu:
        label = (
            f"extrapolated from one image of {shape[0]}x{shape[1]}, half size, by {scale:g}; a rough guide"
        )
    seconds *= scale * config.train.accumulate
    at_once = "a step" if config.train.accumulate == 1 else "a pass"
    print(f"On {device} ({label}):")
    print(f"  memory       {(fixed + growing * scale) / 2**30:.1f} GiB at {images} images {at_once}")
    total = duration(seconds * config.train.steps)
    print(f"  time         {seconds:.2f} s a step, {total} for {config.train.steps} steps")


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.0f} days"
