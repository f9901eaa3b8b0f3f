"""Short runs of a training step, by one process or by several that sum over gloo.

    python group_runs.py RANK SIZE FOLDER TRIAL...

makes these of TRIALS as process RANK of SIZE and writes what came of them to FOLDER/RANK.pt.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from nosync import NoSync
from torch import Tensor

from fastmrcnn.config.file import parse_config
from fastmrcnn.config.schema import OptimConfig
from fastmrcnn.device import choose_precision
from fastmrcnn.graphs import leaves
from fastmrcnn.group import ALONE, Group
from fastmrcnn.model.build import build_model
from fastmrcnn.structures import Batch, Proposals, present, tree_map
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.step import TrainingStep

CPU = torch.device("cpu")
JOINTS = 4
# All that is proposed is learnt from, and NMS leaves a few boxes alone. Else rounding, which is not the same
# for two images at once and for each by itself, would now and then choose another RoI.
TREE: dict[str, Any] = {
    "backbone": {"name": "resnet18", "norm": "gn", "frozen_stages": 0, "width": 8},
    "fpn": {"channels": 8},
    "anchors": {"sizes": [[8], [16], [24], [40], [64]]},
    "rpn": {"pre_nms_top_n": 30, "post_nms_top_n": 20, "batch_per_image": 32, "nms_iou": 0.7},
    "roi": {"batch_per_image": 128, "sampling_ratio": 2},
    "box_head": {"hidden": 16, "detections": 10},
    "mask_head": {"convs": 1, "channels": 8},
    "keypoint_head": {"convs": 1, "channels": 8},
}


@dataclass
class Trial:
    """A model, how it is trained, and for how long."""

    norm: str = "gn"
    model: dict[str, dict[str, Any]] = field(default_factory=dict)  # changes to TREE
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", clip_norm=3.0, ema=0.9, momentum=0.9)
    )
    steps: int = 2
    images: int = 2  # of a step
    accumulate: int = 1
    precision: str = "fp32"
    reduce_bf16: bool = False
    compiled: bool = False
    recorded: str | None = None  # whole | parts, by a stand-in for CUDA graphs
    bad: tuple[int, int] | None = None  # step and image of pixels that are not finite
    fault: str | None = None  # the last process's loss, or gradient, is infinite in the second step
    lr: float = 0.01
    means: bool = False  # average the processes' losses, which is wrong
    guarded: bool = False  # fail if the host waits for the device


ADAMW = OptimConfig(name="adamw", clip_norm=3.0, ema=0.9)
RPN_ALONE = {name: {"enabled": False} for name in ("box_head", "mask_head", "keypoint_head")}
TRIALS = {
    "frozen_bn": Trial("frozen_bn", steps=20),
    "gn": Trial("gn", steps=20),
    # Batch norm makes much of little: at a higher rate one process's own losses, from weights that differ by
    # rounding, are 1 % apart after 20 steps.
    "sync_bn": Trial("sync_bn", steps=20, lr=0.001),
    "plain": Trial(guarded=True),
    "adamw": Trial(optim=ADAMW, lr=0.001),
    "means": Trial(means=True),
    "counted": Trial(
        model={"rpn": {"loss_normalizer": "sampled"}, "keypoint_head": {"loss_normalizer": "static"}}
    ),
    "cascade": Trial(model={"box_head": {"cascade": True, "class_agnostic": True}}),
    "softmax": Trial(model={"mask_head": {"loss": "softmax"}}),
    "mlp": Trial(model={"mask_head": {"kind": "mlp", "hidden": 16}, "box_head": {"class_agnostic": True}}),
    "rpn": Trial(model=RPN_ALONE),
    "given": Trial(model={"rpn": {"enabled": False}}),
    "slots": Trial(model={"mask_head": {"slots_per_image": 2}}, steps=1),
    "bad": Trial("sync_bn", bad=(1, 1), steps=3, lr=0.001),
    "bad loss": Trial(fault="loss", steps=3),
    "overflow": Trial(fault="gradient", precision="fp16", steps=3),
    "bf16": Trial(reduce_bf16=True),
    "accumulate": Trial(images=4, accumulate=2),
    "accumulate bf16": Trial(images=4, accumulate=2, reduce_bf16=True),
    "whole": Trial(recorded="whole"),
    "parts": Trial(recorded="parts"),
    "accumulate whole": Trial(images=4, accumulate=2, recorded="whole"),
    "accumulate parts": Trial(images=4, accumulate=2, recorded="parts"),
    "compiled": Trial("sync_bn", compiled=True, lr=0.001),
}


def counts_of(step: int, images: int) -> tuple[int, ...]:
    """Objects of each image: quite different numbers, and none in some."""
    return tuple(((5, 1), (0, 4), (3, 0), (1, 6))[step % 4][image % 2] for image in range(images))


def batch_of(trial: Trial, step: int) -> Batch:
    """All images of a step."""
    batch = random_batch(step, counts_of(step, trial.images), shape=(64, 64))
    targets = batch.targets
    assert targets is not None
    r = torch.Generator().manual_seed(1000 + step)
    low, high = targets.boxes[:, :, None, :2], targets.boxes[:, :, None, 2:]
    places = low + (high - low) * torch.rand(*targets.valid.shape, JOINTS, 2, generator=r)
    # The first image's are nearly all visible, of the second's few are.
    seen = torch.rand(*targets.valid.shape, JOINTS, 1, generator=r)
    seen = seen < torch.tensor([0.9, 0.3] * trial.images)[: trial.images, None, None, None]
    seen = 2.0 * (seen & targets.valid[..., None, None])
    batch = batch._replace(targets=targets._replace(keypoints=torch.cat([places, seen], -1)))
    if trial.model.get("rpn", {}).get("enabled", True) is False:
        boxes = 40 * torch.rand(trial.images, 12, 4, generator=r)
        boxes[..., 2:] = boxes[..., :2] + 8 + boxes[..., 2:] / 4
        valid = torch.ones(trial.images, 12, dtype=torch.bool)
        batch = batch._replace(proposals=Proposals(boxes, torch.zeros(trial.images, 12), valid))
    if trial.bad is not None:
        pixels = batch.pixels.float()
        if trial.bad[0] == step:
            pixels[trial.bad[1]] = float("nan")
        batch = batch._replace(pixels=pixels)
    return batch


def cut(batch: Batch, first: int, count: int) -> Batch:
    """Some images of a batch. What all of them share stays whole."""
    targets = batch.targets
    assert targets is not None
    rows = slice(first, first + count)
    masks = targets.masks
    own = masks._replace(**{k: v[rows] for k, v in masks._asdict().items() if k != "buffer"})
    rest = targets._replace(masks=None)  # type: ignore[arg-type]
    rest = tree_map(lambda t: t[rows], batch._replace(targets=rest))
    return rest._replace(targets=rest.targets._replace(masks=own))


def make_step(trial: Trial, group: Group) -> TrainingStep:
    tree = {name: {**section, **trial.model.get(name, {})} for name, section in TREE.items()}
    tree["backbone"]["norm"] = trial.norm
    tree["keypoint_head"] = {"enabled": True, **tree["keypoint_head"]}
    config = parse_config({"model": tree}, "the test").model
    torch.manual_seed(0)
    model = build_model(config, 3, JOINTS).train()
    step = TrainingStep(
        model,
        trial.optim,
        choose_precision(trial.precision, CPU),
        Execution(reduce_bf16=trial.reduce_bf16),
        seed=5,
        group=group,
        accumulate=trial.accumulate,
    )
    if trial.compiled:
        step.forward = torch.compile(step.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    if trial.recorded is not None:
        cut = trial.recorded == "parts"
        step.record(PartsRecorder(step) if cut else Recorder(), cut=cut)
    return step


class Recorder:
    """Stands for a CUDA graph: `replay` runs what was recorded, on the buffers that it was recorded on."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        for _ in range(2):
            result = run(*inputs)

        def replay() -> None:
            for own, new in zip(leaves(result), leaves(run(*inputs)), strict=True):
                own.copy_(new)

        return result, replay


