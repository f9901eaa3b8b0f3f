"""The one place where the configuration's model section becomes modules.

Modules have no defaults of their own: their keyword arguments are the fields of their section, by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastmrcnn.config.schema import ModelConfig
from fastmrcnn.config.timm_models import check_name, load_timm
from fastmrcnn.errors import UserError
from fastmrcnn.model.anchors import AnchorGenerator
from fastmrcnn.model.backbone import ResNet, residual_stage, stage_channels
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.cascade import CascadeBoxHead
from fastmrcnn.model.fpn import FeaturePyramid
from fastmrcnn.model.keypoint_head import KeypointHead
from fastmrcnn.model.mask_head import FcnMaskHead, MaskHead, MlpMaskHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.norms import Norm, make_norm
from fastmrcnn.model.roi_pooler import RoiPooler
from fastmrcnn.model.rois import RoiSampler
from fastmrcnn.model.rpn import RegionProposalNetwork
from fastmrcnn.model.timm_backbone import TimmBackbone


def build_model(config: ModelConfig, num_classes: int, num_keypoints: int | None = None) -> MaskRCNN:
    """A Mask R-CNN for `num_classes` classes, with random weights.

    Args:
        num_keypoints: of the objects, if the configuration asks for a keypoint head.
    """
    c4 = config.architecture == "c4"
    backbone = _backbone(config)
    res5 = last_stage(config) if c4 and config.box_head.enabled else None
    fpn = None
    if config.architecture == "fpn":
        fpn = FeaturePyramid(
            backbone.out_channels, channels=config.fpn.channels, norm=_optional_norm(config.fpn.norm)
        )
    channels = backbone.out_channels[-1] if fpn is None else fpn.channels
    strides = backbone.strides[-1:] if fpn is None else fpn.strides
    head_channels = stage_channels(config.backbone.name, 4, config.backbone.width) if c4 else channels
    roi = config.roi
    return MaskRCNN(
        backbone=backbone,
        fpn=fpn,
        rpn=_rpn(config, channels, strides) if config.rpn.enabled else None,
        sampler=RoiSampler(
            num_classes,
            crowd_overlap=config.crowd_overlap,
            **roi.values("batch_per_image", "foreground_share", "foreground_iou", "append_ground_truth"),
        ),
        pooler=RoiPooler(
            backbone.strides[-1:] if fpn is None else backbone.strides,
            **roi.values("op", "mode", "canonical_size", "sampling_ratio", "aligned"),
        ),
        res5=res5,
        box_head=_box_head(config, head_channels, num_classes) if config.box_head.enabled else None,
        mask_head=_mask_head(config, head_channels, num_classes) if config.mask_head.enabled else None,
        keypoint_head=_keypoint_head(config, channels, num_keypoints)
        if config.keypoint_head.enabled
        else None,
        **config.values("channel_order", "pixel_mean", "pixel_std"),
    )


def _backbone(config: ModelConfig) -> ResNet | TimmBackbone:
    backbone = config.backbone
    if backbone.timm_name is not None:
        timm = load_timm()
        check_name(timm, backbone.timm_name)
        return TimmBackbone(timm, backbone.timm_name, **backbone.values("norm", "frozen_stages", "drop_path"))
    return ResNet(
        norm=make_norm(backbone.norm, backbone.norm_eps),
        stages=3 if config.architecture == "c4" else 4,
        **backbone.values("name", "width", "stride_in_1x1", "frozen_stages"),
    )


def last_stage(config: ModelConfig) -> nn.Sequential:
    """The residual stage that a C4 model keeps for its heads: an ImageNet network's layer4."""
    backbone = config.backbone
    norm = make_norm(backbone.norm, backbone.norm_eps)
    return residual_stage(index=4, norm=norm, **backbone.values("name", "width", "stride_in_1x1"))


def _rpn(config: ModelConfig, channels: int, strides: list[int]) -> RegionProposalNetwork:
    anchors = AnchorGenerator(strides, **config.anchors.values())
    return RegionProposalNetwork(
        channels, anchors, crowd_overlap=config.crowd_overlap, **config.rpn.without("enabled")
    )


def _box_head(config: ModelConfig, channels: int, num_classes: int) -> BoxHead | CascadeBoxHead:
    box = config.box_head
    side = -(-box.resolution // 2) if config.architecture == "c4" else box.resolution
    own = box.without("enabled", "norm", "delta_weights", "cascade", "cascade_ious", "cascade_delta_weights")

    def head(delta_weights: Sequence[float]) -> BoxHead:
        norm = _optional_norm(box.norm)
        return BoxHead(channels, side, num_classes, norm=norm, delta_weights=delta_weights, **own)

    if not box.cascade:
        return head(box.delta_weights)
    return CascadeBoxHead(
        [head(weights) for weights in (box.delta_weights, *box.cascade_delta_weights)],
        ious=box.cascade_ious,
        crowd_overlap=config.crowd_overlap,
    )


def _mask_head(config: ModelConfig, channels: int, num_classes: int) -> MaskHead:
    mask, aligned = config.mask_head, config.roi.aligned
    if mask.kind == "mlp":
        own = mask.without("enabled", "kind", "threshold", "convs", "channels", "norm")
        return MlpMaskHead(channels, num_classes, aligned=aligned, **own)
    own = mask.without("enabled", "kind", "threshold", "fcs", "hidden", "norm")
    return FcnMaskHead(channels, num_classes, aligned=aligned, norm=_optional_norm(mask.norm), **own)


def _keypoint_head(config: ModelConfig, channels: int, num_keypoints: int | None) -> KeypointHead:
    if not num_keypoints:
        raise UserError(
            "model.keypoint_head.enabled=true needs to know the keypoints: annotations that name them, or a "
            "checkpoint that was trained on such"
        )
    most = num_keypoints * config.roi.batch_per_image * config.roi.foreground_share
    return KeypointHead(
        channels, num_keypoints, most_keypoints=most, **config.keypoint_head.without("enabled")
    )


def _optional_norm(name: str) -> Norm | None:
    return None if name == "none" else make_norm(name)
