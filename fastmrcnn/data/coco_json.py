"""The lists of a COCO file: images, categories, and entries with ids."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmrcnn.data.masks import FARTHEST
from fastmrcnn.data.records import ImageRecord, Problems
from fastmrcnn.errors import UserError


def read_json(file: Path, key: str) -> dict[str, list[Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; set {key}.annotations to a COCO-format JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {key}.annotations must be a JSON file") from None
    try:
        with _no_garbage_collection():
            tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); {key}.annotations must be a JSON file") from None
    parts = ("images", "annotations", "categories")
    if isinstance(tree, dict):
        missing = [part for part in parts if not isinstance(tree.get(part), list)]
        wrong = f"has no list of {' and no list of '.join(missing)}" if missing else ""
    else:
        wrong = f"holds a {type(tree).__name__} where an object is expected"
    if wrong:
        raise UserError(
            f"{file}: not COCO format: it {wrong}; {key}.annotations must hold {', '.join(parts)}"
        )
    for part in ("images", "categories"):
        if not tree[part]:
            raise UserError(f"{file}: its list of {part} is empty; give {key}.annotations with {part}")
    return tree


def read_categories(entries: list[Any], problems: Problems) -> tuple[list[str], list[int]]:
    names: dict[int, str] = {}
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        category = identifier(entry, "category", position, seen, problems)
        if category is None:
            continue
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            problems.add("category", category, "no name")
        names[category] = str(entry.get("name"))
    ids = sorted(names)
    return [names[category] for category in ids], ids


def read_images(entries: list[Any], folder: Path, file: Path, problems: Problems) -> dict[Any, ImageRecord]:
    records: dict[Any, ImageRecord] = {}
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        image_id = identifier(entry, "image", position, seen, problems)
        if image_id is None:
            continue
        width, height, name = _whole(entry.get("width")), _whole(entry.get("height")), entry.get("file_name")
        if not isinstance(name, str) or not name:
            problems.add("image", image_id, "no file_name")
            name = "?"
        if width is None or height is None or not (0 < width <= FARTHEST and 0 < height <= FARTHEST):
            given = f"width {entry.get('width')!r}, height {entry.get('height')!r}"
            problems.add("image", image_id, f"{given}: both must be whole numbers from 1 to {FARTHEST:,}")
            width = height = 1
        records[image_id] = ImageRecord(image_id, folder / name, name, width, height, [], file)
    return records


def identifier(entry: Any, thing: str, position: int, seen: set[int], problems: Problems) -> int | None:
    if not isinstance(entry, dict):
        problems.add(thing, f"number {position + 1}", f"is a {type(entry).__name__}, not an object")
        return None
    found = _whole(entry.get("id"))
    if found is None:
        problems.add(thing, f"number {position + 1}", f"its id {entry.get('id')!r} is not a whole number")
    elif found in seen:
        problems.add(thing, found, "its id is there twice")
        return None
    else:
        seen.add(found)
    return found


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of new lists trigger one futile collection after another: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
