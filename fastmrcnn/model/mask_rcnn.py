"""Mask R-CNN (arXiv 1703.06870): the data flow on one screen. Shapes and letters: structures.py."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastmrcnn.model.backbone import ResNet
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.cascade import CascadeBoxHead
from fastmrcnn.model.fpn import FeaturePyramid
from fastmrcnn.model.keypoint_head import KeypointHead, with_keypoints
from fastmrcnn.model.mask_head import MaskHead
from fastmrcnn.model.roi_pooler import RoiPooler, WantedRois
from fastmrcnn.model.rois import RoiSampler, pack_foreground
from fastmrcnn.model.rpn import RegionProposalNetwork
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.model.timm_backbone import TimmBackbone
from fastmrcnn.structures import Batch, Counts, Detections, Losses, Proposals, SampledRois, Targets


class MaskRCNN(nn.Module):
    """
    In training mode `model(batch, keys)` gives Losses and Counts, else `model(batch)` gives Detections.

    Args:
        rpn: None: proposals come with the batch.
        box_head: None: the RPN alone, whose proposals are the detections.
        fpn: None: everything reads the backbone's last map (C4, C5).
        pooler: cuts RoI features.
        res5: stage that the heads share, run on the RoI features (C4); None: there is none.
        mask_head, keypoint_head: None: Faster R-CNN. With `res5` the mask head reads what it makes of the
            box head's RoI features.
        channel_order: rgb | bgr, of the network's input; a batch is always RGB.
        pixel_mean, pixel_std: in that order, for pixels in 0..255.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: ResNet | TimmBackbone,
        fpn: FeaturePyramid | None,
        rpn: RegionProposalNetwork | None,
        sampler: RoiSampler,
        pooler: RoiPooler,
        res5: nn.Sequential | None,
        box_head: BoxHead | CascadeBoxHead | None,
        mask_head: MaskHead | None,
        keypoint_head: KeypointHead | None,
        channel_order: str,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        if rpn is None and box_head is None:
            raise ValueError("a model needs an RPN or a box head")
        if (mask_head is not None or keypoint_head is not None) and box_head is None:
            raise ValueError("a mask or keypoint head needs a box head")
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.sampler = sampler
        self.pooler = pooler
        self.res5 = res5
        self.box_head = box_head
        self.mask_head = mask_head
        self.keypoint_head = keypoint_head
        self.channel_order = channel_order
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).reshape(3, 1, 1), persistent=False)

    def forward(self, batch: Batch, keys: SamplingKeys | None = None) -> tuple[Losses, Counts] | Detections:
        if not self.training:
            return self.detect(batch)
        if batch.targets is None or keys is None:
            raise ValueError("training needs targets and sampling keys; for detections call eval() first")
        return self.losses(batch, batch.targets, keys)

    def losses(self, batch: Batch, targets: Targets, keys: SamplingKeys) -> tuple[Losses, Counts]:
        losses: dict[str, Tensor] = {}
        divisors: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        features = self.features(batch, keys.drop_path)
        if self.rpn is not None:
            anchors = self.rpn.anchors(features, batch.pixels.shape[-2:])
            with torch.no_grad():  # the losses compute for themselves what they read
                objectness, deltas = self.rpn.head(features)
            features, losses["loss_rpn_cls"], losses["loss_rpn_loc"], learnt = self.rpn.losses(
                features, anchors, targets, keys.anchors
            )
            divisors |= {"loss_rpn_cls": learnt, "loss_rpn_loc": learnt}
            if self.box_head is None:
                return Losses(**losses), Counts(divisors=Losses(**divisors))
            proposals = self.rpn.propose(objectness, deltas, anchors, batch.sizes)
        else:
            proposals = given_proposals(batch)

        assert self.box_head is not None
        rois = self.sampler(proposals, targets, keys.rois)
        counts["num_fg"] = rois.is_foreground.sum()
        most = self.sampler.foreground_slots
        # All RoIs are known before any features are cut, so that their gradients can be made as one.
        wanted = {"box": WantedRois(rois.boxes, rois.valid, self.box_head.resolution)}
        if self.mask_head is not None:
            of_mask = pack_foreground(rois, most, self.mask_head.slots_per_image)
            counts["masks_dropped"] = counts["num_fg"] - of_mask.valid.sum()
            if self.res5 is None:
                wanted["mask"] = of_mask.wanted(self.mask_head.resolution)
        if self.keypoint_head is not None:
            if targets.keypoints is None:
                raise ValueError("a model with a keypoint head needs targets with keypoints")
            labelled = with_keypoints(rois, targets.keypoints)
            of_keypoints = pack_foreground(labelled, most, self.keypoint_head.slots_per_image)
            counts["keypoints_dropped"] = labelled.is_foreground.sum() - of_keypoints.valid.sum()
            wanted["keypoint"] = of_keypoints.wanted(self.keypoint_head.resolution)
        x = dict(zip(wanted, self.pooler.together(features, list(wanted.values())), strict=True))

        pooled = self.with_res5(x["box"])
        of_boxes, learnt_boxes = self.box_losses(features, pooled, rois, targets, batch.sizes)
        losses |= of_boxes
        divisors |= learnt_boxes
        if self.mask_head is not None:
            if self.res5 is not None:
                x["mask"] = pooled.flatten(0, 1).index_select(0, of_mask.slot)
            losses["loss_mask"] = self.mask_head.loss_of_rois(x["mask"], of_mask, batch, targets.masks)
            divisors["loss_mask"] = of_mask.valid.sum()
        if self.keypoint_head is not None:
            assert targets.keypoints is not None
            losses["loss_keypoint"], divisors["loss_keypoint"] = self.keypoint_head.loss(
                self.keypoint_head(x["keypoint"]), of_keypoints, targets.keypoints
            )
        return Losses(**losses), Counts(**counts, divisors=Losses(**divisors))

    @torch.no_grad()
    def detect(self, batch: Batch) -> Detections:
        features = self.features(batch)
        proposals = self.propose(features, batch)
        if self.box_head is None:
            return as_detections(proposals)
        found = self.find_boxes(features, proposals, batch.sizes)
        if self.mask_head is not None:
            if self.res5 is None:
                x = self.pooler(features, found.boxes, found.valid, self.mask_head.resolution)
            else:
                x = self.box_features(features, found.boxes, found.valid)
            masks = self.mask_head.masks_of_rois(x.flatten(0, 1), found.classes.flatten())
            found = found._replace(masks=masks.unflatten(0, found.valid.shape))
        if self.keypoint_head is not None:
            x = self.pooler(features, found.boxes, found.valid, self.keypoint_head.resolution)
            heatmaps = self.keypoint_head(x.flatten(0, 1))
            found = found._replace(heatmaps=heatmaps.unflatten(0, found.valid.shape))
        return found

    def propose(self, features: list[Tensor], batch: Batch) -> Proposals:
        """Proposals of the RPN, or those that come with the batch if the model has none."""
        if self.rpn is None:
            return given_proposals(batch)
        objectness, deltas = self.rpn.head(features)
        anchors = self.rpn.anchors(features, batch.pixels.shape[-2:])
        return self.rpn.propose(objectness, deltas, anchors, batch.sizes)

    def features(self, batch: Batch, drop_path: Tensor | None = None) -> list[Tensor]:
        """p2..p6 of a batch, or the one map of a model without a pyramid.

        Args:
            drop_path: as in SamplingKeys.
        """
        maps = self.backbone(self.normalize(batch), drop_path)
        return maps[-1:] if self.fpn is None else self.fpn(maps)

    def normalize(self, batch: Batch) -> Tensor:
        """(N, 3, H, W) pixels -> float32, zero mean and unit deviation, zero where padded."""
        pixels = batch.pixels.float()
        if self.channel_order == "bgr":
            pixels = pixels.flip(1)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        height, width = pixels.shape[-2:]
        rows = torch.arange(height, device=pixels.device) < batch.sizes[:, 0, None]  # (N, H)
        columns = torch.arange(width, device=pixels.device) < batch.sizes[:, 1, None]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(inside, pixels, 0.0)

    def box_losses(
        self, features: list[Tensor], pooled: Tensor, rois: SampledRois, targets: Targets, sizes: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of the box head on RoIs with these features, or of all heads of a cascade, by name; and
        what each of them is a mean over."""
        if isinstance(self.box_head, CascadeBoxHead):
            pool = partial(self.box_features, features)
            return self.box_head.losses(pool, pooled, rois, targets, sizes)
        assert self.box_head is not None
        logits, deltas = self.box_head(pooled)
        loss_cls, loss_box_reg = self.box_head.losses(logits, deltas, rois, targets)
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
        return losses, dict.fromkeys(losses, rois.valid.sum())

    def find_boxes(self, features: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        """Detections of the box head, or of a cascade of them, without masks."""
        if isinstance(self.box_head, CascadeBoxHead):
            return self.box_head.detect(partial(self.box_features, features), proposals, sizes)
        assert self.box_head is not None
        x = self.box_features(features, proposals.boxes, proposals.valid)
        logits, deltas = self.box_head(x)
        return self.box_head.detect(logits, deltas, proposals, sizes)

    def box_features(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        """What the box head reads of (N, S, 4) boxes: (N, S, C, side, side)."""
        assert self.box_head is not None
        return self.with_res5(self.pooler(features, boxes, valid, self.box_head.resolution))

    def with_res5(self, x: Tensor) -> Tensor:
        """RoI features (N, S, C, side, side) after the stage that the heads share, if there is one."""
        return x if self.res5 is None else self.res5(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def draw_keys(self, batch: Batch, generator: torch.Generator, images: int | None = None) -> SamplingKeys:
        """Fresh sampling keys for a batch, on the generator's device.

        Args:
            images: as many of its shape; None: as many as it has.
        """
        count, _, height, width = batch.pixels.shape
        count = count if images is None else images
        anchors = 0 if self.rpn is None else self.rpn.anchors.count(height, width)
        rois = given_proposals(batch).valid.shape[1] if self.rpn is None else self.rpn.post_nms_top_n
        if batch.targets is not None:
            rois += batch.targets.boxes.shape[1]
        device = generator.device
        sizes = (anchors, rois, len(self.backbone.drops)) if self.backbone.drops else (anchors, rois)
        return SamplingKeys(*(torch.rand(count, size, generator=generator, device=device) for size in sizes))


def given_proposals(batch: Batch) -> Proposals:
    if batch.proposals is None:
        raise ValueError("a model without an RPN needs proposals with its batch")
    return batch.proposals


def as_detections(proposals: Proposals) -> Detections:
    """Proposals as detections of class 0, scored by their objectness."""
    return Detections(
        boxes=torch.where(proposals.valid[..., None], proposals.boxes, 0.0),
        scores=torch.where(proposals.valid, proposals.scores.sigmoid(), 0.0),
        classes=torch.zeros_like(proposals.valid, dtype=torch.int64),
        valid=proposals.valid,
        cut=torch.zeros(len(proposals.valid), dtype=torch.int64, device=proposals.valid.device),
    )
