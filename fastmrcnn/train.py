"""python -m fastmrcnn.train: the loop, read from top to bottom."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastmrcnn.config.checks import check_trainable, starting_config
from fastmrcnn.config.file import differing_keys, dump_config, load_config, parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import train_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.pixel_range import clipped_line
from fastmrcnn.device import (
    busy_machine,
    choose_device,
    choose_precision,
    is_undecided,
    set_threads,
    set_up_cuda,
)
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.evaluation.background import Evaluator, judge_snapshot
from fastmrcnn.evaluation.metric_names import metric_names
from fastmrcnn.evaluation.run import run_evaluation
from fastmrcnn.files import write_text
from fastmrcnn.structures import Batch
from fastmrcnn.training.best import Best, check_metric
from fastmrcnn.training.console import describe, describe_start, list_left_out, mask_slot_advice, print_next
from fastmrcnn.training.curves import plot_losses
from fastmrcnn.training.dry_run import dry_run
from fastmrcnn.training.evaluations import Evaluations, in_background
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.precision import decide_precision
from fastmrcnn.training.run import discarding_unstarted, keep_config, prepare_run, run_folder_of
from fastmrcnn.training.saving import BadLossError, Saver, saving_first, tell_stop
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.training.stopping import Requests
from fastmrcnn.training.time_limit import time_limit_of, with_steps
from fastmrcnn.weights.card import ModelCard, read_card
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint, require_optimizer, restore
from fastmrcnn.weights.start import load_start, new_model


def main(argv: list[str]) -> None:
    started, arguments = time.monotonic(), parse_arguments(argv)
    state, folder, before = None, None, None
    with Requests() as requests:
        try:
            if arguments.resume is not None:
                if arguments.config is not None:
                    raise UserError(
                        "--resume goes on with the run's own configuration; leave out --config, and give "
                        "what is to change as key=value"
                    )
                checkpoint = find_checkpoint(arguments.resume)
                folder = run_folder_of(checkpoint)
                state = read_checkpoint(checkpoint)
                require_optimizer(state)
                before = read_card(state, checkpoint)
                config = load_config(overrides=arguments.overrides, base=state["config"])
                if config.model.weights not in (None, before.config.model.weights):
                    raise UserError(
                        "model.weights starts a new run and goes with --config; --resume goes on with the "
                        "weights of the checkpoint"
                    )
            else:
                config = starting_config(arguments.config, arguments.overrides)
            check_trainable(config)
            if arguments.dry_run:
                check_only(config, before)
                return
            config, folder, train_set, val_set = prepare_run(config, folder, before)
            with discarding_unstarted(folder, new=state is None):
                write_text(folder / "config.yaml", dump_config(config))
                for line in train_set.summary() + (val_set.summary() if val_set else []):
                    print(line)
                train(config, folder, train_set, val_set, state, requests, started)
        except KeyboardInterrupt as stop:
            raise SystemExit(tell_stop(stop, folder)) from None


def check_only(config: Config, before: ModelCard | None = None) -> None:
    """--dry-run: nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        config, _, train_set, val_set = prepare_run(config, Path(folder), before)
        for line in train_set.summary() + (val_set.summary() if val_set else []):
            print(line)
        dry_run(config, train_set)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "train", "Train Mask R-CNN. Without arguments: a small model on an embedded set of shapes."
    )
    parser.add_argument("--config", help="YAML recipe; see configs/")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="runs",
        metavar="RUN",
        help="go on from a run's last checkpoint (a run folder or a checkpoint; default: the newest run)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration and data, estimate the cost"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=1000")
    return parser.parse_intermixed_args(argv)


