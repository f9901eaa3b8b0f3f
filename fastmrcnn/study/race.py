"""Ours and torchvision's Mask R-CNN, the same network, images and machine: what each learns in a time.

A contender trains for so many minutes, without what evaluating takes, and is judged. Ours, and torchvision
with the recipe's optimizer, begin anew for each time, since their learning rate falls towards its end; with
its own defaults the rate stays as it is, and one run is judged at all times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import read_sets, train_loader, with_pixel_range
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.device import choose_precision
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.run import judge_results, run_evaluation
from fastmrcnn.files import make_folder, write_json
from fastmrcnn.speed.environment import environment
from fastmrcnn.study.peer import Examples, build_peer, peer_results
from fastmrcnn.study.places import race_file
from fastmrcnn.study.runs import CONFIGS
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.optim import Ema, GatedStep, build_optimizer, set_rate
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.start import new_model

MINUTES = (1.0, 2.0, 5.0, 10.0)
OURS, DEFAULTS, TUNED = "ours", "torchvision", "torchvision_tuned"
CONTENDERS = (OURS, DEFAULTS, TUNED)
TRACKS = {"nuclei": "nuclei", "mushrooms": "small", "flakes": "small"}
"""Set: its recipe."""
# torchvision's references/detection/train.py: the rate is for 8 processes with 2 images each.
RATE, RATE_BATCH, MOMENTUM, DECAY, WARM_UP, WARM_FROM = 0.02, 16, 0.9, 1e-4, 1000, 0.001


class Mark(NamedTuple):
    minutes: float
    steps: int
    metrics: dict[str, float]


class Course(NamedTuple):
    """What all contenders are given."""

    config: Config
    card: ModelCard
    train_set: CocoDataset
    val_set: CocoDataset


def course(name: str, folder: Path, seed: int, extra: Sequence[str] = ()) -> Course:
    """A set with the recipe that it is trained by; loading is in this process, for all alike.

    Raises:
        UserError: the folder does not hold such a set.
    """
    settings = [
        *(f"data.{split}.{kind}={path}" for split, kind, path in places(folder)),
        f"train.seed={seed}",
        "data.workers=0",
        "runtime.device=cpu",
        *extra,
    ]
    config = load_config(CONFIGS / f"{TRACKS[name]}.yaml", settings)
    train_set, val_set = read_sets(config)
    assert val_set is not None, "it was given"
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    return Course(with_pixel_range(config, train_set), card, train_set, val_set)


def places(folder: Path) -> list[tuple[str, str, Path]]:
    """Split, images or annotations, and where they are: images/ beside train.json and val.json, or train/
    and valid/ with a file _annotations.coco.json in each."""
    one = [
        (split, kind, folder / ("images" if kind == "images" else f"{split}.json"))
        for split in ("train", "val")
        for kind in ("images", "annotations")
    ]
    own = [
        (split, kind, folder / name if kind == "images" else folder / name / "_annotations.coco.json")
        for split, name in (("train", "train"), ("val", "valid"))
        for kind in ("images", "annotations")
    ]
    for layout in (one, own):
        if all(path.exists() for _, _, path in layout):
            return layout
    raise UserError(
        f"{folder}: holds neither images/, train.json and val.json nor train/ and valid/ with "
        "_annotations.coco.json in each"
    )


Step = Callable[[float], None]
"""One step of training, at this share of the time."""
Judge = Callable[[], dict[str, float]]


def ours(track: Course) -> tuple[Step, Judge]:
    """The trainer's own step, loader and schedule, by the time that has passed."""
    config = track.config
    device = torch.device("cpu")
    torch.manual_seed(config.train.seed)
    model = new_model(track.card, device)
    precision = choose_precision(config.runtime.precision, device)
    step = TrainingStep(
        model, config.optim, precision, choose_execution(config, device), seed=config.train.seed
    )
    endless = config.model_copy(update={"train": config.train.model_copy(update={"steps": 10**9})})
    loader = iter(train_loader(track.train_set, endless, 0, pin_memory=False))
    numbers = itertools.count()

    def train(share: float) -> None:
        number = next(numbers)
        step(step.upload(next(loader).batch), number, rate(config, number, share))

    def judge() -> dict[str, float]:
        judged = model if step.ema is None else step.ema.model
        judged.eval()
        with tempfile.TemporaryDirectory() as folder:
            found = run_evaluation(
                judged, track.val_set, config, output=Path(folder), pictures=0, progress=False
            )
        model.train()
        return found

    return train, judge


