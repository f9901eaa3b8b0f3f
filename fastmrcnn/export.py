"""python -m fastmrcnn.export: a trained model as a file that runs without this program and finds the same."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import read_split
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.images import read_image
from fastmrcnn.data.transforms import Size
from fastmrcnn.deployment.beside import check_labels, files_beside
from fastmrcnn.deployment.graph import INPUTS, ServingGraph, check_shape
from fastmrcnn.deployment.onnx_file import as_onnx, require_onnx, with_card
from fastmrcnn.deployment.parity import FULL, HALF, Inputs, compare, eager, median_times
from fastmrcnn.deployment.preprocess import as_inputs, default_shape, noise
from fastmrcnn.deployment.pt2 import as_compiled, as_program
from fastmrcnn.device import choose_device, set_threads
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import expanded, make_folder, new_run_folder, replacing, to_write, write_text
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.speed.torchvision_row import NotComparableError, torchvision_detector
from fastmrcnn.weights.checkpoint import find_checkpoint
from fastmrcnn.weights.exported import (
    CARD,
    Arrays,
    ExportedCard,
    Runner,
    as_text,
    open_session,
    session_runner,
)
from fastmrcnn.weights.pt2_file import pt2_runner
from fastmrcnn.weights.sources import is_url
from fastmrcnn.weights.trained import TrainedModel, load_overridden


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.format == "onnx":
        require_onnx()
    torch.manual_seed(0)
    trained = load_overridden(arguments.checkpoint, arguments.aot or "cpu", arguments.overrides)
    config = trained.card.config
    set_threads(config.runtime.threads)
    check_labels(trained.card.class_names)
    graph = ServingGraph(trained, half=arguments.half, paste=arguments.paste)
    dataset, where = validation_images(config)
    shape = choose_shape(arguments.shape, config, dataset)
    target = choose_output(arguments.output, arguments.format)
    print(f"Images of {shape[0]} x {shape[1]}, {arguments.batch} at a time; {where}", flush=True)
    exported = ExportedCard(trained.card, shape, arguments.batch, arguments.half)
    content, run, engine = as_file(graph, exported, arguments.format, arguments.aot)
    batches = parity_inputs(dataset, config, shape, arguments.batch, arguments.images)
    faults = report(trained, exported, run, batches, engine)
    if faults:
        print(f"error: the file does not find what the model finds: {'; '.join(faults)}", file=sys.stderr)
        print("Nothing was written", file=sys.stderr)
        raise SystemExit(1)
    if target is None:
        target = new_folder(arguments.checkpoint, config.output) / f"model.{arguments.format}"
    make_folder(target.parent)
    example: Arrays = dict(zip(INPUTS, batches[0], strict=True))
    tensors = {"input": example, "output": run(*batches[0])}
    beside = files_beside(exported, target.name, tensors, arguments.aot)
    for name, text in beside.items():
        write_text(target.parent / name, text)
    with replacing(target) as stream:  # the last: where it is, the others are
        stream.write(content)
    print(f"Written: {target} ({len(content) / 1e6:.1f} MB), and beside it {', '.join(beside)}")
    word = shlex.quote(str(target))
    print(
        f"  python {shlex.quote(str(target.parent / 'run_model.py'))} IMAGE\n"
        f"  python -m fastmrcnn.predict IMAGE --checkpoint {word} --output DIR\n"
        f"  python -m fastmrcnn.evaluate --checkpoint {word}"
    )


def as_file(
    graph: ServingGraph, exported: ExportedCard, form: str, aot: str | None
) -> tuple[bytes, Runner, str]:
    """The content of the file, a function that runs it, and the name of what runs it."""
    batch, shape = exported.batch, exported.shape
    if form == "onnx":
        model = as_onnx(graph, exported.card.config.model, len(exported.card.class_names), batch, shape)
        content = with_card(model, exported)
        return content, session_runner(open_session(content)), "onnxruntime"
    told = {CARD: as_text(exported)}
    if aot is None:
        content = as_program(graph, batch, shape, told)
    else:
        print(f"AOTInductor compiles it for {aot}, which takes minutes ...", flush=True)
        content = as_compiled(graph, batch, shape, told)
    run = pt2_runner(content, choose_device(aot or "cpu"))
    return content, run, "torch.export" if aot is None else "AOTInductor"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "export",
        "Write a trained model as a file that runs without this program, and check that it finds the same. "
        "Exit code 1: it does not, and nothing is written.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "pt2"),
        default="onnx",
        help="onnx (default), or pt2: a program of torch.export",
    )
    parser.add_argument(
        "--aot", choices=("cpu", "cuda"), help="with pt2: compiled by AOTInductor for this kind of device"
    )
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="padded height and width of the images (default: the smallest that holds those of data.val by "
        "the model's rule, or any image)",
    )
    parser.add_argument("--batch", type=int, default=1, help="images of a call (1)")
    parser.add_argument("--half", action="store_true", help="weights and activations in fp16")
    parser.add_argument(
        "--paste", action="store_true", help="one more output: masks in the size of the images, as bits"
    )
    parser.add_argument(
        "--output", metavar="F", help="file to write (default: a new folder exported_001 in the run)"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=8,
        metavar="K",
        help="images of data.val, or of noise, to check with (8)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the checkpoint's configuration, such as model.box_head.score_threshold=0.3",
    )
    arguments = parser.parse_intermixed_args(argv)
    for name in ("batch", "images"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if arguments.aot is not None and arguments.format != "pt2":
        raise UserError("--aot goes with --format pt2")
    return arguments


def validation_images(config: Config) -> tuple[CocoDataset | None, str]:
    """The set that data.val names, if it is there; and a line about what the file is checked with."""
    split = config.data.val
    if split.images is None or split.annotations is None:
        return None, "checked with noise, since there is no data.val"
    for path in (split.images, split.annotations):
        if not expanded(path).exists():
            return None, f"checked with noise, since {path} is not there; data.val.images=DIR ... give others"
    dataset = read_split(config, "val")
    return dataset, f"checked with images of {split.annotations}"


def choose_shape(given: Sequence[int] | None, config: Config, dataset: CocoDataset | None) -> Size:
    if given is None:
        sizes = None if dataset is None else [(one.height, one.width) for one in dataset.records]
        return default_shape(config, sizes)
    height, width = given
    check_shape(height, width)
    return height, width


def choose_output(given: str | None, form: str) -> Path | None:
    """The file that was asked for, which is not there yet; None: the default."""
    if given is None:
        return None
    target = to_write(given)
    if target.suffix != f".{form}":
        raise UserError(f"--output {target}: must end in .{form}")
    for name in (target.name, "labels.txt", "preprocessing.json", "run_model.py", "config.pbtxt"):
        if (target.parent / name).exists():
            raise UserError(f"{target.parent / name}: is already there; choose another --output or remove it")
    return target


def new_folder(checkpoint: str, root: str) -> Path:
    """A new one in the run that the checkpoint is of, or beside its file."""
    if is_url(checkpoint):
        return new_run_folder(root, "exported")
    parent = find_checkpoint(checkpoint).parent
    return new_run_folder(parent.parent if parent.name == "checkpoints" else parent, "exported")


def parity_inputs(
    dataset: CocoDataset | None, config: Config, shape: Size, batch: int, count: int
) -> list[Inputs]:
    """Whole batches of at least `count` images, spread evenly over the set, or of noise."""
    if dataset is not None and dataset.records:
        count = min(count, len(dataset))
    total = -(-count // batch) * batch
    if dataset is None or not dataset.records:
        pixels = noise(total, shape)
        sizes = np.array([shape] * total, np.int32)
    else:
        records = [dataset.records[index * len(dataset) // total] for index in range(total)]
        pixels, sizes = as_inputs([read_image(one)[0] for one in records], config.data, shape)
    return [(pixels[i : i + batch], sizes[i : i + batch]) for i in range(0, total, batch)]


def report(
    trained: TrainedModel, exported: ExportedCard, run: Runner, batches: Sequence[Inputs], engine: str
) -> list[str]:
    """Print how far the file differs from the model, and how long each takes; what is out of tolerance.

    Args:
        engine: the name of what runs the file.
    """
    model, config = trained.model, trained.card.config
    assert isinstance(model, MaskRCNN)
    tolerances = HALF if exported.half else FULL
    parity = compare(model, run, batches, tolerances, config.model.mask_head.threshold)
    print(*parity.lines(), sep="\n", flush=True)
    if not parity.matched:
        print("The model finds nothing in these images, which tells little; give data.val.images=DIR ...")
    pixels, sizes = batches[0]
    calls = {
        f"the file ({engine})": lambda: run(pixels, sizes),
        "eager": lambda: eager(model, pixels, sizes),
    }
    try:
        calls["torchvision"] = torchvision_detector(trained.card, model.state_dict(), pixels, sizes)
    except NotComparableError as error:
        print(f"not beside torchvision: {error}")
    for name, milliseconds in median_times(calls).items():
        print(f"{name}: {milliseconds:.1f} ms for {len(pixels)} of {pixels.shape[1]} x {pixels.shape[2]}")
    return parity.faults()


if __name__ == "__main__":
    run_main(main)
