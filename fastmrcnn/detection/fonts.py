"""Text in any script, with the fonts that the system has."""

from __future__ import annotations

import functools
import math
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# DejaVu Sans, which comes with Matplotlib and knows more scripts than Pillow's own font.
FIRST = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
_BITMAP_SIZES = (109, 128, 136, 160, 96, 64, 32)  # the usual ones of fonts that are pictures, as of emoji
# Their glyphs are placeholders, or of one style where a plain one will do.
_PLACEHOLDERS = re.compile(r"last.?resort|adobe.?blank", re.IGNORECASE)
_STYLES = re.compile(r"bold|italic|oblique|light|thin|black|condensed|mono|serif", re.IGNORECASE)
_NAMED = 5  # of the names that cannot be drawn


class Face(NamedTuple):
    path: str
    characters: frozenset[int]
    fixed: int | None
    """The one size of a font that is pictures; None: any."""


class Run(NamedTuple):
    """Letters that one font has."""

    text: str
    face: Face


class Line:
    """A line of text of one size, ready to be measured and drawn from the left end of its base line.

    Args:
        text: as `drawable_names` lets it pass; a letter that no font has is left out.
    """

    def __init__(self, text: str, size: int) -> None:
        self.size = size
        self.runs = [run for run in _runs(text) if run.text]

    def bounds(self) -> tuple[float, float]:
        """Left and right end of the ink."""
        x = left = right = 0.0
        for place, run in enumerate(self.runs):
            font, scale = _font(run.face, self.size)
            start, _, end, _ = font.getbbox(run.text, anchor="ls")
            left = start * scale if place == 0 else left
            right = x + end * scale
            x += font.getlength(run.text) * scale
        return left, right

    def draw(self, image: Image.Image, position: tuple[float, float], fill: str) -> None:
        x, y = position
        for run in self.runs:
            font, scale = _font(run.face, self.size)
            if run.face.fixed is None:
                ImageDraw.Draw(image).text((x, y), run.text, font=font, fill=fill, anchor="ls")
            else:
                _paste_pictures(image, (x, y), run.text, font, scale)
            x += font.getlength(run.text) * scale


@functools.lru_cache(maxsize=64)
def drawable_names(names: tuple[str, ...]) -> list[str]:
    """The names, with the class number in place of one that has a letter of which no font is there.

    The first time a line on stderr says which those are.
    """
    shown, absent = [], []
    for number, name in enumerate(names):
        text = _one_line(name)
        if all(_face_of(letter) is not None for letter in text if not _is_silent(letter)):
            shown.append(text)
        else:
            shown.append(f"class {number}")
            absent.append(f"class {number} is {text!r}")
    if absent:
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        line = (
            f"note: no font here has the letters of these names, so pictures show their numbers: "
            f"{', '.join(absent[:_NAMED])}{more}; a font for them, such as Noto's, has to be installed"
        )
        tqdm.write(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return shown


def system_fonts() -> list[str]:
    """Files of all fonts here, plain styles first."""
    from matplotlib import font_manager  # which may take seconds the first time, and is hardly ever needed

    found = [path for path in font_manager.findSystemFonts() if not _PLACEHOLDERS.search(Path(path).name)]
    return sorted(found, key=lambda path: (len(_STYLES.findall(Path(path).name)), path))


@functools.cache
def _system_fonts() -> list[str]:
    return system_fonts()


@functools.cache
def _open_face(path: str) -> Face | None:
    """None: a file that is damaged, or that Pillow cannot draw with."""
    fixed = None
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            characters = frozenset(font.getBestCmap() or ())
        try:
            ImageFont.truetype(path, 16)
        except OSError:
            fixed = next((size for size in _BITMAP_SIZES if _has_size(path, size)), None)
            if fixed is None:
                return None
    except Exception:  # whatever the parts of a damaged file raise
        return None
    return Face(path, characters, fixed)


def _has_size(path: str, size: int) -> bool:
    try:
        ImageFont.truetype(path, size)
    except OSError:
        return False
    return True


@functools.cache
def _face_of(letter: str) -> Face | None:
    """The first font that has a letter."""
    code = ord(letter)
    for path in (FIRST, *(() if letter.isascii() else _system_fonts())):
        face = _open_face(path)
        if face is not None and code in face.characters:
            return face
    return None


@functools.lru_cache(maxsize=4096)
def _runs(text: str) -> tuple[Run, ...]:
    """The text cut where the font changes. A run goes on as long as its font has the letters."""
    runs: list[Run] = []
    for letter in text:
        last = runs[-1] if runs else None
        if last is not None and ord(letter) in last.face.characters:
            runs[-1] = Run(last.text + letter, last.face)
        elif (face := _face_of(letter)) is not None and not _is_silent(letter):
            runs.append(Run(letter, face))
    return tuple(runs)


@functools.lru_cache(maxsize=256)
def _font(face: Face, size: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """A font, and by what its pixels are to be multiplied."""
    if face.fixed is None:
        return ImageFont.truetype(face.path, size), 1.0
    return ImageFont.truetype(face.path, face.fixed), size / face.fixed


def _paste_pictures(
    image: Image.Image, position: tuple[float, float], text: str, font: Any, scale: float
) -> None:
    left, top, right, bottom = (math.floor(side) for side in font.getbbox(text, anchor="ls"))
    tile = Image.new("RGBA", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(tile).text((-left, -top), text, font=font, embedded_color=True, anchor="ls")
    size = (max(round(tile.width * scale), 1), max(round(tile.height * scale), 1))
    tile = tile.resize(size, Image.Resampling.BILINEAR)
    place = (round(position[0] + left * scale), round(position[1] + top * scale))
    image.paste(tile, place, tile)


def _one_line(name: str) -> str:
    """Without line breaks and other control characters."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in name)


def _is_silent(letter: str) -> bool:
    """Whether a letter only says how others are to look: joiners, directions, variants."""
    return unicodedata.category(letter) == "Cf" or "VARIATION SELECTOR" in unicodedata.name(letter, "")
