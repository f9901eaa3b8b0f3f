"""What is decided before the first step: configuration, device, precision, data, folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastmrcnn.coco_eval import choose_sigmas
from fastmrcnn.config.checks import SplitName
from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset, check_same_classes, read_coco
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.data.loader import EvalLoader
from fastmrcnn.data.proposals import attach_proposals
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError
from fastmrcnn.files import new_run_folder


class Execution(NamedTuple):
    """How a step is run."""

    compiled: bool = False
    max_autotune: bool = False
    cuda_graphs: bool = False
    fuse_epilogues: bool = False
    description: str = ""


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
