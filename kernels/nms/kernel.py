"""Greedy non-maximum suppression in Triton: every image and group in one fixed sequence of launches.

The boxes are sorted by (image, group, falling score) into *tiles* of 64. One program a tile waits for
each earlier tile of the same image and group to say which of its boxes survived, drops what those
overlap, settles the order within its own tile, and says so in turn. No matrix of all pairs is stored,
no length is read by the host, and the tiles of all images and groups run at the same time.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import H100, CompileSpec, Launch, Target, target_of
from ..common.library import interpreting
from .cpu import round_down_to_float32
from .greedy import greedy_kernel

TILE = 64  # as many as an int64 has bits
ROWS = 4  # of a tile, compared at once; 8 spill registers on sm_100
REGISTERS = 80  # of a thread, on NVIDIA; left to itself the compiler takes so few that some spill
COMPACT_BLOCK = 2048
KEY_BLOCK = 1024


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    max_out: int,
) -> tuple[Tensor, Tensor]:
    """See `op.padded_nms`."""
    index = boxes.new_zeros((boxes.shape[0], max_out), dtype=torch.int64)
    kept_valid = boxes.new_zeros((boxes.shape[0], max_out), dtype=torch.bool)
    if index.numel() and scores.numel():
        for launch in _launches(
            boxes, scores, groups, valid, iou_threshold, index, kept_valid, only_finite=True
        ):
            launch.run()
    return index, kept_valid


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """See `op.nms` and `op.batched_nms`. Reads the number of survivors once, at the end."""
    index = boxes.new_zeros((1, boxes.shape[0]), dtype=torch.int64)
    kept_valid = boxes.new_zeros((1, boxes.shape[0]), dtype=torch.bool)
    if index.numel():
        groups = None if groups is None else groups[None]
        for launch in _launches(
            boxes[None], scores[None], groups, None, iou_threshold, index, kept_valid, only_finite=False
        ):
            launch.run()
    return index[0, : int(kept_valid.sum())].clone()


def _launches(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    index: Tensor,
    kept_valid: Tensor,
    only_finite: bool,
    target: Target | None = None,
) -> Iterator[Launch]:
    """Of the kernels that write the survivors into index and kept_valid (N, max_out), which are zero.

    Each must have run when the next is asked for: what is sorted in between is what it wrote.
    """
    images, slots_per_image = scores.shape
    slots = images * slots_per_image
    boxes = boxes.reshape(slots, 4)
    ranked = scores.dtype == torch.float64
    if ranked:
        if only_finite:
            valid = ~scores.isnan() if valid is None else valid & ~scores.isnan()
        scores = _ranks(scores.reshape(slots))

    key = boxes.new_empty((slots,), dtype=torch.int64)
    keys = {
        "boxes_ptr": boxes,
        "scores_ptr": scores.contiguous(),
        "valid_ptr": None if valid is None else valid.contiguous().view(torch.uint8),
        "key_ptr": key,
        "stride_slot": boxes.stride(0),
        "stride_coordinate": boxes.stride(1),
        "slots": slots,
        "slots_per_image": slots_per_image,
        "RANKED": ranked,
        "ONLY_FINITE": only_finite,
        "HAS_VALID": valid is not None,
        "BLOCK": KEY_BLOCK,
    }
    yield Launch(_score_key_kernel, (triton.cdiv(slots, KEY_BLOCK),), keys)
    key, by_score = key.sort(stable=True)

    # `run` tells apart image, validity and the group's low 32 bits. Groups that agree in those share a
    # run; the kernel compares their whole values.
    run = key >> 32 << 32
    rank = order = by_score
    grouped = groups is not None
    if groups is not None:
        # Widened first: a narrower one that is negative would set the bits of the image too.
        group_by_score = groups.reshape(slots).long().index_select(0, by_score)
        run, rank = (run | (group_by_score & 0xFFFFFFFF)).sort(stable=True)
        order = by_score.index_select(0, rank)
        # A narrower group is in its run as a whole.
        groups = group_by_score.index_select(0, rank) if groups.dtype.itemsize == 8 else None
    tiles = triton.cdiv(slots, TILE)
    sorted_boxes = boxes.new_zeros((tiles * TILE, 4), dtype=torch.float32)
    torch.index_select(boxes.float(), 0, order, out=sorted_boxes[:slots])

    keep = boxes.new_empty((slots,), dtype=torch.uint8)
    begun, done = boxes.new_zeros((tiles + 1,), dtype=torch.int32).split([1, tiles])
    greedy = {
        "boxes_ptr": sorted_boxes,
        "run_ptr": run,
        "begin_ptr": torch.searchsorted(run, run),
        "group_ptr": groups,
        "rank_ptr": rank if grouped else None,
        "keep_ptr": keep,
        "survivors_ptr": boxes.new_empty((tiles,), dtype=torch.int64),
        "begun_ptr": begun,
        "done_ptr": done,
        "slots": slots,
        "threshold": round_down_to_float32(iou_threshold),
        "TILE": TILE,
        "ROWS": 32 if interpreting() else ROWS,
    }
    # Without fusion the rounding of every step is torchvision's.
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if (target or target_of(boxes.device)).backend == "cuda":
        options["maxnreg"] = REGISTERS
    yield Launch(greedy_kernel, (tiles,), greedy, options=options)
    compact = {
        "keep_ptr": keep,
        "by_score_ptr": by_score,
        "index_ptr": index,
        "valid_ptr": kept_valid.view(torch.uint8),
        "slots_per_image": slots_per_image,
        "max_out": index.shape[1],
        "BLOCK": COMPACT_BLOCK,
    }
    yield Launch(_compact_kernel, (images,), compact, num_warps=8)


def _ranks(scores: Tensor) -> Tensor:
    """(P,) int32, the place of each score when they fall; for scores that 32 bits cannot order."""
    order = scores.argsort(stable=True, descending=True)
    places = torch.arange(scores.shape[0], dtype=torch.int32, device=scores.device)
    return torch.empty_like(places).scatter_(0, order, places)


def compile_specs(target: Target = H100) -> list[CompileSpec]:
    """8 images, 5 levels of 2000 boxes each, 1000 of an image kept."""
    images, per_image, max_out, in_group = 8, 10_000, 1000, 2000
    slots = images * per_image
    index = torch.empty((images, max_out), dtype=torch.int64, device="meta")
    kept_valid = index.new_empty(index.shape, dtype=torch.bool)
    valid = index.new_empty((images, per_image), dtype=torch.bool)
    specs = []
    for name, dtype, group in (
        ("fp32", torch.float32, None),
        ("bf16", torch.bfloat16, torch.int32),
        ("wide groups", torch.float32, torch.int64),
    ):
        grouped = group is not None
        boxes = valid.new_empty((images, per_image, 4), dtype=dtype)
        groups = None if group is None else valid.new_empty(valid.shape, dtype=group)
        keys, greedy, compact = _launches(
            boxes, boxes[..., 0], groups, valid, 0.7, index, kept_valid, only_finite=True, target=target
        )
        if name != "wide groups":  # as fp32
            specs.append(keys.spec("nms keys", name, slots * (5 * dtype.itemsize + 1 + 8), 0))
        moved = slots * (16 + 8 + 8 + 1 + (0 if group is None else 8 if group == torch.int32 else 16))
        operations = 14 * slots * (in_group if grouped else per_image) // 2  # of one IoU, for all pairs
        # A tile meets itself and those before it of its run, half of them in the mean, a few rows at a time.
        trips = ((in_group if grouped else per_image) / TILE / 2 + 1) * TILE / greedy.arguments["ROWS"]
        variant = {"fp32": "one group", "bf16": "groups"}.get(name, name)
        specs.append(greedy.spec("nms greedy", variant, moved, operations, trips=trips))
    moved = slots * 1 + images * max_out * (8 + 8 + 1)
    return [*specs, compact.spec("nms compact", "", moved, 0)]


@triton.jit(do_not_specialize=["slots", "slots_per_image"])
def _score_key_kernel(
    boxes_ptr,  # (slots, 4) floating point
    scores_ptr,  # (slots,) floating point up to 32 bits, or int32 if RANKED
    valid_ptr,  # (slots,) uint8, read if HAS_VALID
    key_ptr,  # (slots,) int64
    stride_slot,
    stride_coordinate,
    slots,
    slots_per_image,
    RANKED: tl.constexpr,
    ONLY_FINITE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys that rise by image, then valid before not valid, then falling score."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    usable = inside
    if RANKED:
        falling = tl.load(scores_ptr + slot, mask=inside, other=0).to(tl.int64)
    else:
        score = tl.load(scores_ptr + slot, mask=inside, other=0).to(tl.float32)
        score = tl.where(score == 0, 0.0, score)  # -0 ties with +0
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        # Positive floats rise with their bits; negative ones fall. NaN comes first, as in torch.sort.
        falling = tl.where(bits >= 0, 0x7FFFFFFF - bits, 0x80000000 + (bits & 0x7FFFFFFF))
        falling = tl.where(score == score, falling, 0)
        if ONLY_FINITE:
            usable = usable & (score == score)
    if ONLY_FINITE:
        for i in tl.static_range(4):
            place = slot * stride_slot + i * tl.cast(stride_coordinate, tl.int64)
            side = tl.load(boxes_ptr + place, mask=inside, other=0)
            usable = usable & (tl.abs(side.to(tl.float32)) < float("inf"))
    if HAS_VALID:
        usable = usable & (tl.load(valid_ptr + slot, mask=inside, other=0) != 0)
    image = slot // slots_per_image
    key = (image << 33) | (tl.where(usable, 0, 1).to(tl.int64) << 32) | falling
    tl.store(key_ptr + slot, key, mask=inside)


@triton.jit(do_not_specialize=["slots_per_image", "max_out"])
def _compact_kernel(
    keep_ptr,  # (images, slots_per_image) uint8, by falling score
    by_score_ptr,  # (images, slots_per_image) int64 into images * slots_per_image
    index_ptr,  # (images, max_out) int64, zero
    valid_ptr,  # (images, max_out) uint8, zero
    slots_per_image,
    max_out,
    BLOCK: tl.constexpr,
):
    """Move an image's survivors to the front."""
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    start = 0
    count = 0
    while (start < slots_per_image) & (count < max_out):
        slot = image * slots_per_image + start + lane
        inside = start + lane < slots_per_image
        keep = tl.load(keep_ptr + slot, mask=inside, other=0).to(tl.int32)
        place = count + tl.cumsum(keep, axis=0) - 1
        write = (keep != 0) & (place < max_out)
        index = tl.load(by_score_ptr + slot, mask=write, other=0) - image * slots_per_image
        tl.store(index_ptr + image * max_out + place, index, mask=write)
        tl.store(valid_ptr + image * max_out + place, tl.full((BLOCK,), 1, tl.uint8), mask=write)
        start += BLOCK
        count += tl.sum(keep, axis=0)
