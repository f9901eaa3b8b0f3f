"""Proposals in a file, so that heads can be trained on those of an RPN that was trained by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.records import ImageProposals
from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded, replacing

_ARRAYS = ("image_ids", "counts", "boxes", "scores")


def write_proposals(path: str | Path, proposals: Mapping[int, ImageProposals]) -> None:
    """Write an .npz with image_ids (I,), counts (I,), and boxes (sum, 4) and scores (sum,) end to end.

    Raises:
        UserError: the file cannot be written. What was there before is still there.
    """
    boxes = [one.boxes for one in proposals.values()]
    scores = [one.scores for one in proposals.values()]
    with replacing(path) as stream:
        np.savez(
            stream,
            image_ids=np.array(list(proposals), np.int64),
            counts=np.array([len(each) for each in scores], np.int64),
            boxes=np.concatenate([*boxes, np.zeros((0, 4), np.float32)]).astype(np.float32),
            scores=np.concatenate([*scores, np.zeros(0, np.float32)]).astype(np.float32),
        )


def read_proposals(path: str | Path) -> dict[int, ImageProposals]:
    """What `write_proposals` wrote, by image id; no code of the file runs.

    Raises:
        UserError: missing, not such a file, or with numbers that do not go together.
    """
    path = expanded(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = [name for name in _ARRAYS if name not in archive]
            if absent:
                raise UserError(f"{path}: lacks {', '.join(absent)}; python -m fastmrcnn.propose writes them")
            ids, counts, boxes, scores = (archive[name] for name in _ARRAYS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of proposals") from None
    except (OSError, ValueError, EOFError, AttributeError) as error:  # AttributeError: a bare .npy
        raise UserError(f"{path}: is not a file of proposals, .npz ({error})") from None
    fits = (
        ids.ndim == counts.ndim == scores.ndim == 1
        and len(ids) == len(counts)
        and boxes.shape == (len(scores), 4)
        and all(array.dtype.kind in "iu" for array in (ids, counts))
        and all(array.dtype.kind == "f" for array in (boxes, scores))
        and (counts >= 0).all()
        and counts.sum() == len(scores)
    )
    if not fits:
        raise UserError(
            f"{path}: its arrays do not go together: image_ids {ids.shape}, counts {counts.shape} with the "
            f"sum {counts.sum()}, boxes {boxes.shape}, scores {scores.shape}"
        )
    bad = ~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    if bad.any():
        raise UserError(
            f"{path}: {int(bad.sum())} proposals are not finite, the first of them {bad.argmax()}"
        )
    ends = np.cumsum(counts)
    found = {}
    for identifier, start, end in zip(ids.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
        order = np.argsort(-scores[start:end], kind="stable")
        found[identifier] = ImageProposals(
            boxes[start:end][order].astype(np.float32), scores[start:end][order].astype(np.float32)
        )
    return found


def attach_proposals(dataset: CocoDataset, path: str | Path, most: int) -> CocoDataset:
    """The data set with the best `most` proposals of each image.

    Raises:
        UserError: as `read_proposals`; or images of the set are not in the file.
    """
    known = read_proposals(path)
    ids = flat_records(dataset.records).image_ids.tolist()
    missing = [image_id for image_id in ids if image_id not in known]
    if missing:
        raise UserError(
            f"{path}: has no proposals for {len(missing)} images of {dataset.annotations}: "
            f"{_some(missing)}; make them with python -m fastmrcnn.propose"
        )
    kept = {image_id: ImageProposals(*(array[:most] for array in known[image_id])) for image_id in ids}
    return replace(dataset, proposals=kept, proposal_slots=most)


def _some(ids: Iterable[int], most: int = 4) -> str:
    ids = list(ids)
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")
