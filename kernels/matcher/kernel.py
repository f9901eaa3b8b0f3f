"""Matching of boxes to objects in Triton: a program for a block of boxes, which meets one object at a time.

Two passes over the boxes: the first finds the highest IoU of each object, the second that of each box,
and which boxes reach the highest of an object. Both compute an IoU in the same steps without fusion, so
that it has the same bits in both. An object that does not touch the smallest box around a program's boxes
costs that program four comparisons; anchors of a block lie close together, so that most objects do not.

Overlaps are compared as the integers that their bits are, which orders them as the numbers, for they are
not negative, and lets a maximum of many programs be taken in any order.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch

BLOCK = 256  # boxes of a program
SLOTS = 128  # ground-truth slots that a program prepares at once
NAN = tl.constexpr(0x7FC00000)  # the bits of one NaN, above those of every number
ABOVE = tl.constexpr(float("inf"))


def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    low_quality: bool,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.match_boxes`; what was not asked for is empty."""
    found = _outputs(boxes, gt_valid, gt_crowd, low_quality)
    if gt_valid.shape[0]:
        for launch in _launches(boxes, gt_boxes, gt_valid, gt_crowd, crowd_overlap, found):
            launch.run()
    return found


Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(boxes: Tensor, gt_valid: Tensor, gt_crowd: Tensor | None, low_quality: bool) -> Found:
    slots = (gt_valid.shape[0], boxes.shape[1])
    device = boxes.device
    return (
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(slots, dtype=torch.int64, device=device),
        torch.empty(gt_valid.shape if low_quality else (0,), dtype=torch.float32, device=device),
        torch.empty(slots if low_quality else (0,), dtype=torch.bool, device=device),
        torch.empty((0,) if gt_crowd is None else slots, dtype=torch.bool, device=device),
    )


def _launches(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    crowd_overlap: float,
    found: Found,
) -> Iterator[Launch]:
    """Of the kernels that write `found`, in this order."""
    best, index, gt_best, is_best, in_crowd = found
    images, objects = gt_valid.shape
    total = boxes.shape[1]
    low_quality = gt_best.ndim == 2
    boxes = boxes.float().contiguous().expand(images, -1, -1)
    valid = gt_valid.contiguous().view(torch.uint8)
    crowd = None if gt_crowd is None else gt_crowd.contiguous().view(torch.uint8)
    used = torch.empty((images, 2), dtype=torch.int32, device=boxes.device)
    highest = gt_best.view(torch.int32) if low_quality else None
    prepare = {
        "valid_ptr": valid,
        "crowd_ptr": crowd,
        "gt_best_ptr": gt_best if low_quality else None,
        "used_ptr": used,
        "objects": objects,
        "SLOTS": SLOTS,
    }
    yield Launch(_prepare_kernel, (images,), prepare, num_warps=1)
    if not total:
        return
    common = {
        "boxes_ptr": boxes,
        "gt_boxes_ptr": gt_boxes.float().contiguous(),
        "valid_ptr": valid,
        "used_ptr": used,
        "highest_ptr": highest,
        "stride_image": boxes.stride(0) // 4,
        "boxes": total,
        "objects": objects,
        "BLOCK": BLOCK,
    }
    grid = (triton.cdiv(total, BLOCK), images)
    options = {"enable_fp_fusion": False}
    if low_quality:
        yield Launch(_best_of_objects_kernel, grid, common, options=options)
    of_boxes = {
        **common,
        "crowd_ptr": crowd,
        "best_ptr": best,
        "index_ptr": index,
        "is_best_ptr": is_best.view(torch.uint8) if low_quality else None,
        "in_crowd_ptr": None if crowd is None else in_crowd.view(torch.uint8),
        "crowd_overlap": crowd_overlap,
    }
    yield Launch(_best_of_boxes_kernel, grid, of_boxes, options=options)


