"""What all rows of a benchmark share: recipe, device, batches, weights to start from, number of steps."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmrcnn.config.checks import RECIPES
from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.synthetic import synthetic_batches
from fastmrcnn.data.transforms import Size
from fastmrcnn.device import choose_device, set_threads, set_up_cuda
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.norms import FrozenBatchNorm2d, fold_norms
from fastmrcnn.structures import Batch
from fastmrcnn.weights.card import ModelCard

RECIPE = "mask_rcnn_r50_fpn_1x.yaml"
RANDOM_WEIGHTS = ["model.weights=null", "model.backbone.weights=null"]
BATCHES = 3  # different ones, in turn: a step is not to find its own inputs in a cache


@dataclass(frozen=True)
class Workload:
    """Synthetic batches for a recipe. `shape` is height and width, `images` are those of a step."""

    config: Config
    device: torch.device
    shape: Size
    images: int
    steps: int
    objects: int = 15
    num_classes: int = 80
    seed: int = 0

    @cached_property
    def batches(self) -> list[Batch]:
        """On the CPU, of equal shapes."""
        return synthetic_batches(
            range(self.seed, self.seed + BATCHES),
            self.images,
            self.shape,
            self.objects,
            self.num_classes,
            polygons=self.config.model.mask_head.reads_polygons,
        )

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Weights that every row starts from, on the CPU."""
        torch.manual_seed(self.seed)
        model = build_model(self.config.model, self.num_classes)
        fit_frozen_norms(model.eval(), self.batches[0])
        return model.state_dict()

    @property
    def card(self) -> ModelCard:
        ids = list(range(1, self.num_classes + 1))
        return ModelCard(self.config, [f"class {number}" for number in ids], ids)

    @property
    def facts(self) -> dict[str, Any]:
        """What is run, in words that need no configuration file."""
        height, width = self.shape
        model = self.config.model
        return {
            "images": self.images,
            "height": height,
            "width": width,
            "steps": self.steps,
            "objects_per_image": self.objects,
            "classes": self.num_classes,
            "seed": self.seed,
            "backbone": model.backbone.name,
            "architecture": model.architecture,
            "sampling_ratio": model.roi.sampling_ratio,
            "rois_per_image": model.roi.batch_per_image,
        }


@contextlib.contextmanager
def on_disk(workload: Workload) -> Iterator[Path]:
    """A file with the workload, its batches and its weights made, for other processes to read."""
    assert workload.batches
    assert workload.start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "workload.pt"
        torch.save(workload, file)
        yield file


def read_workload(file: Path, device: str | None = None) -> Workload:
    """What `on_disk` wrote; sets up its device.

    Args:
        device: another one, as `runtime.device` has it.
    """
    workload: Workload = torch.load(file, mmap=True, weights_only=False)  # of our own making
    if device is not None:
        config = changed(workload.config, "runtime.device", device)
        return replace(workload, config=config, device=set_up_device(config))
    set_up_device(workload.config)
    return workload


def load_recipe(path: str | Path | None, overrides: list[str]) -> Config:
    """A recipe, or RECIPE, without its weights."""
    return load_config(path or RECIPES / RECIPE, RANDOM_WEIGHTS + overrides)


def set_up_device(config: Config) -> torch.device:
    """The recipe's device, ready for all rows, torchvision's too: its images are of one size here."""
    device = choose_device(config.runtime.device)
    set_up_cuda(device)
    set_threads(config.runtime.threads)
    return device


def check_synthetic(config: Config) -> None:
    """Raise UserError where synthetic batches lack what the model reads."""
    problems = []
    if config.model.keypoint_head.enabled:
        problems.append("keypoints: set model.keypoint_head.enabled=false")
    if not config.model.rpn.enabled:
        problems.append("proposals: set model.rpn.enabled=true")
    if not config.model.box_head.enabled:
        problems.append("results without a box head: set model.box_head.enabled=true")
    if problems:
        raise UserError("the benchmark has no " + "; and no ".join(problems))


def changed(config: Config, key: str, value: Any) -> Config:
    """The configuration with the setting `key` (section.name) replaced."""
    tree = config.model_dump()
    section = tree
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    return Config.model_validate(tree)


@torch.no_grad()
def fit_frozen_norms(model: nn.Module, batch: Batch) -> None:
    """Give frozen batch norms the statistics of what reaches them, as trained weights bring along.

    With random weights and the statistics 0 and 1, the maps grow from block to block, and so do the losses.
    """

    def fit(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
    fold_norms(model, False)  # so that they see their inputs
    first = batch._replace(pixels=batch.pixels[:1], sizes=batch.sizes[:1])
    try:
        if hooks:
            model.features(first)  # type: ignore[operator]
            # C4's last stage runs on RoIs; a whole map has the same statistics.
            if getattr(model, "res5", None) is not None:
                model.res5(model.features(first)[-1])  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
        fold_norms(model, True)
