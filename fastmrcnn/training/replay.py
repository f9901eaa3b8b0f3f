"""python -m fastmrcnn.train --resume RUN --replay STEP: one step once more, watched, and nothing written.

A batch is a function of the seed and its step, and the checkpoint of a step holds the weights before it, so
both are there after a loss that was not finite has ended a run.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import train_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.device import Precision, choose_device, choose_precision, set_up_cuda
from fastmrcnn.errors import UserError
from fastmrcnn.graphs import leaves
from fastmrcnn.group import ALONE
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import present, to_device
from fastmrcnn.training.execution import Execution
from fastmrcnn.training.finite import FiniteWatch, Record, described
from fastmrcnn.training.sharing import share_of
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import checkpoint_of_step, restore
from fastmrcnn.weights.start import new_model


def checkpoint_to_replay(run: str, step: int) -> Path:
    """The checkpoint from before step number `step` (from 0) of a run.

    Raises:
        UserError: there is none; which steps there are.
    """
    file, there = checkpoint_of_step(run, step)
    if file is None:
        known = ", ".join(map(str, there)) or "none"
        raise UserError(
            f"{run}: --replay {step} needs the weights from before that step, which a run saves that ends "
            f"with a loss that is not finite; steps that can be replayed here: {known}"
        )
    return file


def for_replay(config: Config) -> Config:
    """The configuration, so that the embedded set is read where it was drawn, and not drawn again."""
    drawn = config.data.train.annotations
    if not config.data.shapes or drawn is None or not Path(drawn).is_file():
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"shapes": False})})


def replay(config: Config, train_set: CocoDataset, state: dict[str, Any], step: int) -> tuple[bool, str]:
    """Run forward and backward of a step from the weights before it, operation by operation.

    The step is eager, whatever the run was, and makes no update.

    Args:
        state: the checkpoint of the step.
        step: its number, from 0.
    Returns:
        Whether the loss or its gradient was not finite, as the run judges it; and a paragraph that says
        where that began.
    Raises:
        UserError: the model does not fit the checkpoint; or the batch cannot be read.
    """
    device = choose_device(config.runtime.device)
    set_up_cuda(device)
    precision = choose_precision(config.runtime.precision, device)
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    model = new_model(card, device)
    share = share_of(config, ALONE)
    make_step = TrainingStep(
        model,
        config.optim,
        precision,
        Execution(),
        seed=config.train.seed,
        accumulate=share.accumulate,
    )
    average = None if make_step.ema is None else make_step.ema.model
    restore(state, model, make_step.optimizer, make_step.update, average)
    alone = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    more = alone.train.model_copy(update={"steps": max(config.train.steps, step + 1)})
    loader = train_loader(train_set, alone.model_copy(update={"train": more}), step, False, share)
    passes = list(itertools.islice(loader, share.accumulate))
    batches = [to_device(loaded.batch, device) for loaded in passes]

    watch = FiniteWatch(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        watch.given(tensor.data, f"the weights {name}")
    for tensor in leaves(batches):
        watch.given(tensor, "the batch")
    ids = [image_id for loaded in passes for image_id in loaded.image_ids]
    text = f"Step {step}, seed {config.train.seed}, image ids {ids}, {precision.name} on {device}:"
    for batch, keys in zip(batches, make_step.draw_keys(batches, step), strict=True):
        with watch:
            losses, _ = make_step.forward(batch, keys)
            total = losses.total()
            finite = bool(total.isfinite())
            if finite:
                (total * make_step.update.scale / share.accumulate).backward()
        shown = ", ".join(f"{name} {value.item():.4g}" for name, value in present(losses).items())
        text = f"{text} {shown}."
        if not finite:
            return True, _paragraph(f"{text} {_told(watch.record_of(total), 'The loss is not finite')}")
    bad, words = _judge_gradient(make_step, model, watch, precision)
    return bad, _paragraph(f"{text} The loss is finite. {words}")


def _judge_gradient(
    make_step: TrainingStep, model: MaskRCNN, watch: FiniteWatch, precision: Precision
) -> tuple[bool, str]:
    """Whether the gradient ends a run, by the rule of `GatedStep`; and where it begins not to be finite."""
    scale = float(make_step.update.scale)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    records = {name: record for name, grad in grads.items() if (record := watch.record_of(grad)) is not None}
    norm = float(torch.nn.utils.get_total_norm(list(grads.values()))) / scale
    if math.isfinite(norm):
        return False, (
            f"Its gradient is finite, with a norm of {norm:.4g}: this time nothing was wrong. What is "
            "compiled, or computed on another device, may round otherwise; runtime.device, "
            "runtime.precision and the images are worth a look."
        )
    if records:
        name, record = min(records.items(), key=lambda entry: entry[1].origin().number)
        words = _told(record, f"The gradient of {name}{_others(len(records) - 1)} is not finite")
    else:
        name = max(grads, key=lambda key: float(grads[key].abs().max()))
        words = (
            f"Every gradient is finite, but their norm is not: that of {name} is "
            f"{described(grads[name])}. Lower optim.lr or lengthen optim.warmup_steps."
        )
    if scale > 1:
        return False, f"{words} With a loss scale of {scale:g} ({precision.name}) that only skips the update."
    return True, words


def _others(count: int) -> str:
    return f", and of {count} others," if count else ""


def _told(record: Record | None, what: str) -> str:
    if record is None:  # of a sum whose every part is finite
        return f"{what}."
    origin = record.origin()
    if origin.number < 0:
        return f"{what}; what is not finite stood in {origin.name} from the start: {origin.result}."
    backward = f", in the backward pass ({origin.backward}) of what is" if origin.backward else ""
    place = f"{backward} in {origin.place.module}" if origin.place.module else backward
    line = f", at {origin.place.line}" if origin.place.line else ""
    return (
        f"{what}; it began with {origin.name}{place}{line}, which made {origin.result} of "
        f"{'; '.join(origin.inputs) or 'no tensor'}."
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)
