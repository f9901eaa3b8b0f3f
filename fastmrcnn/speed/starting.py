"""What the start of a run costs with a large annotation file, the first time and again, and how much memory a
loader process needs for it."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from fastmrcnn.data.annotation_cache import AnnotationCache
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.loader import TrainLoader, largest_targets
from fastmrcnn.speed.apart import Apart


def measure_starts(folder: Path, file: Path) -> dict[str, Any]:
    """Of a set in a folder, where what was read of it is kept, too. Each start is in a process of its own.

    Returns:
        `first` and `second`: processor and wall seconds of reading, and of making the loader; `worker_mb`:
        memory of a loader process that has read all annotations, beyond that of one that has none; `kept_mb`.
    """
    cache = AnnotationCache(folder / "kept", least_bytes=0)
    found: dict[str, Any] = {}
    for name in ("first", "second"):
        with Apart(Start, folder, file, cache) as start:
            found[name] = start.ask("read")
            found["worker_mb"] = start.ask("worker_mb")
    found["kept_mb"] = sum(path.stat().st_size for path in cache.folder.iterdir()) / 1e6
    return found


class Start:
    """The start of a run, in a process of its own."""

    def __init__(self, folder: Path, file: Path, cache: AnnotationCache) -> None:
        self.given = folder, file, cache
        self.bare = _memory_of_a_fork(None)
        self.dataset: CocoDataset | None = None

    def read(self) -> dict[str, float]:
        folder, file, cache = self.given
        clocks = time.process_time(), time.perf_counter()
        self.dataset = dataset = read_coco(folder, file, cache=cache, max_objects=2**20)
        processor, wall = (
            now() - then for now, then in zip((time.process_time, time.perf_counter), clocks, strict=True)
        )
        started = time.process_time()
        slots, mask_bytes = largest_targets(dataset, 16)
        TrainLoader(
            dataset,
            batch=16,
            short_sides=[800],
            long_side_max=1333,
            steps=1,
            max_objects=2**20,
            min_slots=slots,
            min_mask_bytes=mask_bytes,
        )
        return {"processor_s": processor, "wall_s": wall, "loader_s": time.process_time() - started}

    def worker_mb(self) -> float | None:
        """Memory of a process that has looked at every annotation, beyond that of one that began before there
        were any. None where the system does not say."""
        used = _memory_of_a_fork(self.dataset)
        return None if used is None or self.bare is None else used - self.bare


def memory_mb() -> float | None:
    """Resident memory of this process, pages that it shares included; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _memory_of_a_fork(dataset: CocoDataset | None) -> float | None:
    """Of a process that begins as a copy of this one, as loader processes do, when it has looked at a set."""
    if memory_mb() is None:
        return None
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[float | None] = context.SimpleQueue()
    process = context.Process(target=_look_at_all, args=(dataset, queue))
    process.start()
    used = queue.get()
    process.join()
    return used


def _look_at_all(dataset: CocoDataset | None, queue: SimpleQueue[float | None]) -> None:
    for record in dataset.records if dataset is not None else ():
        list(record.objects)
    queue.put(memory_mb())
