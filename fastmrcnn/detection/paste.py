"""From M x M mask probabilities within a box to bitmaps of the whole image.

A mask is sampled bilinearly at the centres of the image's pixels, with zeros around it. On an accelerator
kernels do that (`kernels.paste_masks`, `kernels.mask_rle`). On the host an object costs its own window
instead of the image, and the windows are sampled in NumPy, whose calls cost a tenth of torch's at that size.
Both have the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn import kernels
from fastmrcnn.structures import pinned, to_device

Runs = NDArray[Any]  # (runs,) integer, lengths of zeros and ones in turn
ROOM = 4  # runs of an object for each column of the image, on an accelerator; the host encodes one with more


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    *,
    method: Literal["sample", "resize"] = "sample",
) -> Tensor:
    """Bitmaps of the objects in an image.

    Args:
        masks: (D, M, M) float, probabilities within the box.
        boxes: (D, 4) xyxy in output pixels; parts outside the image are cut off. A box without area
            gives an empty bitmap with `sample`, and at least one pixel with `resize`.
        height, width: of the output, in pixels.
        threshold: a pixel belongs to the object from this probability on, in 0..1, not 0.
        method: `sample` takes the probability at each pixel's centre (detectron2's
            `paste_masks_in_image`); `resize` rounds the box to whole pixels and resizes the mask to
            it (torchvision's).
    Returns:
        (D, height, width) bool on the device of `masks`.
    Raises:
        ValueError: for other shapes, or a threshold out of range.
    """
    _check(masks, boxes, threshold)
    if method == "sample" and on_accelerator(masks):
        return kernels.paste_masks(masks, boxes.to(masks.device), height, width, threshold)
    windows = _sampled_windows if method == "sample" else _resized_windows
    result = torch.zeros((len(masks), height, width), dtype=torch.bool)
    bitmaps = result.numpy()  # the same memory
    for index, (x, y, part) in enumerate(windows(masks.cpu(), boxes.cpu(), height, width, threshold)):
        bitmaps[index, y : y + part.shape[0], x : x + part.shape[1]] = part
    return result.to(masks.device)


def paste_to_host(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> NDArray[np.bool_]:
    """(D, height, width): the bitmaps of `paste_masks` in NumPy."""
    return paste_all_to_host([masks], [boxes], [(height, width)], threshold)[0]


def paste_all_to_host(
    masks: Sequence[Tensor],
    boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    threshold: float = 0.5,
) -> list[NDArray[np.bool_]]:
    """The bitmaps of `paste_masks` in NumPy; from an accelerator they come as bits, all of them in one copy.

    Args:
        masks, boxes: of each image (D, M, M) and (D, 4).
        sizes: height and width of each image.
    Returns:
        For each image (D, height, width).
    """
    each = list(zip(masks, boxes, sizes, strict=True))
    for own_masks, own_boxes, _ in each:
        _check(own_masks, own_boxes, threshold)
    if not masks or not on_accelerator(masks[0]):
        return [paste_masks(m, b, *size, threshold).numpy() for m, b, size in each]
    device = masks[0].device
    moved = to_device(pinned(torch.cat(list(boxes)), device), device).split([len(one) for one in boxes])
    bits = [
        kernels.paste_masks(m, b, *size, threshold, packed=True)
        for m, b, size in zip(masks, moved, sizes, strict=True)
    ]
    host = torch.cat([one.flatten() for one in bits]).cpu().split([one.numel() for one in bits])
    return [
        np.unpackbits(one.view(packed.shape).numpy(), axis=-1, count=width).view(np.bool_)
        for one, packed, (_, width) in zip(host, bits, sizes, strict=True)
    ]


def encode_images(
    masks: Sequence[Tensor],
    boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    threshold: float = 0.5,
) -> list[list[dict[str, Any]]]:
    """The bitmaps of `paste_masks` as COCO's compressed RLE, without the bitmaps.

    On an accelerator the objects of all images are encoded at once.

    Args:
        masks, boxes: of each image (D, M, M) and (D, 4).
        sizes: height and width of each image.
    Returns:
        For each image D dictionaries {"size": [height, width], "counts": str}, ready for JSON.
    """
    for own_masks, own_boxes in zip(masks, boxes, strict=True):
        _check(own_masks, own_boxes, threshold)
    if sum(map(len, masks)) and on_accelerator(masks[0]):
        runs = _runs_of_images(masks, boxes, sizes, threshold)
    else:
        runs = [
            runs_of_windows(own_masks, own_boxes, height, width, threshold)
            for own_masks, own_boxes, (height, width) in zip(masks, boxes, sizes, strict=True)
        ]
    return [compressed(own, height, width) for own, (height, width) in zip(runs, sizes, strict=True)]


def on_accelerator(masks: Tensor) -> bool:
    return masks.device.type != "cpu"


def compressed(runs: list[Runs], height: int, width: int) -> list[dict[str, Any]]:
    """COCO's compressed RLE of the objects of an image."""
    uncompressed = [{"size": [height, width], "counts": counts} for counts in runs]
    # pycocotools takes a list of these, but not an empty one.
    encoded = coco_mask.frPyObjects(uncompressed, height, width) if uncompressed else []
    return [{"size": [height, width], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def runs_of_slots(
    masks: Tensor, boxes: Tensor, keep: Tensor, sizes: Sequence[tuple[int, int]], threshold: float
) -> tuple[Tensor, Tensor]:
    """Lengths of the runs of a whole batch, made where the masks are, without the host waiting.

    Args:
        masks, boxes: (n, D, M, M), and (n, D, 4) in the pixels of the images, on one device.
        keep: (n, D) bool; other slots get the runs of an empty mask.
        sizes: height and width of the n images.
    Returns:
        (n, D, R) int32, with room for R = 4 runs for each column of the widest image; and (n, D) int32, how
        many each has, which may be more than there is room for.
    """
    largest_height, largest_width = (max(axis) for axis in zip(*sizes, strict=True))
    of_image = torch.from_numpy(np.array(sizes, np.int64))
    of_slot = to_device(pinned(of_image, masks.device), masks.device).repeat_interleave(masks.shape[1], 0)
    runs, count = kernels.mask_rle(
        masks.flatten(0, 1),
        boxes.flatten(0, 1),
        largest_height,
        largest_width,
        threshold,
        max_runs=ROOM * largest_width,
        sizes=of_slot,
        valid=keep.flatten(),
    )
    return runs.view(*keep.shape, -1), count.view(keep.shape)


def _runs_of_images(
    masks: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], threshold: float
) -> list[list[Runs]]:
    """Of each object of each image, made where the masks are. Only the lengths of runs are copied."""
    device = masks[0].device
    of_object = [size for own, size in zip(masks, sizes, strict=True) for _ in range(len(own))]
    own_sizes = torch.from_numpy(np.array(of_object, np.int64))
    largest_height, largest_width = (max(axis) for axis in zip(*sizes, strict=True))
    max_runs = ROOM * largest_width
    runs, count = kernels.mask_rle(
        torch.cat(list(masks)),
        to_device(pinned(torch.cat(list(boxes)), device), device),
        largest_height,
        largest_width,
        threshold,
        max_runs=max_runs,
        sizes=to_device(pinned(own_sizes, device), device),
    )
    counts = count.tolist()
    rows = iter(zip(counts, runs[:, : max(counts)].cpu().numpy(), strict=True))
    found = []
    for own_masks, own_boxes, (height, width) in zip(masks, boxes, sizes, strict=True):
        own: list[Runs] = []
        for index, (number, row) in enumerate(itertools.islice(rows, len(own_masks))):
            if number <= max_runs:
                own.append(row[:number])
            else:  # there was no room for all of them
                one = slice(index, index + 1)
                own += runs_of_windows(own_masks[one], own_boxes[one], height, width, threshold)
        found.append(own)
    return found


def runs_of_windows(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> list[Runs]:
    """Of each object, made on the host.

    Each is pasted and encoded in the columns that its box covers; the columns on both sides only lengthen
    the first and the last run.
    """
    windows = _sampled_windows(masks.cpu(), boxes.cpu(), height, width, threshold)
    return [_runs(x, y, part, height, width) for x, y, part in windows]


def _check(masks: Tensor, boxes: Tensor, threshold: float) -> None:
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"masks must be (D, M, M), got {tuple(masks.shape)}")
    if boxes.shape != (len(masks), 4):
        raise ValueError(f"boxes must be ({len(masks)}, 4), got {tuple(boxes.shape)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")


def _taps(masks: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The masks with a rim of zeros, and the position of each output row and column in them.

    Returns:
        (D, M + 2, M + 2) float32, (2, D, height) and (2, D, width): lower tap and weight of the upper.
    """
    side = masks.shape[-1]

    def axis(low: Tensor, high: Tensor, size: int) -> Tensor:
        centres = torch.arange(size, device=boxes.device) + 0.5
        extent = (high - low)[:, None]
        position = (centres - low[:, None]) / extent * side + 0.5
        # Below 0 and above M + 1 there is nothing but the rim; so is a box without extent.
        position = torch.where(extent > 0, position, 0.0).clamp(0, side + 1)
        lower = position.floor().clamp(max=side)
        return torch.stack((lower, position - lower))

    rows = axis(boxes[:, 1], boxes[:, 3], height)
    columns = axis(boxes[:, 0], boxes[:, 2], width)
    return F.pad(masks.float(), (1, 1, 1, 1)), rows, columns


def _sampled_windows(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float
) -> Iterator[tuple[int, int, np.ndarray]]:
    """For each object left, top and bitmap of a window that holds all its pixels."""
    boxes = boxes.float()
    # An infinite or unknown place is no place: an empty box, as the kernels take it.
    boxes = boxes.where((boxes[:, 2:] - boxes[:, :2]).isfinite().all(dim=1, keepdim=True), 0.0)
    padded, rows, columns = (tensor.numpy() for tensor in _taps(masks, boxes, height, width))
    # The zeros around a mask reach half a cell beyond the box before the interpolation ends.
    rim = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0) / (2 * masks.shape[-1])
    limit = torch.tensor([width, height], dtype=torch.float32)
    low = torch.minimum((boxes[:, :2] - rim).floor().clamp(min=0), limit).long()
    high = torch.minimum((boxes[:, 2:] + rim).ceil().clamp(min=0), limit).long().maximum(low)
    lower_row, lower_column = rows[0].astype(np.int64), columns[0].astype(np.int64)
    for index, (x0, y0, x1, y1) in enumerate(torch.cat((low, high), dim=1).tolist()):
        mask, y, x = padded[index], lower_row[index, y0:y1], lower_column[index, x0:x1]
        upper = mask[y]
        across = upper + rows[1, index, y0:y1, None] * (mask[y + 1] - upper)
        left = across[:, x]
        yield x0, y0, left + columns[1, index, x0:x1] * (across[:, x + 1] - left) >= threshold


def _resized_windows(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float
) -> Iterator[tuple[int, int, np.ndarray]]:
    side = masks.shape[-1]
    scale = (side + 2) / side
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    padded = F.pad(masks.float(), (1, 1, 1, 1))
    corners = torch.cat((centre - half, centre + half), dim=1).long().tolist()
    for mask, (x0, y0, x1, y1) in zip(padded, corners, strict=True):
        size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
        resized = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        left, top = min(max(x0, 0), width), min(max(y0, 0), height)
        right, bottom = min(max(x1 + 1, left), width), min(max(y1 + 1, top), height)
        part = resized[top - y0 : bottom - y0, left - x0 : right - x0] >= threshold
        yield left, top, part.numpy()


def _runs(x: int, y: int, part: np.ndarray, height: int, width: int) -> Runs:
    """Lengths of the runs of zeros and ones in turn, column by column through the whole image."""
    rows, columns = part.shape
    strip = np.zeros((columns, height), dtype=bool)
    strip[:, y : y + rows] = part.T
    flat = np.concatenate(([False], strip.ravel(), [False]))
    # Where a run of ones begins, and where it ends; the runs of zeros lie between.
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + x * height
    ends = np.concatenate(([0], edges))
    if ends[-1] != height * width:
        ends = np.append(ends, height * width)
    return np.diff(ends)
