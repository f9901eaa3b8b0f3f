"""The section `model` of the configuration."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fastmrcnn.config.section import FilePath, Section, Side
from fastmrcnn.config.timm_models import TIMM, pixel_statistics
from fastmrcnn.errors import UserError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")


class BackboneConfig(Section):
    name: str = "resnet50"
    """One of ours: resnet18, resnet34, resnet50, resnet101, resnext50_32x4d, resnext101_32x8d; or timm:NAME,
    a network of timm that has maps of stride 4, 8, 16 and 32. It stays as timm builds it: width,
    stride_in_1x1 and norm_eps are for ours."""
    weights: FilePath | None = None
    """File or URL of an ImageNet checkpoint (torchvision; detectron2's R-50.pkl; of a network of timm, timm's
    own file); `pretrained`: what timm publishes for its network, from the hub's cache on this machine or
    fetched into it; None: random weights."""
    weights_sha256: str | None = None
    """Expected hash (or its first digits) of that file; torchvision's URLs carry it in the name."""
    norm: Literal["frozen_bn", "bn", "sync_bn", "gn"] = "frozen_bn"
    """Where several processes train, bn normalises by the images of each, and what is saved and evaluated are
    the first one's statistics; sync_bn normalises by the images of all. A network of timm keeps its own
    norms: with frozen_bn its batch norms, if it has any, do not learn, with bn they do."""
    norm_eps: float = Field(1e-5, ge=0)
    """Epsilon of the backbone's normalisation."""
    width: int = Field(64, gt=0)
    """Channels of the stem; the stages scale with it. 64 is the published network."""
    stride_in_1x1: bool = False
    """Downsample in the 1x1 convolution (the original ResNet, Caffe2) or in the 3x3 (torchvision)."""
    frozen_stages: int = Field(2, ge=0, le=5)
    """How many are frozen: 1 the stem, 2 stem and res2 (timm: and all that the map of stride 4 hangs on), ...
    0 with random weights."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Largest share of an image's residual branches that a network of timm leaves out in training, growing
    from 0 at the first block (stochastic depth). Which are, follows from seed and step."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value in BACKBONES or (value.startswith(TIMM) and value != TIMM):
            return value
        near = difflib.get_close_matches(value, BACKBONES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected one of {', '.join(BACKBONES)} or {TIMM}NAME{hint}")

    @property
    def timm_name(self) -> str | None:
        """Of a network of timm, what timm calls it; else None."""
        return self.name.removeprefix(TIMM) if self.name.startswith(TIMM) else None

    @model_validator(mode="after")
    def _check_together(self) -> BackboneConfig:
        if self.timm_name is None:
            if self.drop_path:
                raise ValueError("model.backbone.drop_path is for networks of timm")
            if self.weights == "pretrained":
                raise ValueError(
                    "model.backbone.weights=pretrained is for networks of timm; give a file or URL, as the "
                    "recipes do"
                )
            return self
        own = {"width": 64, "stride_in_1x1": False, "norm_eps": 1e-5}
        if changed := [f"model.backbone.{key}" for key, value in own.items() if getattr(self, key) != value]:
            raise ValueError(f"{', '.join(changed)}: not for a network of timm, which is built as it is")
        if self.norm not in ("frozen_bn", "bn"):
            raise ValueError(
                f"model.backbone.norm={self.norm}: a network of timm keeps its own norms; take bn, with "
                "which they learn, or frozen_bn, with which its batch norms do not"
            )
        return self


class FpnConfig(Section):
    channels: int = Field(256, gt=0)
    norm: Literal["none", "gn", "bn", "sync_bn", "frozen_bn"] = "none"


class AnchorConfig(Section):
    sizes: list[Annotated[list[Side], Field(min_length=1)]] = Field([[32], [64], [128], [256], [512]])
    """Sides of the square anchors, a list per level p2..p6."""
    aspect_ratios: list[Side] = Field([0.5, 1.0, 2.0], min_length=1)
    """Height over width."""
    rounding: bool = False
    """Round the base anchors to whole pixels (torchvision)."""
    stride_rule: Literal["nominal", "grid"] = "nominal"
    """nominal: 4, 8, ... (detectron2); grid: padded size // grid size (torchvision)."""
    offset: float = Field(0.0, ge=0, lt=1)
    """Of the anchor centres, in strides (detectron2's ANCHOR_GENERATOR.OFFSET)."""


