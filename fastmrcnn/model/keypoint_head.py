"""Keypoint head: RoI features to a heatmap per keypoint (arXiv 1703.06870, section 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.model.convs import make_convs, run_convs
from fastmrcnn.model.rois import PackedRois
from fastmrcnn.model.subsample import take
from fastmrcnn.structures import SampledRois


class KeypointHead(nn.Module):
    """3x3 convolutions, a deconvolution to twice the size, and bilinear enlargement to four times the size.

    A heatmap is one softmax over its M x M positions. Classes share the heatmaps.

    Args:
        in_channels: of the RoI features, (T, in_channels, M/4, M/4).
        num_keypoints: J.
        resolution: M/4, side of the RoI features, which are always the head's own.
        convs, channels: 3x3 convolutions and their width.
        slots_per_image: slots in training, shared by the images of a batch; None: as many as the sampler
            may give.
        loss_normalizer: visible: the loss is a mean over the visible keypoints of the batch (torchvision,
            and the recipes of detectron2); static: it is divided by `images * most_keypoints`, so that a
            batch with few keypoints weighs less.
        most_keypoints: J times the foreground RoIs that may be sampled of an image.
    """

    def __init__(
        self,
        in_channels: int,
        num_keypoints: int,
        *,
        resolution: int,
        convs: int,
        channels: int,
        slots_per_image: int | None,
        loss_normalizer: str,
        most_keypoints: float,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.num_keypoints = num_keypoints
        self.resolution = resolution
        self.slots_per_image = slots_per_image
        self.loss_normalizer = loss_normalizer
        self.most_keypoints = most_keypoints
        self.loss_weight = loss_weight
        self.convs, _ = make_convs(in_channels, channels, convs)
        inputs = channels if convs else in_channels
        self.deconv = nn.ConvTranspose2d(inputs, num_keypoints, 4, stride=2, padding=1)
        for layer in (*self.convs, self.deconv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """RoI features (T, C, M/4, M/4) -> heatmap logits (T, J, M, M) float32."""
        x = run_convs(x, self.convs)
        # In float32: the loss and the search for the highest position need it, and it is a small map.
        return F.interpolate(self.deconv(x).float(), scale_factor=2.0, mode="bilinear", align_corners=False)

    def loss(self, logits: Tensor, rois: PackedRois, keypoints: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax cross-entropy at each visible keypoint within its RoI; 0 if there is none.

        Args:
            logits: (T, J, M, M) of the T slots of `rois`.
            keypoints: (N, G, J, 3) of the ground truth.
        Returns:
            the loss, and what it is a mean over.
        """
        images, slots = keypoints.shape[:2]
        with torch.no_grad():
            own = keypoints.flatten(0, 1).index_select(0, rois.image * slots + rois.matched)
            goal, counts = keypoint_targets(own, rois.boxes, logits.shape[-1])
            counts = counts & rois.valid[:, None]
            divisor = counts.sum().float()
            if self.loss_normalizer == "static":
                divisor = torch.full_like(divisor, images * self.most_keypoints)
        loss = F.cross_entropy(logits.flatten(0, 1).flatten(1), goal.flatten(), reduction="none")
        total = torch.where(counts.flatten(), loss, 0.0).sum()
        return total / torch.where(divisor > 0, divisor, 1.0) * self.loss_weight, divisor


def keypoint_targets(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The cell of its box that each keypoint falls into. A keypoint on the right or lower edge belongs to
    the last cell (torchvision and detectron2).

    Args:
        keypoints: (T, J, 3) x, y, visibility.
        boxes: (T, 4) xyxy in the same pixels.
        side: M, cells of a box per axis.
    Returns:
        (T, J) int64 cell in 0..M*M-1, row by row, 0 where it does not count; (T, J) bool, whether the
        keypoint is labelled and within the box.
    """
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    extent = high - low
    real = extent > 0
    cell = ((keypoints[..., :2] - low) * (side / torch.where(real, extent, 1.0))).floor()
    cell = torch.where(keypoints[..., :2] == high, side - 1, cell)
    counts = ((cell >= 0) & (cell < side) & real).all(-1) & (keypoints[..., 2] > 0)
    cell = torch.where(counts[..., None], cell, 0.0).long()
    return cell[..., 1] * side + cell[..., 0], counts


@torch.no_grad()
def with_keypoints(rois: SampledRois, keypoints: Tensor) -> SampledRois:
    """The RoIs, those alone foreground that hold a labelled keypoint of their object.

    The others add nothing to the loss: they would take slots in vain.

    Args:
        keypoints: (N, G, J, 3) of the ground truth.
    """
    own = take(keypoints, rois.matched)  # (N, S, J, 3)
    low, high = rois.boxes[:, :, None, :2], rois.boxes[:, :, None, 2:]
    within = ((own[..., :2] >= low) & (own[..., :2] <= high)).all(-1) & (own[..., 2] > 0)
    return rois._replace(is_foreground=rois.is_foreground & within.any(-1))
