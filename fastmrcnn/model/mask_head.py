"""Mask head: a small FCN with a sigmoid mask per class (arXiv 1703.06870, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.kernels import mask_loss, mask_targets
from fastmrcnn.model.roi_sampler import PackedRois
from fastmrcnn.structures import Batch, PackedMasks


class MaskHead(nn.Module):
    """
    Args:
        in_channels: of the RoI features, (F, in_channels, M/2, M/2).
        num_classes: K; class-agnostic: one mask for all.
        target: bitmap (average of the ground truth in each pixel, then >= 0.5) or soft (the average).
        target_sampling_ratio: samples per pixel and axis for that average; 0: adaptive.
        aligned: half-pixel correct sampling of the ground truth.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        convs: int = 4,
        channels: int = 256,
        class_agnostic: bool = False,
        target: str = "bitmap",
        target_sampling_ratio: int = 2,
        aligned: bool = True,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.class_agnostic = class_agnostic
        self.target = target
        self.target_sampling_ratio = target_sampling_ratio
        self.aligned = aligned
        self.loss_weight = loss_weight
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if index == 0 else channels, channels, 3, padding=1)
            for index in range(convs)
        )
        inputs = channels if convs else in_channels
        self.deconv = nn.ConvTranspose2d(inputs, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, 1 if class_agnostic else num_classes, 1)
        for layer in (*self.convs, self.deconv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (*self.convs, self.deconv, self.predictor):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """RoI features (F, C, M/2, M/2) -> mask logits (F, K or 1, M, M)."""
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return self.predictor(F.relu(self.deconv(x), inplace=True))

    def loss(self, logits: Tensor, rois: PackedRois, batch: Batch, masks: PackedMasks) -> Tensor:
        """Mean sigmoid cross-entropy of the ground-truth class's mask over the foreground.

        Args:
            logits: (T, K or 1, M, M) of the T slots of `rois`.
        """
        with torch.no_grad():
            goal = mask_targets(
                rois.boxes,
                rois.image,
                rois.matched,
                *masks,
                image_sizes=batch.sizes,
                image_shape=(batch.pixels.shape[-2], batch.pixels.shape[-1]),
                resolution=logits.shape[-1],
                aligned=self.aligned,
                sampling_ratio=self.target_sampling_ratio,
            )
            if self.target == "bitmap":
                goal = (goal >= 0.5).float()
        return mask_loss(logits, rois.classes, goal, rois.valid.float()) * self.loss_weight

    def of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """(D, K or 1, M, M) logits of the given classes (D,) -> (D, M, M) probabilities, float32."""
        if self.class_agnostic:
            return logits[:, 0].float().sigmoid()
        index = classes[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        return logits.gather(1, index).squeeze(1).float().sigmoid()
