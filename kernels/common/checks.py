"""What every operator checks before it runs, and how it says so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int | str, ...]
NOT_EMPTY = "CHKMVW"
"""Letters of axes that must not be empty. Any other letter is a number of things, which may be none."""
_KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "floating point": lambda dtype: dtype.is_floating_point,
    "integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
    "real": lambda dtype: not dtype.is_complex,
}


def require(
    name: str,
    tensor: Tensor | None,
    shape: Shape | list[Shape],
    kind: str | torch.dtype | None = None,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Raise ValueError unless a tensor, if there is one, is what is expected of it.

    Args:
        shape: sizes, and letters in the place of those that are free; equal letters are equal sizes. It may
            begin with "...", for any axes. Or several of these, of which one must fit.
        kind: "floating point", "integer", "real" (all but complex numbers), or a dtype. None: any.
        like: name and tensor on whose device it must be, and to which the shape belongs.
    """
    if tensor is None:
        return
    shapes = shape if isinstance(shape, list) else [shape]
    if not any(_fits(tensor, wanted) for wanted in shapes):
        belongs = "" if like is None else f" for {like[0]} {tuple(like[1].shape)}"
        raise ValueError(f"{name} must be {_described(shapes)}{belongs}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like[1].device:
        verb = "are" if like[0].endswith("s") else "is"
        raise ValueError(f"{name} must be on {like[1].device} as {like[0]} {verb}, got {tensor.device}")
    if isinstance(kind, torch.dtype):
        if tensor.dtype != kind:
            raise ValueError(f"{name} must be {str(kind).removeprefix('torch.')}, got {tensor.dtype}")
    elif kind is not None and not _KINDS[kind](tensor.dtype):
        wanted = "of an integer dtype" if kind == "integer" else kind
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")


def _fits(tensor: Tensor, shape: Shape) -> bool:
    sizes = tuple(tensor.shape)
    if shape[:1] == ("...",):
        shape = shape[1:]
        sizes = sizes[-len(shape) :]
    if len(sizes) != len(shape):
        return False
    known: dict[int | str, int] = {}
    return all(
        size == (wanted if isinstance(wanted, int) else known.setdefault(wanted, size))
        and (size > 0 or isinstance(wanted, int) or wanted not in NOT_EMPTY)
        for size, wanted in zip(sizes, shape, strict=True)
    )


def _described(shapes: list[Shape]) -> str:
    """As "(N, 4) or (1, 4)", and which letters are at least 1."""
    texts = [f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})" for shape in shapes]
    letters = dict.fromkeys(axis for shape in shapes for axis in shape if str(axis) in NOT_EMPTY)
    some = f" with {' and '.join(map(str, letters))} at least 1" if letters else ""
    return " or ".join(texts) + some


def require_at_least(name: str, number: float, least: float) -> None:
    if not number >= least:  # nor is NaN
        raise ValueError(f"{name} must be at least {least}, got {number}")


def may_look(tensor: Tensor) -> bool:
    """Whether a check may look at values: in eager mode on the CPU, where it costs no wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_all(fine: Tensor, message: Callable[[], str]) -> None:
    """Raise ValueError unless all are true, for tensors that `may_look` allows."""
    try:
        torch._assert_async(fine.all())  # on the CPU it raises at once, and traces without a host read
    except RuntimeError:
        raise ValueError(message()) from None


def check_range(name: str, index: Tensor, size: int, counts: Tensor | None = None) -> None:
    """Raise ValueError for an index that is not in 0..size-1, where looking costs no wait.

    Args:
        index: (slots,).
        counts: (slots,), 0 or false where the index is not used; None: all are.
    """
    if not may_look(index):
        return
    if not index.dtype.is_floating_point:
        index = index.long()  # a narrower one would be compared with a size of its own dtype
    fine = (index >= 0) & (index < size)
    if counts is not None:
        fine = fine | (counts == 0)
    require_all(fine, lambda: f"{name} must be in 0..{size - 1}, got {index[~fine][:5].tolist()}")
