"""What was read of annotation files, kept for the next start.

A large file takes a minute to parse and to check, and the result is the same as long as its content, the
options and this program are. So it is kept in a file named by all three: nothing in it can be out of date.
What depends on the images' files is not kept; they are looked at anew at every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastmrcnn.data.contents import BoxSource, Contents, read_contents
from fastmrcnn.data.flat_file import DamagedError, MappedArrays, open_arrays, write_arrays
from fastmrcnn.data.flat_records import FlatRecords
from fastmrcnn.data.formats import other_file
from fastmrcnn.data.image_files import Listings
from fastmrcnn.data.keypoints import KeypointOptions, KeypointSchema
from fastmrcnn.data.records import Finding, Problems
from fastmrcnn.files import TEMPORARY_SUFFIX

SUFFIX = ".annotations"
LEAST_BYTES = 2_000_000  # of an annotation file; a smaller one is read in less than a second
MOST_BYTES = 20 * 2**30  # of all that is kept; COCO's training set takes half a gigabyte
_LEFT_OVER = 24 * 3600  # seconds after which a temporary file is one that a crash has left


class AnnotationCache(NamedTuple):
    folder: Path
    least_bytes: int = LEAST_BYTES
    """Smaller annotation files are read anew each time."""
    most_bytes: int = MOST_BYTES
    """What was used longest ago is removed beyond it."""


class ContentOptions(NamedTuple):
    """How `read_contents` is to read a file."""

    boxes: BoxSource = "file"
    min_box_side: float = 0.0
    require_masks: bool = False
    keypoints: KeypointOptions | None = None
    keep_tree: bool = False
    keep_group_classes: bool = False

    def named(self) -> list[Any]:
        """What of them decides what is read, in types that JSON has."""
        points = self.keypoints and [self.keypoints.flip_pairs, self.keypoints.offset]
        return [self.boxes, self.min_box_side, self.require_masks, points, self.keep_group_classes]


def usual_folder() -> Path | None:
    """Where caches belong; None for a user without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "fastmrcnn" / "annotations"
    try:
        return Path.home() / ".cache" / "fastmrcnn" / "annotations"
    except RuntimeError:
        return None


def read_kept(
    file: Path,
    folder: Path,
    key: str,
    problems: Problems,
    options: ContentOptions,
    cache: AnnotationCache | None,
) -> tuple[Contents, str | None]:
    """What `read_contents` gives, from the cache if it is there, and then kept in it. A tree is not kept.

    Returns:
        The contents, and why they could not be kept, if so.
    Raises:
        UserError: as `read_contents`.
    """

    def read() -> Contents:
        return read_contents(file, folder, key, problems, **options._asdict())

    stamp = None if cache is None or options.keep_tree else _stamp(file)
    if cache is None or stamp is None or stamp[0] < cache.least_bytes or other_file(file) is not None:
        return read(), None
    try:
        path = cache.folder / f"{name_of(file, options)}{SUFFIX}"
    except OSError:  # is told when it is read
        return read(), None
    found = _open(path, file, folder, problems)
    if found is not None:
        return found, None
    contents = read()
    if problems.has_errors or _stamp(file) != stamp:  # what was read may not be what the name stands for
        return contents, None
    try:
        arrays = _keep(path, contents, folder, problems)
    except (OSError, DamagedError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        line = (
            f"cannot be kept for the next start in {cache.folder} ({reason}); data.cache=FOLDER names "
            "another place, and data.cache=off does without"
        )
        return contents, line
    remove_oldest(cache, path)
    # From here on the pages of the file, which all processes share, in place of memory of this one.
    contents = contents._replace(records=FlatRecords(arrays, folder, file))
    _give_back_memory()
    return contents, None


def name_of(file: Path, options: ContentOptions) -> str:
    """Of the content of a file, the options with which it is read, and the program that does it.

    The content is read as a whole: 1.3 GB take a second. Its time would take nothing, but a file that was
    copied or restored over another can have that one's time and size.
    """
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([options.named(), _program()]).encode())
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@functools.cache
def _program() -> str:
    """A word that changes with what computes the contents: the sources of this room, and the libraries."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    for package in ("fastmrcnn", "numpy", "orjson", "pycocotools"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when somebody writes to the file while it is read; None: there is no such file."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # ValueError: no system has such a name
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _open(path: Path, file: Path, folder: Path, problems: Problems) -> Contents | None:
    """What is kept, its findings told to `problems`; None if there is nothing, or not for this folder."""
    try:
        arrays = open_arrays(path)
    except OSError:
        return None
    except DamagedError:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    about = arrays.about
    records = FlatRecords(arrays, folder, file)
    if (named := about["names_for"]) is not None:
        # Which part of an address is the name was decided by what is in this folder.
        listings = Listings()
        if named != os.path.abspath(folder) or not all(map(listings.has, records.paths)):
            return None
    with contextlib.suppress(OSError):  # another's
        os.utime(path)
    for severity, thing, kind, message, remedy, ids in about["findings"]:
        problems.say(severity, thing, message, remedy, ids, kind)
    schema = about["schema"]
    if schema is not None:
        names, skeleton, mirror = schema
        schema = KeypointSchema(names, [(a, b) for a, b in skeleton], mirror)
    return Contents(
        {},
        records,
        about["class_names"],
        about["category_ids"],
        schema,
        Counter(dict(about["skipped"])),
        about["clipped"],
        named is not None,
    )


def _keep(path: Path, contents: Contents, folder: Path, problems: Problems) -> MappedArrays:
    """Write what was read, and open it. Of two processes that do so at once the later one wins."""
    about = {
        "findings": [_parts(finding) for finding in problems.found.values()],
        "schema": contents.schema,
        "class_names": contents.class_names,
        "category_ids": contents.category_ids,
        "skipped": list(contents.skipped.items()),
        "clipped": contents.clipped,
        "names_for": os.path.abspath(folder) if contents.names_from_addresses else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new_file(path) as stream:
        write_arrays(stream, contents.records.arrays, about)
    return open_arrays(path)


def _give_back_memory() -> None:
    """Let go of what the C library holds for later. Loader processes are copies of this one, and would each
    count a gigabyte that nobody uses."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _parts(finding: Finding) -> list[Any]:
    return [
        finding.severity,
        finding.thing,
        finding.kind,
        finding.message,
        finding.remedy,
        finding.ids,
    ]


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """As `files.replacing`, but under a name that no process of any machine has, since this folder may be one
    that many share; and what goes wrong is no error of the user's."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove_oldest(cache: AnnotationCache, kept: Path) -> None:
    """Remove what was used longest ago until the rest is small enough, `kept` aside; and what crashes left.

    A process that uses a file goes on with it: the file is gone from the folder alone until it is closed.
    """
    entries = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(cache.folder):
            with contextlib.suppress(OSError):
                status = entry.stat()
                if entry.name.endswith(TEMPORARY_SUFFIX) and time.time() - status.st_mtime > _LEFT_OVER:
                    os.unlink(entry.path)
                elif entry.name.endswith(SUFFIX):
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= cache.most_bytes:
            break
        if path != os.fspath(kept):
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
