"""python -m fastmrcnn.benchmark: the whole training step, measured technique by technique."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import to_write, write_text
from fastmrcnn.speed.decoding import decoding_table, measure_decoding_apart
from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.handover import handover_table, measure_handover
from fastmrcnn.speed.inference_rows import inference_table, measure_inference_apart
from fastmrcnn.speed.judging import judging_table, measure_judging
from fastmrcnn.speed.ladder import MASK_SLOTS, broken, climb_apart, kernel_table, ladder_table, takes_turns
from fastmrcnn.speed.loading import loading_table, measure_loading
from fastmrcnn.speed.markdown import origin
from fastmrcnn.speed.profile import profile_step, profile_table
from fastmrcnn.speed.reading import measure_reading, reading_table
from fastmrcnn.speed.scaling import check_devices, measure_scaling, scaling_table
from fastmrcnn.speed.schedule import cuda_schedule, schedule_tables
from fastmrcnn.speed.step_workload import (
    RECIPE,
    Workload,
    changed,
    check_synthetic,
    load_recipe,
    set_up_device,
)
from fastmrcnn.speed.training_rows import OurRunner, Row, cpu_rows, cuda_rows
from fastmrcnn.training.execution import choose_execution


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    names, overrides = row_names(arguments)
    config = load_recipe(arguments.config, overrides)
    if arguments.schedule is not None:
        tell_schedule(arguments, config)
        return
    device = set_up_device(config)
    check_synthetic(config)
    if names == ["help"]:
        print("\n".join(row.name for row in all_rows(device)))
        return
    if arguments.processes is not None:
        check_devices(arguments.processes, device)
    rows = choose_rows(names, config, device)
    workload = make_workload(arguments, config, device)
    found: dict[str, Any] = {
        **environment(device),
        "workload": workload.facts,
        "config": config.model_dump(mode="json"),
    }
    keep = partial(write, found, arguments.json)
    keep()
    print(heading(found) + "\n")

    slots = mask_slots(arguments, device)
    if not arguments.no_ladder:
        found["rows_took_turns"] = takes_turns(device)
        climb_apart(
            rows,
            workload,
            mask_slots=slots,
            limit_s=arguments.row_limit,
            report=tell,
            keep=partial(keep, "ladder"),
        )
        print(ladder_table(found["ladder"]) + "\n")
        print(how_they_ran(found["ladder"], device) + "\n")
        for row in found["ladder"] if arguments.kernels else []:
            print(kernel_table(row, arguments.kernels) + "\n")
    if arguments.profile is not None:
        row = profiled_row(device)
        tell(f"profile: {row.name}")
        runner = OurRunner(row, workload, slots or MASK_SLOTS)
        runner.warm_up()
        keep("profile", profile_step(runner, to_write(arguments.profile)))
        del runner
        print(profile_table(found["profile"]) + "\n")
    if arguments.inference:
        compiled = choose_execution(config, device).compiled
        measure_inference_apart(workload, compiled=compiled, report=tell, keep=partial(keep, "inference"))
        print(inference_table(found["inference"]) + "\n")
    if arguments.loader:
        tell("decoding")
        keep("decoding", measure_decoding_apart(config))
        print(decoding_table(found["decoding"]) + "\n")
        tell("handover")
        keep("handover", measure_handover())
        print(handover_table(found["handover"]) + "\n")
        tell("loader")
        keep("loader", measure_loading(config, device, workload.images, workload.steps))
        print(loading_table(found["loader"]) + "\n")
    if arguments.processes is not None:
        keep("scaling", measure_scaling(workload, arguments.processes, report=tell))
        print(scaling_table(found["scaling"]) + "\n")
    if arguments.reader:
        tell("reader")
        images, annotations = arguments.reader_size or (None, 100_000)
        keep("reader", measure_reading(annotations, images))
        print(reading_table(found["reader"]) + "\n")
    if arguments.evaluation:
        tell("evaluation")
        keep("evaluation", measure_judging())
        print(judging_table(found["evaluation"]) + "\n")
    if broken(found.get("ladder", [])):
        print("error: a row failed or does not agree with the first of ours; see the table", file=sys.stderr)
        raise SystemExit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("benchmark", "Measure the training step on synthetic images, technique by technique.")
    parser.add_argument("--config", help=f"YAML recipe (default: {RECIPE}); its weights are left out")
    parser.add_argument("--steps", type=int, help="that are timed (default: 50, on a CPU 5)")
    parser.add_argument("--batch", type=int, help="images a step (default: 12, on a CPU 2)")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of the images (default: 800 1344, on a CPU 320 480)",
    )
    parser.add_argument(
        "--mask-slots",
        metavar="N",
        help="an image, of the rows that pack them; match: as many as torchvision has foreground RoIs in "
        f"the same run, rounded up to 16 a batch (default: {MASK_SLOTS}, on a CPU match)",
    )
    parser.add_argument("--no-ladder", action="store_true", help="leave out the training rows")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="NAME",
        help="the training rows to measure, in the ladder's order; help: print the names of all. The first "
        "of ours among them is what the others of ours must agree with",
    )
    parser.add_argument(
        "--row-limit",
        type=float,
        metavar="S",
        help="seconds that a training row may take, compilation included; one that takes longer has failed",
    )
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        metavar="N",
        help="also print the N kernels of each row that take the GPU longest",
    )
    parser.add_argument(
        "--inference", action="store_true", help="also measure inference, batch 1 and 8, masks pasted"
    )
    parser.add_argument(
        "--loader",
        action="store_true",
        help="also measure decoding on one core, the way of batches between processes, and the step fed by "
        "the loader, from data.train or the embedded shapes",
    )
    parser.add_argument(
        "--evaluation", action="store_true", help="also measure COCO's evaluation of results that are made up"
    )
    parser.add_argument(
        "--reader",
        action="store_true",
        help="also measure the reading of an annotation file that is made up, and starts with it",
    )
    parser.add_argument(
        "--reader-size",
        type=int,
        nargs=2,
        metavar=("IMAGES", "ANNOTATIONS"),
        help="of that file (default: 14286 100000)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="also measure the step in one process and in N, each with a GPU (or, on a CPU, its part of the "
        "cores) and --batch images",
    )
    parser.add_argument(
        "--schedule",
        choices=["cuda"],
        help="measure nothing: count kernels and bytes of the compiled CUDA step, and estimate its time; "
        "needs a CUDA build of torch, but no GPU",
    )
    parser.add_argument(
        "--profile", metavar="DIR", help="also print the eager step's time by part, and write a trace"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything that was measured, anew after each row"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.compile=on")
    return parser.parse_intermixed_args(argv)


def tell_schedule(arguments: argparse.Namespace, config: Config) -> None:
    """The schedule of the last row but epilogues, or with them where the configuration says so."""
    device = torch.device("cuda")
    workload = make_workload(arguments, config, device)
    slots = mask_slots(arguments, device)
    if slots is None:
        raise UserError("--schedule runs no torchvision to match: give --mask-slots a number")
    if config.model.mask_head.enabled:
        config = changed(config, "model.mask_head.slots_per_image", slots)
    check_synthetic(config)
    tell("tracing the step; this takes a minute or two")
    found: dict[str, Any] = {
        **environment(torch.device("cpu")),
        "workload": {**workload.facts, "mask_slots": slots},
        "schedule": cuda_schedule(config, workload.shape, workload.images),
        "config": config.model_dump(mode="json"),
    }
    write(found, arguments.json)
    print(schedule_tables(found["schedule"], workload.images))


def make_workload(arguments: argparse.Namespace, config: Config, device: torch.device) -> Workload:
    steps, images, shape = (50, 12, [800, 1344]) if device.type == "cuda" else (5, 2, [320, 480])
    steps = steps if arguments.steps is None else arguments.steps
    images = images if arguments.batch is None else arguments.batch
    height, width = arguments.shape or shape
    for option, value, least in (("--steps", steps, 1), ("--batch", images, 1), ("--shape", height, 32)):
        if value < least:
            raise UserError(f"{option} must be at least {least}, got {value}")
    for value in arguments.reader_size or ():
        if value < 1:
            raise UserError(f"--reader-size must be at least 1, got {value}")
    if width < 32:
        raise UserError(f"--shape must be at least 32, got {width}")
    return Workload(config, device, (height, width), images, steps, seed=config.train.seed)


def row_names(arguments: argparse.Namespace) -> tuple[list[str] | None, list[str]]:
    """Names after --rows, None for those that the configuration chooses; and the settings, which may stand
    after them."""
    words = arguments.rows or []
    settings = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    return (names if arguments.rows else None), [*arguments.overrides, *settings]


def all_rows(device: torch.device) -> list[Row]:
    return cuda_rows(max_autotune=True) if device.type == "cuda" else cpu_rows(compiled=True)


def choose_rows(names: list[str] | None, config: Config, device: torch.device) -> list[Row]:
    """Those of these names, or what the configuration compiles."""
    if names is None:
        if device.type == "cuda":
            return cuda_rows(max_autotune=config.train.compile == "max-autotune")
        return cpu_rows(compiled=config.train.compile in ("on", "max-autotune"))
    rows = all_rows(device)
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise UserError(f"--rows: no row '{name}' on this device; there are: {'; '.join(known)}")
    return [row for row in rows if row.name in names]


def profiled_row(device: torch.device) -> Row:
    """The last of the rows that are not compiled: only an eager step has operations to tell apart."""
    rows = cuda_rows(max_autotune=False) if device.type == "cuda" else cpu_rows(compiled=False)
    return [row for row in rows if row.program == "fastmrcnn" and not row.execution.compiled][-1]


def heading(found: dict[str, Any]) -> str:
    what = found["workload"]
    small = "" if found["gpu"] else " A CPU's figures say nothing about a GPU."
    return (
        f"{origin(found)}\n"
        f"{what['backbone']} {what['architecture']}, random weights, {what['images']} images of "
        f"{what['height']}x{what['width']} a step, noise with {what['objects_per_image']} objects an image, "
        f"{what['rois_per_image']} RoIs an image, {what['steps']} steps.{small}"
    )


def how_they_ran(rows: list[dict[str, Any]], device: torch.device) -> str:
    """How fairly rows compare."""
    text = "Each row ran in a process of its own"
    if not takes_turns(device):
        return f"{text}, one after the other with all of the GPU, not in turns."
    waits = [row["waiting_processor_ms"] for row in rows if "waiting_processor_ms" in row]
    most = f"; waiting for its turn cost it {max(waits):.0f} ms of processor time at most" if waits else ""
    return f"{text}, and they took turns step by step{most}."


def write(found: dict[str, Any], file: str | None, key: str | None = None, value: Any = None) -> None:
    """Add to what has been found, and write the file anew, if there is to be one."""
    if key is not None:
        found[key] = value
    if file is not None:
        write_text(to_write(file), json.dumps(found, indent=1) + "\n")


def mask_slots(arguments: argparse.Namespace, device: torch.device) -> int | None:
    given = arguments.mask_slots or (str(MASK_SLOTS) if device.type == "cuda" else "match")
    if given == "match":
        return None
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"--mask-slots must be a number above 0, or match, got {given}")
    return int(given)


def tell(line: str) -> None:
    """Progress goes to the error stream; the tables are the output."""
    tqdm.write(line, file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
