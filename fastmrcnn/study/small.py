"""The small suite: narrow networks from random weights on drawn scenes, in minutes a run."""

from __future__ import annotations

from fastmrcnn.study.paper import COMPARISONS
from fastmrcnn.study.suite import Cell, Suite

_OBJECTS, _FIGURES = "experiments/objects", "experiments/figures"
_C4 = ("model.architecture=c4", "model.anchors.sizes=[[12, 20, 32, 56]]")
# At stride 32 an image of 160 pixels would be a map of 5 by 5: it is enlarged.
_C5 = (
    "model.architecture=c5",
    "model.anchors.sizes=[[24, 40, 64, 112]]",
    "data.short_side=[320]",
    "data.short_side_test=320",
    "data.long_side_max=320",
)
_POOL = ("model.roi.op=pool", "model.roi.mode=max")
_NO_MASK, _NO_KEYPOINTS = "model.mask_head.enabled=false", "model.keypoint_head.enabled=false"


def _deep(name: str) -> tuple[str, ...]:
    return (f"model.backbone.name={name}", "model.backbone.width=16")


def _objects(name: str, *settings: str, proposals_of: str | None = None) -> Cell:
    return Cell(name, "objects", _OBJECTS, settings, proposals_of)


def _figures(name: str, *settings: str) -> Cell:
    return Cell(name, "figures", _FIGURES, settings)


_CELLS = (
    _objects("r50_c4", *_deep("resnet50"), *_C4),
    _objects("r101_c4", *_deep("resnet101"), *_C4),
    _objects("r50_fpn", *_deep("resnet50")),
    _objects("r101_fpn", *_deep("resnet101")),
    _objects("x101_fpn", *_deep("resnext101_32x8d")),
    _objects("c4", *_C4),
    _objects("c4_softmax", *_C4, "model.mask_head.loss=softmax"),
    _objects("c4_pool", *_C4, *_POOL),
    _objects("c4_warp_max", *_C4, "model.roi.op=warp", "model.roi.mode=max"),
    _objects("c4_warp", *_C4, "model.roi.op=warp"),
    _objects("c4_align_max", *_C4, "model.roi.mode=max"),
    _objects("c4_agnostic", *_C4, "model.mask_head.class_agnostic=true"),
    _objects("c5", *_C5),
    _objects("c5_pool", *_C5, *_POOL),
    _objects("fpn"),
    _objects("fpn_mlp2", "model.mask_head.kind=mlp", "model.mask_head.hidden=256"),
    _objects(
        "fpn_mlp3",
        "model.mask_head.kind=mlp",
        "model.mask_head.hidden=256",
        "model.mask_head.fcs=3",
    ),
    _objects("rpn", "model.box_head.enabled=false", _NO_MASK),
    _objects("fpn_separate", "model.rpn.enabled=false", proposals_of="rpn"),
    _figures("figures_box", _NO_MASK, _NO_KEYPOINTS),
    _figures("figures_mask", _NO_KEYPOINTS),
    _figures("figures_keypoint", _NO_MASK),
    _figures("figures_both"),
    _figures("figures_keypoint_pool", _NO_MASK, *_POOL),
)

SMALL = Suite("small", {cell.name: cell for cell in _CELLS}, COMPARISONS, seeds=3, races=True)