def train(
    config: Config,
    folder: Path,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    state: dict[str, Any] | None = None,
    requests: Requests | None = None,
    started: float | None = None,
) -> dict[str, float]:
    """Train to `config.train.steps`, from `state` if given; returns the metrics of the last evaluation.

    Args:
        requests: what signals ask for; None: Ctrl-C alone stops the run.
        started: by `time.monotonic`, of what `train.time_limit` holds to; None: now.
    Raises:
        UserError, Stopped: as `saving_first`.
    """
    requests = requests or Requests()
    if config.train.keep_best is not None and val_set is not None:
        check_metric(config.train.keep_best, metric_names(val_set, config))
    device = choose_device(config.runtime.device)
    set_up_cuda(device)
    set_threads(config.runtime.threads)
    images = 0 if val_set is None else len(val_set)
    limit = time_limit_of(config, state, images, in_background(config, device.type == "cuda"), started)
    if limit is not None:
        config = limit.config
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    torch.manual_seed(config.train.seed)
    model = new_model(card, device)
    if state is None:
        load_start(model, card)
        if is_undecided(
            config.runtime.precision, device, config.runtime.cpu_precision
        ):  # a run that is resumed goes on as it began
            config, line = decide_precision(config, train_set, model)
            card = keep_config(folder, card, config)
            print(line)
    precision = choose_precision(config.runtime.precision, device, config.runtime.cpu_precision)
    execution = choose_execution(config, device)
    make_step = TrainingStep(model, config.optim, precision, execution, seed=config.train.seed)
    update, ema = make_step.update, make_step.ema
    start = restored(state, make_step, config) if state is not None else 0
    print(f"On {device}: {precision.name}, {execution.description}.")
    for line in describe_start(model, config, make_step.optimizer):
        print(line)
    busy = busy_machine(device)
    if busy is not None:
        print(busy)

    steps, batch_size, log_every = config.train.steps, config.train.batch, config.train.log_every
    loader = train_loader(train_set, config, start, pin_memory=device.type == "cuda")
    metrics = Metrics(folder, start, state["extra"].get("metrics") if state is not None else None)
    saver = Saver(folder, make_step, card, metrics, keep=config.train.keep_checkpoints, start=start)
    recent: deque[tuple[int, list[int]]] = deque(maxlen=log_every)
    left_out: dict[int, str] = {}
    clipped: dict[int, str] = {}
    judged = model if ema is None else ema.model

    def evaluate(pictures: int = 0) -> dict[str, float]:
        assert val_set is not None
        began = time.perf_counter()
        judged.eval()
        found = run_evaluation(judged, val_set, config, output=folder / "evaluation", pictures=pictures)
        model.train()
        if limit is not None:
            limit.evaluated(time.perf_counter() - began)
        return found

    evaluations = Evaluations(
        config.train.evaluate_every if val_set is not None else None,
        folder,
        judged,
        lambda: card,
        metrics,
        requests,
        in_line=evaluate,
        from_file=partial(from_file, val_set, folder, device),
        background=background_of(config, val_set, folder, device),
        best=best_of(config, folder, metrics),
    )
    if limit is not None:
        saver.carry = lambda: {"time_limit": limit.carried()}
    bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, desc="train")
    closing = contextlib.closing
    with saving_first(saver, requests), closing(metrics), closing(bar), closing(evaluations):
        evaluations.make_up(start, steps)
        steps = evaluations.last_step(start, steps)
        fetched = time.perf_counter()
        for step, loaded in enumerate(loader, start=start):
            data_time = time.perf_counter() - fetched
            batch = make_step.upload(loaded.batch)
            recent.append((step, loaded.image_ids))
            for fault in loaded.left_out.values():
                tqdm.write(f"left out, others stand in for it: {fault}")
            left_out |= loaded.left_out
            clipped |= loaded.clipped
            if execution.compiled or execution.cuda_graphs:
                prepare_shapes(make_step, batch, loader.buckets, first=step == start)
            with requests.held():  # from here to its checkpoint a step is whole
                lr = learning_rate(config.optim, step, steps, batch_size)
                losses, counts = make_step(batch, step, lr)
                saver.done = done = step + 1
                metrics.add(losses, counts, batch_size, data_time)
                bar.update()
                save_now = done % config.train.checkpoint_every == 0 or done == steps
                # Read before saving too, so that a checkpoint is never of a run that has gone wrong unseen.
                if done % log_every == 0 or save_now:
                    row, bad_step = metrics.read(step, update.first_bad_step, lr, steps - done)
                    check_loss(bad_step, recent)
                    bar.set_postfix_str(describe(row))
                paused = time.perf_counter()
                if requests.save:  # rare, so the host may wait for the device
                    requests.save = False
                    check_loss(int(update.first_bad_step), recent)
                    tqdm.write(f"saved, as SIGUSR1 asked: {saver.save()}")
                elif save_now:
                    saver.save()
            saved = time.perf_counter()
            evaluations.after(done, steps)
            fetched = time.perf_counter()
            metrics.exclude(fetched - paused)
            steps = evaluations.last_step(done, steps)
            if limit is not None:
                limit.saved(saved - paused)
                if limit.measuring or done % log_every == 0:
                    int(update.first_bad_step)  # what is timed is to be done; rare, so the host may wait
                    steps = min(steps, limit.after(done))
            if steps != config.train.steps:
                config = with_steps(config if limit is None else limit.config, steps)
                card = saver.card = keep_config(folder, card, config)
                bar.total = steps
            if done >= steps:
                break
        bar.close()
        evaluations.wait()
        if val_set is not None and (start < steps or steps - 1 not in metrics.evaluated):
            evaluations.take(steps, evaluate(config.evaluate.pictures))
        metrics.close()
        advice = mask_slot_advice(config, metrics.most_foreground, metrics.masks_dropped)
        if advice is not None:
            print(advice)
        if left_out:
            print(list_left_out(left_out))
        if clipped:
            print(clipped_line(clipped.values()))
        plot_losses(folder / "metrics.json", folder / "losses.png")
        print_next(folder, saver.path, config, val_set, evaluations.describe_best())
    return evaluations.last


