"""The ids that a COCO file gives to images and classes, for results that are to be judged against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmrcnn.data.coco_json import parse_json
from fastmrcnn.data.formats import by_id
from fastmrcnn.data.image_files import plain_parts
from fastmrcnn.data.images import nearly
from fastmrcnn.data.values import whole
from fastmrcnn.errors import UserError


class KnownImage(NamedTuple):
    """An image that a file lists."""

    image_id: int
    parts: tuple[str, ...]
    """Its file_name: folders, then the name."""
    size: tuple[Any, Any]
    """Width and height, as the file has them; None: it does not."""


class CocoIds(NamedTuple):
    file: Path
    images: list[KnownImage]
    categories: list[tuple[int, str]]
    """Ids and names. A file of test images may have none."""


def read_ids(file: Path) -> CocoIds:
    """Images and categories of a COCO file; annotations need not be there.

    Raises:
        UserError: it cannot be read, or an id or a name is missing or there twice.
    """
    try:
        tree = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; --annotations takes a COCO-format JSON file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{file}: cannot be read ({error}); --annotations takes a JSON file") from None
    entries = _entries(tree, "images")
    if not entries:
        raise UserError(f"{file}: lists no images; --annotations takes a COCO-format JSON file")
    images = []
    for image_id, entry in _identified(entries, "image", file):
        name = entry.get("file_name") or entry.get("coco_url")  # LVIS has but the second
        if not isinstance(name, str | int | float) or not (parts := tuple(plain_parts(str(name)))):
            raise UserError(f"{file}: image {image_id} has no file_name, by which it is found")
        images.append(KnownImage(image_id, parts, (_side(entry.get("width")), _side(entry.get("height")))))
    categories = []
    for category, entry in _identified(_entries(tree, "categories"), "category", file):
        categories.append((category, str(entry.get("name"))))
    return CocoIds(file, images, categories)


def _entries(tree: Any, part: str) -> list[Any]:
    """A list of the file, also one that stands in an object, by id; empty if there is none."""
    found = tree.get(part) if isinstance(tree, dict) else None
    if isinstance(found, dict):
        return list(found.values()) if by_id(found) else []
    return found if isinstance(found, list) else []


def _side(given: Any) -> Any:
    """A width or height as a number, where it is one or spells one."""
    found = whole(given)
    return given if found is None else found


def _identified(entries: list[Any], thing: str, file: Path) -> list[tuple[int, dict[str, Any]]]:
    found: dict[int, dict[str, Any]] = {}
    for place, entry in enumerate(entries, start=1):
        given = whole(entry.get("id")) if isinstance(entry, dict) else None
        if given is None:
            raise UserError(f"{file}: {thing} number {place} has no id that is a whole number; correct it")
        if given in found:
            raise UserError(f"{file}: {thing} {given} is there twice; give each an id of its own")
        found[given] = entry
    return list(found.items())


def match_images(paths: Sequence[Path], known: CocoIds) -> list[KnownImage | str]:
    """The listed image that each file is, by its name, or why it is none.

    Folders count where names alone do not tell: of several images of one name it is the one whose
    `file_name` goes on to agree with the path. Where that leaves two, or two files agree with one image as
    well, there is no telling.
    """
    by_name: dict[str, list[KnownImage]] = defaultdict(list)
    for image in known.images:
        by_name[image.parts[-1]].append(image)
    matches: list[KnownImage | str] = []
    agreement: dict[int, list[int]] = defaultdict(list)  # of each image that was found: with whom, how far
    for path in paths:
        parts = plain_parts(str(path.absolute()))
        ranked = [(_shared(image.parts, parts), image) for image in by_name.get(parts[-1], [])]
        most = max((shared for shared, _ in ranked), default=0)
        best = [image for shared, image in ranked if shared == most]
        if not best:
            matches.append(f"{known.file} lists no image of this name")
        elif len(best) > 1:
            ids = ", ".join(str(image.image_id) for image in best[:4])
            matches.append(f"{known.file} lists {len(best)} images of this name (ids {ids})")
        else:
            matches.append(best[0])
            agreement[best[0].image_id].append(most)
    for place, (path, match) in enumerate(zip(paths, matches, strict=True)):
        if isinstance(match, KnownImage) and len(rivals := agreement[match.image_id]) > 1:
            own = _shared(match.parts, plain_parts(str(path.absolute())))
            if own < max(rivals) or rivals.count(own) > 1:
                matches[place] = (
                    f"image {match.image_id} of {known.file} may be this one or another of the same name"
                )
    return matches


def size_fault(image: KnownImage, width: int, height: int, file: Path) -> str | None:
    """Why pixels of this size are not the image that the file means; None if they are."""
    if image.size == (None, None) or nearly((width, height), image.size):
        return None
    return (
        f"has width {width}, height {height}, but {file} gives image {image.image_id} width "
        f"{image.size[0]}, height {image.size[1]}"
    )


def match_categories(names: Sequence[str], ids: Sequence[int], known: CocoIds, source: str) -> list[int]:
    """The file's ids of a model's classes, by name; those that it lacks keep their own.

    Args:
        names, ids: of the classes, as the model has them.
        source: of the model, for messages.
    Raises:
        UserError: a class has several ids in the file, or its own is there another's.
    """
    by_name: dict[str, list[int]] = defaultdict(list)
    for category, name in known.categories:
        by_name[name].append(category)
    taken = {category for category, _ in known.categories}
    found, faults = [], []
    for name, own in zip(names, ids, strict=True):
        there = by_name.get(name, [])
        if own in there or not (there or own in taken):
            found.append(own)
        elif len(there) == 1:
            found.append(there[0])
        elif there:
            faults.append(f"'{name}' is the name of categories {', '.join(map(str, there))}")
        else:
            faults.append(f"'{name}' is not there, and its id {own} is that of another category")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{known.file}: its categories are not those of {source}: {'; '.join(faults[:3])}{more}; give "
            "both the same names, or leave --annotations out"
        )
    return found


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many of the last parts are the same."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