class RpnConfig(Section):
    enabled: bool = True
    """false: proposals come from files, data.train.proposals and data.val.proposals."""
    convs: int = Field(1, ge=1)
    """3x3 convolutions before the predictors."""
    pre_nms_top_n: int = Field(2000, gt=0)
    """Proposals kept per level before NMS, in training."""
    pre_nms_top_n_test: int = Field(1000, gt=0)
    post_nms_top_n: int = Field(1000, gt=0)
    """Proposals kept per image after NMS, in training."""
    post_nms_top_n_test: int = Field(1000, gt=0)
    nms_iou: float = Field(0.7, gt=0, le=1)
    min_box_side: float = Field(0.0, ge=0)
    """Proposals with a smaller side are dropped."""
    foreground_iou: float = Field(0.7, gt=0, le=1)
    background_iou: float = Field(0.3, ge=0, le=1)
    batch_per_image: int = Field(256, gt=0)
    """Anchors sampled for the losses."""
    foreground_share: float = Field(0.5, gt=0, le=1)
    box_loss_beta: float = Field(0.0, ge=0)
    """Smooth L1 turns from quadratic to linear here; 0 is L1."""
    loss_normalizer: Literal["asked", "sampled"] = "asked"
    """Divide by the number asked for (detectron2) or by the number sampled (torchvision)."""
    loss_weight: float = Field(1.0, ge=0)


class RoiConfig(Section):
    """Sampling of RoIs, and what cuts their features."""

    batch_per_image: int = Field(512, gt=0)
    foreground_share: float = Field(0.25, gt=0, le=1)
    foreground_iou: float = Field(0.5, gt=0, le=1)
    append_ground_truth: bool = True
    canonical_size: float = Field(224.0, gt=0)
    """Side of a box, in pixels, that FPN's rule gives to p4 (arXiv 1612.03144, eq. 1)."""
    op: Literal["align", "pool", "warp"] = "align"
    """pool: RoIPool; warp: RoIWarp, as table 2c compares it (boxes rounded as by RoIPool, bins not)."""
    mode: Literal["avg", "max"] = "avg"
    """Of the samples of a bin. pool needs max."""
    aligned: bool = True
    """Half-pixel correct RoIAlign (detectron2's RoIAlignV2); false: torchvision. Mask targets are cut from
    the ground truth alike."""
    sampling_ratio: int = 0
    """Samples per bin and axis; 0 or less: adaptive."""


# Batch norm would count the slots that hold no RoI; frozen, it is for weights that were trained with it.
HeadNorm = Literal["none", "gn", "frozen_bn"]


DeltaWeights = tuple[float, float, float, float]
Share = Annotated[float, Field(gt=0, le=1)]


