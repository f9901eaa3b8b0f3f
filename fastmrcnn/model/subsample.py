"""Random choice of foreground and background slots, of fixed size.

Randomness comes in as keys, so that eager, compiled and reference runs choose alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SamplingKeys(NamedTuple):
    anchors: Tensor  # (N, R) float32, uniform in 0..1
    rois: Tensor  # (N, P + G) float32, or wider: the first P + G are used
    drop_path: Tensor | None = None  # (N, B) float32, for B branches of the backbone that may be left out


class Sample(NamedTuple):
    picked: Tensor  # (N, S) int64 into the candidates: foreground first, then background
    is_foreground: Tensor  # (N, S) bool
    valid: Tensor  # (N, S) bool


def sample(
    is_foreground: Tensor, is_background: Tensor, keys: Tensor, *, asked: int, foreground_share: float
) -> Sample:
    """Choose up to `asked` candidates of each image, of them up to asked * foreground_share foreground.

    Args:
        is_foreground, is_background: (N, B) bool, disjoint.
        keys: (N, B) or wider, uniform in 0..1; the candidates of highest key are chosen.
    Returns:
        S = min(asked, B) slots an image; background fills up what foreground leaves.
    """
    total = is_foreground.shape[1]
    slots = min(asked, total)
    most_foreground = min(int(asked * foreground_share), total)
    keys = keys[:, :total]
    fg_key, fg_index = torch.where(is_foreground, keys, -1.0).topk(most_foreground)
    bg_key, bg_index = torch.where(is_background, keys, -1.0).topk(slots)
    num_fg = (fg_key >= 0).sum(1, keepdim=True)
    num_bg = torch.minimum((bg_key >= 0).sum(1, keepdim=True), slots - num_fg)
    position = torch.arange(slots, device=keys.device)[None, :]
    from_fg = position < num_fg
    # One table of candidates; each slot looks up its row, the foreground first.
    table = torch.cat([fg_index, bg_index], 1)
    row = torch.where(from_fg, position, most_foreground + (position - num_fg).clamp(min=0))
    return Sample(table.gather(1, row), from_fg, position < num_fg + num_bg)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows (N, B, ...) at index (N, S) -> (N, S, ...), by `gather`, whose backward is repeatable."""
    index = index.reshape(*index.shape, *(1,) * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
