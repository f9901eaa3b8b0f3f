"""Which files are images."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

# Pillow has their names, but decodes them with the help of another program or not at all.
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


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


def plain_name(name: str) -> str:
    """What is left of a name without what systems differ in."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(name)).lower()).strip()
