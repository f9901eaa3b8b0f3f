"""The page in a browser: upload, look, move, download; two visitors; narrow, dark; nothing from elsewhere."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import chromium, programs, requested, resize, wait_for
from PIL import Image
from planted_page import planted_detector

import fastmrcnn.predict as predict
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.demo import HOST, open_page
from fastmrcnn.detection.detector import Detector
from fastmrcnn.page.examples import find_examples
from fastmrcnn.page.layout import build_page, import_gradio
from fastmrcnn.page.picture import BOXES, MASKS, NAMES

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Site:
    """The page of a detector that finds what was planted, and a browser."""

    def __init__(self, dataset: CocoDataset, detector: Detector, window: Any, address: str, folder: Path):
        self.dataset, self.detector, self.window = dataset, detector, window
        self.address, self.folder = address, folder

    @property
    def runs(self) -> int:
        """Of the model, up to now."""
        return len(self.detector.model.seen)  # type: ignore[arg-type]

    def open(self) -> None:
        self.window.get(self.address)
        wait_for("the examples", lambda: self.all("#examples button img"))

    def all(self, selector: str) -> list[Any]:
        return self.window.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.window.find_element("css selector", selector)

    def upload(self, path: Path) -> None:
        field = wait_for("the field for a file", lambda: self.all("#upload input[type=file]"))[0]
        field.send_keys(str(path))

    def set_score(self, score: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.one("#score input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(score, Keys.TAB)

    def tick(self, group: str, name: str) -> None:
        label = next(one for one in self.all(f"{group} label") if one.text == name)
        label.click()

    def message(self, text: str) -> str:
        """The message, once the text is in it."""

        def get() -> str:
            shown = self.one("#message").text
            return shown if text in shown else ""

        return wait_for(f"the message {text!r}", get)

    def picture(self, other_than: str | None = None) -> tuple[str, np.ndarray]:
        """Address and pixels of the picture on the screen, once it is another one."""

        def get() -> str:
            image = self.one("#picture img")
            address = image.get_attribute("src")
            ready = self.window.execute_script("return arguments[0].complete", image)
            return address if ready and address != other_than else ""

        address = wait_for("the picture", get)
        with Image.open(io.BytesIO(self.one("#picture img").screenshot_as_png)) as image:
            return address, np.asarray(image.convert("RGB")).astype(int)

    def download(self, kind: str) -> Path:
        folder = self.folder / "downloads"

        def whole() -> set[Path]:  # what is on its way has another suffix
            return {file for file in folder.glob("*") if file.suffix in (".json", ".png", ".csv")}

        before = whole()
        self.one(f"#save-{kind}").click()
        return wait_for(f"the download of {kind}", lambda: whole() - before).pop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("gradio")
    programs()
    folder = tmp_path_factory.mktemp("site")
    dataset, detector = planted_detector(folder / "data")
    scratch = folder / "scratch"
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
            patch.setenv(name, "")  # so that what the page sets is taken back
        gr = import_gradio(scratch)
        page = build_page(gr, detector, find_examples(None, detector, scratch), scratch, "", "planted")
        port = free_port()
        open_page(page, gr, port)
        try:
            with chromium(folder) as window:
                yield Site(dataset, detector, window, f"http://{HOST}:{port}/", folder)
        finally:
            page.close(verbose=False)


def test_upload_look_move_and_download(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site.dataset.records[0].path
    resize(site.window, 1280, 1300)
    site.open()
    before = site.runs
    site.upload(path)
    site.message("3 objects in 11.png, 92 x 60 pixels.")
    assert site.runs == before + 1

    # The masks are where they are to be, in what is seen.
    address, _ = site.picture()
    for name in (NAMES, BOXES):
        site.tick("#parts", name)
        address, with_masks = site.picture(other_than=address)
    site.tick("#parts", MASKS)
    address, without = site.picture(other_than=address)
    changed = abs(with_masks - without).max(2) > 12
    masks = site.detector(path).masks
    assert masks is not None
    expected = Image.fromarray(masks.any(0)).resize(changed.shape[::-1])
    both = np.asarray(expected)
    assert (changed & both).sum() / (changed | both).sum() > 0.85
    seen = site.runs

    site.set_score("0.6")
    site.message("2 objects")
    assert [row.text for row in site.all("#by-class tbody tr")] == [site.one("#by-class tbody tr").text]
    assert "disc" in site.one("#by-class tbody").text
    assert len(site.all("#by-object tbody tr")) == 2
    file = site.download("json")
    assert file.name == "11_coco.json"
    assert "11_coco.json is ready: 2 objects." in site.one("#saved").text
    ours = json.loads(file.read_text(encoding="utf-8"))
    assert site.runs == seen, "the threshold needs no run of the model"

    monkeypatch.setattr(predict, "load", lambda *_: site.detector)
    predict.main([str(path), "--checkpoint", "x", "--output", str(tmp_path / "out"), "--score", "0.6"])
    theirs = json.loads((tmp_path / "out" / predict.RESULTS).read_text(encoding="utf-8"))
    assert len(ours) == 2
    for own, their in zip(ours, theirs, strict=True):
        assert own.pop("file_name") == Path(their.pop("file_name")).name
        del their["overlay"]
        assert own == their

    with Image.open(site.download("labels")) as image:
        labels = np.asarray(image)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels == 1, masks[0])
    assert site.download("table").read_text(encoding="utf-8").count("\n") == 3
    with Image.open(site.download("picture")) as image:
        assert image.size == (552, 360)


def test_an_example_and_classes_and_units(site: Site) -> None:
    resize(site.window, 1280, 1300)
    site.open()
    site.all("#examples button")[0].click()
    site.message("3 objects in")
    site.tick("#classes", "disc")
    site.message("1 object in")
    assert site.one("#by-class tbody").text.startswith("box 1 ")
    from selenium.webdriver.common.keys import Keys

    site.one("#pixel-size input, #pixel-size textarea").send_keys("0.5 um", Keys.ENTER)
    wait_for("the unit", lambda: "µm²" in site.one("#by-class thead").text)


def test_a_file_that_is_no_image_is_told_and_the_next_one_works(site: Site, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    resize(site.window, 1280, 1300)
    site.open()
    site.upload(tmp_path / "notes.txt")
    site.message("notes.txt is not an image that can be read here")
    assert not site.all("#picture img")
    site.upload(site.dataset.records[1].path)
    site.message("3 objects in 5.png, 40 x 100 pixels.")


def test_two_visitors_do_not_meet(site: Site) -> None:
    resize(site.window, 1280, 1300)
    site.open()
    first = site.window.current_window_handle
    site.upload(site.dataset.records[0].path)
    site.message("3 objects in 11.png")
    site.window.switch_to.new_window("tab")
    try:
        site.open()
        assert "Choose an image" in site.one("#message").text
        assert not site.all("#picture img")
        site.upload(site.dataset.records[1].path)
        site.message("3 objects in 5.png")
        second = site.window.current_window_handle
        site.window.switch_to.window(first)
        site.set_score("0.6")
        site.message("2 objects in 11.png")
        site.window.switch_to.window(second)
        assert "3 objects in 5.png" in site.one("#message").text
    finally:
        if site.window.current_window_handle != first:
            site.window.close()
        site.window.switch_to.window(first)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_screen_in_its_colours(site: Site, width: int, dark: bool) -> None:
    resize(site.window, width, 900, dark=dark)
    site.open()
    site.all("#examples button")[0].click()
    site.message("3 objects in")
    site.picture()
    too_wide = """return [...document.querySelectorAll("#heading *, #columns *")].filter((one) =>
        one.offsetParent && !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1
    ).map((one) => one.outerHTML.slice(0, 80))"""
    assert not site.window.execute_script(too_wide)
    assert site.window.execute_script("return document.documentElement.scrollWidth") <= width
    colour = site.window.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]])
    assert (brightness < 60) if dark else (brightness > 200)
    places = [site.one(selector).rect for selector in ("#upload", "#message", "#picture", "#score")]
    tops = [place["y"] for place in places]
    if width == 390:
        assert tops == sorted(tops), "what was found comes before what changes it"
    else:
        assert tops[1] == pytest.approx(tops[0], abs=20)
        assert places[2]["x"] > places[0]["x"] + places[0]["width"]


@pytest.mark.parametrize(
    ("classes", "masks", "chooser"),
    [
        (1, True, "checkboxgroup"),
        (80, True, "dropdown"),
        (2, False, "checkboxgroup"),
    ],
)
def test_pages_of_other_models(site: Site, tmp_path: Path, classes: int, masks: bool, chooser: str) -> None:
    card = site.detector.card
    model = card.config.model
    head = model.mask_head.model_copy(update={"enabled": masks})
    config = card.config.model_copy(update={"model": model.model_copy(update={"mask_head": head})})
    other = replace(card, config=config, class_names=[f"thing {k}" for k in range(classes)])
    detector = Detector(site.detector.model, other)
    page = build_page(pytest.importorskip("gradio"), detector, [], tmp_path, "", "other")
    parts = {one["props"].get("elem_id"): one for one in page.config["components"]}
    assert parts["classes"]["type"] == chooser
    assert parts["classes"]["props"]["visible"] == (classes > 1)
    assert ("save-labels" in parts) == masks
    assert not parts["examples"]["props"]["visible"]
    drawn = [name for name, _ in parts["parts"]["props"]["choices"]]
    assert (MASKS in drawn) == masks


def test_nothing_is_asked_of_others(site: Site) -> None:
    resize(site.window, 1280, 900)
    requested(site.window)
    site.open()
    site.all("#examples button")[0].click()
    site.message("3 objects in")
    site.picture()
    addresses = requested(site.window)
    assert len(addresses) > 10
    local = (site.address, "data:", "blob:")
    assert not {address for address in addresses if not address.startswith(local)}