def compile_specs() -> list[CompileSpec]:
    """8 images: the anchors of 800x1344 with low-quality matches and crowds, and 2000 proposals of each.

    The least operations are those of one IoU for each box.
    """
    images, objects = 8, 64
    specs = []
    for name, boxes, low_quality in (
        ("anchors", torch.empty((1, 268_569, 4), device="meta"), True),
        ("proposals", torch.empty((images, 2000, 4), device="meta"), False),
    ):
        gt_boxes = boxes.new_empty((images, objects, 4))
        valid = boxes.new_empty((images, objects), dtype=torch.bool)
        crowd = valid if low_quality else None
        found = _outputs(boxes, valid, crowd, low_quality)
        read = boxes.nbytes + gt_boxes.nbytes + valid.nbytes * (1 + low_quality)
        for launch in _launches(boxes, gt_boxes, valid, crowd, 0.7, found):
            kind = launch.kernel.__name__.strip("_").removesuffix("_kernel").replace("_", " ")
            moved = {
                "prepare": valid.nbytes * (1 + low_quality) + found[2].nbytes,
                "best of objects": read + found[2].nbytes,
                "best of boxes": read + sum(t.nbytes for t in found),
            }[kind]
            operations = 0 if kind == "prepare" else 14 * found[0].numel()
            # 15 objects an image, as in `bench/workload.py`, of which 3.2 touch a block of anchors in the
            # mean. One that does not costs a quarter of a trip (42 and 31 instructions of 139 and 167).
            trips = 1 if kind == "prepare" else 3.2 + 11.8 / 4 if low_quality else 15
            specs.append(launch.spec(f"matcher {kind}", name, moved, operations, trips=trips))
    return specs


