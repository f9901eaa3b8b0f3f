"""Classes by name: what the class numbers of one file, run or checkpoint are in another's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.keypoints import check_same_keypoints
from fastmrcnn.data.records import Finding
from fastmrcnn.errors import UserError


def match_classes(
    names: Sequence[str], ids: Sequence[int], known_names: Sequence[str], known_ids: Sequence[int]
) -> list[int | None]:
    """The index of each class among known ones; None: it is not there, or cannot be told from others.

    Classes match by name. Those that share a name with another, on either side, match by name and id.
    """
    ours, theirs = Counter(names), Counter(known_names)
    by_name = {name: index for index, name in enumerate(known_names) if theirs[name] == 1}
    by_both = {both: index for index, both in enumerate(zip(known_names, known_ids, strict=True))}
    return [
        by_name[name] if ours[name] == 1 and name in by_name else by_both.get((name, number))
        for name, number in zip(names, ids, strict=True)
    ]


def check_same_classes(train: CocoDataset, val: CocoDataset) -> CocoDataset:
    """The validation set, its class indices those of the training set. It may lack some classes.

    Raises:
        UserError: it has a class that the training set does not have; or other keypoints.
    """
    check_same_keypoints(val.keypoints, train.keypoints, val.annotations, str(train.annotations))
    return align_classes(val, train.class_names, train.category_ids, str(train.annotations))


def align_classes(
    dataset: CocoDataset, class_names: Sequence[str], category_ids: Sequence[int], source: str
) -> CocoDataset:
    """The data set with the class indices of `source`, a training set, a run or a checkpoint.

    Category ids stay those of the data set's file, and where they are others than in `source`, its
    summary says so. A class that the file lacks has the id of `source`, or a new one if that is taken.

    Raises:
        UserError: it has a class that `source` does not have, or that could be several of it.
    """
    own = (dataset.class_names, dataset.category_ids)
    moved = [index for index in match_classes(*own, class_names, category_ids) if index is not None]
    if len(moved) < len(dataset.class_names):
        raise UserError(
            f"{dataset.annotations}: its categories do not match {source}: "
            f"{'; '.join(class_faults(*own, class_names, category_ids))}; give both files the same names"
        )
    if dataset.category_ids == list(category_ids) and moved == list(range(len(class_names))):
        return dataset
    ids = _ids_in_order(dataset.category_ids, moved, category_ids)
    other = [index for index in sorted(moved) if ids[index] != category_ids[index]]
    findings = dataset.findings
    if other:
        shown = [f"'{class_names[i]}' is {ids[i]} here, {category_ids[i]} there" for i in other[:3]]
        rest = f" and {len(other) - 3} more" if len(other) > 3 else ""
        message = (
            f"classes are matched with {source} by name, since their ids differ: {', '.join(shown)}{rest}"
        )
        findings = [*findings, Finding("note", "", "other ids", message)]
    records = flat_records(dataset.records).renumbered(moved)
    return replace(
        dataset, records=records, class_names=list(class_names), category_ids=ids, findings=findings
    )


def class_faults(
    names: Sequence[str], ids: Sequence[int], known_names: Sequence[str], known_ids: Sequence[int]
) -> list[str]:
    """What keeps each class that has no match from having one."""
    ids_of: dict[str, list[int]] = {}
    for name, number in zip(known_names, known_ids, strict=True):
        ids_of.setdefault(name, []).append(number)
    names_of = dict(zip(known_ids, known_names, strict=True))
    faults = []
    for name, number, match in zip(
        names, ids, match_classes(names, ids, known_names, known_ids), strict=True
    ):
        if match is not None:
            continue
        if name in ids_of:
            there = ", ".join(map(str, ids_of[name]))
            faults.append(
                f"category '{name}' has id {number} here and {there} there, and a name that several "
                "share says which one is meant only together with its id"
            )
        elif number in names_of:
            faults.append(f"category {number} is '{name}' here, but '{names_of[number]}' there")
        else:
            faults.append(f"category {number} '{name}' is not there")
    return faults


def _ids_in_order(own: Sequence[int], moved: Sequence[int], known: Sequence[int]) -> list[int]:
    """The id of each class of the other order: the file's own, where it has the class."""
    given = dict(zip(moved, own, strict=True))
    taken, ids = set(own), []
    for index, number in enumerate(known):
        if index not in given and number in taken:
            number = max((*taken, *known)) + 1
        ids.append(given.get(index, number))
        taken.add(ids[-1])
    return ids
