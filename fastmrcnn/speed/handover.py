"""What it costs to hand a batch from a loader process to the process that trains."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrcnn.data.order import BatchPlan
from fastmrcnn.data.transforms import Size
from fastmrcnn.data.transport import Transport
from fastmrcnn.data.worker import LoadedBatch
from fastmrcnn.speed.markdown import table
from fastmrcnn.structures import Batch

IMAGES, SHAPE = 12, (800, 1344)
WAYS = {"by slots that are used again": True, "by new shared memory, as torch does it": False}


class Filled:
    """Batches that are only filled, with what tells them apart."""

    def __init__(self, images: int) -> None:
        self.images = images

    def load(self, plan: BatchPlan, memory: NDArray[np.uint8] | None = None) -> LoadedBatch:
        number, shape = plan.samples[0][1], (self.images, *plan.bucket, 3)
        size = int(np.prod(shape))
        pixels = np.empty(size, np.uint8) if memory is None else memory[:size]
        pixels[:] = number % 256
        batch = Batch(
            torch.from_numpy(pixels.reshape(shape)).permute(0, 3, 1, 2),
            torch.tensor([plan.bucket] * self.images),
        )
        return LoadedBatch(batch, [number], self.images, [plan.bucket], torch.zeros(1, 2, 3), {}, {})


def measure_handover(
    batches: int = 16, images: int = IMAGES, shape: Size = SHAPE, workers: int = 2
) -> dict[str, Any]:
    """Batches a second, and processor time of a batch on both sides, of loader processes that only fill
    batches of images, and of a reader that looks at a byte of each page.

    Raises:
        RuntimeError: a batch does not come as it was made.
    """
    rows = []
    for way, slots in WAYS.items():
        plans = [BatchPlan(shape, [(0, number)]) for number in range(batches)]
        room = 3 * images * shape[0] * shape[1] + 2**16 if slots else 0
        transport = Transport(Filled(images), plans, workers, pin_memory=False, slot_bytes=room)
        before, started = _processor_seconds(), time.perf_counter()
        for number, loaded in enumerate(transport):
            pages = loaded.batch.pixels.permute(0, 2, 3, 1).reshape(-1)[::4096]
            if not bool((pages == number % 256).all()):
                raise RuntimeError(f"{way}: batch {number} was overwritten")
        seconds = time.perf_counter() - started
        own, others = (b - a for a, b in zip(before, _processor_seconds(), strict=True))
        rows.append(
            {
                "way": way,
                "batches_per_second": batches / seconds,
                "reader_ms": 1e3 * own / batches,
                "workers_ms": 1e3 * others / batches,
                "by_slot": transport.by_slot,
            }
        )
    megabytes = 3e-6 * images * shape[0] * shape[1]
    return {"megabytes": megabytes, "batches": batches, "workers": workers, "rows": rows}


def _processor_seconds() -> tuple[float, float]:
    """Of this process, and of those it started that have ended."""
    of = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, others = (usage.ru_utime + usage.ru_stime for usage in of)
    return own, others


def handover_table(found: dict[str, Any]) -> str:
    rows = [
        [
            row["way"],
            f"{row['batches_per_second']:.1f}",
            f"{row['workers_ms']:.1f}",
            f"{row['reader_ms']:.1f}",
        ]
        for row in found["rows"]
    ]
    head = f"batches of {found['megabytes']:.0f} MB, {found['workers']} workers"
    return table([head, "batches/s", "processor ms of the workers", "of the reader"], rows)
