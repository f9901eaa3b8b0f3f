"""From proposals to the RoIs that the heads are trained on."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmrcnn.model.matcher import match
from fastmrcnn.model.roi_pooler import WantedRois
from fastmrcnn.model.subsample import sample, take
from fastmrcnn.structures import Proposals, SampledRois, Targets


class PackedRois(NamedTuple):
    """Foreground RoIs of a whole batch, in T slots that its images share."""

    boxes: Tensor  # (T, 4) float32
    image: Tensor  # (T,) int64 in 0..N-1
    slot: Tensor  # (T,) int64, the RoI's row among the N * S sampled ones
    classes: Tensor  # (T,) int64 in 0..K-1; 0 where not valid
    matched: Tensor  # (T,) int64, ground-truth slot of that image
    valid: Tensor  # (T,) bool

    def wanted(self, resolution: int) -> WantedRois:
        return WantedRois(self.boxes, self.valid, resolution, self.image)


@dataclass(eq=False)
class RoiSampler:
    """Labels proposals by the ground truth and samples some for the heads to learn from."""

    num_classes: int  # K, the class of background
    _: KW_ONLY
    batch_per_image: int  # RoIs sampled of each image
    foreground_share: float  # at most this share of them is foreground
    foreground_iou: float  # overlap from which a proposal is foreground; below it is background
    append_ground_truth: bool  # the objects' own boxes are proposals too
    crowd_overlap: float | None  # see `match`

    @property
    def foreground_slots(self) -> int:
        """F: no foreground RoI stands at this slot or beyond."""
        return int(self.batch_per_image * self.foreground_share)

    @torch.no_grad()
    def __call__(self, proposals: Proposals, targets: Targets, keys: Tensor) -> SampledRois:
        boxes, valid = proposals.boxes, proposals.valid
        if self.append_ground_truth:
            boxes = torch.cat([boxes, targets.boxes], 1)
            valid = torch.cat([valid, targets.valid], 1)
        matches = match(
            boxes,
            targets,
            foreground_iou=self.foreground_iou,
            background_iou=self.foreground_iou,
            crowd_overlap=self.crowd_overlap,
        )
        chosen = sample(
            matches.is_foreground & valid,
            matches.is_background & valid,
            keys,
            asked=self.batch_per_image,
            foreground_share=self.foreground_share,
        )
        matched = take(matches.matched, chosen.picked)
        classes = torch.where(chosen.is_foreground, take(targets.classes, matched), self.num_classes)
        return SampledRois(take(boxes, chosen.picked), classes, matched, chosen.is_foreground, chosen.valid)


def pack_foreground(rois: SampledRois, most: int, slots_per_image: int | None) -> PackedRois:
    """Gather the foreground of all images into N * slots_per_image slots.

    Args:
        most: no image has foreground beyond this slot.
        slots_per_image: if that is fewer than `most`, an image may use what others leave; what does not
            fit is dropped, the last slots of every image first. The sampler's order is random, so a
            random choice stays.
    """
    images, sampled = rois.valid.shape
    slots = min(most, sampled)
    device = rois.boxes.device
    image = torch.arange(images, device=device)[:, None].expand(-1, slots)
    slot = image * sampled + torch.arange(slots, device=device)
    if slots_per_image is None or slots_per_image >= slots:
        image, slot = image.flatten(), slot.flatten()
    else:
        # Slot by slot over the images, foreground first: a stable sort keeps that order.
        order = (~rois.is_foreground[:, :slots]).T.flatten().argsort(stable=True)[: images * slots_per_image]
        image, slot = image.T.flatten()[order], slot.T.flatten()[order]
    boxes, classes, matched, valid = (
        t.flatten(0, 1).index_select(0, slot)
        for t in (rois.boxes, rois.classes, rois.matched, rois.is_foreground)
    )
    return PackedRois(boxes, image, slot, torch.where(valid, classes, 0), matched, valid)
