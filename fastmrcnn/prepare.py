"""What is decided before the first step: configuration, device, precision, data, folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fastmrcnn.coco_eval import choose_sigmas
from fastmrcnn.config import Config
from fastmrcnn.config_file import load_config
from fastmrcnn.data.coco import CocoDataset, check_same_classes, read_coco
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.data.loader import EvalLoader
from fastmrcnn.data.proposals import attach_proposals
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError
from fastmrcnn.files import new_run_folder

RECIPES = Path(__file__).parent / "configs"
SplitName = Literal["train", "val"]


class Execution(NamedTuple):
    """How a step is run."""

    compiled: bool = False
    max_autotune: bool = False
    cuda_graphs: bool = False
    fuse_epilogues: bool = False
    description: str = ""


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
    random = backbone.weights is None and config.model.weights is None
    if random and backbone.norm == "frozen_bn":
        problems.append(
            "model.backbone.norm=frozen_bn needs model.backbone.weights or model.weights; from random "
            "weights use gn or bn"
        )
    if random and backbone.frozen_stages > 0:
        problems.append(
            "model.backbone.frozen_stages needs model.backbone.weights or model.weights; from random weights "
            "set it to 0"
        )
    names: tuple[SplitName, ...] = ("train",) if config.data.val.annotations is None else ("train", "val")
    problems += [problem for name in names if (problem := proposals_problem(config, name))]
    if problems:
        raise UserError("; ".join(problems))


def choose_execution(config: Config, device: torch.device) -> Execution:
    """Compile and replay on CUDA; on a CPU neither, since compiling takes longer than a short run.

    Raises:
        UserError: CUDA graphs or cuDNN's epilogues are asked for on a CPU.
    """
    train, cuda = config.train, device.type == "cuda"
    if train.cuda_graphs == "on" and not cuda:
        raise UserError(f"train.cuda_graphs=on needs a CUDA device, this is {device}; use auto or off")
    if train.fuse_epilogues and not cuda:
        raise UserError(f"train.fuse_epilogues=true needs a CUDA device, this is {device}; leave it out")
    compiled = cuda if train.compile == "auto" else train.compile != "off"
    graphs = cuda if train.cuda_graphs == "auto" else train.cuda_graphs == "on"
    how = [
        f"compiled as one graph (train.compile={train.compile})" if compiled else "eager, not compiled",
        f"replayed as CUDA graphs (train.cuda_graphs={train.cuda_graphs})" if graphs else "no CUDA graphs",
    ]
    if train.compile == "auto" and not cuda:
        how[0] += ": compiling on a CPU takes minutes (train.compile=on to do it all the same)"
    if train.fuse_epilogues:
        how.append("bias, residual and ReLU within cuDNN's convolutions (train.fuse_epilogues=true)")
    autotune = train.compile == "max-autotune"
    return Execution(compiled, autotune, graphs, train.fuse_epilogues, ", ".join(how))


def prepare_run(config: Config, folder: Path | None) -> tuple[Config, Path, CocoDataset, CocoDataset | None]:
    """The run's folder, training and validation set, and the configuration with the paths of both.

    A new folder is made if none is given, and only once the data that was asked for is known to be
    there. The embedded set is drawn into the folder.
    """
    if not config.data.shapes:
        train_set, val_set = read_sets(config)
        return config, folder or new_run_folder(config.output), train_set, val_set
    folder = folder or new_run_folder(config.output)
    paths = write_shapes(folder / "data", seed=0)
    tree = config.model_dump()
    for split in ("train", "val"):
        images, annotations = paths[f"{split}_images"], paths[f"{split}_annotations"]
        tree["data"][split] |= {"images": str(images), "annotations": str(annotations)}
    config = Config.model_validate(tree)
    return config, folder, *read_sets(config)


@contextlib.contextmanager
def discarding_unstarted(folder: Path, *, new: bool) -> Iterator[None]:
    """Remove a new run's folder if the block fails before there is any record or checkpoint in it."""
    try:
        yield
    except BaseException:
        record = folder / "metrics.json"
        started = (folder / "checkpoints").exists() or (record.exists() and record.stat().st_size > 0)
        if new and not started:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def run_folder_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint; UserError if the file was moved out of it."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints":
        raise UserError(f"{checkpoint}: --resume needs a checkpoint where its run wrote it, RUN/checkpoints/")
    return folder.parent


def keypoint_options(config: Config, least: int = 0) -> KeypointOptions | None:
    """How to read keypoints; None if the model has no head for them."""
    if not config.model.keypoint_head.enabled:
        return None
    return KeypointOptions(config.data.keypoint_flip_pairs, config.data.keypoint_offset, least)


def proposals_problem(config: Config, name: SplitName) -> str | None:
    """What is wrong with a split's file of proposals, which stands in for an RPN; None if nothing is."""
    if (getattr(config.data, name).proposals is None) != config.model.rpn.enabled:
        return (
            f"data.{name}.proposals goes with model.rpn.enabled=false, and that with it; "
            "python -m fastmrcnn.propose writes the file"
        )
    return None


def read_split(config: Config, name: SplitName) -> CocoDataset:
    """The set that data.train or data.val names, with its proposals if it has some."""
    data, rpn, train = config.data, config.model.rpn, name == "train"
    split = data.train if train else data.val
    assert split.images is not None, "the caller checks"
    assert split.annotations is not None, "the caller checks"
    dataset = read_coco(
        split.images,
        split.annotations,
        max_objects=data.max_objects,
        min_box_side=data.min_box_side,
        require_masks=config.model.mask_head.enabled,
        keypoints=keypoint_options(config, data.min_keypoints if train else 0),
        key=f"data.{name}",
    )
    if split.proposals is None:
        return dataset
    most = rpn.post_nms_top_n if train else rpn.post_nms_top_n_test
    return attach_proposals(dataset, split.proposals, most)


def read_sets(config: Config) -> tuple[CocoDataset, CocoDataset | None]:
    """Training and validation set of a configuration that `check_trainable` let pass."""
    train_set = read_split(config, "train")
    if train_set.num_keypoints is not None:
        choose_sigmas(train_set.num_keypoints, config.evaluate.oks_sigmas)  # not only after the training
    if config.data.val.annotations is None:
        return train_set, None
    return train_set, check_same_classes(train_set, read_split(config, "val"))


def evaluation_loader(dataset: CocoDataset, config: Config) -> EvalLoader:
    """All images of a set, resized and padded as the configuration says for evaluation."""
    data = config.data
    return EvalLoader(
        dataset,
        batch=config.evaluate.batch,
        short_side=data.short_side_test,
        long_side_max=data.long_side_max,
        buckets=data.buckets,
        workers=data.workers,
    )
