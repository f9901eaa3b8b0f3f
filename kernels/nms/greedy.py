"""The greedy order of NMS in Triton: one program a tile of boxes, which waits for the tiles before it.

Each program waits for each earlier tile of the same image and group to say which of its boxes survived,
drops what those overlap, settles the order within its own tile, and says so in turn.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def greedy_kernel(
    boxes_ptr,  # (4, slots) fp32, sorted by run, then falling score, as all that follows
    run_ptr,  # (slots,) int64, rising; bit 32 is set in slots that are not valid
    group_ptr,  # (slots,) int64, read if HAS_GROUPS
    rank_ptr,  # (slots,) int64, place by image and falling score, read if HAS_GROUPS
    first_tile_ptr,  # (tiles,) int64, where the run of a tile's first slot begins
    keep_ptr,  # (slots,) uint8, written, by image and falling score
    survivors_ptr,  # (tiles,) int64, written, bit by bit the survivors of a tile
    begun_ptr,  # (1,) int32, zero; how many tiles have begun
    done_ptr,  # (tiles,) int32, zero; 1 when a tile's survivors are written
    slots,
    threshold,
    HAS_GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Programs take tiles in the order in which they start, whatever their number and however few fit on
    # the device, and wait for tiles of lower number only. So whoever is waited for has started, is
    # resident until it ends (no GPU here suspends a program to start another of the same kernel), and of
    # those that run the one with the lowest tile waits for None: it ends, then the next.
    tile = tl.atomic_add(begun_ptr, 1).to(tl.int64)
    lane = tl.arange(0, TILE)
    bit = tl.full((TILE,), 1, tl.int64) << lane
    slot = tile * TILE + lane
    inside = slot < slots
    run = tl.load(run_ptr + slot, mask=inside, other=-1)
    valid = ((run >> 32) & 1) == 0
    candidates = tl.sum(tl.where(valid, bit, 0), axis=0)
    survivors = candidates
    if candidates != 0:
        within = _overlapping(
            boxes_ptr, run_ptr, group_ptr, tile, tile, slots, threshold, HAS_GROUPS, TILE, ROWS
        )
        within = within & (bit - 1)  # only better boxes drop a box

        start = tl.load(first_tile_ptr + tile)
        if (candidates & 1) == 0:
            start = tile  # not valid slots end an image: behind them a new run begins within this tile
        dropped = tl.zeros((TILE,), tl.int64)
        for other in range(start, tile):
            overlapping = _overlapping(
                boxes_ptr, run_ptr, group_ptr, other, tile, slots, threshold, HAS_GROUPS, TILE, ROWS
            )
            while tl.atomic_add(done_ptr + other, 0, sem="acquire") == 0:
                pass
            # Not from the L1 cache, which may hold what stood there before.
            dropped = dropped | (overlapping & tl.load(survivors_ptr + other, cache_modifier=".cg"))

        # A box survives if no survivor before it overlaps it. Repeating that from any guess settles the
        # first box, then the second, and so on; chains are short, so it takes a few rounds.
        candidates = tl.sum(tl.where(valid & (dropped == 0), bit, 0), axis=0)
        survivors = candidates
        changed = candidates
        while changed != 0:
            settled = candidates & tl.sum(tl.where((within & survivors) == 0, bit, 0), axis=0)
            changed = settled ^ survivors
            survivors = settled

    tl.store(survivors_ptr + tile, survivors)
    tl.debug_barrier()
    tl.atomic_xchg(done_ptr + tile, 1, sem="release")
    place = slot
    if HAS_GROUPS:
        place = tl.load(rank_ptr + slot, mask=inside, other=0)
    tl.store(keep_ptr + place, ((survivors >> lane) & 1).to(tl.uint8), mask=inside)


@triton.jit
def _overlapping(
    boxes_ptr,
    run_ptr,
    group_ptr,
    row_tile,
    tile,
    slots,
    threshold,
    HAS_GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(TILE,) int64, bit by bit the boxes of `row_tile` that overlap each box of `tile`."""
    column = tile * TILE + tl.arange(0, TILE)
    x1, y1, x2, y2, run = _load(boxes_ptr, run_ptr, column, slots)
    area = (x2 - x1) * (y2 - y1)
    group = run
    if HAS_GROUPS:
        group = tl.load(group_ptr + column, mask=column < slots, other=0)
    bits = tl.zeros((ROWS, TILE), tl.int64)
    for first in range(0, TILE, ROWS):
        lane = first + tl.arange(0, ROWS)
        row = row_tile * TILE + lane
        a1, b1, a2, b2, row_run = _load(boxes_ptr, run_ptr, row, slots)
        width = tl.minimum(a2[:, None], x2[None, :]) - tl.maximum(a1[:, None], x1[None, :])
        height = tl.minimum(b2[:, None], y2[None, :]) - tl.maximum(b1[:, None], y1[None, :])
        inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        row_area = (a2 - a1) * (b2 - b1)
        union = row_area[:, None] + area[None, :] - inter
        # Boxes that do not meet have an IoU of 0 or NaN, above no threshold. They are most of the pairs, and
        # a dividend of 0 would take the slow path of IEEE division.
        meet = inter > 0
        iou = tl.div_rn(tl.where(meet, inter, 1.0), tl.where(meet, union, 1.0))
        over = meet & (iou > threshold) & (row_run[:, None] == run[None, :])
        if HAS_GROUPS:
            row_group = tl.load(group_ptr + row, mask=row < slots, other=0)
            over = over & (row_group[:, None] == group[None, :])
        bits = bits | tl.where(over, (tl.full((ROWS,), 1, tl.int64) << lane)[:, None], 0)
    return tl.sum(bits, axis=0)


@triton.jit
def _load(boxes_ptr, run_ptr, slot, slots):
    inside = slot < slots
    x1 = tl.load(boxes_ptr + slot, mask=inside, other=0.0)
    y1 = tl.load(boxes_ptr + tl.cast(slots, tl.int64) + slot, mask=inside, other=0.0)
    x2 = tl.load(boxes_ptr + tl.cast(slots, tl.int64) * 2 + slot, mask=inside, other=0.0)
    y2 = tl.load(boxes_ptr + tl.cast(slots, tl.int64) * 3 + slot, mask=inside, other=0.0)
    return x1, y1, x2, y2, tl.load(run_ptr + slot, mask=inside, other=-1)
