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
from fastmrcnn.model.subsample import take
from fastmrcnn.structures import Detections, Proposals, SampledRois, Targets


class BoxHead(nn.Module):
    """
    Args:
        channels, resolution: of the RoI features, (N, S, channels, resolution, resolution).
        num_classes: K; the background is class K.
        convs, conv_channels, norm: 3x3 convolutions before the hidden layers, their width and norm.
        fcs, hidden: hidden layers and their width; without any, features are averaged over the RoI (C4).
        delta_weights: the deltas are learned multiplied by these.
        score_threshold: a score at or below it is no candidate.
        candidates: most candidates of an image that go into NMS.
        detections: D, slots per image that come out.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        num_classes: int,
        *,
        convs: int = 0,
        conv_channels: int = 256,
        norm: Norm | None = None,
        fcs: int = 2,
        hidden: int = 1024,
        class_agnostic: bool = False,
        delta_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        box_loss_beta: float = 0.0,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        candidates: int = 100_000,
        detections: int = 100,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.delta_weights = tuple(delta_weights)
        self.box_loss_beta = box_loss_beta
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.candidates = candidates
        self.detections = detections
        self.loss_weight = loss_weight
        self.convs, self.norms = make_convs(channels, conv_channels, convs, norm)
        channels = conv_channels if convs else channels
        inputs = channels * resolution * resolution if fcs else channels
        self.fcs = [f"fc{index}" for index in range(1, fcs + 1)]
        for name in self.fcs:
            self.add_module(name, nn.Linear(inputs, hidden))
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
        x = x.flatten(2) if self.fcs else x.mean((3, 4))
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
        scores = logits.float().softmax(-1)[..., :-1]  # (N, P, K)
        num_classes = scores.shape[-1]
        above = (scores > self.score_threshold) & proposals.valid[..., None]
        flat = torch.where(above, scores, -1.0).flatten(1)
        count = min(self.candidates, flat.shape[1])
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
        kept, real = padded_nms(box, score, cls, valid, self.nms_iou, min(self.detections, count))
        return Detections(
            boxes=torch.where(real[..., None], take(box, kept), 0.0),
            scores=torch.where(real, take(score, kept), 0.0),
            classes=torch.where(real, take(cls, kept), 0),
            valid=real,
            cut=cut,
        )
