"""Names in any script: drawn with a font that has their letters, else as class numbers with a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from typefaces import write_font

from fastmrcnn.detection import fonts
from fastmrcnn.detection.draw import COLOURS, draw_objects
from fastmrcnn.detection.fonts import FIRST, Line, drawable_names
from fastmrcnn.detection.objects import Objects

RED = (250, 20, 30)
System = Callable[..., None]


def forget() -> None:
    for cached in (fonts._system_fonts, fonts._open_face, fonts._face_of, fonts._runs, drawable_names):
        cached.cache_clear()


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """Say which fonts the system has."""

    def has(*paths: Path) -> None:
        monkeypatch.setattr(fonts, "system_fonts", lambda: [str(path) for path in paths])
        forget()

    has()
    yield has
    forget()


def drawn(text: str, size: int = 20) -> np.ndarray:
    image = Image.new("RGB", (200, 40), "white")
    Line(text, size).draw(image, (10, 30), "black")
    return np.asarray(image)


def test_text_of_the_first_font_is_drawn_as_pillow_draws_it(system: System) -> None:
    font = ImageFont.truetype(FIRST, 20)
    for text in ("cat 0.95", "жук é (crowd)", ""):
        image = Image.new("RGB", (200, 40), "white")
        ImageDraw.Draw(image).text((10, 30), text, font=font, fill="black", anchor="ls")
        assert (drawn(text) == np.asarray(image)).all()
        left, _, right, _ = font.getbbox(text, anchor="ls")
        assert Line(text, 20).bounds() == (left, right)


def test_without_a_font_the_class_number_and_one_line(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("cat", "細胞", "b🦠", "naïve Ω", "\ud800")
    assert drawable_names(names) == ["cat", "class 1", "class 2", "naïve Ω", "class 4"]
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "class 1 is '細胞', class 2 is 'b🦠', class 4 is '\\ud800'; a font for them" in line
    drawable_names(names)
    assert capsys.readouterr().err == "", "it is told once"
    many = tuple(chr(0x4E00 + k) for k in range(9))
    assert drawable_names(many) == [f"class {k}" for k in range(9)]
    assert "class 4 is '丄' and 4 more; " in capsys.readouterr().err


def test_a_font_of_the_system_that_has_the_letters(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.ttf").write_bytes(b"\0\1\0\0" * 9)
    wrong, right = write_font(tmp_path / "a.ttf", "abc"), write_font(tmp_path / "b.ttf", "細胞 ")
    system(tmp_path / "damaged.ttf", tmp_path / "gone.ttf", wrong, right)
    assert drawable_names(("細胞", "b細")) == ["細胞", "b細"]
    assert capsys.readouterr().err == ""
    # A square of 16 by 16 from 2 on, for each of the letters.
    ink = (drawn("細胞") < 128).all(axis=2)
    assert ink[14:30, 12:28].all()
    assert ink[14:30, 32:48].all()
    assert ink.sum() == 2 * 16 * 16
    assert Line("細胞", 20).bounds()[1] == 40
    assert Line("細胞", 10).bounds()[1] == 20


def test_letters_of_several_fonts_stand_side_by_side(system: System, tmp_path: Path) -> None:
    system(write_font(tmp_path / "a.ttf", "細"), write_font(tmp_path / "b.ttf", "胞"))
    assert drawable_names(("ab細胞",)) == ["ab細胞"]
    length = ImageFont.truetype(FIRST, 20).getlength("ab")
    left, right = Line("ab細胞", 20).bounds()
    assert left == Line("ab", 20).bounds()[0]
    assert right == pytest.approx(length + 40)
    picture = drawn("ab細胞")
    assert (picture[:, : 10 + int(length)] == drawn("ab")[:, : 10 + int(length)]).all()
    assert (picture[14:30, 14 + int(length) : 26 + int(length)] < 128).all()


def test_emoji_are_pictures_in_their_colours(system: System, tmp_path: Path) -> None:
    system(write_font(tmp_path / "emoji.ttf", "🦠", RED))
    for name in ("🦠", "🦠\ufe0f", "🦠\u200d🦠"):
        assert drawable_names((name,)) == [name]
        assert Line(name, 20).bounds()[1] == pytest.approx(20 * name.count("🦠"), abs=0.5)
    picture = drawn("a🦠")
    start = 10 + ImageFont.truetype(FIRST, 20).getlength("a")
    assert (picture[12:28, round(start) + 1 : round(start) + 19] == RED).all()
    assert (picture[:9] == 255).all()


def test_line_breaks_are_spaces(system: System) -> None:
    assert drawable_names(("a\nb", "c\td", "e\u2028f", "g\0")) == ["a b", "c d", "e f", "g "]


def test_fonts_of_placeholders_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["A-Bold.ttf", "LastResortHE-Regular.ttf", "B.ttf", "AdobeBlank.otf", "C-BoldItalic.ttf"]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [f"/x/{name}" for name in names])
    assert fonts.system_fonts() == ["/x/B.ttf", "/x/A-Bold.ttf", "/x/C-BoldItalic.ttf"]


def test_labels_of_objects(system: System, tmp_path: Path) -> None:
    image = np.full((480, 480, 3), 128, np.uint8)
    box = np.array([[100, 200, 300, 400]], np.float32)

    def labelled(name: str) -> np.ndarray:
        one = Objects(480, 480, box, np.zeros(1, np.int64), scores=np.array([0.9], np.float32))
        return draw_objects(image, one, [name])

    assert (labelled("細胞") == labelled("class 0")).all()
    assert (labelled("a\nb") == labelled("a b")).all()
    system(write_font(tmp_path / "a.ttf", "細胞"))
    picture = labelled("細胞")
    assert (picture != labelled("class 0")).any()
    bar = picture[180:199, 100:160]
    assert (bar == COLOURS[0]).all(axis=2).mean() > 0.1
    assert (bar.max(axis=2) < 60).sum() > 2 * 8 * 8, "two black squares"
