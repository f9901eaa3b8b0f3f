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

from fastmrcnn.config.file import differing_keys, dump_config, parse_config
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
from fastmrcnn.group import ALONE, Group, first_speaks, group_of_environment, joined, tell
from fastmrcnn.structures import Batch
from fastmrcnn.training.beginning import begin
from fastmrcnn.training.best import Best, check_metric
from fastmrcnn.training.console import describe, describe_start, list_left_out, mask_slot_advice, print_next
from fastmrcnn.training.curves import plot_losses
from fastmrcnn.training.dry_run import dry_run
from fastmrcnn.training.evaluations import Evaluations, in_background
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.fit import settled_batch, telling_what_fits
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.precision import decide_precision
from fastmrcnn.training.replay import for_replay, replay
from fastmrcnn.training.restart import launch_of_environment, mark
from fastmrcnn.training.run import discarding_unstarted, keep_config, prepare_run
from fastmrcnn.training.saving import BadLossError, Saver, saving_first, tell_stop
from fastmrcnn.training.sharing import own_device, share_of
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.training.stopping import Requests
from fastmrcnn.training.time_limit import time_limit_of, with_steps
from fastmrcnn.training.together import apart, steps_of, stopping_together
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import restore
from fastmrcnn.weights.start import load_start, new_model


def main(argv: list[str]) -> None:
    started, group = time.monotonic(), group_of_environment()
    with first_speaks(group), joined(group), Requests() as requests:
        arguments = group.lead(lambda: parse_arguments(argv))
        folder = None
        try:
            config, folder, state, before = group.lead(lambda: begin(arguments, group))
            if arguments.dry_run:
                check_only(config, before)
                return
            if arguments.replay is not None and state is not None:
                raise SystemExit(replay_only(config, folder, before, state))
            config, folder, train_set, val_set = prepare_run(config, folder, before, group)
            with discarding_unstarted(folder, new=state is None and group.leads):
                config = settled_batch(config, train_set, group)
                if group.leads:
                    write_text(folder / "config.yaml", dump_config(config))
                    mark(folder, launch_of_environment())
                for line in train_set.summary() + (val_set.summary() if val_set else []):
                    print(line)
                train(config, folder, train_set, val_set, state, requests, group, started)
        except KeyboardInterrupt as stop:
            tell(group, stop)
            raise SystemExit(tell_stop(stop, folder, speaks=group.leads)) from None


