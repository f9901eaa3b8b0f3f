"""The data that cells name: scenes that are drawn, and COCO where the user has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmrcnn.errors import UserError
from fastmrcnn.study.runs import Split
from fastmrcnn.study.scenes import SETS, write_scenes

IMAGES = {"objects": (500, 100), "figures": (500, 100)}  # to train on and to judge by
_COCO = "--data coco=DIR, with train2017, val2017 and annotations in it"
COCO_FILES = {"coco": "instances", "coco_person": "person_keypoints"}


class Sets:
    """
    Args:
        work: folder that scenes are drawn into, once.
        given: name: folder, from the command line.
        images: how many, for sets of scenes.
    """

    def __init__(
        self, work: Path, given: Mapping[str, Path], images: Mapping[str, tuple[int, int]] = IMAGES
    ) -> None:
        self.work = work
        self.given = given
        self.images = images

    def __call__(self, name: str) -> Split:
        """Where a set is; a set of scenes is drawn if it is not there.

        Raises:
            UserError: it is not there, and was not given.
        """
        if name in SETS:
            return self._scenes(name)
        if name in COCO_FILES:
            return self._coco(COCO_FILES[name])
        raise AssertionError(name)

    def _scenes(self, name: str) -> Split:
        train, val = self.images[name]
        folder = self.work / "data" / f"{name}_{train}_{val}"
        whole = folder / "whole"
        split = Split(folder / "train", folder / "train.json", folder / "val", folder / "val.json")
        if not whole.exists():
            write_scenes(folder, name, train=train, val=val)
            whole.touch()
        return split

    def _coco(self, files: str) -> Split:
        if "coco" not in self.given:
            raise UserError(
                "these runs need COCO: give --data coco=DIR, which holds train2017, val2017 and annotations"
            )
        folder = self.given["coco"]
        split = Split(
            folder / "train2017",
            folder / "annotations" / f"{files}_train2017.json",
            folder / "val2017",
            folder / "annotations" / f"{files}_val2017.json",
        )
        for path in split:
            if not path.exists():
                raise UserError(
                    f"{path}: is not there; --data coco=DIR must hold train2017, val2017 and annotations"
                )
        return split


def given_sets(pairs: list[str]) -> dict[str, Path]:
    """NAME=DIR arguments.

    Raises:
        UserError: one is no pair, or no folder.
    """
    found = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--data {pair}: must be NAME=DIR")
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"--data {pair}: there is no such folder")
        found[name] = path.absolute()
    return found