@triton.jit(do_not_specialize=["objects"])
def _prepare_kernel(
    valid_ptr,  # (images, objects) uint8
    crowd_ptr,  # (images, objects) uint8, or None
    gt_best_ptr,  # (images, objects) fp32, or None; written: 0, where not valid -1
    used_ptr,  # (images, 2) int32, written: first valid slot, or -1; end of the slots in use
    objects,
    SLOTS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    nowhere = tl.cast(objects, tl.int32)
    first = nowhere
    end = nowhere * 0
    for start in range(0, objects, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        inside = slot < objects
        valid = tl.load(valid_ptr + image * objects + slot, mask=inside, other=0)
        in_use = valid
        if crowd_ptr is not None:
            in_use = valid | tl.load(crowd_ptr + image * objects + slot, mask=inside, other=0)
        if gt_best_ptr is not None:
            tl.store(gt_best_ptr + image * objects + slot, tl.where(valid != 0, 0.0, -1.0), mask=inside)
        first = tl.minimum(first, tl.min(tl.where(valid != 0, slot, nowhere), axis=0))
        end = tl.maximum(end, tl.max(tl.where(in_use != 0, slot + 1, 0), axis=0))
    tl.store(used_ptr + image * 2, tl.where(first < nowhere, first, -1))
    tl.store(used_ptr + image * 2 + 1, end)


@triton.jit(do_not_specialize=["stride_image", "boxes", "objects"])
def _best_of_objects_kernel(
    boxes_ptr,  # (images, boxes, 4) fp32 xyxy, images stride_image rows apart
    gt_boxes_ptr,  # (images, objects, 4) fp32 xyxy
    valid_ptr,  # (images, objects) uint8
    used_ptr,  # (images, 2) int32, see `_prepare_kernel`
    highest_ptr,  # (images, objects) int32, bits of fp32, 0 where valid; raised
    stride_image,
    boxes,
    objects,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sides = _load_boxes(boxes_ptr, image, box, boxes, stride_image)
    around = _around(sides)
    for slot in range(tl.load(used_ptr + image * 2 + 1)):
        row = image * objects + slot
        gt = _load_object(gt_boxes_ptr, row)
        if (tl.load(valid_ptr + row) != 0) & _touching(around, gt):
            highest = tl.max(_bits_of_iou(sides, gt, _intersection(sides, gt)), axis=0)
            if highest > 0:
                tl.atomic_max(highest_ptr + row, highest, sem="relaxed")


@triton.jit(do_not_specialize=["stride_image", "boxes", "objects"])
def _best_of_boxes_kernel(
    boxes_ptr,  # (images, boxes, 4) fp32 xyxy, images stride_image rows apart
    gt_boxes_ptr,  # (images, objects, 4) fp32 xyxy
    valid_ptr,  # (images, objects) uint8
    crowd_ptr,  # (images, objects) uint8, or None
    used_ptr,  # (images, 2) int32, see `_prepare_kernel`
    highest_ptr,  # (images, objects) int32, bits of fp32, or None
    best_ptr,  # (images, boxes) fp32, written
    index_ptr,  # (images, boxes) int64, written
    is_best_ptr,  # (images, boxes) uint8, written, or None as highest_ptr
    in_crowd_ptr,  # (images, boxes) uint8, written, or None as crowd_ptr
    stride_image,
    boxes,
    objects,
    crowd_overlap,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = box < boxes
    sides = _load_boxes(boxes_ptr, image, box, boxes, stride_image)
    around = _around(sides)

    # A box that touches no object overlaps the first by 0, as it does all others.
    first = tl.load(used_ptr + image * 2)
    best = tl.zeros((BLOCK,), tl.int32) + tl.minimum(first, 0)
    index = tl.zeros((BLOCK,), tl.int32) + tl.maximum(first, 0)
    is_best = tl.zeros((BLOCK,), tl.int32)
    in_crowd = tl.zeros((BLOCK,), tl.int32)
    for slot in range(tl.load(used_ptr + image * 2 + 1)):
        row = image * objects + slot
        gt = _load_object(gt_boxes_ptr, row)
        if _touching(around, gt):
            inter = _intersection(sides, gt)
            bits = tl.where(tl.load(valid_ptr + row) != 0, _bits_of_iou(sides, gt, inter), -1)
            better = bits > best
            best = tl.where(better, bits, best)
            index = tl.where(better, slot, index)
            if highest_ptr is not None:
                highest = tl.load(highest_ptr + row)
                reached = (bits == tl.where(highest == NAN, 0, highest)) & (bits > 0)
                is_best = is_best | reached.to(tl.int32)
            if crowd_ptr is not None:
                # Of boxes that do not touch it is 0 or NaN, and the threshold is above 0.
                share = tl.div_rn(inter, _area(sides))
                share = tl.where(tl.load(crowd_ptr + row) != 0, share, -1.0)
                in_crowd = in_crowd | (share >= crowd_overlap).to(tl.int32)
    place = image * boxes + box
    tl.store(best_ptr + place, tl.where(best < 0, -1.0, best.to(tl.float32, bitcast=True)), mask=inside)
    tl.store(index_ptr + place, index.to(tl.int64), mask=inside)
    if is_best_ptr is not None:
        tl.store(is_best_ptr + place, is_best.to(tl.uint8), mask=inside)
    if in_crowd_ptr is not None:
        tl.store(in_crowd_ptr + place, in_crowd.to(tl.uint8), mask=inside)


@triton.jit
def _load_boxes(boxes_ptr, image, box, boxes, stride_image):
    """Sides of a block of boxes. Those that are not there or NaN are inside out, and touch nothing."""
    row = image * stride_image + box
    inside = box < boxes
    at = boxes_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    sides = tl.load(at, mask=inside[:, None], other=0.0)  # 16 bytes a box
    x, y = tl.split(tl.reshape(sides, (box.shape[0], 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    there = inside & (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    x1, y1 = tl.where(there, x1, ABOVE), tl.where(there, y1, ABOVE)
    return x1, y1, tl.where(there, x2, -ABOVE), tl.where(there, y2, -ABOVE)


@triton.jit
def _around(sides):
    """The smallest box around all boxes of a block."""
    x1, y1, x2, y2 = sides
    return tl.min(x1, axis=0), tl.min(y1, axis=0), tl.max(x2, axis=0), tl.max(y2, axis=0)


@triton.jit
def _load_object(gt_boxes_ptr, row):
    at = gt_boxes_ptr + row * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _touching(a, b):
    """Whether two boxes may have some area in common; false where NaN."""
    return (a[0] < b[2]) & (b[0] < a[2]) & (a[1] < b[3]) & (b[1] < a[3])


@triton.jit
def _area(sides):
    x1, y1, x2, y2 = sides
    return (x2 - x1) * (y2 - y1)


@triton.jit
def _intersection(sides, gt):
    width = tl.minimum(sides[2], gt[2]) - tl.maximum(sides[0], gt[0])
    height = tl.minimum(sides[3], gt[3]) - tl.maximum(sides[1], gt[1])
    return tl.maximum(width, 0.0) * tl.maximum(height, 0.0)


@triton.jit
def _bits_of_iou(sides, gt, inter):
    """IoU, as the integer of the same bits; all NaN are one."""
    # Where they do not meet, a dividend of 0 would take the slow path of IEEE division.
    meet = inter > 0
    union = _area(sides) + _area(gt) - inter
    iou = tl.div_rn(tl.where(meet, inter, 1.0), tl.where(meet, union, 1.0))
    bits = tl.where(iou == iou, iou.to(tl.int32, bitcast=True), NAN)
    return tl.where(meet, bits, 0)
