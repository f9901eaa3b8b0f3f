"""Memory that loader processes put batches into, and that is used again and again.

A tensor that goes from one process to another by itself gets new shared memory each time: its pages are made,
filled with zeros, mapped twice and thrown away, which for images costs several times what it costs to write
them. Here there is one block, cut into slots. The training process gives each batch a slot when it asks for
it, a loader process writes it there, and what goes between the processes is where the tensors lie.

A slot is free again when no tensor refers to it any more, whoever may have kept one; with a GPU, when that
also has done what it had been given to do by then, since copies from pinned memory go on beside the program.
A batch for which no slot is free goes the usual way.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ALIGNMENT = 64  # bytes
_SHARED = "/dev/shm"  # where torch has shared memory on Linux


class Place(NamedTuple):
    """Of a tensor in a slot."""

    start: int  # bytes
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Mark(Protocol):
    """What the device had been given to do at a certain time, as an event of CUDA."""

    def query(self) -> bool:
        """Whether it is done."""
        ...

    def synchronize(self) -> None:
        """Wait for it."""
        ...


def shared_block(slots: int, size: int) -> Tensor | None:
    """(slots, size) uint8 in shared memory, size rounded up; None where there is not so much."""
    size = -(-size // ALIGNMENT) * ALIGNMENT
    if _free() < slots * size:  # torch would find out, but leave its file behind
        return None
    try:
        storage = torch.UntypedStorage._new_shared(slots * size)
    except RuntimeError:  # the file system of shared memory is full, or small as in a container
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(slots, size)


def _free() -> float:
    """Bytes that the file system of shared memory has left; infinite where there is none, as on macOS."""
    try:
        left = os.statvfs(_SHARED)
    except OSError:
        return math.inf
    return left.f_bavail * left.f_frsize


class Slots:
    """Who has which slot; of the process that reads them.

    Args:
        block: from `shared_block`.
        mark: marks what the device has been given to do so far; None: nobody reads a slot beside the program.
    """

    def __init__(self, block: Tensor, mark: Callable[[], Mark] | None = None) -> None:
        self.block, self.mark = block, mark
        self._free = deque(range(len(block)))
        self._dropped: deque[int] = deque()  # by whoever dropped the last tensor, in any thread
        self._read: deque[tuple[Mark, int]] = deque()  # perhaps still by the device

    def take(self) -> int | None:
        """A slot for a batch to come; None: all are in use.

        Where the device alone holds one up, this waits for it: the program is ahead of it by as many steps as
        there are slots to spare.
        """
        self._collect()
        if not self._free and self._read:
            mark, slot = self._read.popleft()
            mark.synchronize()
            self._free.append(slot)
        return self._free.popleft() if self._free else None

    def give_back(self, slot: int) -> None:
        """A slot that nothing was put into."""
        self._free.append(slot)

    def tensors(self, slot: int, contents: Any) -> Any:
        """A structure with tensors in place of its `Place`s. The slot is theirs until the last is gone."""
        lease = self.block[slot].numpy()  # an array of its own, which each of the tensors keeps alive
        weakref.finalize(lease, self._dropped.append, slot).atexit = False
        whole = torch.from_numpy(lease)
        return pytree.tree_map(
            lambda leaf: _at(whole, leaf) if isinstance(leaf, Place) else leaf, contents, is_leaf=_is_place
        )

    def _collect(self) -> None:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if self.mark is None:
            self._free.extend(dropped)
            return
        if dropped:
            mark = self.mark()
            self._read.extend((mark, slot) for slot in dropped)
        while self._read and self._read[0][0].query():
            self._free.append(self._read.popleft()[1])


def put(memory: Tensor, structure: Any) -> Any | None:
    """A structure with a `Place` for each tensor, which is copied to the memory unless it lies there already.

    Args:
        memory: (bytes,) uint8, of a slot.
    Returns:
        None: there is too little room.
    """
    begin, room = memory.data_ptr(), memory.numel()
    leaves, spec = pytree.tree_flatten(structure)
    starts = [leaf.data_ptr() - begin if isinstance(leaf, Tensor) else -1 for leaf in leaves]
    inside = [0 <= start < room for start in starts]
    end = max((start + leaves[i].nbytes for i, start in enumerate(starts) if inside[i]), default=0)
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        start, stride = starts[number], leaf.stride()
        if not inside[number]:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + leaf.nbytes
            if end > room:
                return None
            stride = torch.empty_like(leaf, device="meta").stride()  # without gaps
        place = Place(start, tuple(leaf.shape), tuple(stride), leaf.dtype)
        if not inside[number]:
            _at(memory, place).copy_(leaf)
        leaves[number] = place
    return pytree.tree_unflatten(leaves, spec)


def _at(memory: Tensor, place: Place) -> Tensor:
    start, shape, stride, dtype = place
    if 0 in shape:
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype)
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[start : start + size].view(dtype).as_strided(tuple(shape), tuple(stride))


def _is_place(leaf: Any) -> bool:
    return isinstance(leaf, Place)
