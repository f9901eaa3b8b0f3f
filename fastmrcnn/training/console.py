"""What a run says on the screen."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.errors import UserError
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.timm_backbone import TimmBackbone
from fastmrcnn.structures import Losses
from fastmrcnn.training.optim import describe_groups
from fastmrcnn.weights.checkpoint import find_checkpoint


def mask_slot_advice(config: Config, most_foreground: int, dropped: int) -> str | None:
    """A line if the mask head had too few slots, or far more than the run has ever filled.

    Args:
        most_foreground: RoIs of a batch.
        dropped: RoIs of all batches that found no slot.
    """
    head, roi, batch = config.model.mask_head, config.model.roi, config.train.images
    if not head.enabled or most_foreground == 0:
        return None
    key = "model.mask_head.slots_per_image"
    enough = math.ceil(most_foreground / batch)
    if dropped:
        return (
            f"{dropped} foreground RoIs found no slot in the mask head and gave it nothing to learn; "
            f"{key}={enough} would have held them all."
        )
    slots = head.slots_per_image or int(roi.batch_per_image * roi.foreground_share)
    spare = math.ceil(1.25 * enough)
    if slots < 2 * spare:
        return None
    return (
        f"The mask head ran {slots * batch} slots a step, of which at most {most_foreground} were filled; "
        f"{key}={spare} would be faster and leave a quarter to spare."
    )


def describe(row: dict[str, Any]) -> str:
    """A row of metrics on one line of the progress bar."""
    parts = [f"loss {row['total_loss']:.3f}"]
    parts += [f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in row if name in Losses._fields]
    parts += [f"lr {row['lr']:.2g}", f"{row['images_per_second']:.1f} img/s"]
    return ", ".join(parts)


def describe_start(model: MaskRCNN, config: Config, optimizer: torch.optim.Optimizer) -> list[str]:
    """What the configuration alone does not tell of the network and its rates, a line each."""
    lines = []
    if isinstance(model.backbone, TimmBackbone):
        channels = ", ".join(map(str, model.backbone.out_channels))
        mean, std = config.model.pixel_mean, config.model.pixel_std
        norms = ", each with a layer norm" if len(model.backbone.norms) else ""
        lines.append(
            f"Backbone timm:{model.backbone.name}: maps of {channels} channels at strides 4, 8, 16, "
            f"32{norms}; pixels less {list(mean)}, over {list(std)} (model.pixel_mean, model.pixel_std)."
        )
    if (rates := describe_groups(optimizer)) is not None:
        lines.append(rates)
    return lines


def how_to_go_on(folder: Path) -> str:
    """After an interruption, on one line."""
    try:
        checkpoint = find_checkpoint(folder)
    except UserError:
        gone = "" if folder.exists() else f", and {folder} has been removed"
        return f"nothing was saved yet{gone} (train.checkpoint_every: steps between checkpoints)"
    return f"go on from {checkpoint.name} with: python -m fastmrcnn.train --resume {shlex.quote(str(folder))}"


def list_left_out(faults: Mapping[int, str], most: int = 10) -> str:
    """A line for each of the images that could not be read, by id; of many, the first ones."""
    lines = [
        f"{len(faults)} training image{'s' if len(faults) > 1 else ''} could not be read and did not count:"
    ]
    lines += [f"  image {image_id}: {fault}" for image_id, fault in list(faults.items())[:most]]
    if len(faults) > most:
        ids = list(faults)[most:]
        lines.append(f"  and, by id: {', '.join(map(str, ids))}")
    return "\n".join(lines)


def print_next(
    folder: Path,
    checkpoint: Path | None,
    config: Config,
    val_set: CocoDataset | None,
    best: str | None = None,
) -> None:
    """Where everything is, and what to run next.

    Args:
        best: a line on the best weights, if they were kept.
    """
    checkpoint = checkpoint or find_checkpoint(folder)
    print(f"\nEverything is in {folder}")
    if best is not None:
        print(best)
    parts = config.model
    if not parts.box_head.enabled:
        print("Write its proposals to a file, to train heads on them with model.rpn.enabled=false:")
        print(
            f"  python -m fastmrcnn.propose --checkpoint {shlex.quote(str(checkpoint))} "
            "--images DIR --annotations FILE --output proposals.npz"
        )
    elif val_set is not None and parts.rpn.enabled:
        image = val_set.records[0].path
        print("Look at its pictures, or run the model on an image:")
        words = [str(image), "--checkpoint", str(checkpoint), "--output", f"{folder}/predictions"]
        print(f"  python -m fastmrcnn.predict {shlex.join(words)}")
    if config.data.shapes:
        print("Train on your own data, any COCO-format annotation file:")
        print(
            "  python -m fastmrcnn.train --config configs/small.yaml "
            "data.train.images=DIR data.train.annotations=FILE data.val.images=DIR data.val.annotations=FILE"
        )
