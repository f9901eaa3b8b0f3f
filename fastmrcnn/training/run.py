"""What is decided before the first step: configuration, device, precision, data, folder."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastmrcnn.config.file import dump_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import read_sets, with_pixel_range
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.keypoints import check_same_keypoints
from fastmrcnn.data.same_classes import align_classes, class_faults, match_classes
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError
from fastmrcnn.files import new_run_folder, write_text
from fastmrcnn.group import ALONE, Group
from fastmrcnn.weights.card import ModelCard


def prepare_run(
    config: Config, folder: Path | None, before: ModelCard | None = None, group: Group = ALONE
) -> tuple[Config, Path, CocoDataset, CocoDataset | None]:
    """The run's folder, training and validation set, and the configuration with what was decided on them.

    A new folder is made if none is given, and only once the data that was asked for is known to be
    there. The embedded set is drawn into the folder. Of several processes the first one decides, and the
    others read the sets after it.

    Args:
        before: of the checkpoint that the run goes on from, whose class numbers stay.
    Raises:
        UserError: the data has mistakes; or processes found different sets under the same paths.
    """
    settle = None if before is None else partial(with_classes_of, before)
    if group.size == 1:
        return _prepare(config, folder, before, settle)
    own: list[tuple[CocoDataset, CocoDataset | None]] = []

    def first() -> tuple[Config, Path]:
        decided, place, train_set, val_set = _prepare(config, folder, before, settle)
        own.append((train_set, val_set))
        return decided, place

    config, place = group.lead(first)

    def read() -> tuple[CocoDataset, CocoDataset | None]:
        return own[0] if own else read_sets(config, settle, choose_range=before is None)

    with discarding_unstarted(place, new=folder is None and group.leads):
        train_set, val_set = group.each(read)
        check_same_sets(train_set, val_set, group)
    return config, place, train_set, val_set


def check_same_sets(train_set: CocoDataset, val_set: CocoDataset | None, group: Group) -> None:
    """UserError, on all processes, if they have read different images."""
    for dataset in (train_set, *([] if val_set is None else [val_set])):
        ids = flat_records(dataset.records).image_ids
        found = group.gather((len(ids), zlib.crc32(ids.tobytes()), dataset.class_names))
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            group.end(
                UserError(
                    f"{dataset.annotations}: process {other} reads {found[other][0]} images there, the first "
                    f"one {found[0][0]}, or not the same ones; give all machines the same files"
                )
            )


def _prepare(
    config: Config,
    folder: Path | None,
    before: ModelCard | None,
    settle: Callable[[CocoDataset], CocoDataset] | None,
) -> tuple[Config, Path, CocoDataset, CocoDataset | None]:
    if not config.data.shapes:
        # A run that began without a range of values goes on without one.
        train_set, val_set = read_sets(config, settle, choose_range=before is None)
        folder = folder or new_run_folder(config.output)
        return with_pixel_range(config, train_set), folder, train_set, val_set
    new = folder is None
    folder = folder or new_run_folder(config.output)
    with discarding_unstarted(folder, new=new):
        paths = write_shapes(folder / "data", seed=0)
        tree = config.model_dump()
        for split in ("train", "val"):
            images, annotations = paths[f"{split}_images"], paths[f"{split}_annotations"]
            tree["data"][split] |= {"images": str(images), "annotations": str(annotations)}
        config = Config.model_validate(tree)
        return config, folder, *read_sets(config, settle)


def keep_config(folder: Path, card: ModelCard, config: Config, *, writes: bool = True) -> ModelCard:
    """Write down what a run has decided for itself; returns the card with it."""
    if writes:
        write_text(folder / "config.yaml", dump_config(config))
    return replace(card, config=config)


def with_classes_of(before: ModelCard, dataset: CocoDataset) -> CocoDataset:
    """A training set, its class indices those of the checkpoint that the run goes on from.

    Raises:
        UserError: it has other classes or keypoints than the run had.
    """
    own, known = (dataset.class_names, dataset.category_ids), (before.class_names, before.category_ids)
    faults = class_faults(*own, *known)
    found = match_classes(*known, *own)
    gone = [repr(name) for name, match in zip(before.class_names, found, strict=True) if match is None]
    if gone and not faults:
        faults.append(f"the file lacks {', '.join(gone)}")
    anew = (
        "--resume goes on with the same ones; leave it out and give --config and model.weights=RUN to start "
        "anew from its weights"
    )
    if faults:
        raise UserError(
            f"{dataset.annotations}: its {len(own[0])} classes do not match the {len(known[0])} of the run: "
            f"{'; '.join(faults)}; {anew}"
        )
    source = "the checkpoint"
    try:
        check_same_keypoints(dataset.keypoints, before.keypoints, dataset.annotations, source)
    except UserError as error:
        raise UserError(f"{error}; {anew}") from None
    return align_classes(dataset, *known, source)


@contextlib.contextmanager
def discarding_unstarted(folder: Path, *, new: bool) -> Iterator[None]:
    """Remove a new run's folder if the block fails before there is any record or checkpoint in it."""
    try:
        yield
    except BaseException:
        record = folder / "metrics.json"
        started = any(folder.glob("checkpoints/*.pt")) or (record.exists() and record.stat().st_size > 0)
        if new and not started:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def run_folder_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint; UserError if the file was moved out of it."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints":
        raise UserError(f"{checkpoint}: --resume needs a checkpoint where its run wrote it, RUN/checkpoints/")
    return folder.parent
