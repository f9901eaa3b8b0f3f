"""A training step recorded as CUDA graphs: forward, backward, clipping and update in one launch.

One graph for each set of input shapes, that is for each bucket; all share one memory pool, since only one
of them runs at a time. Where processes sum within a step, NCCL's sums are recorded with it; what no graph can
hold, such as gloo's, cuts the step into parts that are recorded one by one, and is done between them.

A graph reads its inputs where they were when it was recorded, while the step before may still be reading
them. So a batch takes two copies. The slow one comes from the host, on a stream of its own, beside the step
before, into a buffer that waits there (`Staging`); the second, on the device, is the first thing that a step
does. 12 images of 800x1344 are 39 MB: 1.5 ms over 25 GB/s, and read and written at 3 TB/s 26 us. Two
recordings that read two buffers in turn would save those 26 us of some 60 ms, and cost each bucket a second
graph and twice the time to record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmrcnn.graphs import Shapes, leaves, record_graph, shapes_of, warm_up
from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.pixels import pixels_to_be, with_pixels
from fastmrcnn.structures import Batch, Counts, Losses, RawImages, tree_map
from fastmrcnn.training.reduction import Parts, run_through

Result = tuple[Losses, Counts]  # of a step
Run = Callable[[Batch, SamplingKeys], Result]
Replay = Callable[[], None]
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
    step begins when its copy is done; the host waits for neither. Images that are still to be resized become
    pixels there too, beside the step before.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self.device = device
        self.streams = streams or CudaStreams(device)
        self.buffers: dict[Shapes, Batch] = {}
        self.raw: dict[Shapes, RawImages] = {}  # written and read by the stream of the copies alone
        self.free: dict[Shapes, Any] = {}  # events: the buffer may be written to

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, which must be the next one that a step is made with.

        Args:
            batch: in pinned memory.
        """
        taken = batch._replace(pixels=pixels_to_be(batch), raw=None)  # as a step takes it
        shapes = shapes_of(taken)
        if shapes not in self.buffers:
            self.buffers[shapes] = tree_map(lambda t: torch.empty_like(t, device=self.device), taken)
            # The memory may be what an earlier kernel, not done yet, had for itself.
            self.free[shapes] = self.streams.mark()
        buffer = self.buffers[shapes]
        with self.streams.beside():
            self.streams.wait(self.free[shapes])
            if batch.raw is None:
                _copy(buffer, batch)
            else:
                self._make_pixels(buffer, batch, batch.raw)
            arrived = self.streams.mark()
        self.streams.wait(arrived)
        return buffer

    def _make_pixels(self, buffer: Batch, batch: Batch, raw: RawImages) -> None:
        """On the stream of the copies, of which all memory is that is new here."""
        shapes = shapes_of(raw)
        if shapes not in self.raw:
            self.raw[shapes] = tree_map(lambda t: torch.empty_like(t, device=self.device), raw)
        arrived = batch._replace(sizes=buffer.sizes, raw=self.raw[shapes])
        _copy(arrived.raw, raw)
        _copy(buffer._replace(pixels=batch.pixels), batch._replace(raw=None))
        buffer.pixels.copy_(with_pixels(arrived).pixels)

    def taken(self, batch: Batch) -> None:
        """The current stream has been told to read this batch, for the last time."""
        shapes = shapes_of(batch)
        if shapes in self.buffers:
            self.free[shapes] = self.streams.mark()


def _copy(own: Any, given: Any) -> None:
    for mine, leaf in zip(leaves(own), leaves(given), strict=True):
        mine.copy_(leaf, non_blocking=True)


class Recording(NamedTuple):
    inputs: tuple[Any, ...]  # what the graph reads
    result: Any  # what it writes
    replay: Replay


# Of the function that is recorded, and its inputs: what it returned, and what does the same again.
Record = Callable[..., tuple[Any, Replay]]


class GraphedStep:
    """
    Args:
        run: the step or a part of it, of a batch and its sampling keys or of nothing, on the GPU. It reads
            and writes state in place, and leaves no gradient. What `record` takes: for `CudaParts` it is cut.
        closed: a context in which `run` changes no state: recording needs runs that do not count.
        record: runs the step on buffers that stay, and returns its result and a function that does the
            same again; None: as a CUDA graph.
        staging: where batches come from, if they do not stay where they are.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        closed: Callable[[], AbstractContextManager[None]],
        record: Record | None = None,
        staging: Staging | None = None,
    ) -> None:
        self.run = run
        self.closed = closed
        self.record = record or CudaRecorder()
        self.staging = staging
        self.recordings: dict[Shapes, Recording] = {}

    def __call__(self, *inputs: Any) -> Any:
        shapes = shapes_of(inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = self._recorded(inputs)
        recording = self.recordings[shapes]
        for own, given in zip(leaves(recording.inputs), leaves(inputs), strict=True):
            own.copy_(given)
        if self.staging is not None:
            self.staging.taken(inputs[0])
        recording.replay()
        return tree_map(Tensor.clone, recording.result)  # the next replay writes over them

    def _recorded(self, inputs: tuple[Any, ...]) -> Recording:
        inputs = tree_map(Tensor.clone, inputs)
        with self.closed():
            result, replay = self.record(self.run, *inputs)
        return Recording(inputs, result, replay)


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Callable[..., Any], *inputs: Any) -> tuple[Any, Replay]:
        result, graph = record_graph(lambda: run(*inputs), self.pool, WARM_UPS)
        self.pool = graph.pool()
        return result, graph.replay


class CudaParts:
    """Records what is cut, a graph for each part, and sums between them.

    The parts share one memory pool with each other and with those of all shapes. What a later part reads of
    an earlier one is held until the last is recorded, so none of it is given away between them.

    Args:
        reduce: sums a tensor over the processes, in place.
    """

    def __init__(self, reduce: Callable[[Tensor], object]) -> None:
        self.reduce = reduce
        self.pool: Any = None

    def __call__(self, run: Callable[..., Parts[Any]], *inputs: Any) -> tuple[Any, Replay]:
        # The whole of it first, as often as a graph wants before it is recorded.
        warm_up(lambda: run_through(run(*inputs), self.reduce), WARM_UPS)
        parts = run(*inputs)
        done: list[Any] = []
        steps: list[Callable[[], object]] = []
        while not done:
            tensor, graph = record_graph(lambda: _next(parts, done), self.pool, 0)
            self.pool = graph.pool()
            steps.append(graph.replay)
            if tensor is not None:
                steps.append(functools.partial(self.reduce, tensor))

        def replay() -> None:
            for step in steps:
                step()

        return done[0], replay


def _next(parts: Parts[Any], done: list[Any]) -> Tensor | None:
    """Go on to where the parts are cut next; at their end, put what they return into `done`."""
    try:
        return next(parts)
    except StopIteration as end:
        done.append(end.value)
        return None
