"""Fonts made for a test: every letter is a square."""

from __future__ import annotations

import io
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.sbixGlyph import Glyph
from fontTools.ttLib.tables.sbixStrike import Strike
from PIL import Image


def write_font(path: Path, letters: str, colour: tuple[int, int, int] | None = None) -> Path:
    """A font with these letters; with a colour it is of pictures in one size, as fonts of emoji are."""
    names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
    pen = TTGlyphPen(None)
    for place, corner in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if place else pen.moveTo)(corner)
    pen.closePath()
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    font = builder.font
    if colour is not None:
        stream = io.BytesIO()
        Image.new("RGBA", (109, 109), (*colour, 255)).save(stream, "PNG")
        strike = Strike(ppem=109, resolution=72)
        strike.glyphs = {
            name: Glyph(
                glyphName=name,
                graphicType="png " if name != ".notdef" else None,
                imageData=stream.getvalue() if name != ".notdef" else None,
            )
            for name in names
        }
        table = newTable("sbix")
        table.version, table.flags, table.strikes = 1, 1, {109: strike}
        font["sbix"] = table
        del font["glyf"], font["loca"]
        font["maxp"].tableVersion = 0x00005000
    font.save(path)
    return path