class PartsRecorder:
    """Stands for a CUDA graph of each part, with the sums between them, on the buffers that were recorded.

    A part that ran a sum itself would not go unseen: `reduce` is not there while a part runs.
    """

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.parts = 0

    def __call__(self, run: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[[], None]]:
        reduce, step = self.step.reduce, self.step
        held: list[Tensor] = []
        result: list[Any] = []

        def once() -> None:
            parts = run(*inputs)
            for place in range(100):
                step.reduce = _no_sum
                try:
                    tensor = next(parts)
                except StopIteration as end:
                    if not result:
                        result.append(end.value)
                    for own, new in zip(leaves(result[0]), leaves(end.value), strict=True):
                        own.copy_(new)
                    self.parts = place + 1
                    return
                finally:
                    step.reduce = reduce
                if place == len(held):
                    held.append(tensor.clone())
                held[place].copy_(tensor)
                reduce(held[place])
                tensor.copy_(held[place])

        once()
        return result[0], once


def _no_sum(tensor: Tensor) -> None:
    raise AssertionError("a sum over processes within a part")


def made(trial: Trial, group: Group = ALONE) -> dict[str, Any]:
    """What comes of a trial: losses and counts of each step, gradients of the first and the last, weights,
    statistics and averages at the end, and where they began."""
    step = make_step(trial, group)
    began = {name: value.clone() for name, value in step.model.state_dict().items()}
    gradients: list[dict[str, Tensor]] = []
    names = {id(p): name for name, p in step.model.named_parameters()}
    apply = step.update.apply

    def noted(loss: Tensor, number: Any) -> None:
        own = {names[id(p)]: p.grad.clone() for p in step.update.parameters if p.grad is not None}
        gradients.append(own)
        apply(loss, number)

    step.update.apply = noted  # type: ignore[method-assign]
    if trial.means:
        averaging_means(step)
    if trial.fault is not None and group.rank == group.size - 1:
        break_second_step(step, trial.fault)
    rows = []
    images = trial.images // (group.size * trial.accumulate)
    for number in range(trial.steps):
        whole = batch_of(trial, number)
        batches = [
            cut(whole, (k * group.size + group.rank) * images, images) for k in range(trial.accumulate)
        ]
        with NoSync() if trial.guarded else contextlib.nullcontext():
            losses, counts = step(batches if trial.accumulate > 1 else batches[0], number, trial.lr)
        rows.append({name: value.item() for name, value in present(losses, counts).items()})
    assert not any(p.grad is not None for p in step.update.parameters)
    return {
        "rows": rows,
        "gradients": [gradients[0], gradients[-1]] if gradients else [],
        "began": began,
        "model": step.model.state_dict(),
        "ema": None if step.ema is None else step.ema.model.state_dict(),
        "bad": int(step.update.first_bad_step),
        "scale": float(step.update.scale),
        "phase": step.update.phase,
    }


