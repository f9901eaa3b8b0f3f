"""What is decided before the first step: configuration, device, precision, data, folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastmrcnn.config.schema import Config
from fastmrcnn.data.build import read_sets
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError
from fastmrcnn.files import new_run_folder


def prepare_run(config: Config, folder: Path | None) -> tuple[Config, Path, CocoDataset, CocoDataset | None]:
    """The run's folder, training and validation set, and the configuration with the paths of both.

    A new folder is made if none is given, and only once the data that was asked for is known to be
    there. The embedded set is drawn into the folder.
    """
    if not config.data.shapes:
        train_set, val_set = read_sets(config)
        return config, folder or new_run_folder(config.output), train_set, val_set
    new = folder is None
    folder = folder or new_run_folder(config.output)
    with discarding_unstarted(folder, new=new):
        paths = write_shapes(folder / "data", seed=0)
        tree = config.model_dump()
        for split in ("train", "val"):
            images, annotations = paths[f"{split}_images"], paths[f"{split}_annotations"]
            tree["data"][split] |= {"images": str(images), "annotations": str(annotations)}
        config = Config.model_validate(tree)
        return config, folder, *read_sets(config)


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
