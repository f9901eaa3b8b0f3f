"""Detection replayed as CUDA graphs, one for each padded shape that comes again and again.

Without them the host launches some thousand kernels for an image, which takes it longer than the GPU needs
to run them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastmrcnn.graphs import Shapes, leaves, record_graph, shapes_of
from fastmrcnn.structures import Batch, Detections, to_device, tree_map

Run = Callable[[Batch], Detections]
Record = Callable[[Run, Batch], tuple[Detections, Callable[[], None]]]
MOST = 16  # graphs; the one that was needed longest ago goes first
# Batches of a shape before it is recorded. To record takes as long as some of them, which a shape that comes
# twice is not worth; the first ones also make what cuDNN and Triton make once.
BEFORE = 3
WARM_UPS = 1  # runs before recording, on the stream where that happens


class Recording(NamedTuple):
    batch: Batch  # what the graph reads
    result: Detections  # what it writes
    replay: Callable[[], None]


class RecordedModel:
    """Runs batches, those of shapes that are frequent by replaying. The host does not wait.

    Args:
        run: detects in a batch on the device, without a host sync.
        device: of the model.
        record: runs it on a batch that stays, and returns its result and a function that does the same
            again; None: as a CUDA graph.
    """

    def __init__(self, run: Run, device: torch.device, record: Record | None = None) -> None:
        self.run = run
        self.device = device
        self.record = record or CudaRecorder()
        self.recordings: OrderedDict[Shapes, Recording] = OrderedDict()
        self.met: Counter[Shapes] = Counter()
        self.failed = False

    def __call__(self, batch: Batch) -> Detections:
        """
        Args:
            batch: on the device, or in pinned memory.
        Returns:
            What no later call writes over.
        """
        shapes = shapes_of(batch)
        recording = self.recordings.get(shapes)
        if recording is None:
            self.met[shapes] += 1
            if not self.failed and self.met[shapes] > BEFORE:
                recording = self._recorded(batch)
        if recording is None:
            return self.run(to_device(batch, self.device))
        self.recordings[shapes] = recording
        self.recordings.move_to_end(shapes)
        for own, given in zip(leaves(recording.batch), leaves(batch), strict=True):
            own.copy_(given, non_blocking=True)
        recording.replay()
        return tree_map(Tensor.clone, recording.result)  # the next replay writes over them

    def forget(self) -> None:
        """Drop all graphs: what they read has moved."""
        if self.recordings:
            self._wait()
        self.recordings.clear()
        self.met.clear()

    def _recorded(self, batch: Batch) -> Recording | None:
        """None if it cannot be recorded, which is said once."""
        while len(self.recordings) >= MOST:
            self._wait()
            shapes, _ = self.recordings.popitem(last=False)
            self.met[shapes] = 0  # or a set of many shapes in turn would be recorded without end
        own = tree_map(lambda tensor: torch.empty_like(tensor, device=self.device), batch)
        for mine, given in zip(leaves(own), leaves(batch), strict=True):
            mine.copy_(given, non_blocking=True)
        try:
            result, replay = self.record(self.run, own)
        except Exception as error:  # out of memory, or a driver that cannot
            self.failed = True
            reason = (str(error) or type(error).__name__).splitlines()[0]
            tqdm.write(f"detection goes on without CUDA graphs, which cannot be recorded here: {reason}")
            return None
        return Recording(own, result, replay)

    def _wait(self) -> None:
        """A graph that is dropped must not be running."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool, since only one of them runs at a time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Run, batch: Batch) -> tuple[Detections, Callable[[], None]]:
        result, graph = record_graph(lambda: run(batch), self.pool, WARM_UPS)
        self.pool = graph.pool()
        return result, graph.replay
