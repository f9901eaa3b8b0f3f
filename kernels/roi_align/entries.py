"""The (pixel, weight) entries of every bin: what RoIAlign sums over on a CPU.

No shape depends on data and nothing is read back, so a device never waits. With adaptive sampling the
number of entries is known on the device only: the lists have room for the most there can be, and what
is left over belongs to no bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.pooling import Pooling
from ..level_assign import reference as level_assign
from .rois import Axis, Rois

MAX_ENTRIES = 1 << 22
"""RoIs are taken in groups whose entries do not exceed this, to bound the memory."""


class Entries(NamedTuple):
    pixel: Tensor  # (T,) int32 row in the table of all pixels
    weight: Tensor  # (T,)
    offset: Tensor  # (bins + 1,) int32: bin b has entries offset[b] up to offset[b + 1]


def entry_groups(rois: Rois, sizes: list[tuple[int, int]], how: Pooling) -> Iterator[tuple[slice, Entries]]:
    oh, ow = how.output_size
    total = rois.real.shape[0]
    if how.sampling_ratio > 0:
        most = oh * ow * (2 * how.sampling_ratio) ** 2
    else:
        most_entries, most_rows = _most_entries(sizes, how)
        most = most_entries
    step = max(1, MAX_ENTRIES // most)
    for begin in range(0, total, step):
        group = slice(begin, min(begin + step, total))
        part = Rois(
            Axis(*(t[group] for t in rois.y)),
            Axis(*(t[group] for t in rois.x)),
            rois.origin[group],
            rois.real[group],
        )
        if how.sampling_ratio > 0:
            yield group, _grid_entries(part, how)
        else:
            yield group, _window_entries(part, how, most_entries, most_rows, sizes)


def _grid_entries(rois: Rois, how: Pooling) -> Entries:
    """A fixed number of samples: every bin has 2n x 2n entries, two lines per sample and axis."""
    oh, ow = how.output_size
    rows, row_weight = _grid_lines(rois.y, oh, how.sampling_ratio)
    columns, column_weight = _grid_lines(rois.x, ow, how.sampling_ratio)
    start = rois.origin[:, None, None] + rows * rois.x.size[:, None, None]
    pixel = start[:, :, None, :, None] + columns[:, None, :, None, :]
    row_weight = torch.where(rois.real[:, None, None], row_weight, 0)
    weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
    each = (2 * how.sampling_ratio) ** 2
    offset = torch.arange(0, pixel.numel() + 1, each, device=pixel.device, dtype=torch.int32)
    return Entries(pixel.flatten().int(), weight.flatten(), offset)


def _grid_lines(axis: Axis, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Lines (rows or columns) that each bin reads, and their weights: both (R, bins, 2 * samples)."""
    step = torch.arange(samples, device=axis.start.device, dtype=axis.start.dtype) + 0.5
    place = torch.arange(bins, device=axis.start.device)[:, None]
    length = axis.bin[:, None, None]
    at = axis.start[:, None, None] + place * length + step * length / samples
    size = axis.size[:, None, None]
    inside = (at >= -1) & (at <= size)
    at = torch.minimum(at.clamp(min=0), (size - 1).to(at.dtype))
    low = at.floor()
    share = at - low
    lines = torch.stack([low.long(), torch.minimum(low.long() + 1, size - 1)], dim=-1)
    weights = torch.stack([1 - share, share], dim=-1) * inside[..., None] / samples
    return lines.flatten(2), weights.flatten(2)


