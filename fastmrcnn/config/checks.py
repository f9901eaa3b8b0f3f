"""Where a configuration comes from, and what is valid in it but cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError

RECIPES = Path(__file__).parents[1] / "configs"


SplitName = Literal["train", "val"]


def starting_config(path: str | None, overrides: list[str]) -> Config:
    """The recipe that was asked for; without one and without data, the demo."""
    if path is None:
        if any(item.startswith("data.train.") for item in overrides):
            raise UserError(
                "data.train needs a recipe: --config configs/small.yaml (a small model from random weights) "
                "or one of configs/mask_rcnn_*.yaml"
            )
        return load_config(RECIPES / "demo.yaml", overrides)
    return load_config(path, overrides)


def check_trainable(config: Config) -> None:
    """Raise UserError for a configuration that is valid but cannot be meant."""
    backbone, split = config.model.backbone, config.data.train
    problems = []
    missing = [key for key in ("images", "annotations") if getattr(split, key) is None]
    if missing and not config.data.shapes:
        keys = " and ".join(f"data.train.{key}" for key in missing)
        problems.append(f"{keys} must be given: data.train.images=DIR data.train.annotations=FILE")
    if (config.data.val.images is None) != (config.data.val.annotations is None):
        problems.append("data.val needs both images and annotations, or neither")
    train, val = config.train, config.data.val.annotations is not None or config.data.shapes
    if train.keep_best is not None and not val:
        problems.append("train.keep_best needs a validation set: data.val.images and data.val.annotations")
    if train.patience is not None and (train.keep_best is None or train.evaluate_every is None):
        problems.append(
            "train.patience needs train.keep_best (such as segm/AP) and train.evaluate_every, whose "
            "evaluations it counts"
        )
    random = backbone.weights is None and config.model.weights is None
    if random and backbone.norm == "frozen_bn":
        learn = "gn or bn" if backbone.timm_name is None else "bn"
        problems.append(
            "model.backbone.norm=frozen_bn needs model.backbone.weights or model.weights; from random "
            f"weights use {learn}"
        )
    if random and backbone.frozen_stages > 0:
        problems.append(
            "model.backbone.frozen_stages needs model.backbone.weights or model.weights; from random weights "
            "set it to 0"
        )
    augment = config.data.augment
    several = [name for name in ("copy_paste", "mosaic", "albumentations") if getattr(augment, name)]
    if config.data.train.proposals is not None and several:
        keys = " and ".join(f"data.augment.{name}" for name in several)
        problems.append(
            f"{keys} and data.train.proposals do not go together: a file has those of whole images"
        )
    names: tuple[SplitName, ...] = ("train",) if config.data.val.annotations is None else ("train", "val")
    problems += [problem for name in names if (problem := proposals_problem(config, name))]
    if problems:
        raise UserError("; ".join(problems))


def proposals_problem(config: Config, name: SplitName) -> str | None:
    """What is wrong with a split's file of proposals, which stands in for an RPN; None if nothing is."""
    if (getattr(config.data, name).proposals is None) != config.model.rpn.enabled:
        return (
            f"data.{name}.proposals goes with model.rpn.enabled=false, and that with it; "
            "python -m fastmrcnn.propose writes the file"
        )
    return None
