"""The whole training step, not only its operators: the trainer's own row of the ladder of
`fastmrcnn.benchmark`.

On CUDA that is the recipe of R50-FPN at 800x1344 as the trainer runs it; elsewhere a narrow network on small
images, eagerly, to show that it works.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from first_gpu.run import NARROW

from conftest import FOUND
from fastmrcnn.speed.entry import Entry, make_runner
from fastmrcnn.speed.ladder import MASK_SLOTS, climb
from fastmrcnn.speed.step_workload import Workload, load_recipe, set_up_device
from fastmrcnn.speed.timing import Times, wait
from fastmrcnn.speed.training_rows import Row, Runner, cpu_rows, cuda_rows


def choose(device: torch.device) -> tuple[Workload, list[Row]]:
    """The row that is benchmarked comes last; before it torchvision with AMP, and the row to agree with."""
    config = load_recipe(None, [f"runtime.device={device}", *([] if device.type == "cuda" else NARROW)])
    set_up_device(config)
    if device.type == "cpu":
        # A network so narrow has losses that bf16 changes by more than one that is worth training in it.
        rows = [row for row in cpu_rows(compiled=False) if row.precision == "fp32"]
        return Workload(config, device, (96, 128), 2, 2), rows[-2:]
    rows = cuda_rows(max_autotune=False)
    peer = next(row for row in rows if row.program == "torchvision" and row.precision == "bf16")
    ours = next(row for row in rows if row.execution.cuda_graphs)  # as the trainer runs by default
    return Workload(config, device, (800, 1344), 12, 50), [peer, rows[2], ours]


def test_training_step(benchmark: Any, device: torch.device, pytestconfig: pytest.Config) -> None:
    workload, rows = choose(device)
    last: list[Runner] = []

    def make(row: Row, workload: Workload, mask_slots: int) -> Runner:
        runner = make_runner(row, workload, mask_slots)
        if row is rows[-1]:
            last.append(runner)  # it is run once more below
        return runner

    *peers, reference, ours = climb(rows, workload, mask_slots=MASK_SLOTS, start=partial(Entry, make=make))
    assert "failure" not in ours, ours["failure"]
    assert "failure" not in reference, reference["failure"]
    assert "disagrees" not in ours, ours["disagrees"]
    height, width = workload.shape
    name = workload.config.model.backbone.name
    found: dict[str, Any] = {
        "operator": f"training step, {name}-FPN, {workload.images} x {height} x {width}",
        "pass": "step",
        "error": abs(ours["last_loss"] - reference["last_loss"]) / abs(reference["last_loss"]),
        "ours": times(ours),
        "peers": {},
    }
    syncs = {"ours": ours["syncs"]} if "syncs" in ours else {}
    for peer in peers:
        reason = peer.get("failure") or peer.get("not_run")
        if reason is not None:
            found["peers"]["torchvision"] = {"failure": reason}
            continue
        found["peers"]["torchvision"] = {**times(peer), "ratio": peer["p50_ms"] / ours["p50_ms"]}
        syncs["torchvision"] = peer["syncs"]
    if syncs:
        found["host_syncs"] = syncs

    def waited() -> None:
        last[0].step(workload.steps)
        wait(device)

    benchmark.group = f"{found['operator']}, {found['pass']}"
    benchmark.extra_info.update(found)
    benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
    pytestconfig.stash[FOUND].append(found)


def times(row: dict[str, Any]) -> dict[str, Any]:
    """As the operators' rows have them; `extra_bytes` is here the peak of the whole step, weights and all."""
    percentiles = {name: row[name] for name in Times._fields}
    return {**percentiles, "extra_bytes": row.get("peak_bytes"), "calls": row["steps"]}
