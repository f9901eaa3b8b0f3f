"""The steps of a run, that its processes begin together or not at all.

Before each step every process says whether it has a batch, and what the system asked of it. So a signal to
any of them stops all after the same step, a process that cannot read its images leaves none waiting in the
middle of one, and what was left out is counted over all.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.order import Share
from fastmrcnn.data.worker import LoadedBatch
from fastmrcnn.errors import UserError
from fastmrcnn.group import Group
from fastmrcnn.structures import Batch
from fastmrcnn.training.stopping import Requests, Stopped


class LoadedStep(NamedTuple):
    """What a step needs. Batches and image ids are this process's; what was left out, that of all."""

    batches: list[Batch]  # micro-batches
    image_ids: list[int]
    left_out: dict[int, str]  # id and fault of each image that no step before has met
    clipped: dict[int, str]
    save: bool  # whether a checkpoint was asked for, of any of several processes


def steps_of(loader: TrainLoader, group: Group, requests: Requests, share: Share) -> Iterator[LoadedStep]:
    """The loader's batches, step by step.

    Raises:
        Stopped: a signal came to one of the processes. All of them have made the same steps.
        UserError, Told: as `Group.agree`, if one of them has no batch; or more images could not be read than
            data.max_broken allows.
    """
    batches = iter(loader)
    known: set[int] = set()
    while True:
        loaded: list[LoadedBatch] = []
        failure: BaseException | None = None
        try:
            loaded = list(itertools.islice(batches, share.accumulate))
        except KeyboardInterrupt:  # of a second signal, which waits for nothing
            raise
        except BaseException as error:
            if group.size == 1:
                raise
            failure = error
        new, save = _left_out(loaded), False
        if group.size > 1:
            new, save = _agree(group, requests, failure, new)
            new = {image_id: fault for image_id, fault in new.items() if image_id not in known}
            known |= new.keys()
            if new:
                try:
                    loader.check_left_out(len(known), next(iter(new.values())))
                except UserError as error:
                    group.end(error)
        if not loaded:
            return
        clipped = {k: note for one in loaded for k, note in one.clipped.items()}
        ids = [image_id for one in loaded for image_id in one.image_ids]
        yield LoadedStep([one.batch for one in loaded], ids, new, clipped, save)


def _left_out(loaded: list[LoadedBatch]) -> dict[int, str]:
    return {image_id: fault for one in loaded for image_id, fault in one.left_out.items()}


def _agree(
    group: Group, requests: Requests, failure: BaseException | None, left_out: dict[int, str]
) -> tuple[dict[int, str], bool]:
    """Before a step: raise what ends the run; returns what any process left out, and whether to save."""
    asked = requests.save
    if asked:
        requests.save = False
    stop, save, failed, some = group.most([requests.stop or 0, asked, failure is not None, bool(left_out)])
    if failed:
        group.agree(failure)
    if stop:
        requests.stop = stop
        raise Stopped(stop)
    every = group.gather(left_out) if some else []
    return {image_id: fault for one in every for image_id, fault in one.items()}, bool(save)


@contextlib.contextmanager
def stopping_together(group: Group, requests: Requests) -> Iterator[None]:
    """A block that trains, in which a signal waits until the processes agree."""
    if group.size == 1:
        yield
        return
    with requests.together(speaks=group.leads):
        yield
    stop_if_asked(group, requests)


@contextlib.contextmanager
def apart(group: Group, requests: Requests) -> Iterator[None]:
    """A block within it, such as an evaluation, in which a signal acts on its process at once."""
    stop_if_asked(group, requests)
    with requests.alone():
        yield


def stop_if_asked(group: Group, requests: Requests) -> None:
    """Raises Stopped on all processes if a signal has come to one of them."""
    if group.size > 1:
        (stop,) = group.most([requests.stop or 0])
        if stop:
            requests.stop = stop
            raise Stopped(stop)