def check_only(config: Config, before: ModelCard | None = None) -> None:
    """--dry-run: nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        config, _, train_set, val_set = prepare_run(config, Path(folder), before)
        for line in train_set.summary() + (val_set.summary() if val_set else []):
            print(line)
        dry_run(settled_batch(config, train_set), train_set)


def replay_only(config: Config, folder: Path | None, before: ModelCard | None, state: dict[str, Any]) -> int:
    """--replay: nothing is written. The exit code: 0 if the step goes wrong again, else 1."""
    config, _, train_set, _ = prepare_run(for_replay(config), folder, before)
    bad, text = replay(config, train_set, state, int(state["step"]))
    print(text)
    return 0 if bad else 1


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
        "--replay",
        type=int,
        metavar="STEP",
        help="with --resume: run that step alone, and name the first operation that was not finite",
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
    group: Group = ALONE,
    started: float | None = None,
) -> dict[str, float]:
    """Train to `config.train.steps`, from `state` if given; returns the metrics of the last evaluation.

    Args:
        requests: what signals ask for; None: Ctrl-C alone stops the run.
        group: the processes of the run, all of which call this.
        started: by `time.monotonic`, of what `train.time_limit` holds to; None: now.
    Raises:
        UserError, Stopped: as `saving_first`.
    """
    requests = requests or Requests()
    share = share_of(config, group)
    if config.train.keep_best is not None and val_set is not None:
        group.lead(partial(check_metric, config.train.keep_best, metric_names(val_set, config)))
    device = group.each(lambda: choose_device(own_device(config.runtime.device, group)))
    set_up_cuda(device)
    set_threads(config.runtime.threads)
    on_gpu = device.type == "cuda"
    background = val_set is not None and group.each(partial(in_background, config, on_gpu, group.size))
    images = 0 if val_set is None else len(val_set)
    limit = time_limit_of(config, state, images, background, started)
    if limit is not None:
        config = limit.config
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    torch.manual_seed(config.train.seed)
    model = new_model(card, device)
    if state is None:
        group.lead(partial(load_start, model, card))  # the others get its weights by `align`
        # A run that is resumed goes on as it began.
        if is_undecided(config.runtime.precision, device, config.runtime.cpu_precision):
            config, line = group.lead(partial(decide_precision, config, train_set, model))
            card = keep_config(folder, card, config, writes=group.leads)
            print(line)
    precision = choose_precision(config.runtime.precision, device, config.runtime.cpu_precision)
    execution = group.each(partial(choose_execution, config, device))
    make_step = TrainingStep(
        model,
        config.optim,
        precision,
        execution,
        seed=config.train.seed,
        group=group,
        accumulate=share.accumulate,
    )
    update, ema = make_step.update, make_step.ema
    start = 0 if state is None else group.each(partial(restored, state, make_step, config))
    make_step.align()
    processes = "" if group.size == 1 else f"{group.size} processes, the first one on "
    print(f"On {processes}{device}: {precision.name}, {execution.description}.")
    for line in describe_start(model, config, make_step.optimizer):
        print(line)
    busy = busy_machine(device)
    if busy is not None:
        print(busy)

    steps, batch_size, log_every = config.train.steps, config.train.images, config.train.log_every
    loader = group.each(partial(train_loader, train_set, config, start, pin_memory=on_gpu, share=share))
    carried = state["extra"].get("metrics") if state is not None else None
    metrics = group.each(partial(Metrics, folder, start, carried, writes=group.leads))
    keep = config.train.keep_checkpoints
    saver = Saver(folder, make_step, card, metrics, keep=keep, start=start, writes=group.leads)
    recent: deque[tuple[int, list[int]]] = deque(maxlen=log_every)
    left_out: dict[int, str] = {}
    clipped: dict[int, str] = {}
    judged = model if ema is None else ema.model

    def evaluate(pictures: int = 0) -> dict[str, float]:
        assert val_set is not None
        began = time.perf_counter()
        with apart(group, requests):
            make_step.align()
            judged.eval()
            found = run_evaluation(
                judged, val_set, config, output=folder / "evaluation", pictures=pictures, group=group
            )
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
        background=background_of(background, config, val_set, folder, device),
        best=best_of(config, folder, metrics) if group.leads else None,  # which tells the others below
    )
    if limit is not None:
        saver.carry = lambda: {"time_limit": limit.carried()}
    bar = tqdm(
        total=steps, initial=start, unit="step", dynamic_ncols=True, desc="train", disable=not group.leads
    )
    with (
        saving_first(saver, requests),
        stopping_together(group, requests),
        contextlib.closing(metrics),
        contextlib.closing(bar),
        contextlib.closing(evaluations),
    ):
        group.lead(partial(evaluations.make_up, start))
        metrics.evaluated, evaluations.best = group.lead(lambda: (metrics.evaluated, evaluations.best))
        if evaluations.best is not None:
            evaluations.best.writes = group.leads
        evaluations.after(start, steps)
        steps = evaluations.last_step(start, steps)
        fetched = time.perf_counter()
        for step, loaded in enumerate(steps_of(loader, group, requests, share), start=start):
            data_time = time.perf_counter() - fetched
            batch = make_step.upload(loaded.batches[0] if share.accumulate == 1 else loaded.batches)
            recent.append((step, loaded.image_ids))
            for fault in loaded.left_out.values():
                tqdm.write(f"left out, others stand in for it: {fault}")
            left_out |= loaded.left_out
            clipped |= loaded.clipped
            if execution.compiled or execution.cuda_graphs:
                with telling_what_fits(config, train_set, make_step, group):
                    prepare_shapes(make_step, batch, loader.buckets, group, first=step == start)
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
                    check_loss(bad_step, recent, group)
                    bar.set_postfix_str(describe(row))
                paused = time.perf_counter()
                # Rare: the host may wait for the device.
                if loaded.save or (requests.save and group.size == 1):
                    requests.save = requests.save and group.size > 1
                    check_loss(int(update.first_bad_step), recent, group)
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
                    steps = min(steps, limit.agreed(done, group))
            if steps != config.train.steps:
                config = with_steps(config if limit is None else limit.config, steps)
                card = saver.card = keep_config(folder, card, config, writes=group.leads)
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
        for notes in group.gather(clipped):
            clipped |= notes
        if clipped:
            print(clipped_line(clipped.values()))
        if group.leads:
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
    wanted: bool, config: Config, val_set: CocoDataset | None, folder: Path, device: torch.device
) -> Evaluator | None:
    if val_set is None or not wanted:
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
    make_step: TrainingStep,
    batch: Batch | Sequence[Batch],
    buckets: Sequence[tuple[int, int]],
    group: Group,
    *,
    first: bool,
) -> None:
    """Compile for every bucket before the first step; later, say so when a batch needs a compilation.

    Processes compile together, since what they compile sums over all of them.
    """
    (new,) = group.most([make_step.is_new(batch)])
    if not new:
        return
    started = time.perf_counter()
    one = batch if isinstance(batch, Batch) else batch[0]
    _, _, height, width = one.pixels.shape
    make_step.warm_up(batch, buckets if first else [(height, width)])
    seconds = time.perf_counter() - started
    if first:
        tqdm.write(f"Compiled for {len(buckets)} padded shape(s) in {seconds:.0f} s.")
        return
    objects = 0 if one.targets is None else one.targets.valid.shape[1]
    tqdm.write(
        f"Compiled anew in {seconds:.0f} s for a batch of {height}x{width} with {objects} slots for objects: "
        "it has more objects, or larger ones, than any before"
    )


def check_loss(bad_step: int, recent: deque[tuple[int, list[int]]], group: Group) -> None:
    """BadLossError, which names the images of all processes, if there is a bad step (else -1)."""
    if bad_step >= 0:
        own = next((ids for step, ids in recent if step == bad_step), [])
        group.end(BadLossError(bad_step, [image_id for ids in group.gather(own) for image_id in ids]))


if __name__ == "__main__":
    run_main(main)
