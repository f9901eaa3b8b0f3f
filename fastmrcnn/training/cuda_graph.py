"""A training step recorded as CUDA graphs: forward, backward, clipping and update in one launch.

One graph for each set of input shapes, that is for each bucket; all share one memory pool, since only one
of them runs at a time.

A graph reads its inputs where they were when it was recorded, while the step before may still be reading
them. So a batch takes two copies. The slow one comes from the host, on a stream of its own, beside the step
before, into a buffer that waits there (`Staging`); the second, on the device, is the first thing that a step
does. 12 images of 800x1344 are 39 MB: 1.5 ms over 25 GB/s, and read and written at 3 TB/s 26 us. Two
recordings that read two buffers in turn would save those 26 us of some 60 ms, and cost each bucket a second
graph and twice the time to record.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmrcnn.graphs import Shapes, leaves, record_graph, shapes_of
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.structures import Batch, Counts, Losses, tree_map

Result = tuple[Losses, Counts]  # of a step
Run = Callable[[Batch, SamplingKeys], Result]
WARM_UPS = 3  # runs before recording


class Streams(Protocol):
    """What copies beside the step need of CUDA."""

    def beside(self) -> AbstractContextManager[Any]:
        """Work that is begun within goes to the stream of the copies."""
        ...

    def mark(self) -> Any:
        """An event: all that the current stream has been given so far is done."""
        ...

    def wait(self, event: Any) -> None:
        """What the current stream is given from now on begins after the event. The host does not wait."""
        ...


class CudaStreams:
    def __init__(self, device: torch.device) -> None:
        self.copies = torch.cuda.Stream(device)

    def beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.copies)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        event.wait()


class Staging:
    """Copies batches to the device beside the step before.

    Each set of shapes has one buffer. Its copy begins when the step before has taken what was in it, and a
    step begins when its copy is done; the host waits for neither.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self.device = device
        self.streams = streams or CudaStreams(device)
        self.buffers: dict[Shapes, Batch] = {}
        self.free: dict[Shapes, Any] = {}  # events: the buffer may be written to

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, which must be the next one that a step is made with.

        Args:
            batch: in pinned memory.
        """
        shapes = shapes_of(batch)
        if shapes not in self.buffers:
            self.buffers[shapes] = tree_map(lambda t: torch.empty_like(t, device=self.device), batch)
            # The memory may be what an earlier kernel, not done yet, had for itself.
            self.free[shapes] = self.streams.mark()
        buffer = self.buffers[shapes]
        with self.streams.beside():
            self.streams.wait(self.free[shapes])
            for own, given in zip(leaves(buffer), leaves(batch), strict=True):
                own.copy_(given, non_blocking=True)
            arrived = self.streams.mark()
        self.streams.wait(arrived)
        return buffer

    def taken(self, batch: Batch) -> None:
        """The current stream has been told to read this batch, for the last time."""
        shapes = shapes_of(batch)
        if shapes in self.buffers:
            self.free[shapes] = self.streams.mark()


class Recording(NamedTuple):
    batch: Batch  # what the graph reads
    keys: SamplingKeys
    result: Result  # what it writes
    replay: Callable[[], None]


Record = Callable[[Run, Batch, SamplingKeys], tuple[Result, Callable[[], None]]]


class GraphedStep:
    """
    Args:
        run: the step, its inputs on the GPU. It reads and writes state in place, and leaves no gradient.
        closed: a context in which `run` changes no state: recording needs runs that do not count.
        record: runs the step on buffers that stay, and returns its result and a function that does the
            same again; None: as a CUDA graph.
        staging: where batches come from, if they do not stay where they are.
    """

    def __init__(
        self,
        run: Run,
        closed: Callable[[], AbstractContextManager[None]],
        record: Record | None = None,
        staging: Staging | None = None,
    ) -> None:
        self.run = run
        self.closed = closed
        self.record = record or CudaRecorder()
        self.staging = staging
        self.recordings: dict[Shapes, Recording] = {}

    def __call__(self, batch: Batch, keys: SamplingKeys) -> Result:
        shapes = shapes_of((batch, keys))
        if shapes not in self.recordings:
            self.recordings[shapes] = self._recorded(batch, keys)
        recording = self.recordings[shapes]
        for own, given in zip(leaves(recording[:2]), leaves((batch, keys)), strict=True):
            own.copy_(given)
        if self.staging is not None:
            self.staging.taken(batch)
        recording.replay()
        return tree_map(Tensor.clone, recording.result)  # the next replay writes over them

    def _recorded(self, batch: Batch, keys: SamplingKeys) -> Recording:
        batch, keys = tree_map(Tensor.clone, batch), tree_map(Tensor.clone, keys)
        with self.closed():
            result, replay = self.record(self.run, batch, keys)
        return Recording(batch, keys, result, replay)


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Run, batch: Batch, keys: SamplingKeys) -> tuple[Result, Callable[[], None]]:
        result, graph = record_graph(lambda: run(batch, keys), self.pool, WARM_UPS)
        self.pool = graph.pool()
        return result, graph.replay
