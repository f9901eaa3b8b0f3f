"""Mask heads: RoI features to a mask per class (arXiv 1703.06870, section 3 and table 2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.kernels import (
    class_mask_logits,
    class_mask_loss,
    class_mask_loss_from_bitmaps,
    mask_loss,
    mask_targets,
    polygon_mask_targets,
)
from fastmrcnn.model.convs import init_convs, make_convs, run_convs
from fastmrcnn.model.norms import Norm
from fastmrcnn.model.roi_linear import RoiLinear
from fastmrcnn.model.rois import PackedRois
from fastmrcnn.structures import Batch, PackedMasks, PackedPolygons


class MaskHead(nn.Module):
    """What mask heads share: the loss, and the choice of a class's mask. `forward` is the kind's own.

    Args:
        num_classes: K.
        resolution: M/2, side of the RoI features. With C4 they are the box head's instead.
        slots_per_image: slots in training, shared by the images of a batch; None: as many as the sampler
            may give.
        class_agnostic: one mask for all classes.
        loss: sigmoid: a binary mask for each class by itself; softmax: the classes and the background
            compete for each pixel (table 2b), the last channel is the background.
        target: bitmap (average of the ground truth in each pixel, then >= 0.5), soft (the average), or
            polygon (the polygons rasterised; as bitmap where an object has none).
        target_sampling_ratio: samples per pixel and axis for that average; 0: adaptive.
        aligned: half-pixel correct sampling of the ground truth.

    Raises:
        ValueError: softmax with what it cannot mean: class-agnostic masks or soft targets.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        resolution: int,
        slots_per_image: int | None,
        class_agnostic: bool,
        loss: str,
        target: str,
        target_sampling_ratio: int,
        aligned: bool,
        loss_weight: float,
    ) -> None:
        super().__init__()
        if loss == "softmax" and (class_agnostic or target == "soft"):
            raise ValueError("a softmax over the classes needs class-specific masks and binary targets")
        self.resolution = resolution
        self.slots_per_image = slots_per_image
        self.class_agnostic = class_agnostic
        self.softmax = loss == "softmax"
        self.target = target
        self.target_sampling_ratio = target_sampling_ratio
        self.aligned = aligned
        self.loss_weight = loss_weight
        self.mask_channels = 1 if class_agnostic else num_classes + self.softmax

    def loss_of_rois(self, x: Tensor, rois: PackedRois, batch: Batch, masks: PackedMasks) -> Tensor:
        """`loss` of the RoI features (T, C, M/2, M/2)."""
        return self.loss(self(x), rois, batch, masks)

    def masks_of_rois(self, x: Tensor, classes: Tensor) -> Tensor:
        """`of_class` of the RoI features (D, C, M/2, M/2)."""
        return self.of_class(self(x), classes)

    def loss(self, logits: Tensor, rois: PackedRois, batch: Batch, masks: PackedMasks) -> Tensor:
        """Mean cross-entropy over the pixels of the foreground.

        Args:
            logits: (T, mask_channels, M, M) of the T slots of `rois`.
        """
        goal = self.targets(rois, batch, masks, logits.shape[-1])
        if self.softmax:
            loss = softmax_mask_loss(logits, rois.classes, goal, rois.valid)
        else:
            loss = mask_loss(logits, rois.classes, goal, rois.valid.float())
        return loss * self.loss_weight

    @torch.no_grad()
    def targets(self, rois: PackedRois, batch: Batch, masks: PackedMasks, resolution: int) -> Tensor:
        """What the masks of `rois` should be: (T, M, M) float32 in 0..1."""
        polygons = _polygons(batch) if self.target == "polygon" else None
        boxes = rois.boxes
        if polygons is not None:
            slot = rois.image * polygons.parts.shape[1] + rois.matched
            has_polygon = polygons.parts.flatten().index_select(0, slot) > 0
            boxes = boxes.where(~has_polygon[:, None], 0.0)  # the bitmap will not be looked at: read little
        goal = mask_targets(
            boxes,
            rois.image,
            rois.matched,
            *masks,
            image_sizes=batch.sizes,
            image_shape=(batch.pixels.shape[-2], batch.pixels.shape[-1]),
            resolution=resolution,
            aligned=self.aligned,
            sampling_ratio=self.target_sampling_ratio,
        )
        if self.target == "soft":
            return goal
        goal = (goal >= 0.5).float()
        if polygons is None:
            return goal
        inside = polygon_mask_targets(rois.boxes, rois.image, rois.matched, *polygons, resolution=resolution)
        return torch.where(has_polygon[:, None, None], inside.float(), goal)

    def of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """(D, mask_channels, M, M) logits of the given classes (D,) -> (D, M, M) probabilities, float32."""
        if self.class_agnostic:
            return logits[:, 0].float().sigmoid()
        logits = logits.float()
        index = classes[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        chosen = logits.gather(1, index).squeeze(1)
        return (chosen - logits.logsumexp(1)).exp() if self.softmax else chosen.sigmoid()


class FcnMaskHead(MaskHead):
    """3x3 convolutions, a deconvolution to twice the size, and a 1x1 predictor.

    Args:
        in_channels: of the RoI features, (F, in_channels, M/2, M/2).
        convs, channels, norm: 3x3 convolutions, their width and norm.
        **settings: of MaskHead.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        convs: int,
        channels: int,
        norm: Norm | None,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes, **settings)
        self.convs, self.norms = make_convs(in_channels, channels, convs, norm)
        inputs = channels if convs else in_channels
        self.deconv = nn.ConvTranspose2d(inputs, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, self.mask_channels, 1)
        init_convs(self.convs)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for bias in (self.deconv.bias, self.predictor.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """RoI features (F, C, M/2, M/2) -> mask logits (F, mask_channels, M, M)."""
        return self.predictor(self.features(x))

    def loss_of_rois(self, x: Tensor, rois: PackedRois, batch: Batch, masks: PackedMasks) -> Tensor:
        """With the ground-truth class's logits alone, which are never stored."""
        if self.softmax:
            return super().loss_of_rois(x, rois, batch, masks)
        x = self.features(x)
        predictor = (x, self.predictor.weight, self.predictor.bias, rois.classes)
        if self.target == "polygon":
            loss = class_mask_loss(*predictor, self.targets(rois, batch, masks, x.shape[-1]), rois.valid)
        else:
            loss = class_mask_loss_from_bitmaps(
                *predictor,
                rois.valid,
                rois.boxes,
                rois.image,
                rois.matched,
                *masks,
                image_sizes=batch.sizes,
                image_shape=(batch.pixels.shape[-2], batch.pixels.shape[-1]),
                sampling_ratio=self.target_sampling_ratio,
                aligned=self.aligned,
                bitmap=self.target == "bitmap",
            )
        return loss * self.loss_weight

    def masks_of_rois(self, x: Tensor, classes: Tensor) -> Tensor:
        """With the logits of the given classes alone."""
        if self.softmax:
            return super().masks_of_rois(x, classes)
        x = self.features(x)
        return class_mask_logits(x, self.predictor.weight, self.predictor.bias, classes).sigmoid()

    def features(self, x: Tensor) -> Tensor:
        """What the predictor gets: (F, channels, M, M)."""
        return F.relu(self.deconv(run_convs(x, self.convs, self.norms)), inplace=True)


class MlpMaskHead(MaskHead):
    """Fully connected layers over the whole RoI (table 2e).

    Args:
        in_channels: of the RoI features, (F, in_channels, M/2, M/2).
        fcs, hidden: hidden layers and their width.
        **settings: of MaskHead.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        fcs: int,
        hidden: int,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes, **settings)
        self.side = 2 * self.resolution
        inputs, outputs = in_channels * self.resolution**2, self.mask_channels * self.side**2
        self.fcs = nn.ModuleList(
            nn.Linear(hidden, hidden) if index else RoiLinear(inputs, hidden) for index in range(fcs)
        )
        self.predictor = nn.Linear(hidden, outputs) if fcs else RoiLinear(inputs, outputs)
        for index in range(fcs):
            nn.init.kaiming_uniform_(self.get_parameter(f"fcs.{index}.weight"), a=1)
            nn.init.zeros_(self.get_parameter(f"fcs.{index}.bias"))
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, x: Tensor) -> Tensor:
        """RoI features (F, C, M/2, M/2) -> mask logits (F, mask_channels, M, M)."""
        for fc in self.fcs:
            x = F.relu(fc(x), inplace=True)
        return self.predictor(x).unflatten(1, (-1, self.side, self.side))


def _polygons(batch: Batch) -> PackedPolygons:
    if batch.targets is None or batch.targets.polygons is None:
        raise ValueError("mask targets from polygons need targets with polygons; TrainLoader packs them")
    return batch.targets.polygons


def softmax_mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy per pixel over K classes and the background, which is the last channel.

    Args:
        logits: (F, K + 1, M, M).
        classes: (F,) int64 in 0..K-1.
        targets: (F, M, M), 0 or 1.
        valid: (F,) bool.
    """
    background = logits.shape[1] - 1
    goal = torch.where(targets > 0, classes[:, None, None], background)
    loss = F.cross_entropy(logits.float(), goal, reduction="none").mean((1, 2))
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)
