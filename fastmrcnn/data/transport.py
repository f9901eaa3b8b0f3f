"""Batches from the loader processes to the process that trains."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmrcnn.data.order import BatchPlan
from fastmrcnn.data.processes import obey_parent_alone
from fastmrcnn.data.slots import Slots, put, shared_block
from fastmrcnn.data.worker import Failure, LoadedBatch
from fastmrcnn.errors import UserError

PREFETCH = 4  # batches that each loader process works ahead
SPARE = 4  # slots beyond those: one in use, one asked for, and the steps by which a GPU may lie behind


class Plans(Protocol):
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[BatchPlan]: ...


class Handed(NamedTuple):
    """What a loader process hands over."""

    slot: int | None
    """The one that was given for it."""
    filled: bool
    """Its tensors are there, and `loaded` has their places."""
    loaded: Any  # LoadedBatch or Failure


class Samples(Protocol):
    """What makes a batch, in a loader process."""

    def load(self, plan: BatchPlan, memory: NDArray[np.uint8] | None = None) -> LoadedBatch | Failure: ...


class Transport:
    """The batches of `plans` in their order, each pass over them anew.

    Args:
        plans: one for each batch.
        workers: loader processes; 0 loads in this one.
        pin_memory: for copies to a GPU that do not wait.
        slot_bytes: what the tensors of a batch need as a rule; larger ones go the slow way. 0: all do.
    Raises:
        UserError: while iterating, from what loads, or because a loader process died.
    """

    def __init__(
        self,
        samples: Samples,
        plans: Plans,
        workers: int,
        pin_memory: bool,
        slot_bytes: int,
    ) -> None:
        self.samples, self.plans, self.workers = samples, plans, workers
        self.pin_memory, self.slot_bytes = pin_memory, slot_bytes
        self.by_slot = 0  # batches that came by one, in all passes

    def __iter__(self) -> Iterator[LoadedBatch]:
        slots = self._slots()
        block = None if slots is None else slots.block
        # A plan is a whole batch, so torch's own batching is off.
        loader = DataLoader(
            _Filling(self.samples, block),
            batch_size=None,
            sampler=_Addressed(self.plans, slots),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=self.pin_memory,  # of what did not go by a slot
            prefetch_factor=PREFETCH if self.workers else None,
            worker_init_fn=obey_parent_alone if self.workers else None,
            generator=torch.Generator(),  # or else each pass would advance the global one
        )
        try:
            batches = iter(loader)
            if block is not None and self.pin_memory:
                pin(block)  # now that the processes have started, which so inherit no pinned memory
            for handed in batches:
                yield self._opened(handed, slots)
                del handed
        except RuntimeError as error:
            if (reason := dead_worker(error)) is None:
                raise
            raise UserError(reason) from None

    def _slots(self) -> Slots | None:
        if not self.workers or not self.slot_bytes:
            return None
        block = shared_block(min(self.workers * PREFETCH, len(self.plans)) + SPARE, self.slot_bytes)
        return None if block is None else Slots(block, cuda_mark if self.pin_memory else None)

    def _opened(self, handed: Handed, slots: Slots | None) -> LoadedBatch:
        slot, filled, loaded = handed
        if isinstance(loaded, Failure):
            raise UserError(loaded.message)
        if slots is not None and slot is not None:
            if filled:
                self.by_slot += 1
                loaded = slots.tensors(slot, loaded)
            else:
                slots.give_back(slot)
        # pinning turns tuples within a list into lists
        return loaded._replace(original_sizes=[(h, w) for h, w in loaded.original_sizes])


class _Addressed:
    """Plans, each with the number of the slot for its batch."""

    def __init__(self, plans: Plans, slots: Slots | None) -> None:
        self.plans, self.slots = plans, slots

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[tuple[BatchPlan, int | None]]:
        for plan in self.plans:
            yield plan, None if self.slots is None else self.slots.take()


class _Filling(Dataset[Handed]):
    """In a loader process: makes a batch and puts it into its slot."""

    def __init__(self, samples: Samples, block: Tensor | None) -> None:
        self.samples, self.block = samples, block

    def __getitem__(self, addressed: tuple[BatchPlan, int | None]) -> Handed:
        plan, slot = addressed
        if self.block is None or slot is None:
            return Handed(slot, False, self.samples.load(plan))
        memory = self.block[slot]
        loaded = self.samples.load(plan, memory.numpy())
        if isinstance(loaded, Failure):
            return Handed(slot, False, loaded)
        places = put(memory, loaded)
        if places is None:  # on its way it is copied
            return Handed(slot, False, loaded)
        return Handed(slot, True, places)


def pin(block: Tensor) -> bool:
    """Let a GPU copy from memory without the program's waiting, until the tensor is gone; whether that could
    be done. Copies from it are right without, but slower."""
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) != 0:
        _forget_error()
        return False
    weakref.finalize(block, _unpin, block.data_ptr()).atexit = False
    return True


def _forget_error() -> None:
    """CUDA keeps the last error until somebody asks, and torch asks after its next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy may be on its way
    torch.cuda.cudart().cudaHostUnregister(address)


def cuda_mark() -> torch.cuda.Event:
    """All that the current stream has been given. What copies on another one makes this one wait for it."""
    event = torch.cuda.Event()
    event.record()
    return event


def _as_it_is(loaded: Any) -> Any:
    """The default would turn the tuples within into lists."""
    return loaded


def dead_worker(error: BaseException) -> str | None:
    """One line if the error is torch's word that a loader process died, which it says wherever the program
    happens to be."""
    text = str(error)
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in text or "Caught" in text:
        return None
    reason = text.split("\n")[0].rstrip(".")
    return (
        f"a loader process died ({reason}), most often for lack of memory or of shared memory; "
        "lower data.workers, or set it to 0"
    )
