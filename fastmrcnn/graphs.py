"""CUDA graphs and streams.

How a graph is recorded, what decides whether two inputs can share it, and where work goes that is not to wait
behind what was begun before it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


def record_graph(run: Callable[[], T], pool: Any, warm_ups: int) -> tuple[T, torch.cuda.CUDAGraph]:
    """Run a function on the current CUDA device a few times, then record it.

    Args:
        run: reads and writes tensors that stay; no host sync, no shape that depends on data.
        pool: memory of an earlier graph, which this one may share if only one of them runs at a time;
            None: its own.
        warm_ups: runs before: cuDNN chooses its algorithms, lazy state is made.
    Returns:
        What `run` returned, whose tensors each replay writes anew; and the graph.
    """
    warm_up(run, warm_ups)
    stream = _recording_stream(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    # Other threads go on meanwhile: a loader's thread may pin memory, which "global" would not bear.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return result, graph


def warm_up(run: Callable[[], Any], times: int) -> None:
    """Run what is to be recorded, on the stream that it will be recorded on."""
    stream = _recording_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # AdamW wonders why an update that can be recorded is not.
        warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: what one of them has let go of in a pool, only the same stream is given again."""
    return torch.cuda.Stream(device)


def leaves(structure: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def shapes_of(structure: Any) -> Shapes:
    """What decides whether two inputs can share a graph."""
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves(structure))


def beside(device: torch.device) -> AbstractContextManager[Any]:
    """Work on a CUDA device that is begun within runs beside what was begun before.

    Its inputs must be there already, and the host must have waited for its results when the block ends:
    nothing else keeps an order.
    """
    return torch.cuda.stream(_stream_beside(device)) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
