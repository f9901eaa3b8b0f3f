"""What more processes are worth: the trainer's step in one and in several, each with as many images."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.detection.pipeline import cores
from fastmrcnn.device import choose_precision
from fastmrcnn.errors import UserError
from fastmrcnn.group import Group, joined
from fastmrcnn.speed.apart import Apart
from fastmrcnn.speed.markdown import spread, table
from fastmrcnn.speed.step_workload import Workload, changed, on_disk, read_workload
from fastmrcnn.speed.timing import Stopwatch, summary
from fastmrcnn.structures import to_device
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.sharing import own_device
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.start import new_model

WARM_UP = 2  # steps before the first that counts


def check_devices(processes: int, device: torch.device) -> None:
    """Raises UserError if so many processes cannot have a device each."""
    if processes < 2:
        raise UserError(f"--processes must be at least 2, got {processes}")
    if device.type == "cuda" and torch.cuda.device_count() < processes:
        raise UserError(
            f"--processes {processes}: each needs a GPU, and there are {torch.cuda.device_count()} here; "
            "runtime.device=cpu shows that it works"
        )


def measure_scaling(
    workload: Workload, processes: int, *, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Images a second of one process, and of so many.

    Args:
        workload: its images are those of each process.
    Raises:
        GoneError: a process failed.
    """
    # As many threads for the one as it has among others: what is measured is not the threads.
    threads = max(1, cores() // processes) if workload.device.type == "cpu" else torch.get_num_threads()
    rows = []
    with on_disk(workload) as file:
        for size in (1, processes):
            report(f"{size} process{'' if size == 1 else 'es'}")
            rows.append({"processes": size, **_run_together(file, size, threads, workload)})
    share = rows[1]["images_per_second"] / (processes * rows[0]["images_per_second"])
    return {
        "images_per_process": workload.images,
        "steps": workload.steps,
        "threads": threads,
        "backend": "gloo" if workload.device.type == "cpu" else "nccl",
        "rows": rows,
        "efficiency": share,
    }


def _run_together(file: Path, size: int, threads: int, workload: Workload) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        members = [
            stack.enter_context(
                Apart(Member, file, workload.device.type, Group(rank, size, rank), port, threads)
            )
            for rank in range(size)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(size))
        # A member that fails leaves the others waiting for it, until its process has ended.
        asked = [pool.submit(member.ask, "run", workload.steps) for member in members]
        found = [one.result() for one in asked]
    times, busy, loss = found[0]
    seconds = times["p50_ms"] / 1e3
    return {
        "images_per_second": size * workload.images / seconds,
        "step": times,
        "processor_s": sum(one[1] for one in found) / 1e3 / workload.steps if busy else None,
        "loss": loss,
    }


class Member:
    """One of the processes, with batches of its own."""

    def __init__(self, file: Path, device: str, group: Group, port: int, threads: int) -> None:
        torch.set_num_threads(threads)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        self.group = group
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(joined(group))
        self.workload = workload = read_workload(file, own_device(device, group))
        config = changed(workload.config, "train.batch", workload.images * group.size)
        model = new_model(workload.card, workload.device)
        model.load_state_dict(workload.start)
        execution = choose_execution(config, workload.device)
        precision = choose_precision(config.runtime.precision, workload.device)
        self.config = config
        self.make_step = TrainingStep(
            model, config.optim, precision, execution, seed=workload.seed, group=group
        )
        self.make_step.align()
        batches = [to_device(batch, workload.device) for batch in workload.batches]
        self.batches = batches[group.rank % len(batches) :] + batches[: group.rank % len(batches)]

    def run(self, steps: int) -> tuple[dict[str, float], float, float]:
        """Percentiles of a step's time, processor milliseconds of all of them (0 on a GPU), the last loss."""
        with self.make_step.update.closed():
            for number in range(WARM_UP):
                self._step(number)
        watch = Stopwatch(self.workload.device)
        for number in range(steps):
            loss = watch(lambda number=number: self._step(number))  # type: ignore[misc]
        times = summary(watch.milliseconds())._asdict()
        last = float(loss)
        self.stack.close()
        return times, sum(watch.busy), last

    def _step(self, number: int) -> torch.Tensor:
        config = self.config
        rate = learning_rate(config.optim, number, config.train.steps, config.train.batch)
        losses, _ = self.make_step(self.batches[number % len(self.batches)], number, rate)
        return losses.total()


def scaling_table(found: dict[str, Any]) -> str:
    head = ["processes", "images/s", "ms a step, p50 (p20 to p80)", "processor s a step, of all", "scaling"]
    first = found["rows"][0]["images_per_second"]
    rows = [
        [
            str(row["processes"]),
            f"{row['images_per_second']:.2f}",
            spread(row["step"]),
            "" if row["processor_s"] is None else f"{row['processor_s']:.2f}",
            f"{row['images_per_second'] / first:.2f}",
        ]
        for row in found["rows"]
    ]
    note = (
        f"{found['images_per_process']} images a process and step, over {found['backend']}; efficiency "
        f"{found['efficiency']:.0%}."
    )
    return f"{table(head, rows)}\n{note}"