class BoxHeadConfig(Section):
    enabled: bool = True
    """false: train the RPN alone; its proposals are the detections."""
    resolution: int = Field(7, gt=0)
    """Side of the RoI features; with C4, of what goes into res5, which halves it."""
    convs: int = Field(0, ge=0)
    """3x3 convolutions before the hidden layers."""
    channels: int = Field(256, gt=0)
    """Of these convolutions."""
    norm: HeadNorm = "none"
    """After these convolutions."""
    fcs: int = Field(2, ge=0)
    """Hidden layers; 0: the features' average goes straight to the predictors (C4)."""
    hidden: int = Field(1024, gt=0)
    box_loss_beta: float = Field(0.0, ge=0)
    class_agnostic: bool = False
    delta_weights: DeltaWeights = (10.0, 10.0, 5.0, 5.0)
    cascade: bool = False
    """Three heads one after the other (Cascade R-CNN), each on the boxes of the one before; class_agnostic is
    then the default, and needed."""
    cascade_ious: tuple[Share, Share] = (0.6, 0.7)
    """Overlap from which a box is foreground to the second and the third head; to the first it is
    roi.foreground_iou."""
    cascade_delta_weights: tuple[DeltaWeights, DeltaWeights] = (
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    """delta_weights of the second and the third head."""
    score_threshold: float = Field(0.05, ge=0, le=1)
    nms_iou: float = Field(0.5, gt=0, le=1)
    candidates: int = Field(100_000, gt=0)
    """Most class scores above the threshold that go into NMS; a cut is counted and reported."""
    detections: int = Field(100, gt=0)
    """Most detections per image."""
    loss_weight: float = Field(1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_cascade(cls, value: Any) -> Any:
        if isinstance(value, dict) and str(value.get("cascade")).lower() in ("true", "yes", "on", "1"):
            return {"class_agnostic": True} | value
        return value


class MaskHeadConfig(Section):
    enabled: bool = True
    kind: Literal["fcn", "mlp"] = "fcn"
    """fcn: convolutions and a deconvolution; mlp: fully connected layers (table 2e)."""
    resolution: int = Field(14, gt=0)
    """Side of the RoI features; the mask is twice as large. With C4 the features are the box head's."""
    convs: int = Field(4, ge=0)
    """3x3 convolutions of an fcn."""
    channels: int = Field(256, gt=0)
    """Of an fcn."""
    norm: HeadNorm = "none"
    """After the convolutions of an fcn."""
    fcs: int = Field(2, ge=0)
    """Hidden layers of an mlp."""
    hidden: int = Field(1024, gt=0)
    """Of an mlp."""
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid: a binary mask per class; softmax: classes compete for each pixel (table 2b)."""
    class_agnostic: bool = False
    slots_per_image: int | None = Field(None, gt=0)
    """The mask head trains on this many foreground RoIs an image, pooled over the batch; those beyond are
    dropped and counted (masks_dropped). None: as many as can be sampled."""
    target: Literal["bitmap", "soft", "polygon"] = "bitmap"
    """bitmap: RoIAlign of the ground truth, then >= 0.5 (detectron2); soft: its average (torchvision);
    polygon: rasterised from the polygons at the RoI's resolution (detectron2's default for COCO), and as
    bitmap for objects annotated by RLE, which have none."""
    target_sampling_ratio: int = 2
    """Samples per mask pixel and axis; 0 or less: adaptive, as both peers do (much slower)."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Of a pasted mask."""
    loss_weight: float = Field(1.0, ge=0)

    @property
    def reads_polygons(self) -> bool:
        """Whether batches have to bring polygons."""
        return self.enabled and self.target == "polygon"


class KeypointHeadConfig(Section):
    enabled: bool = False
    """The annotations name the keypoints (COCO's person_keypoints format)."""
    resolution: int = Field(14, gt=0)
    """Side of the RoI features, cut from the pyramid or the one map; the heatmap is four times as large."""
    convs: int = Field(8, ge=0)
    channels: int = Field(512, gt=0)
    slots_per_image: int | None = Field(None, gt=0)
    """The keypoint head trains on this many foreground RoIs an image that hold a labelled keypoint, pooled
    over the batch; those beyond are dropped and counted (keypoints_dropped). None: as many as can be
    sampled."""
    loss_normalizer: Literal["visible", "static"] = "visible"
    """visible: mean over the keypoints that are labelled and within their RoI (torchvision, and
    detectron2's recipes); static: divided by the most that there could be in the batch (detectron2's
    NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS=False)."""
    loss_weight: float = Field(1.0, ge=0)


# What an architecture without a pyramid takes as default (detectron2's C4): one map carries every anchor.
_ONE_MAP: dict[str, dict[str, Any]] = {
    "anchors": {"sizes": [[32, 64, 128, 256, 512]]},
    "rpn": {"pre_nms_top_n": 12000, "post_nms_top_n": 2000, "pre_nms_top_n_test": 6000},
}
ARCHITECTURE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "c4": {**_ONE_MAP, "box_head": {"resolution": 14, "fcs": 0}, "mask_head": {"convs": 0}},
    "c5": _ONE_MAP,
}


