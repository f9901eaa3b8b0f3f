"""State dicts of torchvision and detectron2 to ours and back. Which program one is of, its keys tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmrcnn.errors import UserError
from fastmrcnn.weights.peers.class_rows import from_torchvision, to_torchvision
from fastmrcnn.weights.peers.names import backbone_names, detectron2_names, torchvision_names

PROGRAMS = ("fastmrcnn", "torchvision", "detectron2")
_COUNTER = ".num_batches_tracked"
_BATCH_NORM = re.compile(r"(^|\.)(bn\d|downsample\.1)$")

# What detectron2 saves beside the parameters; it is compared with the configuration.
_CONSTANTS = re.compile(r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+")
# Parts of published models that have no counterpart here, and what to call them.
_FOREIGN = [
    (r"sem_seg_head\.", "a head for semantic segmentation"),
    (r"(head|backbone)\.(cls_subnet|bbox_subnet|classification_head|regression_head)", "a RetinaNet head"),
]


class Imported(NamedTuple):
    """A detector under our names."""

    program: str  # where it comes from
    state: dict[str, Tensor]  # classes in our order
    names: dict[str, str]  # our name -> the name in the file
    constants: dict[str, Tensor]  # detectron2's pixel statistics and anchors
    spare: dict[str, Tensor]  # torchvision's rows that no class here has
    homeless: list[str]  # keys of the file for which there is no place


def program_of(keys: Iterable[str]) -> str | None:
    """fastmrcnn | torchvision | detectron2 (detectors), backbone (any program's), or None: none of these."""
    keys = set(keys)

    def some(*starts: str) -> bool:
        return any(key.startswith(starts) for key in keys)

    if some("rpn.head.convs.", "rpn.head.objectness.", "box_head.classes.", "box_head.stages."):
        return "fastmrcnn"
    if some("backbone.body."):
        return "torchvision"
    if some("proposal_generator.", "backbone.bottom_up.", "backbone.res2.", "roi_heads.res5."):
        return "detectron2"
    if some("conv1.weight", "stem.conv1.", "conv1_w", "res2_0_branch", "layer1.0.", "res2.0."):
        return "backbone"
    return None


def import_state(
    state: Mapping[str, Tensor],
    source: str | Path,
    num_classes: int | None = None,
    *,
    strict: bool = True,
) -> Imported:
    """Any known program's detector under our names.

    Args:
        source: of the state dict, for messages.
        num_classes: that are wanted; matters only for torchvision's 91 labels, see rows.py.
        strict: parts that no model here has are an error that lists every key; else they are left out.

    Raises:
        UserError: it is of none of the programs, or has such parts.
    """
    program = program_of(state)
    if program == "backbone":
        raise UserError(
            f"{source}: holds a classifier's backbone only; give it as model.backbone.weights instead"
        )
    if program is None:
        start = ", ".join(list(state)[:3]) or "none"
        raise UserError(
            f"{source}: is no detector of fastmrcnn, torchvision or detectron2; its first keys are {start}"
        )
    constants: dict[str, Tensor] = {}
    if program == "fastmrcnn":
        names: dict[str, str | None] = {key: key for key in state}
    elif program == "torchvision":
        names = torchvision_names(state, to_ours=True)
    else:
        constants = {key: value for key, value in state.items() if _CONSTANTS.fullmatch(key)}
        names = detectron2_names((key for key in state if key not in constants), to_ours=True)
    homeless = [key for key, ours in names.items() if ours is None and not key.endswith(_COUNTER)]
    if homeless and strict:
        raise UserError(_homeless(homeless, source, program))
    placed = {ours: theirs for theirs, ours in names.items() if ours is not None}
    ours = {name: state[theirs] for name, theirs in placed.items()}
    spare: dict[str, Tensor] = {}
    if program == "torchvision":
        ours, spare = from_torchvision(ours, num_classes)
    return Imported(program, ours, placed, constants, spare, homeless)


def import_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detectron2 or Caffe2 ImageNet file under the names of a torchvision classifier, without the rest.

    Another program's file is returned as it is.
    """
    if program_of(state) != "backbone" or any(key.startswith("layer1.") for key in state):
        return dict(state)
    names = backbone_names(key for key in state if not key.endswith("_momentum"))
    ours = {ours: state[theirs] for theirs, ours in names.items() if ours is not None}
    return with_statistics(ours) if any("_bn_" in key for key in state) else ours


def with_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean 0 and variance 1 for the batch norms of a file that folded them into scale and shift."""
    full = dict(state)
    for key, value in state.items():
        owner, _, leaf = key.rpartition(".")
        if leaf == "weight" and _BATCH_NORM.search(owner) and f"{owner}.running_mean" not in state:
            full[f"{owner}.running_mean"] = torch.zeros_like(value)
            full[f"{owner}.running_var"] = torch.ones_like(value)
    return full


def export_state(
    state: Mapping[str, Tensor],
    program: str,
    source: str | Path,
    category_ids: Sequence[int],
    spare: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Our state dict under another program's names, its classes in that program's order.

    Args:
        category_ids: of the data set, by class: COCO's 80 get torchvision's 91 labels.
        spare: rows that `import_state` set aside.

    Raises:
        UserError: the model has parts that the program does not have.
    """
    if any(key.startswith("backbone.timm.") for key in state):
        raise UserError(f"{source}: {program} has no place for a backbone of timm")
    rename = torchvision_names if program == "torchvision" else detectron2_names
    names = rename(state, to_ours=False)
    if homeless := [key for key, name in names.items() if name is None]:
        raise UserError(
            f"{source}: {program} has no place for {len(homeless)} of its parameters: {grouped(homeless)}"
        )
    if program == "torchvision":
        rows = {"box_head.deltas.bias": 4 * len(category_ids), "mask_head.predictor.bias": len(category_ids)}
        if odd := [key for key, count in rows.items() if key in state and len(state[key]) != count]:
            raise UserError(
                f"{source}: torchvision has an output for each class, and these have not: {', '.join(odd)} "
                "(class_agnostic or softmax)"
            )
        state = to_torchvision(state, category_ids, spare)
    elif (bias := state.get("mask_head.predictor.bias")) is not None and len(bias) == len(category_ids) + 1:
        raise UserError(
            f"{source}: detectron2 has no mask of the background, as model.mask_head.loss=softmax learns one"
        )
    return {str(name): state[key] for key, name in names.items()}


def grouped(keys: Iterable[str]) -> str:
    """conv1.weight, layer1.0.bn1.{weight, bias}"""
    leaves: dict[str, list[str]] = {}
    for key in keys:
        owner, _, leaf = key.rpartition(".")
        leaves.setdefault(owner, []).append(leaf)
    parts = []
    for owner, names in leaves.items():
        inner = names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"
        parts.append(f"{owner}.{inner}" if owner else inner)
    return ", ".join(parts)


def _homeless(keys: list[str], source: str | Path, program: str) -> str:
    parts = [text for pattern, text in _FOREIGN if any(re.match(pattern, key) for key in keys)]
    return (
        f"{source}: this {program} model has {', '.join(parts) or 'parts'} that no model here has "
        f"({len(keys)} tensors): {grouped(keys)}"
    )
