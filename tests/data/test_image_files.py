"""Image files of a data set that was written on another system."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fastmrcnn.data.image_files import find_files, image_suffixes, looks_like_image, require_files
from fastmrcnn.errors import UserError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "\u00e9.png") for form in ("NFC", "NFD"))


def files(folder: Path, *names: str) -> Path:
    images = folder / "images"
    images.mkdir()
    for name in names:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).touch()
    return images


@pytest.mark.parametrize(
    ("there", "said", "difference"),
    [
        ("sub/1.png", "sub\\1.png", "backslashes"),
        ("1.png", ".\\1.png", "folders"),
        ("1.png", "images\\1.png", "folders"),
        ("1.png", "images/1.png", "folders"),
        ("1.png", "/home/somebody/data/images/1.png", "folders"),
        ("sub/1.png", "C:\\data\\images\\sub\\1.png", "folders"),
        ("1.png", "file:///C:/data/1.png", "folders"),
        ("1.png", "https://host/data/1.png?token=a/b", "folders"),
        ("1 a.png", "1%20a.png", "percent escapes"),
        ("1%20a.png", "1 a.png", "percent escapes"),
        (DECOMPOSED, COMPOSED, "accents composed another way"),
        (COMPOSED, DECOMPOSED, "accents composed another way"),
        (DECOMPOSED, "%C3%A9.png", "accents composed another way"),
        ("1.PNG", "1.png", "case"),
        ("Sub/1.png", "sub/1.PNG", "case"),
    ],
)
def test_names_of_other_systems(tmp_path: Path, there: str, said: str, difference: str) -> None:
    images = files(tmp_path, there, "other.png")
    found = find_files([said, "other.png"], images)
    assert found.paths == {said: str(images / there), "other.png": str(images / "other.png")}
    assert found.missing == []
    [line] = found.lines
    assert line == (
        f"1 image is found under another name than file_name says ({difference}: 1): {said!r} is {there!r}"
    )


def test_names_that_are_right_are_not_told(tmp_path: Path) -> None:
    images = files(tmp_path, "1.png", "sub/2.png", "3%20.png", "A.png", "a.png")
    names = ["1.png", "./1.png", "sub/2.png", "3%20.png", "a.png", "A.png", str(images / "1.png")]
    found = find_files(names, images)
    assert (list(found.paths), found.missing, found.lines) == (names, [], [])
    assert Path(found.paths["a.png"]).name == "a.png"


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["1.PNG", "1.Png"], ["1.png"]),  # two that it may mean
        (["1.PNG"], ["1.PNG", "1.png"]),  # one is it by its name
        (["1.png"], ["train/1.png", "val/1.png"]),  # two mean the same
        (["1.png"], ["/data/a/1.png", "1.png"]),
        (["1 a.png", "1%20A.png"], ["1%20a.png"]),
        (["x/1.png", "X/1.png"], ["x\\1.PNG"]),
        (["1.png/inside"], ["sub/1.png"]),  # a folder
    ],
)
def test_what_may_mean_another_file_is_missing(tmp_path: Path, there: list[str], said: list[str]) -> None:
    images = files(tmp_path, *there)
    found = find_files(said, images)
    assert set(found.missing) == {name for name in said if not (images / name).exists()}
    assert found.lines == []
    assert not set(found.missing) & set(found.paths)


def test_many_are_one_line(tmp_path: Path) -> None:
    images = files(tmp_path, *(f"{k}.PNG" for k in range(40)), "x y.png")
    found = find_files([*(f"{k}.png" for k in range(40)), "x%20y.png"], images)
    assert found.lines == [
        "41 images are found under another name than file_name says (case: 40, percent escapes: 1): '0.png' "
        "is '0.PNG'"
    ]


@pytest.mark.parametrize(
    ("there", "said", "hint"),
    [
        ("cat.jpg", "cat.png", "(is 'cat.png' 'cat.jpg'?)"),
        ("cat_0001.png", "cat_001.png", "(is 'cat_001.png' 'cat_0001.png'?)"),
        ("train/cat.png", "cat.png", "(there is one in {images}/train)"),
        ("dog.png", "zebra.jpg", ": zebra.jpg; set"),
    ],
)
def test_the_near_match_is_named(tmp_path: Path, there: str, said: str, hint: str) -> None:
    images = files(tmp_path, there)
    found = find_files([said], images)
    with pytest.raises(UserError) as caught:
        require_files(found, 1, images, tmp_path / "set.json", "data.val")
    message = str(caught.value)
    assert "set.json: 1 of 1 image not found in" in message
    assert hint.format(images=images) in message
    assert (
        "set data.val.images to their folder, correct file_name, or leave them out with data.missing=skip"
        in message
    )


def test_names_that_no_system_has(tmp_path: Path) -> None:
    images = files(tmp_path, "1.png")
    names = ["a\0b.png", "x" * 5000, "\ud800.png", "%", "..", "/", "a/../../..", "\\", "%2F%2e"]
    found = find_files(names, images)
    assert {*found.missing, *found.paths} == set(names)
    assert "x" * 5000 in found.missing


def test_what_looks_like_an_image(tmp_path: Path) -> None:
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".bmp",
        ".ppm",
    } <= image_suffixes()
    assert not {".txt", ".json", ".pdf", ".mpg", ".h5", ".eps", ""} & image_suffixes()
    for name in ("a.png", "b.JFIF", "c.gif", ".hidden.png", "._a.png", "notes.txt", "png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir() if looks_like_image(path)) == [
        "a.png",
        "b.JFIF",
        "c.gif",
    ]
