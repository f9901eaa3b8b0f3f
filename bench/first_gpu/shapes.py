"""python bench/first_gpu/shapes.py FILE [--small]: seconds and memory that each further padded shape costs.

On a GPU the step is compiled and recorded for one shape after the other, as a run does before its first step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from run import SMALL

from fastmrcnn.config.schema import Config
from fastmrcnn.speed.ladder import MASK_SLOTS
from fastmrcnn.speed.step_workload import Workload, load_recipe, set_up_device
from fastmrcnn.speed.timing import wait
from fastmrcnn.speed.training_rows import OurRunner, cpu_rows, cuda_rows

SHAPES = ((800, 1344), (800, 1088), (1344, 800), (1088, 800))
SMALL_SHAPES = ((64, 96), (96, 64))


def start(text: str | None) -> tuple[Path, bool, Config, torch.device]:
    """What the command line says: the file, whether shapes are small; the recipe, and its device, set up."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("file", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    config = load_recipe(None, list(SMALL) if args.small else [])
    return args.file, args.small, config, set_up_device(config)


def main() -> None:
    file, small, config, device = start(__doc__)
    cuda = device.type == "cuda"
    name, rows = ("+ CUDA graphs", cuda_rows(False)) if cuda else ("+ batch norm folded", cpu_rows(False))
    (row,) = (row for row in rows if row.name == name)
    shapes, images = (SMALL_SHAPES, 1) if small else (SHAPES, 12)
    runner = OurRunner(row, Workload(config, device, shapes[0], images, 1), MASK_SLOTS)
    found: list[dict[str, Any]] = []
    for shape in shapes:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        runner.make_step.warm_up(runner.batches[0], [shape])
        wait(device)
        one: dict[str, Any] = {"shape": shape, "seconds": time.perf_counter() - started}
        if cuda:
            free, total = torch.cuda.mem_get_info()
            one["peak_bytes"] = torch.cuda.max_memory_allocated()
            one["reserved_bytes"] = torch.cuda.memory_reserved()
            one["device_bytes"] = total - free
        found.append(one)
        print(one, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
