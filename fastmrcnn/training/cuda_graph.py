"""A training step recorded as CUDA graphs: forward, backward, clipping and update in one launch.

One graph for each set of input shapes, that is for each bucket; all share one memory pool, since only one
of them runs at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmrcnn.model.subsample import SamplingKeys
from fastmrcnn.structures import Batch, Counts, Losses, tree_map

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]
Result = tuple[Losses, Counts]  # of a step
Run = Callable[[Batch, SamplingKeys], Result]
WARM_UPS = 3  # runs before recording: cuDNN chooses its algorithms, lazy state is made


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
    """

    def __init__(
        self, run: Run, closed: Callable[[], AbstractContextManager[None]], record: Record | None = None
    ) -> None:
        self.run = run
        self.closed = closed
        self.record = record or CudaRecorder()
        self.recordings: dict[Shapes, Recording] = {}

    def __call__(self, batch: Batch, keys: SamplingKeys) -> Result:
        shapes = shapes_of((batch, keys))
        if shapes not in self.recordings:
            self.recordings[shapes] = self._recorded(batch, keys)
        recording = self.recordings[shapes]
        for own, given in zip(leaves(recording[:2]), leaves((batch, keys)), strict=True):
            own.copy_(given)
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # AdamW wonders why an update that can be recorded is not.
            warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
            for _ in range(WARM_UPS):
                run(batch, keys)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: a loader's thread may pin memory, which "global" would not bear.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = run(batch, keys)
        self.pool = graph.pool()
        return result, graph.replay


def leaves(structure: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def shapes_of(structure: Any) -> Shapes:
    """What decides whether two inputs can share a graph."""
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves(structure))
