"""Which files the images of a data set are, also where it was written on another system."""

from __future__ import annotations

import difflib
import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from PIL import Image

from fastmrcnn.errors import UserError

# Pillow has their names, but decodes them with the help of another program or not at all.
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_NAMES_COMPARED = 5000  # of a folder, to find the nearest


class FoundFiles(NamedTuple):
    paths: dict[str, str]
    """By file_name, of those that are there. Text, since millions of Paths take their time."""
    other_names: dict[str, str]
    """Likewise, of those that are there under another name."""
    missing: list[str]
    lines: list[str]
    """What to tell of those that are there under another name."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case and with their dot, of the files that Pillow can decode."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NOT_PICTURES)


def looks_like_image(path: Path) -> bool:
    """Whether a file in a folder is to be taken for an image: by its suffix, unless it is hidden.

    Hidden are also the files ._NAME that macOS leaves beside others.
    """
    return not path.name.startswith(".") and path.suffix.lower() in image_suffixes() and path.is_file()


def find_files(names: Iterable[str], folder: Path) -> FoundFiles:
    """The file of each `file_name`.

    What is not there by its name is looked for as other systems would write it: with backslashes, percent
    escapes, other case or accents composed another way, and relative to another folder. It is taken if
    there is one such file and no other name means it.
    """
    listings = Listings()
    root = os.fspath(folder)
    paths: dict[str, str] = {}
    candidates: dict[str, str] = {}
    missing = []
    within, inside = os.path.join(root, ""), listings.names(root)
    for name in dict.fromkeys(names):
        if name in inside:  # most are, and a set may have a million
            paths[name] = within + name
            continue
        path = os.path.join(root, name)
        if listings.has(path):
            paths[name] = path
        elif (found := listings.like(name, root)) is not None:
            candidates[name] = found
        else:
            missing.append(name)
    claims = Counter(map(os.path.normpath, [*paths.values(), *candidates.values()]) if candidates else ())
    taken = {name: path for name, path in candidates.items() if claims[os.path.normpath(path)] == 1}
    missing += [name for name in candidates if name not in taken]
    lines = []
    if taken:
        name, path = next(iter(taken.items()))
        differences = Counter(difference(name, os.path.relpath(path, folder)) for name, path in taken.items())
        kinds = ", ".join(f"{what}: {count}" for what, count in differences.items())
        images = "1 image is" if len(taken) == 1 else f"{len(taken)} images are"
        lines.append(
            f"{images} found under another name than file_name says ({kinds}): {name!r} is "
            f"{os.path.relpath(path, folder)!r}"
        )
    return FoundFiles(paths | taken, taken, missing, lines)


def require_files(found: FoundFiles, total: int, folder: Path, file: Path, key: str) -> None:
    """UserError if some are missing, with the nearest that are there."""
    if not found.missing:
        return
    missing = found.missing
    some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    hints = [hint for name in missing[:3] if (hint := nearest(name, folder)) is not None]
    near = f" ({'; '.join(dict.fromkeys(hints))})" if hints else ""
    images = "1 image" if total == 1 else f"{total} images"
    raise UserError(
        f"{file}: {len(missing)} of {images} not found in {folder}: {some}{near}; "
        f"set {key}.images to their folder, correct file_name, or leave them out with data.missing=skip"
    )


class Listings:
    """The contents of folders, each read once: far cheaper than a look at each file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}
        self._plain: dict[str, dict[str, list[str]]] = {}

    def names(self, folder: str) -> set[str]:
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # ValueError: no system has such a name
                self._names[folder] = set()
        return self._names[folder]

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.names(folder) or os.path.exists(path)

    def like(self, name: str, folder: str) -> str | None:
        """The one file within `folder` that `name` may mean; None if there is none, or more than one."""
        parts = plain_parts(name)
        for first in range(len(parts)):
            places = [folder]
            for part in parts[first:]:
                places = [os.path.join(place, there) for place in places for there in self._like(place, part)]
            files = [place for place in places if os.path.isfile(place)]
            if files:
                return files[0] if len(files) == 1 else None
        return None

    def _like(self, folder: str, part: str) -> Sequence[str]:
        if folder not in self._plain:
            plain: dict[str, list[str]] = {}
            for name in self.names(folder):
                plain.setdefault(plain_name(name), []).append(name)
            self._plain[folder] = plain
        return self._plain[folder].get(part, ())


def plain_name(name: str) -> str:
    """What is left of a name without what systems differ in."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(name)).lower()).strip()


def plain_parts(name: str) -> list[str]:
    """The folders and the file of a path of any system, or of a URL."""
    if "://" in name:
        name = re.split(r"[?#]", name.partition("://")[2])[0]
    parts = unquote(name).replace("\\", "/").split("/")
    return [plain for part in parts if (plain := plain_name(part)) not in ("", ".", "..")]


def difference(name: str, there: str) -> str:
    """What of `file_name` another system would write in another way."""
    there = there.replace(os.sep, "/")
    steps = (
        ("backslashes", lambda text: text.replace("\\", "/")),
        ("percent escapes", unquote),
        ("accents composed another way", lambda text: unicodedata.normalize("NFC", text)),
        ("case", str.lower),
    )
    for what, step in steps:
        name, there = step(name), step(there)
        if name == there:
            return what
    return "folders"


def nearest(name: str, folder: Path) -> str | None:
    """What is there in place of a missing file, as a hint; None: nothing like it."""
    listings = Listings()
    parts = plain_parts(name)
    if not parts:
        return None
    wanted, inside = parts[-1], sorted(listings.names(os.fspath(folder)))
    stem = os.path.splitext(wanted)[0]
    for other in inside:
        if os.path.splitext(plain_name(other))[0] == stem and (folder / other).is_file():
            return f"is {name!r} {other!r}?"
    for other in inside:
        if (folder / other).is_dir() and any(
            plain_name(one) == wanted for one in listings.names(os.fspath(folder / other))
        ):
            return f"there is one in {folder / other}"
    plain = {plain_name(other): other for other in inside[:_NAMES_COMPARED]}
    close = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.8)
    return f"is {name!r} {plain[close[0]]!r}?" if close else None