class ModelConfig(Section):
    architecture: Literal["fpn", "c4", "c5"] = "fpn"
    """fpn: a pyramid. c4: RPN and RoIs on res4 at stride 16, res5 is the head that boxes and masks share.
    c5: both on res5 at stride 32, undilated (table 2d), with the heads of fpn. c4 and c5 change the
    defaults of anchors.sizes and rpn's numbers of proposals; c4 also those of the heads."""
    weights: FilePath | None = None
    """A whole detector to start from instead of `backbone.weights`: a file or URL of torchvision or
    detectron2, a checkpoint of ours, or a run's folder. With another number of classes its last predictors
    are left out."""
    weights_sha256: str | None = None
    """Expected hash (or its first digits) of that file; published files carry some of it in their names."""
    weights_strict: bool = True
    """Anything else that does not fit is an error; false: it is left out and listed."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """In `channel_order`, for pixels in 0..255. With a network of timm both are, unless they are given, those
    that its weights were trained with."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    crowd_overlap: float | None = Field(0.7, gt=0, le=1)
    """Background whose area lies by this share in a crowd region is not sampled; None: it is."""
    backbone: BackboneConfig = BackboneConfig()
    fpn: FpnConfig = FpnConfig()
    anchors: AnchorConfig = AnchorConfig()
    rpn: RpnConfig = RpnConfig()
    roi: RoiConfig = RoiConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()
    keypoint_head: KeypointHeadConfig = KeypointHeadConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_architecture(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        merged = dict(value)
        architecture = value.get("architecture")
        defaults = ARCHITECTURE_DEFAULTS.get(architecture, {}) if isinstance(architecture, str) else {}
        for section, entries in defaults.items():
            given = merged.get(section)
            if given is None or isinstance(given, dict):
                merged[section] = {**entries, **(given or {})}
        return merged

    @model_validator(mode="before")
    @classmethod
    def _statistics_of_timm(cls, value: Any) -> Any:
        backbone = value.get("backbone") if isinstance(value, dict) else None
        name = backbone.get("name") if isinstance(backbone, dict) else getattr(backbone, "name", None)
        if not isinstance(name, str) or not name.startswith(TIMM) or name == TIMM:
            return value
        if value.get("pixel_mean") is not None and value.get("pixel_std") is not None:
            return value  # as in a checkpoint, which tells them even where there is no timm
        try:
            mean, std = pixel_statistics(name.removeprefix(TIMM))
        except UserError as error:
            raise ValueError(str(error)) from None
        return {"pixel_mean": mean, "pixel_std": std} | value

    @model_validator(mode="after")
    def _check_together(self) -> ModelConfig:
        if self.backbone.timm_name is not None:
            if self.architecture == "c4":
                raise ValueError("model.architecture=c4 needs a ResNet of ours: its heads are the last stage")
            if self.channel_order != "rgb":
                raise ValueError("model.channel_order: networks of timm read rgb")
        levels, expected = len(self.anchors.sizes), 5 if self.architecture == "fpn" else 1
        if levels != expected:
            where = "per level p2..p6" if expected == 5 else "for the one map"
            raise ValueError(f"model.anchors.sizes must have {expected} list(s), {where}, got {levels}")
        if self.rpn.background_iou > self.rpn.foreground_iou:
            raise ValueError("model.rpn.background_iou must not exceed model.rpn.foreground_iou")
        if self.roi.op == "pool" and self.roi.mode != "max":
            raise ValueError("model.roi.op=pool takes the largest value: it needs model.roi.mode=max")
        if not self.rpn.enabled and not self.box_head.enabled:
            raise ValueError("model.rpn.enabled and model.box_head.enabled cannot both be false")
        if self.mask_head.enabled and not self.box_head.enabled:
            raise ValueError("model.mask_head.enabled needs model.box_head.enabled")
        if self.box_head.cascade and not self.box_head.class_agnostic:
            raise ValueError("model.box_head.cascade=true needs model.box_head.class_agnostic=true")
        if self.box_head.cascade and self.architecture == "c4":
            raise ValueError("model.box_head.cascade=true needs model.architecture=fpn or c5")
        if self.keypoint_head.enabled and not self.box_head.enabled:
            raise ValueError("model.keypoint_head.enabled needs model.box_head.enabled")
        mask = self.mask_head
        if mask.loss == "softmax" and (mask.class_agnostic or mask.target == "soft"):
            raise ValueError(
                "model.mask_head.loss=softmax needs class_agnostic=false and a target other than soft"
            )
        if self.architecture == "c4" and self.backbone.frozen_stages > 4:
            raise ValueError("model.backbone.frozen_stages must be at most 4 with c4: res5 is the heads'")
        if self.architecture == "c4" and mask.kind == "mlp":
            raise ValueError("model.mask_head.kind=mlp reads the pyramid's RoI features, not those of c4")
        return self
