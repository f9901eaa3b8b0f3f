"""The one place where the configuration's model section becomes modules."""

from __future__ import annotations

from fastmrcnn.config import ModelConfig
from fastmrcnn.model.anchors import AnchorGenerator
from fastmrcnn.model.backbone import ResNet, make_norm
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.fpn import FeaturePyramid
from fastmrcnn.model.mask_head import MaskHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.roi_sampler import RoiSampler
from fastmrcnn.model.rpn import RegionProposalNetwork


def build_model(config: ModelConfig, num_classes: int, load_backbone_weights: bool = True) -> MaskRCNN:
    """A Mask R-CNN for `num_classes` classes, its backbone loaded if the configuration names weights."""
    backbone = ResNet(
        config.backbone.name,
        make_norm(config.backbone.norm, config.backbone.norm_eps),
        width=config.backbone.width,
        stride_in_1x1=config.backbone.stride_in_1x1,
        frozen_stages=config.backbone.frozen_stages,
    )
    if load_backbone_weights and config.backbone.weights is not None:
        from fastmrcnn.weights import load_backbone

        load_backbone(backbone, config.backbone.weights, config.backbone.weights_sha256)
    channels = config.fpn.channels
    fpn_norm = None if config.fpn.norm == "none" else make_norm(config.fpn.norm)
    anchors = AnchorGenerator(
        config.anchors.sizes,
        config.anchors.aspect_ratios,
        rounding=config.anchors.rounding,
        stride_rule=config.anchors.stride_rule,
        offset=config.anchors.offset,
    )
    rpn, roi, box, mask = config.rpn, config.roi, config.box_head, config.mask_head
    return MaskRCNN(
        backbone=backbone,
        fpn=FeaturePyramid(backbone.out_channels, channels, fpn_norm),
        rpn=RegionProposalNetwork(
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
        ),
        sampler=RoiSampler(
            num_classes,
            batch_per_image=roi.batch_per_image,
            foreground_share=roi.foreground_share,
            foreground_iou=roi.foreground_iou,
            append_ground_truth=roi.append_ground_truth,
            crowd_overlap=config.crowd_overlap,
        ),
        box_head=BoxHead(
            channels,
            box.resolution,
            num_classes,
            hidden=box.hidden,
            class_agnostic=box.class_agnostic,
            delta_weights=box.delta_weights,
            box_loss_beta=box.box_loss_beta,
            score_threshold=box.score_threshold,
            nms_iou=box.nms_iou,
            candidates=box.candidates,
            detections=box.detections,
            loss_weight=box.loss_weight,
        ),
        mask_head=MaskHead(
            channels,
            num_classes,
            convs=mask.convs,
            channels=mask.channels,
            class_agnostic=mask.class_agnostic,
            target=mask.target,
            target_sampling_ratio=mask.target_sampling_ratio,
            aligned=roi.aligned,
            loss_weight=mask.loss_weight,
        )
        if mask.enabled
        else None,
        box_resolution=box.resolution,
        mask_resolution=mask.resolution,
        mask_slots_per_image=mask.slots_per_image,
        canonical_size=roi.canonical_size,
        sampling_ratio=roi.sampling_ratio,
        aligned=roi.aligned,
        channel_order=config.channel_order,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )
