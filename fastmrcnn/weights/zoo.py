"""The models that torchvision and detectron2 publish: known by their architecture, each with a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastmrcnn.config.checks import RECIPES
from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config, ModelConfig
from fastmrcnn.errors import UserError
from fastmrcnn.weights.peers.programs import Imported
from fastmrcnn.weights.states import COUNTER, backbone_of


class Architecture(NamedTuple):
    """What a detector's parameters tell of its architecture."""

    family: str  # fpn | c4 | c5
    backbone: str | None
    masks: bool
    keypoints: bool
    box_convs: bool = False  # a box head with convolutions
    cascade: bool = False  # of box heads

    def __str__(self) -> str:
        heads = {(True, True): "Mask and Keypoint", (True, False): "Mask", (False, True): "Keypoint"}
        name = heads.get((self.masks, self.keypoints), "Faster")
        end = " with convolutions in the box head" if self.box_convs else ""
        start = "Cascade " if self.cascade else ""
        return f"{start}{name} R-CNN {self.backbone or 'of unknown backbone'}-{self.family.upper()}{end}"


# The recipe that evaluates a program's published model as that program does.
_RECIPES: dict[tuple[str, Architecture], str] = {
    ("torchvision", Architecture("fpn", "resnet50", True, False)): "torchvision_mask_rcnn_r50_fpn",
    ("torchvision", Architecture("fpn", "resnet50", True, False, True)): "torchvision_mask_rcnn_r50_fpn_v2",
    ("torchvision", Architecture("fpn", "resnet50", False, True)): "torchvision_keypoint_rcnn_r50_fpn",
    ("detectron2", Architecture("c4", "resnet50", True, False)): "detectron2_mask_rcnn_r50_c4_3x",
    ("detectron2", Architecture("c4", "resnet101", True, False)): "detectron2_mask_rcnn_r101_c4_3x",
    ("detectron2", Architecture("fpn", "resnet50", True, False)): "detectron2_mask_rcnn_r50_fpn_3x",
    (
        "detectron2",
        Architecture("fpn", "resnet50", True, False, cascade=True),
    ): "detectron2_cascade_mask_rcnn_r50_fpn_3x",
    ("detectron2", Architecture("fpn", "resnet101", True, False)): "detectron2_mask_rcnn_r101_fpn_3x",
    ("detectron2", Architecture("fpn", "resnext101_32x8d", True, False)): "detectron2_mask_rcnn_x101_fpn_3x",
    ("detectron2", Architecture("fpn", "resnet50", False, True)): "detectron2_keypoint_rcnn_r50_fpn_3x",
    ("detectron2", Architecture("fpn", "resnet101", False, True)): "detectron2_keypoint_rcnn_r101_fpn_3x",
    (
        "detectron2",
        Architecture("fpn", "resnext101_32x8d", False, True),
    ): "detectron2_keypoint_rcnn_x101_fpn_3x",
}


def architecture_of(state: Mapping[str, Tensor]) -> Architecture:
    """The architecture of a state dict under our names."""
    backbone = {key.removeprefix("backbone."): value for key, value in state.items()}
    backbone |= {f"layer4.{k.removeprefix('res5.')}": v for k, v in state.items() if k.startswith("res5.")}

    def some(start: str) -> bool:
        return any(key.startswith(start) for key in state)

    return Architecture(
        "fpn" if some("fpn.") else "c4" if some("res5.") else "c5",
        "timm" if some("backbone.timm.") else backbone_of(backbone),
        some("mask_head."),
        some("keypoint_head."),
        some("box_head.convs.") or some("box_head.stages.0.convs."),
        some("box_head.stages."),
    )


def published_recipe(imported: Imported, architecture: Architecture, path: Path) -> tuple[Config, str]:
    """Configuration and name of the recipe in configs/zoo/; UserError if there is none."""
    name = _RECIPES.get((imported.program, architecture))
    if name is None:
        raise UserError(
            f"{path}: holds a {architecture} ({imported.program}), for which there is no recipe in "
            "configs/zoo/; give its configuration as --config"
        )
    overrides = []
    if imported.program == "torchvision" and any(key.endswith(COUNTER) for key in imported.names.values()):
        # The published weights come with eps=0 and frozen norms; a file with counters was trained without.
        overrides.append("model.backbone.norm_eps=1e-5")
    return load_config(RECIPES / "zoo" / f"{name}.yaml", overrides), name


# What a state dict does not tell, and what changes the detections.
_SETTINGS = (
    "channel_order",
    "pixel_mean",
    "pixel_std",
    "backbone.stride_in_1x1",
    "backbone.norm_eps",
    "anchors.sizes",
    "anchors.aspect_ratios",
    "anchors.rounding",
    "anchors.stride_rule",
    "anchors.offset",
    "rpn.pre_nms_top_n_test",
    "rpn.post_nms_top_n_test",
    "rpn.nms_iou",
    "roi.canonical_size",
    "roi.op",
    "roi.mode",
    "roi.aligned",
    "roi.sampling_ratio",
    "box_head.delta_weights",
    "box_head.cascade_delta_weights",
    "box_head.score_threshold",
    "box_head.nms_iou",
    "box_head.detections",
    "mask_head.resolution",
)


def other_settings(config: ModelConfig, program: str, architecture: Architecture) -> list[str]:
    """The settings, as text, in which a model differs from those that a program builds by default."""
    name = _RECIPES.get((program, architecture)) or (
        "torchvision_mask_rcnn_r50_fpn"
        if program == "torchvision"
        else f"detectron2_mask_rcnn_r50_{'c4' if architecture.family == 'c4' else 'fpn'}_3x"
    )
    theirs = load_config(RECIPES / "zoo" / f"{name}.yaml", ["model.backbone.norm_eps=1e-5"]).model
    found = []
    for key in _SETTINGS:
        own, other = _value(config, key), _value(theirs, key)
        if own != other:
            found.append(f"{key} is {own}, there {other}")
    return found


def _value(config: ModelConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