def averaging_means(step: TrainingStep) -> None:
    """Let each process's losses weigh as much as any other's, which is wrong."""
    forward = step.forward

    def means(batch: Batch, keys: Any) -> Any:
        losses, counts, *own = forward(batch, keys)
        if not own:
            return losses, counts
        ones, count = torch.ones_like(own[0].divisors), len(own[0].values)
        sums = torch.cat([own[0].values.detach().double(), ones, own[0].sums[2 * count :]])
        return losses, counts, own[0]._replace(divisors=ones, sums=sums)

    step.forward = means


def break_second_step(step: TrainingStep, fault: str) -> None:
    losses = step.model.losses
    calls: list[int] = []

    def broken(*given: Any) -> Any:
        calls.append(1)
        found, counts = losses(*given)
        if len(calls) != 2:
            return found, counts
        assert found.loss_rpn_cls is not None
        if fault == "loss":
            return found._replace(loss_rpn_cls=found.loss_rpn_cls + math.inf), counts
        (bias, *_) = (p for name, p in step.model.named_parameters() if name == "rpn.head.deltas.bias")
        zero = (bias - bias.detach()).sum()
        zero.register_hook(lambda grad: grad * math.inf)
        return found._replace(loss_rpn_cls=found.loss_rpn_cls + zero), counts

    step.model.losses = broken  # type: ignore[method-assign]


@contextlib.contextmanager
def joined(rank: int, size: int, folder: Path) -> Iterator[Group]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    try:
        yield Group(rank, size, rank)
    finally:
        torch.distributed.destroy_process_group()


def run_together(folder: Path, names: Sequence[str], size: int = 2) -> list[dict[str, dict[str, Any]]]:
    """What each of `size` processes makes of the trials of these names, in turn."""
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    commands = [
        [sys.executable, str(here), str(rank), str(size), str(folder), *names] for rank in range(size)
    ]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def main(rank: int, size: int, folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    with joined(rank, size, folder) as group:
        found = {name: made(TRIALS[name], group) for name in names}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
