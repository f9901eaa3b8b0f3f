"""The one place where the configuration's model section becomes modules."""

from __future__ import annotations

from torch import nn

from fastmrcnn.config.schema import ModelConfig
from fastmrcnn.errors import UserError
from fastmrcnn.model.anchors import AnchorGenerator
from fastmrcnn.model.backbone import ResNet, residual_stage, stage_channels
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.fpn import FeaturePyramid
from fastmrcnn.model.keypoint_head import KeypointHead
from fastmrcnn.model.mask_head import FcnMaskHead, MaskHead, MlpMaskHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.norms import Norm, make_norm
from fastmrcnn.model.roi_pooler import RoiPooler
from fastmrcnn.model.roi_sampler import RoiSampler
from fastmrcnn.model.rpn import RegionProposalNetwork


def build_model(config: ModelConfig, num_classes: int, num_keypoints: int | None = None) -> MaskRCNN:
    """A Mask R-CNN for `num_classes` classes, with random weights.

    Args:
        num_keypoints: of the objects, if the configuration asks for a keypoint head.
    """
    c4 = config.architecture == "c4"
    norm = make_norm(config.backbone.norm, config.backbone.norm_eps)
    backbone = ResNet(
        config.backbone.name,
        norm,
        width=config.backbone.width,
        stride_in_1x1=config.backbone.stride_in_1x1,
        stages=3 if c4 else 4,
        frozen_stages=config.backbone.frozen_stages,
    )
    res5 = last_stage(config) if c4 and config.box_head.enabled else None
    fpn = None
    if config.architecture == "fpn":
        fpn = FeaturePyramid(backbone.out_channels, config.fpn.channels, _optional_norm(config.fpn.norm))
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
            batch_per_image=roi.batch_per_image,
            foreground_share=roi.foreground_share,
            foreground_iou=roi.foreground_iou,
            append_ground_truth=roi.append_ground_truth,
            crowd_overlap=config.crowd_overlap,
        ),
        pooler=RoiPooler(
            backbone.strides[-1:] if fpn is None else backbone.strides,
            op=roi.op,
            mode=roi.mode,
            canonical_size=roi.canonical_size,
            sampling_ratio=roi.sampling_ratio,
            aligned=roi.aligned,
        ),
        res5=res5,
        box_head=_box_head(config, head_channels, num_classes) if config.box_head.enabled else None,
        mask_head=_mask_head(config, head_channels, num_classes) if config.mask_head.enabled else None,
        keypoint_head=_keypoint_head(config, channels, num_keypoints)
        if config.keypoint_head.enabled
        else None,
        box_resolution=config.box_head.resolution,
        mask_resolution=config.mask_head.resolution,
        keypoint_resolution=config.keypoint_head.resolution,
        mask_slots_per_image=config.mask_head.slots_per_image,
        keypoint_slots_per_image=config.keypoint_head.slots_per_image,
        channel_order=config.channel_order,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def last_stage(config: ModelConfig) -> nn.Sequential:
    """The residual stage that a C4 model keeps for its heads: an ImageNet network's layer4."""
    backbone = config.backbone
    return residual_stage(
        backbone.name,
        4,
        make_norm(backbone.norm, backbone.norm_eps),
        width=backbone.width,
        stride_in_1x1=backbone.stride_in_1x1,
    )


def _rpn(config: ModelConfig, channels: int, strides: list[int]) -> RegionProposalNetwork:
    rpn = config.rpn
    anchors = AnchorGenerator(
        config.anchors.sizes,
        config.anchors.aspect_ratios,
        strides,
        rounding=config.anchors.rounding,
        stride_rule=config.anchors.stride_rule,
        offset=config.anchors.offset,
    )
    return RegionProposalNetwork(
        channels,
        anchors,
        convs=rpn.convs,
        pre_nms_top_n=(rpn.pre_nms_top_n, rpn.pre_nms_top_n_test),
        post_nms_top_n=(rpn.post_nms_top_n, rpn.post_nms_top_n_test),
        nms_iou=rpn.nms_iou,
        min_box_side=rpn.min_box_side,
        foreground_iou=rpn.foreground_iou,
        background_iou=rpn.background_iou,
        crowd_overlap=config.crowd_overlap,
        batch_per_image=rpn.batch_per_image,
        foreground_share=rpn.foreground_share,
        box_loss_beta=rpn.box_loss_beta,
        loss_normalizer=rpn.loss_normalizer,
        loss_weight=rpn.loss_weight,
    )


def _box_head(config: ModelConfig, channels: int, num_classes: int) -> BoxHead:
    box = config.box_head
    return BoxHead(
        channels,
        -(-box.resolution // 2) if config.architecture == "c4" else box.resolution,
        num_classes,
        convs=box.convs,
        conv_channels=box.channels,
        norm=_optional_norm(box.norm),
        fcs=box.fcs,
        hidden=box.hidden,
        class_agnostic=box.class_agnostic,
        delta_weights=box.delta_weights,
        box_loss_beta=box.box_loss_beta,
        score_threshold=box.score_threshold,
        nms_iou=box.nms_iou,
        candidates=box.candidates,
        detections=box.detections,
        loss_weight=box.loss_weight,
    )


def _mask_head(config: ModelConfig, channels: int, num_classes: int) -> MaskHead:
    mask = config.mask_head
    settings = {
        "class_agnostic": mask.class_agnostic,
        "loss": mask.loss,
        "target": mask.target,
        "target_sampling_ratio": mask.target_sampling_ratio,
        "aligned": config.roi.aligned,
        "loss_weight": mask.loss_weight,
    }
    if mask.kind == "mlp":
        return MlpMaskHead(
            channels, mask.resolution, num_classes, fcs=mask.fcs, hidden=mask.hidden, **settings
        )
    norm = _optional_norm(mask.norm)
    return FcnMaskHead(channels, num_classes, convs=mask.convs, channels=mask.channels, norm=norm, **settings)


def _optional_norm(name: str) -> Norm | None:
    return None if name == "none" else make_norm(name)


def _keypoint_head(config: ModelConfig, channels: int, num_keypoints: int | None) -> KeypointHead:
    if not num_keypoints:
        raise UserError(
            "model.keypoint_head.enabled=true needs to know the keypoints: annotations that name them, or a "
            "checkpoint that was trained on such"
        )
    head, roi = config.keypoint_head, config.roi
    return KeypointHead(
        channels,
        num_keypoints,
        convs=head.convs,
        channels=head.channels,
        loss_normalizer=head.loss_normalizer,
        most_keypoints=num_keypoints * roi.batch_per_image * roi.foreground_share,
        loss_weight=head.loss_weight,
    )
