"""Find the fastest launch of each kernel on this GPU: `python bench/tune.py roi_align nms mask_loss`.

Sweeps block sizes, warps, stages and registers at the fixed workload (see workload.py), refuses a launch
whose result is not that of the one in use, and prints the others by time. A choice that is better belongs
into the kernel's launcher, with the line that shows it. `--record` writes bench/results/tuning/<gpu>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from harness import NotCloseError, check
from record import file_name
from torch import Tensor
from workload import STRIDES, TRAINING, Workload, feature_maps, generator, masks, proposals, rois

from fastmrcnn.kernels.common.launch import Launch
from fastmrcnn.kernels.common.pooling import Asked, Pooling
from fastmrcnn.kernels.mask_loss import kernel as mask_loss
from fastmrcnn.kernels.nms import kernel as nms
from fastmrcnn.kernels.roi_align import backward, forward
from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.timing import call_times, summary

RESULTS = Path(__file__).parent / "results" / "tuning"
MOST_SHOWN = 8


@dataclass(frozen=True)
class Trial:
    """A launch, and what of it may be chosen.

    `choices` are by name: num_warps, a constexpr of the kernel, or an option of the compiler (None leaves
    it out). `grid` follows from the arguments.
    """

    name: str
    launch: Launch
    choices: dict[str, list[Any]]
    grid: Callable[[dict[str, Any]], tuple[int, ...]]
    outputs: list[Tensor]
    reset: Callable[[], object] = lambda: None  # before each run


def variants(trial: Trial) -> Iterator[tuple[dict[str, Any], Launch]]:
    """Every combination of the choices, and its launch."""
    for values in itertools.product(*trial.choices.values()):
        choice = dict(zip(trial.choices, values, strict=True))
        constants = {k: v for k, v in choice.items() if k in trial.launch.arguments}
        options = {k: v for k, v in choice.items() if k not in constants and k != "num_warps"}
        arguments = {**trial.launch.arguments, **constants}
        merged = {**trial.launch.options, **options}
        yield (
            choice,
            replace(
                trial.launch,
                arguments=arguments,
                grid=trial.grid(arguments),
                num_warps=choice.get("num_warps", trial.launch.num_warps),
                options={k: v for k, v in merged.items() if v is not None},
            ),
        )


def roi_align_trials(load: Workload, device: torch.device) -> Iterator[Trial]:
    maps = [m.to(device) for m in feature_maps(load)]
    sizes = [(m.shape[2], m.shape[3]) for m in maps]
    registers = [None, 128, 168] if torch.version.hip is None else [None]
    for bins, per_image in ((7, load.box_rois), (14, load.mask_rois)):
        boxes = rois(load, per_image).flatten(0, 1).to(device)
        how = Pooling((bins, bins), [1 / s for s in STRIDES], 0, True, 224.0, 4, 2)
        out, pool = forward.launch(maps, boxes, None, None, how)

        def grid(arguments: dict[str, Any], first: int = pool.grid[0]) -> tuple[int, ...]:
            return first, triton.cdiv(arguments["channels"], arguments["BLOCK_C"])

        blocks = {"BLOCK_C": [64, 128, 256], "num_warps": [4, 8], "maxnreg": registers}
        yield Trial(
            f"roi_align forward {bins}x{bins}", pool, {**blocks, "num_stages": [2, 3, 4]}, grid, [out]
        )
        gradient = torch.randn(out.shape, generator=generator(9)).to(out)
        grads, (*finding, gather) = backward.launches(
            [gradient.contiguous(memory_format=torch.channels_last)],
            [Asked(boxes, None, None, how)], load.images, sizes, True,
        )  # fmt: skip

        def find(finding: list[Launch] = finding) -> None:
            finding[1].arguments["taken_ptr"].zero_()
            for launch in finding:
                launch.run()

        yield Trial(
            f"roi_align backward {bins}x{bins}",
            gather,
            {**blocks, "num_stages": [3, 5, 7]},
            lambda arguments, first=gather.grid[0]: grid(arguments, first),
            grads,
            find,
        )


def nms_trials(load: Workload, device: torch.device) -> Iterator[Trial]:
    boxes, scores, groups = (t.to(device) for t in proposals(load))
    index = torch.zeros((load.images, load.nms_kept), dtype=torch.int64, device=device)
    kept = torch.zeros_like(index, dtype=torch.bool)
    keys, greedy, _ = stepwise(
        nms._launches(boxes, scores, groups, None, 0.7, index, kept, only_finite=True), device
    )
    begun, done = (greedy.arguments[name] for name in ("begun_ptr", "done_ptr"))
    yield Trial(
        "nms greedy",
        greedy,
        {"ROWS": [2, 4, 8, 16], "num_warps": [1, 2, 4, 8]},
        lambda arguments: greedy.grid,
        [greedy.arguments["keep_ptr"]],
        lambda: (begun.zero_(), done.zero_()),
    )
    yield Trial(
        "nms keys",
        keys,
        {"BLOCK": [256, 512, 1024, 2048], "num_warps": [4, 8]},
        lambda arguments: (triton.cdiv(arguments["slots"], arguments["BLOCK"]),),
        [keys.arguments["key_ptr"]],
    )


def stepwise(launches: Iterator[Launch], device: torch.device) -> list[Launch]:
    """Launches of which each needs what the one before it wrote; run where there is a GPU."""
    found = []
    for launch in launches:
        found.append(launch)
        if device.type == "cuda":
            launch.run()
    return found


def mask_loss_trials(load: Workload, device: torch.device) -> Iterator[Trial]:
    logits, classes, targets, weight = (t.to(device) for t in masks(load))
    _, divisor, (pool, mean) = mask_loss._forward(logits, classes, targets, weight)
    yield Trial(
        "mask_loss forward",
        pool,
        {"PIXELS": [256, 512, 1024], "num_warps": [2, 4, 8]},
        lambda arguments: pool.grid,
        [pool.arguments["slot_sum_ptr"]],
    )
    if device.type == "cuda":
        pool.run()
        mean.run()
    one = torch.ones((), device=device)
    grad, fill = mask_loss._backward(one, divisor, logits, classes, targets, weight)
    size = logits[0].numel()
    yield Trial(
        "mask_loss backward",
        fill,
        {"STRETCH": [8192, 16384, 32768, 65536], "ZEROS": [2048, 4096, 8192], "num_warps": [4, 8]},
        lambda arguments: (load.masks, triton.cdiv(size, arguments["STRETCH"])),
        [grad],
    )


OPERATORS = {"roi_align": roi_align_trials, "nms": nms_trials, "mask_loss": mask_loss_trials}


def milliseconds(trial: Trial, launch: Launch, repeats: int) -> float:
    """Median time of a launch."""
    return summary(call_times([launch.run] * repeats, torch.device("cuda"), trial.reset)).p50_ms


def sweep(trial: Trial, repeats: int) -> dict[str, Any]:
    """Times of all choices that run and agree with the launch in use, fastest first."""
    trial.reset()
    trial.launch.run()
    expected = [t.clone() for t in trial.outputs]
    found: dict[str, Any] = {
        "kernel": trial.name,
        "in_use_ms": milliseconds(trial, trial.launch, repeats),
        "choices": [],
        "failed": [],
    }
    for choice, launch in variants(trial):
        try:
            trial.reset()
            launch.run()
            check("this launch", trial.outputs, expected, terms=1)
            found["choices"].append({**choice, "ms": milliseconds(trial, launch, repeats)})
        except NotCloseError:
            raise
        except Exception as error:  # that a choice does not fit into the device is an answer too
            found["failed"].append({**choice, "why": f"{type(error).__name__}: {error}".splitlines()[0]})
    found["choices"].sort(key=lambda choice: choice["ms"])
    return found


def text(found: dict[str, Any]) -> str:
    lines = [f"{found['kernel']}: {found['in_use_ms']:.4f} ms as it is launched now"]
    for choice in found["choices"][:MOST_SHOWN]:
        rest = ", ".join(f"{name} {value}" for name, value in choice.items() if name != "ms")
        lines.append(f"  {choice['ms']:.4f} ms  {rest}")
    if found["failed"]:
        lines.append(f"  {len(found['failed'])} others do not run here: {found['failed'][0]['why']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/tune.py", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="+", choices=list(OPERATORS))
    parser.add_argument("--repeats", type=int, default=50, help="runs of each launch")
    parser.add_argument("--record", action="store_true", help="write bench/results/tuning/<gpu>.json")
    parser.add_argument("--commit", help="of the code, where there is no git repository to ask")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: tuning needs a GPU, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for operator in args.operators:
        for trial in OPERATORS[operator](TRAINING, device):
            rows.append(sweep(trial, args.repeats))
            print(text(rows[-1]), flush=True)
    if args.record:
        facts = environment(device, args.commit)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / file_name(facts)
        path.write_text(json.dumps({**facts, "kernels": rows}, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
