"""Overlays drawn in processes of their own.

A picture takes longer than the model on a GPU, and in one process Python runs one thread at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.data.processes import obey_parent_alone
from fastmrcnn.detection.fonts import drawable_names
from fastmrcnn.detection.objects import Objects, pasted
from fastmrcnn.detection.pipeline import cores
from fastmrcnn.detection.prediction import Prediction
from fastmrcnn.errors import UserError

WORTH_IT = 8  # images; fewer are drawn sooner than processes are there
MOST = 16


class Artists:
    """Processes that draw, or none.

    Begin them before the model is on a GPU and before there are threads: they are forks of this process.

    Args:
        images: how many there will be to draw.
    """

    def __init__(self, images: int) -> None:
        wanted = min(MOST, max(1, cores() - 1), images // WORTH_IT)
        self.pool: ProcessPoolExecutor | None = None
        if wanted and "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux":
            fork = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(wanted, mp_context=fork, initializer=_begin)
            self.pool.submit(os.getpid).result()  # which makes all of them
        self.threads = wanted if self.pool else 1

    def __enter__(self) -> Artists:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def draw(
        self,
        path: Path,
        image: NDArray[np.uint8],
        found: Objects,
        class_names: Sequence[str],
        schema: KeypointSchema | None,
        threshold: float,
    ) -> None:
        """Write an overlay; returns when it is there.

        Args:
            found: without probabilities, if there are processes: those may be on a GPU.
        Raises:
            UserError: it cannot be written; a process died.
        """
        drawable_names(tuple(class_names))  # what there is to say of them is said here
        arguments = (path, image, found, list(class_names), schema, threshold)
        if self.pool is None:
            save_overlay(*arguments)
            return
        try:
            self.pool.submit(save_overlay, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "a process that draws died, most often for lack of memory; give fewer images at a time, or "
                "smaller ones"
            ) from None


def save_overlay(
    path: Path,
    image: NDArray[np.uint8],
    found: Objects,
    class_names: list[str],
    schema: KeypointSchema | None,
    threshold: float,
) -> None:
    Prediction(image, pasted(found, threshold), class_names, schema).save(path)


def _begin() -> None:
    """Once in each process."""
    obey_parent_alone(0)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process that draws has been started by someone"
    parent.join()
    os._exit(1)