def torchvision(track: Course, tuned: bool) -> tuple[Step, Judge]:
    """torchvision's model in a plain loop, by its references' settings or by the recipe's optimizer."""
    config = track.config
    torch.manual_seed(config.train.seed)
    model = build_peer(config, track.card).train()
    batches: Iterator[Any] = Examples(track.train_set, config.train.seed).batches(config.train.images)
    numbers = itertools.count()
    judged: nn.Module = model
    advance: Callable[[torch.Tensor, int, float], None]
    if tuned:
        optimizer = build_optimizer(model, config.optim)
        update = GatedStep(model, optimizer, clip_norm=config.optim.clip_norm)
        ema = None if config.optim.ema is None else Ema(model, config.optim.ema)
        judged = model if ema is None else ema.model

        def advance(loss: torch.Tensor, number: int, share: float) -> None:
            set_rate(optimizer, rate(config, number, share))
            update.backward(loss, number)
            if ema is not None:
                ema.update(number)

    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM, weight_decay=DECAY)
        full = RATE * config.train.images / RATE_BATCH
        warm_up = min(WARM_UP, max(1, len(track.train_set.records) // config.train.images - 1))

        def advance(loss: torch.Tensor, number: int, share: float) -> None:
            done = min(1.0, number / warm_up)
            sgd.param_groups[0]["lr"] = full * (WARM_FROM * (1 - done) + done)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()

    def train(share: float) -> None:
        images, targets = next(batches)
        loss = sum(model(images, targets).values())
        advance(loss, next(numbers), share)

    def judge() -> dict[str, float]:
        results = peer_results(judged, track.val_set, config.model.mask_head.threshold)
        model.train()
        return judge_results(track.val_set, results, config, show=False)

    return train, judge


def rate(config: Config, number: int, share: float) -> float:
    """The recipe's learning rate where this share of the time has passed: warm-up by steps, then a cosine."""
    optim = config.optim
    full = optim.lr * config.train.images / optim.reference_batch
    value = full * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    if number < optim.warmup_steps:
        done = number / optim.warmup_steps
        value *= optim.warmup_factor * (1 - done) + done
    return value


def drive(step: Step, judge: Judge, minutes: Sequence[float], whole: float) -> list[Mark]:
    """Train until each of `minutes` has passed, in ascending order, and judge; judging stops the clock.

    Args:
        whole: minutes after which the schedule ends.
    """
    marks, steps, seconds = [], 0, 0.0
    for mark in minutes:
        while seconds < 60 * mark:
            began = time.perf_counter()
            step(seconds / (60 * whole))
            seconds += time.perf_counter() - began
            steps += 1
        found = {key: value for key, value in judge().items() if math.isfinite(value)}
        marks.append(Mark(mark, steps, found))
    return marks


def run(
    name: str, contender: str, folder: Path, seed: int, minutes: Sequence[float], extra: Sequence[str]
) -> Any:
    """All marks of a contender on a set, as they stand in its metrics file."""
    track = course(name, folder, seed, extra)
    marks: list[Mark] = []
    if contender == DEFAULTS:
        marks = drive(*torchvision(track, tuned=False), minutes, minutes[-1])
    else:
        for whole in minutes:  # each run has a schedule of its own
            made = ours(track) if contender == OURS else torchvision(track, tuned=True)
            marks += drive(*made, [whole], whole)
    return {
        "set": name,
        "contender": contender,
        "seed": seed,
        "recipe": TRACKS[name],
        "settings": list(extra),
        "batch": track.config.train.images,
        "threads": torch.get_num_threads(),
        "marks": [mark._asdict() for mark in marks],
        "environment": environment(torch.device("cpu")),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def main(argv: Sequence[str]) -> None:
    """In a process of its own: one contender on one set."""
    parser = argparse.ArgumentParser(prog="python -m fastmrcnn.study.race")
    parser.add_argument("set", choices=sorted(TRACKS))
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, nargs="+", default=list(MINUTES))
    parser.add_argument("--set", dest="extra", action="append", default=[])
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    found = run(given.set, given.contender, given.folder, given.seed, sorted(given.minutes), given.extra)
    path = race_file(given.output, given.set, given.contender, given.seed)
    make_folder(path.parent)
    write_json(path, found)
    print(json.dumps([[m["minutes"], m["steps"], m["metrics"].get("segm/AP")] for m in found["marks"]]))


if __name__ == "__main__":
    main(sys.argv[1:])
