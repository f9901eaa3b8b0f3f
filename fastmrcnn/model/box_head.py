"""Box head: convolutions if asked for, fully connected layers, then classes and deltas (Fast R-CNN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.kernels import decode_boxes, padded_nms
from fastmrcnn.model.boxes import encode
from fastmrcnn.model.convs import init_convs, make_convs, run_convs
from fastmrcnn.model.losses import masked_sum, smooth_l1
from fastmrcnn.model.norms import Norm
from fastmrcnn.model.roi_linear import RoiLinear
from fastmrcnn.model.subsample import take
from fastmrcnn.structures import Detections, Proposals, SampledRois, Targets


class BoxHead(nn.Module):
    """
    Args:
        in_channels, in_side: of what the head reads, (N, S, in_channels, in_side, in_side).
        num_classes: K; the background is class K.
        resolution: side of the RoI features; the same as `in_side` unless a stage of the backbone comes
            between (C4).
        convs, channels, norm: 3x3 convolutions before the hidden layers, their width and norm.
        fcs, hidden: hidden layers and their width; without any, features are averaged over the RoI (C4).
        delta_weights: the deltas are learned multiplied by these.
        score_threshold: a score at or below it is no candidate.
        candidates: most candidates of an image that go into NMS.
        detections: D, slots per image that come out.
    """

    stable = False  # equal scores by rising index, as exported files take them; else as torch's topk does

    def __init__(
        self,
        in_channels: int,
        in_side: int,
        num_classes: int,
        *,
        resolution: int,
        convs: int,
        channels: int,
        norm: Norm | None,
        fcs: int,
        hidden: int,
        class_agnostic: bool,
        delta_weights: Sequence[float],
        box_loss_beta: float,
        score_threshold: float,
        nms_iou: float,
        candidates: int,
        detections: int,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.resolution = resolution
        self.class_agnostic = class_agnostic
        self.delta_weights = tuple(delta_weights)
        self.box_loss_beta = box_loss_beta
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.candidates = candidates
        self.detections = detections
        self.loss_weight = loss_weight
        self.convs, self.norms = make_convs(in_channels, channels, convs, norm)
        inputs = channels if convs else in_channels
        inputs *= in_side * in_side if fcs else 1
        self.fcs = [f"fc{index}" for index in range(1, fcs + 1)]
        for index, name in enumerate(self.fcs):
            self.add_module(name, nn.Linear(inputs, hidden) if index else RoiLinear(inputs, hidden))
            inputs = hidden
        self.classes = nn.Linear(inputs, num_classes + 1)
        self.deltas = nn.Linear(inputs, 4 * (1 if class_agnostic else num_classes))
        init_convs(self.convs)
        for name in self.fcs:
            nn.init.kaiming_uniform_(self.get_parameter(f"{name}.weight"), a=1)
            nn.init.zeros_(self.get_parameter(f"{name}.bias"))
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (self.classes, self.deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features (N, S, C, h, w) -> class logits (N, S, K+1), deltas (N, S, K or 1, 4)."""
        if len(self.convs):
            x = run_convs(x.flatten(0, 1), self.convs, self.norms).unflatten(0, x.shape[:2])
        if not self.fcs:
            x = x.mean((3, 4))
        for name in self.fcs:
            x = F.relu(getattr(self, name)(x), inplace=True)
        return self.classes(x), self.deltas(x).unflatten(-1, (-1, 4))

    def losses(
        self, logits: Tensor, deltas: Tensor, rois: SampledRois, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the sampled RoIs; smooth L1 over the foreground, divided by all sampled."""
        with torch.no_grad():
            scale = self.loss_weight / rois.valid.sum().clamp(min=1).float()
            goal = encode(take(targets.boxes, rois.matched), rois.boxes, self.delta_weights)
        cls = F.cross_entropy(logits.float().flatten(0, 1), rois.classes.flatten(), reduction="none")
        loss_cls = torch.where(rois.valid.flatten(), cls, 0.0).sum() * scale
        loc = smooth_l1(self._of_class(deltas, rois.classes).float() - goal, self.box_loss_beta)
        return loss_cls, masked_sum(loc, rois.is_foreground) * scale

    def _of_class(self, deltas: Tensor, classes: Tensor) -> Tensor:
        """(N, S, K or 1, 4) deltas of the given classes -> (N, S, 4). Background takes any."""
        if self.class_agnostic:
            return deltas.squeeze(2)
        index = classes.clamp(max=self.num_classes - 1)[..., None, None].expand(-1, -1, 1, 4)
        return deltas.gather(2, index).squeeze(2)

    def detect(self, logits: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor) -> Detections:
        """Scores above the threshold, decoded and clipped, after NMS within each class: the best D."""
        return self.detect_scored(logits.float().softmax(-1)[..., :-1], deltas, proposals, sizes)

    def detect_scored(
        self, scores: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor
    ) -> Detections:
        """As `detect`, of class scores (N, P, K) in 0..1."""
        num_classes = scores.shape[-1]
        above = (scores > self.score_threshold) & proposals.valid[..., None]
        flat = torch.where(above, scores, -1.0).flatten(1)
        count = min(self.candidates, flat.shape[1])
        if self.stable and count == flat.shape[1]:
            score, index = flat.sort(dim=1, descending=True, stable=True)
        else:
            score, index = flat.topk(count)
        cut = above.flatten(1).sum(1) - (score > 0).sum(1)
        proposal, cls = index // num_classes, index % num_classes
        delta_index = proposal if self.class_agnostic else index
        box, valid = decode_boxes(
            take(deltas.flatten(1, 2), delta_index),
            take(proposals.boxes, proposal),
            sizes,
            scores=score,
            weights=self.delta_weights,
            score_threshold=self.score_threshold,
        )
        kept, real = padded_nms(box, score, cls.int(), valid, self.nms_iou, min(self.detections, count))
        return Detections(
            boxes=torch.where(real[..., None], take(box, kept), 0.0),
            scores=torch.where(real, take(score, kept), 0.0),
            classes=torch.where(real, take(cls, kept), 0),
            valid=real,
            cut=cut,
        )
