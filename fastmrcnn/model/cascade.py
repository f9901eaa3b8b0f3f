"""Cascade R-CNN (arXiv 1712.00726): box heads one after the other, each on the boxes of the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmrcnn.kernels import decode_boxes
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.matcher import match
from fastmrcnn.model.subsample import take
from fastmrcnn.structures import Detections, Proposals, SampledRois, Targets

# What the heads read of (N, S, 4) boxes and (N, S) valid: (N, S, C, side, side).
Pool = Callable[[Tensor, Tensor], Tensor]


class CascadeBoxHead(nn.Module):
    """
    As detectron2's CascadeROIHeads computes it: the first head learns from the sampled RoIs, the others from
    all boxes that the one before made of them but empty ones, labelled anew by a higher overlap; ground truth
    is not appended again. Found are the last head's boxes, scored by the mean of all heads.

    Args:
        heads: with class-agnostic boxes.
        ious: overlap from which a box is foreground, for each head but the first, whose RoIs come labelled.
        crowd_overlap: see `match`.
    """

    def __init__(
        self, heads: Sequence[BoxHead], *, ious: Sequence[float], crowd_overlap: float | None
    ) -> None:
        super().__init__()
        if len(ious) != len(heads) - 1 or not all(head.class_agnostic for head in heads):
            raise ValueError("a cascade needs class-agnostic heads and an overlap for each but the first")
        self.stages = nn.ModuleList(heads)
        self.ious = tuple(ious)
        self.crowd_overlap = crowd_overlap
        self.resolution = heads[0].resolution
        self.num_classes = heads[0].num_classes
        self.class_agnostic = True

    def losses(
        self, pool: Pool, pooled: Tensor, rois: SampledRois, targets: Targets, sizes: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of each head, under detectron2's names, and what each of them is a mean over.

        Args:
            pooled: (N, S, C, side, side) features of `rois`, which the first head is trained on.
            sizes: (N, 2) height and width of the images.
        """
        losses: dict[str, Tensor] = {}
        divisors: dict[str, Tensor] = {}
        for stage, head in enumerate(self._heads()):
            # All heads' losses are summed; the maps are to feel their mean.
            logits, deltas = head(_scale_gradient(pooled, 1 / len(self.stages)))
            cls, box = head.losses(logits, deltas, rois, targets)
            own = {f"loss_cls_stage{stage}": cls, f"loss_box_reg_stage{stage}": box}
            losses |= own
            divisors |= dict.fromkeys(own, rois.valid.sum())
            if stage < len(self.ious):
                boxes, real = _moved(deltas, rois.boxes, sizes, head, min_side=0.0)
                rois = self._labelled(boxes, real & rois.valid, targets, self.ious[stage])
                pooled = pool(rois.boxes, rois.valid)
        return losses, divisors

    @torch.no_grad()
    def _labelled(self, boxes: Tensor, valid: Tensor, targets: Targets, overlap: float) -> SampledRois:
        matches = match(
            boxes,
            targets,
            foreground_iou=overlap,
            background_iou=overlap,
            crowd_overlap=self.crowd_overlap,
        )
        is_foreground = matches.is_foreground & valid
        classes = torch.where(is_foreground, take(targets.classes, matches.matched), self.num_classes)
        counts = is_foreground | (matches.is_background & valid)
        return SampledRois(boxes, classes, matches.matched, is_foreground, counts)

    def detect(self, pool: Pool, proposals: Proposals, sizes: Tensor) -> Detections:
        """Proposals moved by every head, then as `BoxHead.detect`, by the heads' mean scores."""
        scores: list[Tensor] = []
        heads = self._heads()
        for stage, head in enumerate(heads):
            logits, deltas = head(pool(proposals.boxes, proposals.valid))
            scores.append(logits.float().softmax(-1)[..., :-1])
            if stage < len(heads) - 1:
                # Empty boxes stay, so that each row keeps the scores of all heads.
                boxes, real = _moved(deltas, proposals.boxes, sizes, head)
                proposals = Proposals(boxes, proposals.scores, proposals.valid & real)
        mean = torch.stack(scores).mean(0)
        return heads[-1].detect_scored(mean, deltas, proposals, sizes)

    def _heads(self) -> list[BoxHead]:
        return list(self.stages)  # type: ignore[arg-type]


def _moved(
    deltas: Tensor, boxes: Tensor, sizes: Tensor, head: BoxHead, min_side: float | None = None
) -> tuple[Tensor, Tensor]:
    """Boxes (N, S, 4) moved by a head's deltas (N, S, 1, 4), and which are real; without a gradient."""
    return decode_boxes(
        deltas.detach().squeeze(2), boxes, sizes, weights=head.delta_weights, min_side=min_side
    )


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    return _ScaleGradient.apply(x, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