def _most_entries(sizes: list[tuple[int, int]], how: Pooling) -> tuple[int, int]:
    """Most (entries, rows of bins) that one box can have with adaptive sampling.

    A bin with n samples along an axis touches at most n + 1 lines. A box that is not on the coarsest
    level has less area than that level takes, which bounds height times width, whatever its shape.
    """
    oh, ow = how.output_size
    entries, rows = 1, 1
    for level, (height, width) in enumerate(sizes):
        area = math.inf
        if level + 1 < len(sizes):
            area = level_assign.first_threshold(how.k_min + level, how.canonical_size, how.canonical_level)
            area *= 1.01 * how.spatial_scales[level] ** 2
        most_rows, most_columns = height + 3 * oh, width + 3 * ow
        rows = max(rows, most_rows)
        for samples in range(1, height // oh + 3):
            least_side = (samples - 1) * oh
            other = math.ceil(area / least_side / ow) if least_side > 0 and area < math.inf else math.inf
            columns = min(ow * (other + 1), most_columns)
            entries = max(entries, min(oh * (samples + 1), most_rows) * int(columns))
    return entries, rows


def _window_entries(
    rois: Rois, how: Pooling, most_entries: int, most_rows: int, sizes: list[tuple[int, int]]
) -> Entries:
    """ceil(b) samples in a bin of b pixels: every bin has the entries of its own window of pixels.

    Bins are expanded to lines (the rows of a bin), and lines to entries, each time into a list of fixed
    length whose end is left over. Where the k-th item of a run stands for the k-th row or column, the
    run holds what to add to (or multiply with) the item's place in the whole list.
    """
    oh, ow = how.output_size
    count = rois.real.shape[0]
    top, rows, row_start, row_weight = _windows(rois.y, oh, max(h for h, _ in sizes), rois.real)
    left, columns, column_start, column_weight = _windows(rois.x, ow, max(w for _, w in sizes), rois.real)
    # Sides beyond about 1e6 pixels are too coarse in float32 for the bounds to hold: leave such a box out.
    rows = rows * (rows.sum(1, keepdim=True) * columns.sum(1, keepdim=True) <= most_entries)
    width = rois.x.size[:, None]
    by_row = [
        t.int()[:, :, None]
        for t in (rows, row_start, rois.origin[:, None] + top * width, width.expand_as(rows))
    ]
    rows, row_start, first, width = (t.expand(count, oh, ow).reshape(-1) for t in by_row)
    by_column = [t.int()[:, None, :] for t in (columns, column_start, left)]
    columns, column_start, left = (t.expand(count, oh, ow).reshape(-1) for t in by_column)

    run = _starts(rows)[:-1]
    owner, place = _expand(rows, count * most_rows * ow)
    pixel = _take(first + left - run * width, owner) + _take(width, owner) * place
    row = (_take(row_start - run, owner) + place).clamp_(max=row_weight.numel() - 1)
    line_weight = row_weight.view(-1).index_select(0, row)
    column = _take(column_start, owner)
    columns_here = _take(columns, owner)

    run = _starts(columns_here)[:-1]
    owner, place = _expand(columns_here, count * most_entries)
    before_all = -place.shape[0]
    pixel = _take(pixel - run, owner, before_all).add_(place).clamp_(min=0)
    column = _take(column - run, owner, before_all).add_(place).clamp_(min=0)
    weight = _take(line_weight, owner).mul_(column_weight.view(-1).index_select(0, column))
    return Entries(pixel, weight, _starts(rows * columns))


def _windows(axis: Axis, bins: int, most: int, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lines that each bin touches under adaptive sampling, and their weights.

    Returns:
        first: (R, bins) int64, the first line of the bin.
        lines: (R, bins) int64, how many there are.
        offset: (R, bins) int64, where the bin's weights begin in the flattened `weight`.
        weight: (R, most + 3 * bins).
    """
    device, dtype = axis.start.device, axis.start.dtype
    length, size = axis.bin[:, None], axis.size[:, None]
    samples = length.ceil()
    step = length / samples
    begin = axis.start[:, None] + torch.arange(bins, device=device) * length
    one = begin + 0.5 * length / samples
    end = begin + (samples - 0.5) * length / samples
    touches = real[:, None] & (samples >= 1) & (end >= -1) & (one <= size)
    last = (size - 1).to(dtype)
    first = torch.minimum(torch.where(touches, one, 0).clamp(min=0), last).floor().long()
    final = torch.minimum(torch.where(touches, end, 0).clamp(min=0).floor() + 1, last).long()
    room = most + 3 * bins
    lines = torch.minimum(final - first, samples.clamp(0, most).long()) + 1
    lines = torch.minimum(lines * touches, (room - (lines.cumsum(1) - lines)).clamp(min=0))
    offset = lines.cumsum(1) - lines

    slot = torch.arange(room, device=device).expand(lines.shape[0], room).contiguous()
    place = torch.searchsorted(lines.cumsum(1), slot, right=True).clamp(max=bins - 1)
    at = first.gather(1, place) + slot - offset.gather(1, place)
    start, line = begin.gather(1, place), at.to(dtype)
    # Samples lie more than half a pixel apart, so at most four touch a line; one more for rounding.
    nearest = ((line - 1 - start) / step - 0.5).floor().clamp(min=0)
    weight = torch.zeros_like(start)
    for i in range(6):
        sample = nearest + i
        where = start + (sample + 0.5) * length / samples
        exists = (sample >= 0) & (sample < samples) & (where >= -1) & (where <= size)
        where = torch.minimum(where.clamp(min=0), last)
        weight += torch.where(exists, (1 - (line - where).abs()).clamp(min=0), 0)
    weight = torch.where(touches.gather(1, place), weight / samples, 0)
    return first, lines, offset + torch.arange(lines.shape[0], device=device)[:, None] * room, weight


def _expand(counts: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """(owner, place) of each item of a list of `room` items, in which i owns counts[i] items in turn.

    The owner of what is left over is `len(counts)`. int32, since most of the time goes here.
    """
    rest = (room - counts.sum(dim=0, keepdim=True)).int()
    owner = torch.repeat_interleave(torch.cat([counts, rest]), output_size=room)
    return owner, torch.arange(room, device=counts.device, dtype=torch.int32)


def _starts(counts: Tensor) -> Tensor:
    """(n + 1,) int32: where each of n runs begins, and where the last one ends."""
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _take(values: Tensor, owner: Tensor, if_no_one: int = 0) -> Tensor:
    return F.pad(values, (0, 1), value=if_no_one).index_select(0, owner)


def transpose(entries: Entries, pixels: int) -> Entries:
    """The entries by pixel: each names a bin, and each run belongs to a pixel."""
    counts = entries.offset.diff()
    owner, _ = _expand(counts, entries.pixel.shape[0])
    key, order = torch.where(owner < counts.shape[0], entries.pixel, pixels).sort(stable=True)
    offset = torch.searchsorted(key, torch.arange(pixels + 1, device=key.device, dtype=key.dtype))
    bins = owner.index_select(0, order).clamp_(max=counts.shape[0] - 1)
    return Entries(bins, entries.weight.index_select(0, order), offset.to(bins.dtype))