def restored(state: dict[str, Any], make_step: TrainingStep, config: Config) -> int:
    """Put the run back where its checkpoint found it; returns the number of steps done."""
    average = None if make_step.ema is None else make_step.ema.model
    try:
        return restore(state, make_step.model, make_step.optimizer, make_step.update, average)
    except UserError as error:
        before = parse_config(state["config"], "the checkpoint")
        changed = [key for key in differing_keys(before, config) if key.startswith(("model.", "optim."))]
        if not changed:
            raise
        raise UserError(
            f"--resume goes on with the same model and optimizer, but {', '.join(changed)} changed: {error}"
        ) from None


def background_of(
    config: Config, val_set: CocoDataset | None, folder: Path, device: torch.device
) -> Evaluator | None:
    if val_set is None or not in_background(config, on_gpu=device.type == "cuda"):
        return None
    return Evaluator(val_set, folder / "evaluation", device, config.runtime.threads)


def from_file(
    val_set: CocoDataset | None, folder: Path, device: torch.device, snapshot: Path
) -> dict[str, float]:
    assert val_set is not None, "there are snapshots"
    return judge_snapshot(snapshot, val_set, folder / "evaluation", device)


def best_of(config: Config, folder: Path, metrics: Metrics) -> Best | None:
    metric, patience = config.train.keep_best, config.train.patience
    if metric is None:
        return None
    return Best(metric, patience, folder / "checkpoints", metrics.evaluations)


def prepare_shapes(
    make_step: TrainingStep, batch: Batch, buckets: Sequence[tuple[int, int]], first: bool
) -> None:
    """Compile for every bucket before the first step; later, say so when a batch needs a compilation."""
    if not make_step.is_new(batch):
        return
    started = time.perf_counter()
    _, _, height, width = batch.pixels.shape
    make_step.warm_up(batch, buckets if first else [(height, width)])
    seconds = time.perf_counter() - started
    if first:
        tqdm.write(f"Compiled for {len(buckets)} padded shape(s) in {seconds:.0f} s.")
        return
    objects = 0 if batch.targets is None else batch.targets.valid.shape[1]
    tqdm.write(
        f"Compiled anew in {seconds:.0f} s for a batch of {height}x{width} with {objects} slots for objects: "
        "it has more objects, or larger ones, than any before"
    )


def check_loss(bad_step: int, recent: deque[tuple[int, list[int]]]) -> None:
    """BadLossError, which names the images, if there is a bad step (else -1)."""
    if bad_step >= 0:
        raise BadLossError(bad_step, next((ids for step, ids in recent if step == bad_step), []))


if __name__ == "__main__":
    run_main(main)
