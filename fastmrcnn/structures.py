"""The padded tensors that flow through a step.

Dimension letters, used in every docstring:
    N images, L pyramid levels, R anchors per image, G ground-truth slots,
    P proposal slots, S sampled slots, F foreground slots, D detection slots,
    K classes, M mask side, J keypoints, C channels, H and W the padded image.

A *slot* is one row of a padded tensor; `valid` says whether it is real. What stands in a slot that
is not valid is unspecified but finite. Boxes are xyxy, float32, in pixels of the padded input.
Classes are 0..K-1 and K is background.

Every structure is a NamedTuple, so that it is a pytree: `torch.compile`, `tree_map` and CUDA graphs
take it apart without help.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class PackedMasks(NamedTuple):
    """Ground-truth bitmaps, each cropped to its box, in the annotation's own resolution.

    Flips, scales, rotations and crops of the image change `to_annotation`, never the bitmaps.
    """

    buffer: Tensor  # (B,) uint8, 0 or 1; crops row by row, end to end; B is a power of two
    offset: Tensor  # (N, G) int64, first byte of the slot's crop
    window: Tensor  # (N, G, 4) int32 x, y, width, height of the crop in annotation pixels; 0 if none
    to_annotation: Tensor  # (N, 2, 3) float32, (x, y, 1) in input pixels -> (x, y) in annotation pixels;
    # (N, G, 2, 3), of each object, where inputs are put together from several images
    size: Tensor  # (N, 2) int32, height and width of the annotated image; then (N, G, 2)


class PackedPolygons(NamedTuple):
    """Ground-truth polygons, parts of all objects end to end; see `kernels.polygon_mask_targets`.

    Sizes are powers of two. Flips, scales and crops of the image change `to_input`, never the vertices.
    """

    vertices: Tensor  # (V, 2) float64 x, y in annotation pixels
    part_start: Tensor  # (P + 1,) int32, first vertex of each part; where the last one ends
    first_part: Tensor  # (N, G) int32
    parts: Tensor  # (N, G) int32, how many the slot has; 0 if it has no polygon, as with RLE
    to_input: Tensor  # (N, 2, 3) float64, (x, y, 1) in annotation pixels -> (x, y) in input pixels; or of
    # each object (N, G, 2, 3)
    step: Tensor  # (E,) int32 0, 1, ... E-1; no object has more than E vertices


class Targets(NamedTuple):
    """What there is to learn in a batch."""

    boxes: Tensor  # (N, G, 4) float32
    classes: Tensor  # (N, G) int64 in 0..K-1
    valid: Tensor  # (N, G) bool, an object to learn
    crowd: Tensor  # (N, G) bool, a crowd region: nothing to learn, nothing to punish; never valid too
    masks: PackedMasks
    keypoints: Tensor | None = None  # (N, G, J, 3) float32 x, y, visibility; 0 if not labelled
    polygons: PackedPolygons | None = None  # where the mask targets are rasterised from them


class Proposals(NamedTuple):
    boxes: Tensor  # (N, P, 4) float32, no gradient
    scores: Tensor  # (N, P) float32 objectness logits
    valid: Tensor  # (N, P) bool


class RawImages(NamedTuple):
    """Decoded images and what is to become of them: resized, turned, flipped, cut, coloured, padded.

    `kernels.resize_pad` makes a batch's pixels of them, in this order, on the device of these tensors.
    """

    buffer: Tensor  # (B,) uint8, RGB images row by row, end to end; what follows the last one is not read
    offset: Tensor  # (N,) int64, first byte of each image
    source: Tensor  # (N, 2) int32, height and width of the image as it stands in the buffer
    resized: Tensor  # (N, 2) int32, height and width that it is resized to
    turns: Tensor  # (N,) int32, quarter turns counterclockwise, 0..3
    flips: Tensor  # (N, 2) bool: left and right, top and bottom
    origin: Tensor  # (N, 2) int32 y, x: where in the turned and flipped image its part begins
    colour: Tensor | None = None  # (N, 3, 5) float32, of (red, green, blue, mean level, 1); None: as it is


class Batch(NamedTuple):
    pixels: Tensor  # (N, 3, H, W) uint8, or float32 in 0..255; RGB; zero where padded
    sizes: Tensor  # (N, 2) int64, height and width of the real image within the padding
    targets: Targets | None = None
    proposals: Proposals | None = None  # for a model without an RPN
    raw: RawImages | None = None  # of which the pixels are still to be made; they are then (0, 3, H, W)


class SampledRois(NamedTuple):
    """RoIs to train the heads on: foreground first, then background, then empty slots."""

    boxes: Tensor  # (N, S, 4) float32
    classes: Tensor  # (N, S) int64 in 0..K
    matched: Tensor  # (N, S) int64, ground-truth slot; meaningful where is_foreground
    is_foreground: Tensor  # (N, S) bool
    valid: Tensor  # (N, S) bool


class Losses(NamedTuple):
    """Scalars, named as in detectron2, whose sum is minimised. A part that the model lacks gives None."""

    loss_rpn_cls: Tensor | None = None
    loss_rpn_loc: Tensor | None = None
    loss_cls: Tensor | None = None
    loss_box_reg: Tensor | None = None
    loss_cls_stage0: Tensor | None = None  # of a cascade, in place of the two before
    loss_box_reg_stage0: Tensor | None = None
    loss_cls_stage1: Tensor | None = None
    loss_box_reg_stage1: Tensor | None = None
    loss_cls_stage2: Tensor | None = None
    loss_box_reg_stage2: Tensor | None = None
    loss_mask: Tensor | None = None
    loss_keypoint: Tensor | None = None

    def total(self) -> Tensor:
        """Sum of the losses, to be differentiated."""
        first, *rest = present(self).values()
        return sum(rest, start=first)


class Counts(NamedTuple):
    """Scalars that come with the losses of a batch. A part that the model lacks gives None."""

    num_fg: Tensor | None = None  # foreground RoIs
    masks_dropped: Tensor | None = None  # those of them that found no slot in the mask head
    keypoints_dropped: Tensor | None = None  # those with a labelled keypoint, in the keypoint head
    divisors: Losses | None = None  # what each loss is a mean over; 0 there counts as 1


def present(*parts: Losses | Counts) -> dict[str, Tensor]:
    """Losses and counts by name, without those that are None, and without the divisors."""
    return {
        name: value
        for part in parts
        for name, value in part._asdict().items()
        if value is not None and name != "divisors"
    }


class Detections(NamedTuple):
    """Best D detections of each image, by falling score."""

    boxes: Tensor  # (N, D, 4) float32
    scores: Tensor  # (N, D) float32 in 0..1
    classes: Tensor  # (N, D) int64
    valid: Tensor  # (N, D) bool
    cut: Tensor  # (N,) int64, candidates above the threshold that did not fit before NMS
    masks: Tensor | None = None  # (N, D, M, M) float32 probabilities within the box
    heatmaps: Tensor | None = None  # (N, D, J, H', W') float32 logits of each keypoint within the box


def tree_map(function: Callable[[Tensor], Any], structure: T) -> T:
    """Apply `function` to every tensor of a structure; None stays None."""
    return pytree.tree_map(lambda leaf: None if leaf is None else function(leaf), structure)


def to_device(structure: T, device: Any) -> T:
    """Copy a structure to a device, without waiting where the source is pinned."""
    return tree_map(lambda t: t.to(device, non_blocking=True), structure)


def pinned(structure: T, device: Any) -> T:
    """What is on the host, in memory whose copies to a CUDA device do not wait; for others as it is."""
    if device.type != "cuda":
        return structure
    return tree_map(lambda t: t if t.is_cuda or t.is_pinned() else t.pin_memory(), structure)
