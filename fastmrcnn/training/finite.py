"""The operation with which numbers that are not finite begin, found by watching every one of a step.

Infinities are part of a sound step too, such as the score of a slot that does not count. So an operation is
not blamed for having made one, but only if what it made reached the loss or a gradient: every result that is
not finite remembers the operation and which of its inputs were not finite, and the way back is walked from
the loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_PACKAGE = Path(__file__).parents[1]


class Place(NamedTuple):
    """Where in the model an operation is."""

    module: str  # its path in the model, "" if there is none
    line: str  # the innermost of our own: file, number and function


class Record:
    """An operation whose result was not all finite, or a tensor that was not when the step began."""

    def __init__(
        self, number: int, name: str, place: Place, inputs: list[str], parents: list[Record]
    ) -> None:
        self.number = number  # in the order of the operations
        self.name = name
        self.place = place
        self.inputs = inputs  # their shapes and ranges
        self.parents = parents  # that made its inputs, where these were not finite
        self.result = ""  # shape and range of it
        self.has_nan = False
        self.meant = False
        """An infinity that the program asked for, or that comes of nothing else."""
        self.backward: str | None = None
        """The node of the backward pass that it belongs to; None: of the forward pass."""

    def origin(self) -> Record:
        """The operation with which it began."""
        found = self
        while suspects := [parent for parent in found.parents if not parent.meant]:
            # Where there are NaNs, another input's infinity is not their reason.
            nans = [parent for parent in suspects if parent.has_nan] if found.has_nan else []
            found = min(nans or suspects, key=lambda parent: parent.number)
        return found


class FiniteWatch(TorchDispatchMode):
    """A block in which each operation's results are checked, backward included. Every one waits for the
    device.

    Args:
        model: whose modules are named.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        root = type(model).__name__
        self._modules = {id(module): name or root for name, module in model.named_modules()}
        self._records: dict[int, Record] = {}  # by the address of the storage
        self._kept: list[Tensor] = []  # so that no address is given away again
        self._places: dict[int, Place] = {}  # by the number of the node of the backward pass
        self._count = 0

    def given(self, tensor: Tensor, name: str) -> None:
        """A tensor that is there before the first operation."""
        if _is_suspect(tensor):
            self._remember([tensor], Record(-1, name, Place("", ""), [], []))

    def record_of(self, tensor: Tensor) -> Record | None:
        """Of the last operation that made it not finite; None if it is finite."""
        return self._records.get(_address(tensor)) if _is_suspect(tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:  # what it writes over would else be gone when it is to be described
            given = [tensor.clone() if tensor.is_floating_point() else tensor for tensor in given]
            sources = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        else:
            sources = given
        known = [self._records.get(_address(source)) for source in sources]
        place = self._place_of_forward()
        result = func(*args, **kwargs)
        self._count += 1
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        bad = [tensor for tensor in made if _is_suspect(tensor)]
        if bad:
            parents = [
                record for record, tensor in zip(known, given, strict=True) if record and _is_suspect(tensor)
            ]
            self._remember(bad, self._record(func, args, kwargs, given, parents, place))
        return result

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        parents: list[Record],
        place: Place | None,
    ) -> Record:
        node = torch._C._current_autograd_node()
        backward = None
        if node is not None:
            backward = node.name()
            place = self._places.get(node._sequence_nr(), Place("", ""))
        inputs = [described(tensor) for tensor in given if tensor.is_floating_point()]
        record = Record(self._count, str(func), place or Place("", ""), inputs, parents)
        record.backward = backward
        numbers = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, float)]
        asked = not inputs or any(not math.isfinite(number) for number in numbers)
        record.meant = all(parent.meant for parent in parents) if parents else asked
        return record

    def _remember(self, tensors: list[Tensor], record: Record) -> None:
        record.has_nan = any(bool(tensor.isnan().any()) for tensor in tensors)
        record.meant = record.meant and not record.has_nan
        record.result = "; ".join(described(tensor) for tensor in tensors)
        for tensor in tensors:
            self._records[_address(tensor)] = record
            self._kept.append(tensor.detach())

    def _place_of_forward(self) -> Place | None:
        """Where the program is, kept for the node of the backward pass that was made last."""
        if torch._C._current_autograd_node() is not None:
            return None
        module, line = None, None
        for frame in _frames():
            file = Path(frame.f_code.co_filename)
            if line is None and _PACKAGE in file.parents and file != Path(__file__):
                shown = file.relative_to(_PACKAGE.parent)
                line = f"{shown.as_posix()}:{frame.f_lineno} in {frame.f_code.co_name}"
            module = module or self._modules.get(id(frame.f_locals.get("self")))
            if module is not None and line is not None:
                break
        place = Place(module or "", line or "")
        # An operation that makes no node comes after one that did, and does not take its place.
        self._places.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
        return place


def described(tensor: Tensor) -> str:
    """Shape, type and range of the numbers in a tensor."""
    values = tensor.detach()
    finite = values[values.isfinite()]
    name = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if not finite.numel():
        text = f"{name}, none finite"
    else:
        low, high = finite.min().item(), finite.max().item()
        text = f"{name} of {low:.4g}" if low == high else f"{name} from {low:.4g} to {high:.4g}"
    counts = {"NaN": values.isnan(), "inf": values == math.inf, "-inf": values == -math.inf}
    found = [f"{number} {word}" for word, where in counts.items() if (number := int(where.sum()))]
    return f"{text} ({', '.join(found)})" if found else text


def _is_suspect(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]
