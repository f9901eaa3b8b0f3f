"""The lists of a COCO file: images, categories, and entries with ids."""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from fastmrcnn.data.annotation import AS_NUMBER
from fastmrcnn.data.formats import PARTS, by_id, one_entry, other_file, other_format
from fastmrcnn.data.masks import FARTHEST
from fastmrcnn.data.records import ImageRecord, Problems
from fastmrcnn.data.values import number, whole
from fastmrcnn.errors import UserError


def read_json(file: Path, key: str, problems: Problems) -> dict[str, list[Any]]:
    """The lists of a COCO file.

    Raises:
        UserError: it is not there, not JSON, or not COCO's; the line says what it looks like.
    """
    if file.exists() and (other := other_file(file)) is not None:
        raise UserError(f"{file}: not a JSON file: it {other} and set {key}.annotations to that file")
    try:
        tree = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; set {key}.annotations to a COCO-format JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {key}.annotations must be a JSON file") from None
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise UserError(f"{file}: not valid JSON ({error}); {key}.annotations must be a JSON file") from None
    other = other_format(tree)
    if isinstance(tree, dict) and other is None:
        for part in PARTS:
            if one_entry(tree.get(part)):
                other = f"has one entry where a list of {part} is expected; write [ ] around it"
            elif by_id(tree.get(part)):
                tree[part] = list(tree[part].values())
                what = f"its {part} stand in an object, by id, as in LIVECell"
                problems.say("note", "", what, "taken as a list of them")
        missing = [part for part in PARTS if not isinstance(tree.get(part), list)]
        wrong = f"has no list of {' and no list of '.join(missing)}" if missing else ""
    else:
        wrong = f"holds a {type(tree).__name__} where an object is expected"
    if wrong or other:
        raise UserError(
            f"{file}: not COCO format: it {other or wrong}; {key}.annotations must hold {', '.join(PARTS)}"
        )
    for part in ("images", "categories"):
        if not tree[part]:
            raise UserError(f"{file}: its list of {part} is empty; give {key}.annotations with {part}")
    return tree


def parse_json(content: bytes) -> Any:
    """The content of a JSON file, by a parser that is twice as fast; what that one refuses and others write,
    NaN above all, by Python's own.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        ValueError, RecursionError: it is not JSON.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return json.loads(content.decode())


def read_categories(entries: list[Any], problems: Problems) -> tuple[list[str], list[int]]:
    names: dict[int, str] = {}
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        category = identifier(entry, "category", position, seen, problems)
        if category is None:
            continue
        name = _text(entry, "name", category, "category", problems)
        if name is None:
            problems.add("category", category, "no name")
        names[category] = str(name)
    ids = sorted(names)
    return [names[category] for category in ids], ids


def drop_groups(tree: dict[str, list[Any]], problems: Problems) -> None:
    """Leave out categories that no annotation has and that others name as their supercategory, such as
    the first one of Roboflow's files."""
    named = [
        entry
        for entry in tree["categories"]
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    ]
    above = {
        c["supercategory"]
        for c in named
        if isinstance(c.get("supercategory"), str) and c["supercategory"] != c["name"]
    }
    groups = [entry for entry in named if entry["name"] in above]
    if not groups:
        return
    used = {whole(entry.get("category_id")) for entry in tree["annotations"] if isinstance(entry, dict)}
    groups = [entry for entry in groups if whole(entry.get("id")) not in used]
    if groups and len(groups) < len(tree["categories"]):
        tree["categories"] = [entry for entry in tree["categories"] if not any(entry is g for g in groups)]
        problems.say(
            "note",
            "category",
            "that only groups others and has no object, so it is no class",
            "data.keep_group_classes=true keeps it",
            [entry["name"] for entry in groups],
        )


def read_images(
    entries: list[Any], folder: Path, file: Path, problems: Problems
) -> tuple[dict[int, ImageRecord], bool]:
    """The images by id, and whether some have no name but that in their address."""
    records: dict[int, ImageRecord] = {}
    from_addresses = False
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        image_id = identifier(entry, "image", position, seen, problems)
        if image_id is None:
            continue
        name = _text(entry, "file_name", image_id, "image", problems)
        if name is None and (name := _name_in_url(entry, folder, problems)) is not None:
            from_addresses = True
        if name is None:
            problems.add("image", image_id, "no file_name")
            name = "?"
        sides = {}
        for key in ("width", "height"):
            given = entry.get(key)
            side = whole(given)
            if side is None or not 0 < side <= FARTHEST:
                what = f"width {entry.get('width')!r}, height {entry.get('height')!r}"
                problems.add("image", image_id, f"{what}: both must be whole numbers from 1 to {FARTHEST:,}")
                sides = {"width": 1, "height": 1}
                break
            if isinstance(given, str):
                problems.say("note", "image", f"with {key} given as text", AS_NUMBER, [image_id])
            entry[key] = sides[key] = side
        records[image_id] = ImageRecord(
            image_id, folder / name, name, sides["width"], sides["height"], [], file
        )
    return records, from_addresses


def identifier(entry: Any, thing: str, position: int, seen: set[int], problems: Problems) -> int | None:
    """The id of an image or a category, written into its entry as a whole number; None if it has none."""
    if not isinstance(entry, dict):
        problems.add(thing, f"number {position + 1}", f"is a {type(entry).__name__}, not an object")
        return None
    given = entry.get("id")
    found = whole(given)
    if found is None:
        problems.add(thing, f"number {position + 1}", f"its id {given!r} is not a whole number")
        return None
    if found in seen:
        problems.add(thing, found, "its id is there twice")
        return None
    if isinstance(given, str):
        problems.say("note", thing, "with an id given as text", AS_NUMBER, [found])
    entry["id"] = found
    seen.add(found)
    return found


def _text(entry: dict[str, Any], key: str, identity: int, thing: str, problems: Problems) -> str | None:
    """A name, or the number that stands for it; None if there is none that can be written."""
    given = entry.get(key)
    if (found := number(given)) is not None and not isinstance(given, str):
        problems.say("note", thing, f"with a number as {key}", "taken as text", [identity])
        entry[key] = given = str(found)
    if not isinstance(given, str) or not given:
        return None
    try:
        given.encode()
    except UnicodeEncodeError:  # half of a pair of JSON's escapes
        return None
    return given


def _name_in_url(entry: dict[str, Any], folder: Path, problems: Problems) -> str | None:
    """The file that LVIS names by COCO's address, such as .../train2017/000000391895.jpg alone."""
    address = entry.get("coco_url")
    parts = urlsplit(address).path.split("/") if isinstance(address, str) and "/" in address else []
    if not parts or not parts[-1]:
        return None
    problems.say(
        "note",
        "image",
        "without file_name, as in LVIS",
        "taken from coco_url; COCO's AP counts what LVIS leaves open as false",
        [entry["id"]],
    )
    within = "/".join(parts[-2:])
    return within if (folder / within).exists() else parts[-1]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of new lists trigger one futile collection after another: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
