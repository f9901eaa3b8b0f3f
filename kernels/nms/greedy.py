"""The greedy order of NMS in Triton: one program a tile of boxes, which waits for the tiles before it.

Each program waits for each earlier tile of the same image and group to say which of its boxes survived,
drops what those overlap, settles the order within its own tile, and says so in turn.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots"])
def greedy_kernel(
    boxes_ptr,  # (tiles * TILE, 4) fp32, sorted by run, then falling score, as all that follows; then zeros
    run_ptr,  # (slots,) int64, rising; bit 32 is set in slots that are not valid
    begin_ptr,  # (slots,) int64, the first slot of the run
    group_ptr,  # (slots,) int64, compared too; or None where a run has one group
    rank_ptr,  # (slots,) int64, place by image and falling score; or None, where that is the slot
    keep_ptr,  # (slots,) uint8, written, by image and falling score
    survivors_ptr,  # (tiles,) int64, written, bit by bit the survivors of a tile
    begun_ptr,  # (1,) int32, zero; how many tiles have begun
    done_ptr,  # (tiles,) int32, zero; 1 when a tile's survivors are written
    slots,
    threshold,
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
    valid = ((tl.load(run_ptr + slot, mask=inside, other=-1) >> 32) & 1) == 0
    candidates = tl.sum(tl.where(valid, bit, 0), axis=0)
    survivors = candidates
    if candidates != 0:
        within = _overlapping(boxes_ptr, begin_ptr, group_ptr, tile, tile, slots, threshold, TILE, ROWS)
        within = within & (bit - 1)  # only better boxes drop a box

        start = tl.load(begin_ptr + tile * TILE) // TILE
        if (candidates & 1) == 0:
            start = tile  # not valid slots end an image: behind them a new run begins within this tile
        dropped = tl.zeros((TILE,), tl.int64)
        for other in range(start, tile):
            overlapping = _overlapping(
                boxes_ptr, begin_ptr, group_ptr, other, tile, slots, threshold, TILE, ROWS
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
    if rank_ptr is not None:
        place = tl.load(rank_ptr + slot, mask=inside, other=0)
    tl.store(keep_ptr + place, ((survivors >> lane) & 1).to(tl.uint8), mask=inside)


@triton.jit
def _overlapping(
    boxes_ptr, begin_ptr, group_ptr, row_tile, tile, slots, threshold, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """(TILE,) int64, bit by bit the boxes of `row_tile` of the same run that overlap each box of `tile`.

    Whether inter / union is above the threshold is told in float32, unless a pair of the tiles is so close
    to it that rounding decides: then it is told of all of them in float64, which is slow on some devices.
    """
    bits, close = _compare(
        boxes_ptr, begin_ptr, group_ptr, row_tile, tile, slots, threshold, TILE, ROWS, False
    )
    if tl.max(close, axis=0) != 0:
        bits, close = _compare(
            boxes_ptr, begin_ptr, group_ptr, row_tile, tile, slots, threshold, TILE, ROWS, True
        )
    return bits


@triton.jit
def _compare(
    boxes_ptr,
    begin_ptr,
    group_ptr,
    row_tile,
    tile,
    slots,
    threshold,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The bits of `_overlapping`; and (TILE,) int32, not 0 where they may be wrong unless EXACT."""
    column = tile * TILE + tl.arange(0, TILE)
    x1, y1, x2, y2 = _sides(boxes_ptr, column)
    area = (x2 - x1) * (y2 - y1)
    # Of the rows of this tile, the first that is of the same run. (Beyond the end no row is before a box.)
    first_of_run = tl.load(begin_ptr + column, mask=column < slots, other=0) - row_tile * TILE
    first_of_run = tl.maximum(first_of_run, 0).to(tl.int32)
    if group_ptr is not None:
        group = tl.load(group_ptr + column, mask=column < slots, other=0)
    close = tl.zeros((ROWS, TILE), tl.int32)
    for half in tl.static_range(2):  # a word of 32 bits each
        bits = tl.zeros((ROWS, TILE), tl.uint32)
        for first in range(0, 32, ROWS):
            place = first + tl.arange(0, ROWS)
            lane = half * 32 + place
            a1, b1, a2, b2 = _sides(boxes_ptr + row_tile * (TILE * 4), lane)
            width = tl.minimum(a2[:, None], x2[None, :]) - tl.maximum(a1[:, None], x1[None, :])
            height = tl.minimum(b2[:, None], y2[None, :]) - tl.maximum(b1[:, None], y1[None, :])
            inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
            row_area = (a2 - a1) * (b2 - b1)
            union = row_area[:, None] + area[None, :] - inter
            # Boxes that do not meet have an IoU of 0 or NaN, above no threshold. They are most of the pairs.
            meet = (inter > 0) & (lane[:, None] >= first_of_run[None, :])
            if EXACT:
                over = meet & above_exactly(inter, union, threshold)
            else:
                over, undecided = above(inter, union, threshold)
                over = meet & over
                close = close | (meet & undecided).to(tl.int32)
            if group_ptr is not None:
                row = row_tile * TILE + lane
                row_group = tl.load(group_ptr + row, mask=row < slots, other=0)
                over = over & (row_group[:, None] == group[None, :])
            bits = bits | tl.where(over, (tl.full((ROWS,), 1, tl.uint32) << place)[:, None], 0)
        if half == 0:
            low = tl.sum(bits, axis=0).to(tl.int64)
        else:
            high = tl.sum(bits, axis=0).to(tl.int64)
    return low | (high << 32), tl.max(close, axis=0)


@triton.jit
def above(inter, union, threshold):
    """Whether inter / union, rounded to float32, is above the threshold; and whether that is undecided.

    For 0 < inter <= union, which holds of two boxes that meet, and a threshold of at least 0. Union may be
    infinite or NaN, which gives no quotient above the threshold; either is decided or left undecided.

    What is computed is off by less than 2**-23 of threshold * union, or by a step of float32 where that is
    beyond its normal numbers. The margin is 2**-20 of it and more. Beyond it the quotient differs from the
    threshold by more than half a step, and is rounded to the same side. 2**-120 of union is for quotients
    that would be rounded to 0, 2**-126 for products that are beyond the normal numbers.
    """
    distance = tl.fma(union, -threshold, inter)
    margin = tl.fma(union, threshold * 9.5367431640625e-7 + 7.52316384526264e-37, 1.1754943508222875e-38)
    return distance > 0, tl.abs(distance) <= margin


@triton.jit
def above_exactly(inter, union, threshold):
    """Whether inter / union, rounded to float32, is above the threshold, of what `above` takes.

    It is where the quotient is above the middle of the threshold and the next number of float32; in the
    middle where rounding to even goes up. The middle has 25 bits and union 24, so their product is exact.
    """
    threshold = tl.cast(threshold, tl.float32)
    bits = threshold.to(tl.int32, bitcast=True)
    middle = (threshold.to(tl.float64) + (bits + 1).to(tl.float32, bitcast=True).to(tl.float64)) * 0.5
    limit = union.to(tl.float64) * middle
    return (inter.to(tl.float64) > limit) | ((inter.to(tl.float64) == limit) & ((bits & 1) != 0))


@triton.jit
def _sides(boxes_ptr, slot):
    at = boxes_ptr + slot * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
