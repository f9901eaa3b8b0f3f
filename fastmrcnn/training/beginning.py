"""What a run begins with: a recipe, or the checkpoint that it goes on from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from fastmrcnn.config.checks import check_trainable, starting_config
from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded
from fastmrcnn.group import ALONE, Group
from fastmrcnn.training.replay import checkpoint_to_replay
from fastmrcnn.training.restart import begun_before, launch_of_environment
from fastmrcnn.training.run import run_folder_of
from fastmrcnn.training.sharing import share_of
from fastmrcnn.weights.card import ModelCard, read_card
from fastmrcnn.weights.checkpoint import find_whole_checkpoint, read_checkpoint, require_optimizer


class Beginning(NamedTuple):
    """What a run begins with: of several processes the first one decides it for all."""

    config: Config
    folder: Path | None = None  # of a run that goes on
    state: dict[str, Any] | None = None  # its checkpoint
    before: ModelCard | None = None


def begin(arguments: argparse.Namespace, group: Group = ALONE) -> Beginning:
    """What the command line asks for; or, when torchrun starts it again, the run that it was at.

    Raises:
        UserError: it does not go together.
    """
    launch = launch_of_environment()
    if arguments.replay is not None:
        if arguments.resume is None:
            raise UserError("--replay goes with --resume RUN, whose step it runs again")
        if group.size > 1:
            raise UserError("--replay runs a step in one process; start it without torchrun")
    if arguments.resume is None:
        config = starting_config(arguments.config, arguments.overrides)
        restarted = begun_before(launch, expanded(config.output))
        if restarted is None:
            check_trainable(config)
            check_processes(config, arguments, group)
            return Beginning(config)
        overrides = []  # the checkpoint's configuration has them
        checkpoint = whole_checkpoint(restarted)
    else:
        if arguments.config is not None:
            raise UserError(
                "--resume goes on with the run's own configuration; leave out --config, and give "
                "what is to change as key=value"
            )
        overrides = arguments.overrides
        if arguments.replay is None:
            checkpoint = whole_checkpoint(arguments.resume)
        else:
            checkpoint = checkpoint_to_replay(arguments.resume, arguments.replay)
        restarted = begun_before(launch, run_folder_of(checkpoint).parent)
        if restarted is not None:
            checkpoint = whole_checkpoint(restarted)
    if restarted is not None:
        print(f"Started again by torchrun: going on from {checkpoint}")
    state = read_checkpoint(checkpoint)
    require_optimizer(state)
    before = read_card(state, checkpoint)
    config = load_config(overrides=overrides, base=state["config"])
    if config.model.weights not in (None, before.config.model.weights):
        raise UserError(
            "model.weights starts a new run and goes with --config; --resume goes on with the "
            "weights of the checkpoint"
        )
    check_trainable(config)
    check_processes(config, arguments, group)
    return Beginning(config, run_folder_of(checkpoint), state, before)


def whole_checkpoint(path: str | Path) -> Path:
    """The newest whole one that `path` means; damaged ones are told of."""
    checkpoint, damaged = find_whole_checkpoint(path)
    for line in damaged:
        print(line)
    return checkpoint


def check_processes(config: Config, arguments: argparse.Namespace, group: Group) -> None:
    """UserError if the run cannot be one of so many processes."""
    share_of(config, group)
    if arguments.dry_run and group.size > 1:
        raise UserError("--dry-run estimates the cost in one process; start it without torchrun")
