"""Mask R-CNN (arXiv 1703.06870): the data flow on one screen. Shapes and letters: structures.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmrcnn.kernels import multilevel_roi_align
from fastmrcnn.model.backbone import ResNet
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.fpn import STRIDES, FeaturePyramid
from fastmrcnn.model.mask_head import MaskHead
from fastmrcnn.model.roi_sampler import RoiSampler, pack_foreground
from fastmrcnn.model.rpn import RegionProposalNetwork
from fastmrcnn.model.sampling import SamplingKeys
from fastmrcnn.structures import Batch, Detections, Losses, Targets

if TYPE_CHECKING:
    from fastmrcnn.checkpoint import ModelCard


class MaskRCNN(nn.Module):
    """
    In training mode `model(batch, keys)` gives Losses, else `model(batch)` gives Detections.

    Args:
        mask_head: none: Faster R-CNN.
        box_resolution, mask_resolution: sides of the RoI features for the two heads.
        mask_slots_per_image: slots of the mask head in training, shared by the images of a batch; none:
            as many as the sampler may give.
        canonical_size: side of a box whose features come from p4.
        sampling_ratio, aligned: of RoIAlign.
        channel_order: rgb | bgr, of the network's input; a batch is always RGB.
        pixel_mean, pixel_std: in that order, for pixels in 0..255.
    """

    card: ModelCard | None = None  # where it comes from, set on loading a checkpoint
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: ResNet,
        fpn: FeaturePyramid,
        rpn: RegionProposalNetwork,
        sampler: RoiSampler,
        box_head: BoxHead,
        mask_head: MaskHead | None,
        box_resolution: int = 7,
        mask_resolution: int = 14,
        mask_slots_per_image: int | None = None,
        canonical_size: float = 224.0,
        sampling_ratio: int = 0,
        aligned: bool = True,
        channel_order: str = "rgb",
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.sampler = sampler
        self.box_head = box_head
        self.mask_head = mask_head
        self.box_resolution = box_resolution
        self.mask_resolution = mask_resolution
        self.mask_slots_per_image = mask_slots_per_image
        self.canonical_size = canonical_size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.channel_order = channel_order
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).reshape(3, 1, 1), persistent=False)

    def forward(self, batch: Batch, keys: SamplingKeys | None = None) -> Losses | Detections:
        if not self.training:
            return self.detect(batch)
        if batch.targets is None or keys is None:
            raise ValueError("training needs targets and sampling keys; for detections call eval() first")
        return self.losses(batch, batch.targets, keys)

    def losses(self, batch: Batch, targets: Targets, keys: SamplingKeys) -> Losses:
        features = self.features(batch)
        objectness, deltas = self.rpn.head(features)
        anchors = self.rpn.anchors(features, batch.pixels.shape[-2:])
        loss_rpn_cls, loss_rpn_loc = self.rpn.losses(objectness, deltas, anchors, targets, keys.anchors)

        proposals = self.rpn.propose(objectness, deltas, anchors, batch.sizes)
        rois = self.sampler(proposals, targets, keys.rois)
        x = self.align(features, rois.boxes, rois.valid, self.box_resolution)
        logits, deltas_of_class = self.box_head(x)
        loss_cls, loss_box_reg = self.box_head.losses(logits, deltas_of_class, rois, targets)

        num_fg = rois.is_foreground.sum()
        if self.mask_head is None:
            return Losses(loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg, num_fg=num_fg)
        chosen = pack_foreground(rois, self.sampler.foreground_slots, self.mask_slots_per_image)
        x = self.align(features, chosen.boxes, chosen.valid, self.mask_resolution, chosen.image)
        loss_mask = self.mask_head.loss(self.mask_head(x), chosen, batch, targets.masks)
        dropped = num_fg - chosen.valid.sum()
        return Losses(
            loss_rpn_cls,
            loss_rpn_loc,
            loss_cls,
            loss_box_reg,
            loss_mask,
            num_fg=num_fg,
            masks_dropped=dropped,
        )

    @torch.no_grad()
    def detect(self, batch: Batch) -> Detections:
        features = self.features(batch)
        objectness, deltas = self.rpn.head(features)
        anchors = self.rpn.anchors(features, batch.pixels.shape[-2:])
        proposals = self.rpn.propose(objectness, deltas, anchors, batch.sizes)
        x = self.align(features, proposals.boxes, proposals.valid, self.box_resolution)
        logits, deltas_of_class = self.box_head(x)
        found = self.box_head.detect(logits, deltas_of_class, proposals, batch.sizes)
        if self.mask_head is None:
            return found
        x = self.align(features, found.boxes, found.valid, self.mask_resolution)
        masks = self.mask_head.of_class(self.mask_head(x.flatten(0, 1)), found.classes.flatten())
        return found._replace(masks=masks.unflatten(0, found.valid.shape))

    def features(self, batch: Batch) -> list[Tensor]:
        """p2..p6 of a batch."""
        return self.fpn(self.backbone(self.normalize(batch)))

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

    def align(
        self,
        features: list[Tensor],
        boxes: Tensor,
        valid: Tensor,
        resolution: int,
        image: Tensor | None = None,
    ) -> Tensor:
        """RoI features from p2..p5, the level by FPN eq. 1.

        (N, S, C, resolution, resolution) of (N, S, 4) boxes; (T, C, ...) of (T, 4) boxes with their image.
        """
        return multilevel_roi_align(
            features[:4],
            boxes,
            resolution,
            valid=valid,
            batch_index=image,
            spatial_scales=[1 / stride for stride in STRIDES[:4]],
            canonical_size=self.canonical_size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )

    def draw_keys(self, batch: Batch, generator: torch.Generator) -> SamplingKeys:
        """Fresh sampling keys for a batch, on the generator's device."""
        count, _, height, width = batch.pixels.shape
        anchors = sum(
            per_cell * -(-height // stride) * -(-width // stride)
            for per_cell, stride in zip(self.rpn.anchors.per_cell, STRIDES, strict=True)
        )
        objects = 0 if batch.targets is None else batch.targets.boxes.shape[1]
        device = generator.device
        return SamplingKeys(
            torch.rand(count, anchors, generator=generator, device=device),
            torch.rand(count, self.rpn.post_nms_top_n[0] + objects, generator=generator, device=device),
        )
