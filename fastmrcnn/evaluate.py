"""python -m fastmrcnn.evaluate: COCO's numbers, and pictures, of a checkpoint on a data set."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path

from fastmrcnn.config.checks import proposals_problem
from fastmrcnn.data.build import read_split
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.keypoints import check_same_keypoints
from fastmrcnn.data.same_classes import align_classes
from fastmrcnn.device import set_threads
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.evaluation.run import RESULTS, run_evaluation
from fastmrcnn.files import make_folder, new_run_folder, to_write, write_json
from fastmrcnn.group import Group, first_speaks, group_of_environment, joined
from fastmrcnn.training.sharing import own_device
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import find_checkpoint
from fastmrcnn.weights.sources import is_url
from fastmrcnn.weights.trained import TrainedModel, load_overridden, load_recipe


def main(argv: list[str]) -> None:
    group = group_of_environment()
    with first_speaks(group), joined(group):
        evaluate(group.lead(lambda: parse_arguments(argv)), group)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("evaluate", "COCO's average precision of a checkpoint: boxes, masks, keypoints.")
    parser.add_argument(
        "--checkpoint",
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument(
        "--config", help="instead: recipe whose model.weights are to be judged; see configs/zoo/"
    )
    parser.add_argument("--output", help="new folder (default: evaluation_001, ... beside the checkpoints)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the checkpoint's configuration, such as data.val.images=DIR data.val.annotations=FILE",
    )
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.checkpoint is None) == (arguments.config is None):
        raise UserError("give either --checkpoint or --config (a recipe with model.weights)")
    return arguments


def evaluate(arguments: argparse.Namespace, group: Group) -> None:
    def load() -> TrainedModel:
        device = own_device(arguments.device, group)
        if arguments.config is None:
            return load_overridden(arguments.checkpoint, device, arguments.overrides)
        return load_recipe(arguments.config, device, arguments.overrides)

    trained = group.each(load)
    config = trained.card.config
    source = arguments.checkpoint or arguments.config
    dataset = group.each(lambda: read_validation_set(trained.card, source))
    print(*dataset.summary(), sep="\n")
    set_threads(config.runtime.threads)
    folder = group.lead(lambda: evaluation_folder(arguments.checkpoint, arguments.output, config.output))
    try:
        values = run_evaluation(trained.model, dataset, config, output=folder, group=group)
        if group.leads:
            known = {k: v if math.isfinite(v) else None for k, v in values.items()}
            write_json(folder / "metrics.json", known)
    except BaseException:
        with contextlib.suppress(OSError):
            if group.leads:
                folder.rmdir()  # only if nothing has been written
        raise
    print(f"\nResults, metrics and pictures are in {folder}")


def read_validation_set(card: ModelCard, checkpoint: str) -> CocoDataset:
    """The set that data.val names, its class indices those of the model."""
    config = card.config
    split = config.data.val
    if split.images is None or split.annotations is None:
        raise UserError(
            "no validation set: give data.val.images=DIR and data.val.annotations=FILE on the command line"
        )
    if problem := proposals_problem(config, "val"):
        raise UserError(problem)
    dataset = read_split(config, "val")
    check_same_keypoints(dataset.keypoints, card.keypoints, dataset.annotations, checkpoint)
    return align_classes(dataset, card.class_names, card.category_ids, checkpoint)


def evaluation_folder(checkpoint: str | None, output: str | None, root: str = "runs") -> Path:
    """The folder that was asked for, or a new one beside the checkpoints; never one with results.

    Args:
        root: where the new one comes if the weights are no file here.
    """
    if output is None:
        if checkpoint is None or is_url(checkpoint):
            return new_run_folder(root, "evaluation")
        parent = find_checkpoint(checkpoint).parent
        return new_run_folder(parent.parent if parent.name == "checkpoints" else parent, "evaluation")
    folder = to_write(output)
    if (folder / RESULTS).exists():
        raise UserError(f"{folder}: holds the results of an earlier evaluation; choose another --output")
    make_folder(folder)
    return folder


if __name__ == "__main__":
    run_main(main)
