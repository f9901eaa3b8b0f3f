"""Region proposal network (arXiv 1506.01497), shared over the levels of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.kernels import decode_boxes, padded_nms
from fastmrcnn.model.anchors import AnchorGenerator
from fastmrcnn.model.boxes import encode
from fastmrcnn.model.convs import make_convs, run_convs
from fastmrcnn.model.losses import masked_sum, smooth_l1
from fastmrcnn.model.matcher import match
from fastmrcnn.model.patches import cells_of, take_patches
from fastmrcnn.model.subsample import sample, take
from fastmrcnn.model.wide_product import wide_product
from fastmrcnn.structures import Proposals, Targets


class RpnHead(nn.Module):
    """3x3 convolutions, then objectness and deltas for the A anchors of each cell."""

    def __init__(self, channels: int, anchors_per_cell: int, convs: int) -> None:
        super().__init__()
        self.convs, _ = make_convs(channels, channels, convs)
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for conv in (*self.convs, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits (N, R_l) and deltas (N, R_l, 4), in the anchors' order.

        Under autocast both are float32, so that logits which bf16 would make equal keep their order.
        """
        anchors = self.objectness.out_channels
        weight, bias = self._predictors()
        objectness, deltas = [], []
        for x in features:
            y = _predicted(run_convs(x, self.convs), weight, bias)
            objectness.append(y[..., :anchors].flatten(1))
            deltas.append(y[..., anchors : 5 * anchors].reshape(x.shape[0], -1, 4))
        return objectness, deltas

    def at_anchors(self, features: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """What `forward` gives for some anchors, from what lies around their cells alone.

        The loss reads a few hundred anchors of an image's hundreds of thousands. Computed once more there,
        the head's backward pass reads and writes no map.

        Args:
            index: (N, S) int64, anchors by their place among those of all levels.
        Returns:
            the maps for what follows, see `take_patches`; objectness logits (N, S); deltas (N, S, 4).
        """
        cells, within = cells_of(index, features, self.objectness.out_channels)
        maps, x, inside = take_patches(features, cells, len(self.convs))
        for number, conv in enumerate(self.convs):
            if number:  # around a map a convolution reads zeros, not what it would have computed there
                inside = inside[..., 1:-1, 1:-1]
                x = torch.where(inside, x, 0.0)
            x = F.relu(F.conv2d(x, conv.weight, conv.bias), inplace=True)  # type: ignore[arg-type]
        y = _predicted(x, *self._predictors()).flatten(0, 2)
        anchors = self.objectness.out_channels
        logits = y.gather(1, within[:, None]).unflatten(0, index.shape).squeeze(-1)
        column = anchors + 4 * within[:, None] + torch.arange(4, device=within.device)
        return maps, logits, y.gather(1, column).unflatten(0, index.shape)

    def _predictors(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of both predictors as one, which reads a map once.

        Zeros make its outputs a multiple of 8, as matrix units want them.
        """
        weight = torch.cat([self.objectness.weight, self.deltas.weight])
        bias = torch.cat([self.objectness.bias, self.deltas.bias])  # type: ignore[list-item]
        spare = -len(bias) % 8
        return F.pad(weight, (0, 0, 0, 0, 0, 0, 0, spare)), F.pad(bias, (0, spare))


def _predicted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h, w, outputs), float32 if x is of fewer bits."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return wide_product(x.movedim(1, -1), weight.flatten(1)) + bias
    return F.conv2d(x, weight, bias).movedim(1, -1)


class RegionProposalNetwork(nn.Module):
    """
    Args:
        channels: of every level.
        convs: 3x3 convolutions before the predictors.
        pre_nms_top_n, pre_nms_top_n_test: proposals kept per level, in training and in testing.
        post_nms_top_n, post_nms_top_n_test: and per image.
        foreground_iou, background_iou, crowd_overlap: see `match`.
        batch_per_image, foreground_share: see `sample`.
        loss_normalizer: divide by the anchors asked for, or by those sampled.
    """

    def __init__(
        self,
        channels: int,
        anchors: AnchorGenerator,
        *,
        convs: int,
        pre_nms_top_n: int,
        pre_nms_top_n_test: int,
        post_nms_top_n: int,
        post_nms_top_n_test: int,
        nms_iou: float,
        min_box_side: float,
        foreground_iou: float,
        background_iou: float,
        crowd_overlap: float | None,
        batch_per_image: int,
        foreground_share: float,
        box_loss_beta: float,
        loss_normalizer: str,
        loss_weight: float,
    ) -> None:
        super().__init__()
        if len(set(anchors.per_cell)) != 1:
            raise ValueError(f"every level needs the same number of anchors a cell, got {anchors.per_cell}")
        self.head = RpnHead(channels, anchors.per_cell[0], convs)
        self.anchors = anchors
        self.pre_nms_top_n = pre_nms_top_n
        self.pre_nms_top_n_test = pre_nms_top_n_test
        self.post_nms_top_n = post_nms_top_n
        self.post_nms_top_n_test = post_nms_top_n_test
        self.nms_iou = nms_iou
        self.min_box_side = min_box_side
        self.foreground_iou = foreground_iou
        self.background_iou = background_iou
        self.crowd_overlap = crowd_overlap
        self.batch_per_image = batch_per_image
        self.foreground_share = foreground_share
        self.box_loss_beta = box_loss_beta
        self.loss_normalizer = loss_normalizer
        self.loss_weight = loss_weight

    @torch.no_grad()
    def propose(
        self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], sizes: Tensor
    ) -> Proposals:
        """Best boxes of each level, decoded, clipped and thinned out by NMS within their level."""
        before, after = self.pre_nms_top_n_test, self.post_nms_top_n_test
        if self.training:
            before, after = self.pre_nms_top_n, self.post_nms_top_n
        scores, moves, references, levels = [], [], [], []
        for level, (logits, delta, anchor) in enumerate(zip(objectness, deltas, anchors, strict=True)):
            count = min(before, logits.shape[1])
            top, index = logits.float().topk(count)
            scores.append(top)
            moves.append(take(delta, index))
            references.append(take(anchor[None].expand(logits.shape[0], -1, -1), index))
            levels.append(torch.full_like(index, level, dtype=torch.int32))
        score = torch.cat(scores, 1)
        box, valid = decode_boxes(
            torch.cat(moves, 1), torch.cat(references, 1), sizes, scores=score, min_side=self.min_box_side
        )
        count = min(after, box.shape[1])
        index, kept = padded_nms(box, score, torch.cat(levels, 1), valid, self.nms_iou, count)
        return Proposals(take(box, index), take(score, index), kept)

    def losses(
        self, features: Sequence[Tensor], anchors: Sequence[Tensor], targets: Targets, keys: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Binary cross-entropy of the objectness, and smooth L1 of the deltas, over sampled anchors.

        Returns:
            the maps for what follows, see `take_patches`; both losses; what they are means over.
        """
        with torch.no_grad():
            anchor = torch.cat(list(anchors))
            matches = match(
                anchor[None],
                targets,
                foreground_iou=self.foreground_iou,
                background_iou=self.background_iou,
                low_quality=True,
                crowd_overlap=self.crowd_overlap,
            )
            chosen = sample(
                matches.is_foreground,
                matches.is_background,
                keys,
                asked=self.batch_per_image,
                foreground_share=self.foreground_share,
            )
            reference = anchor[chosen.picked]
            goal = encode(take(targets.boxes, take(matches.matched, chosen.picked)), reference)
            if self.loss_normalizer == "asked":
                divisor = torch.full((), float(self.batch_per_image * len(keys)), device=keys.device)
            else:
                divisor = chosen.valid.sum()
        maps, logits, delta = self.head.at_anchors(features, chosen.picked)
        logits, delta = logits.float(), delta.float()
        cls = F.binary_cross_entropy_with_logits(logits, chosen.is_foreground.float(), reduction="none")
        loc = smooth_l1(delta - goal, self.box_loss_beta)
        scale = self.loss_weight / divisor.clamp(min=1).float()
        loss_cls = torch.where(chosen.valid, cls, 0.0).sum() * scale
        return maps, loss_cls, masked_sum(loc, chosen.is_foreground) * scale, divisor
