"""python -m fastmrcnn.train: the loop, read from top to bottom."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastmrcnn.config.checks import check_trainable, starting_config
from fastmrcnn.config.file import differing_keys, dump_config, load_config, parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import train_loader
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.device import busy_machine, choose_device, choose_precision, set_up_cuda
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.evaluation.run import run_evaluation
from fastmrcnn.files import write_text
from fastmrcnn.structures import Batch, to_device
from fastmrcnn.training.console import describe, how_to_go_on, mask_slot_advice, print_next
from fastmrcnn.training.curves import plot_losses
from fastmrcnn.training.dry_run import dry_run
from fastmrcnn.training.execution import choose_execution
from fastmrcnn.training.metrics import Metrics
from fastmrcnn.training.optim import learning_rate
from fastmrcnn.training.run import discarding_unstarted, prepare_run, run_folder_of
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint, restore, save_checkpoint
from fastmrcnn.weights.start import load_start, new_model


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.resume is not None:
        if arguments.config is not None:
            raise UserError(
                "--resume goes on with the run's own configuration; leave out --config, and give what is to "
                "change as key=value"
            )
        checkpoint = find_checkpoint(arguments.resume)
        folder = run_folder_of(checkpoint)
        state = read_checkpoint(checkpoint)
        config = load_config(overrides=arguments.overrides, base=state["config"])
    else:
        state, folder = None, None
        config = starting_config(arguments.config, arguments.overrides)
    check_trainable(config)
    if arguments.dry_run:
        check_only(config, resumed=state is not None)
        return
    config, folder, train_set, val_set = prepare_run(config, folder, resumed=state is not None)
    try:
        with discarding_unstarted(folder, new=state is None):
            write_text(folder / "config.yaml", dump_config(config))
            for line in train_set.summary() + (val_set.summary() if val_set else []):
                print(line)
            train(config, folder, train_set, val_set, state)
    except KeyboardInterrupt:
        # It may have come in the middle of an update, so what counts is what was saved before.
        print(f"\nstopped; {how_to_go_on(folder)}", file=sys.stderr)
        raise SystemExit(130) from None


def check_only(config: Config, resumed: bool) -> None:
    """--dry-run: nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        config, _, train_set, val_set = prepare_run(config, Path(folder), resumed)
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
) -> dict[str, float]:
    """Train to `config.train.steps`, from `state` if given; returns the metrics of the last evaluation."""
    device = choose_device(config.runtime.device)
    set_up_cuda(device)
    precision = choose_precision(config.runtime.precision, device)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    card = ModelCard(config, train_set.class_names, train_set.category_ids, train_set.keypoints)
    torch.manual_seed(config.train.seed)
    model = new_model(card, device)
    if state is None:
        load_start(model, card)
    execution = choose_execution(config, device)
    make_step = TrainingStep(model, config.optim, precision, execution, seed=config.train.seed)
    update, ema = make_step.update, make_step.ema
    start = restored(state, make_step, config) if state is not None else 0
    print(f"On {device}: {precision.name}, {execution.description}.")
    busy = busy_machine(device)
    if busy is not None:
        print(busy)

    steps, batch_size, log_every = config.train.steps, config.train.batch, config.train.log_every
    loader = train_loader(train_set, config, start, pin_memory=device.type == "cuda")
    metrics = Metrics(folder, start)
    recent: deque[tuple[int, list[int]]] = deque(maxlen=log_every)
    result: dict[str, float] = {}
    last_checkpoint: Path | None = None

    def save(step: int) -> Path:
        return save_checkpoint(
            folder / "checkpoints",
            step=step,
            model=model,
            optimizer=make_step.optimizer,
            scaler=update,
            ema=None if ema is None else ema.model,
            card=card,
            keep=config.train.keep_checkpoints,
        )

    def evaluate(step: int, pictures: int) -> dict[str, float]:
        assert val_set is not None
        judged = model if ema is None else ema.model
        judged.eval()
        found = run_evaluation(
            judged, val_set, config, output=folder / "evaluation", pictures=pictures, device=device
        )
        model.train()
        metrics.write({"iteration": step, **found})
        return found

    bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, desc="train")
    fetched = time.perf_counter()
    try:
        for step, loaded in enumerate(loader, start=start):
            data_time = time.perf_counter() - fetched
            batch = to_device(loaded.batch, device)
            recent.append((step, loaded.image_ids))
            if execution.compiled or execution.cuda_graphs:
                prepare_shapes(make_step, batch, loader.buckets, first=step == start)
            lr = learning_rate(config.optim, step, steps, batch_size)
            losses, counts = make_step(batch, step, lr)
            metrics.add(losses, counts, batch_size, data_time)

            done = step + 1
            bar.update()
            save_now = done % config.train.checkpoint_every == 0 or done == steps
            # Read before saving too, so that a checkpoint is never of a run that has gone wrong unseen.
            if done % log_every == 0 or save_now:
                row, bad_step = metrics.read(step, update.first_bad_step, lr, steps - done)
                if bad_step >= 0:
                    stop_at_bad_loss(bad_step, recent, save(bad_step))
                bar.set_postfix_str(describe(row))
            paused = time.perf_counter()
            if save_now:
                last_checkpoint = save(done)
            every = config.train.evaluate_every
            if val_set is not None and every is not None and done % every == 0 and done < steps:
                result = evaluate(step, pictures=0)
            fetched = time.perf_counter()
            metrics.exclude(fetched - paused)
    finally:
        bar.close()
    if val_set is not None and start < steps:
        result = evaluate(steps - 1, config.evaluate.pictures)
    metrics.close()
    advice = mask_slot_advice(config, metrics.most_foreground, metrics.masks_dropped)
    if advice is not None:
        print(advice)
    plot_losses(folder / "metrics.json", folder / "losses.png")
    print_next(folder, last_checkpoint, config, val_set)
    return result


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


def stop_at_bad_loss(bad_step: int, recent: deque[tuple[int, list[int]]], checkpoint: Path) -> None:
    images = next((ids for step, ids in recent if step == bad_step), [])
    raise UserError(
        f"the loss or its gradient is not finite at step {bad_step} (image ids {images}); the weights are "
        f"those before it, saved in {checkpoint}; lower optim.lr, lengthen optim.warmup_steps or set "
        f"optim.clip_norm, then go on with --resume {checkpoint}"
    )


if __name__ == "__main__":
    run_main(main)
