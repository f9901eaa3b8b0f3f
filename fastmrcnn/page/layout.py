"""The page itself, made of gradio's parts: what is on it, and what happens when something is touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastmrcnn.detection.detector import Detector
from fastmrcnn.errors import UserError
from fastmrcnn.page.downloads import JSON, LABELS, PICTURE, TABLE, write_download
from fastmrcnn.page.examples import Example
from fastmrcnn.page.found import Found, look
from fastmrcnn.page.picture import BOXES, LONG_SIDE, MASKS, NAMES, NUMBERS, POINTS, draw_found
from fastmrcnn.page.tables import class_table, object_table
from fastmrcnn.page.units import PixelSize, parse_pixel_size

START_SCORE = 0.5
KEPT_SECONDS = 4 * 3600  # what a visitor looks at
FILE_SECONDS = 900  # uploads, which are read at once, and files made for a visitor
_MANY_CLASSES = 12  # more of them are chosen from a list
_BUTTONS = {
    PICTURE: "Picture",
    TABLE: "Table (CSV)",
    LABELS: "Label image",
    JSON: "COCO JSON",
}
# The file that has just been made is at an address that no one else knows.
_FETCH = """(file) => {
    if (!file) return;
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name || file.path.split(/[\\\\/]/).pop();
    link.click();
}"""


class View(NamedTuple):
    """What is to be seen of the objects found."""

    score: float
    classes: list[int]
    parts: list[str]
    pixel_size: str


class Handlers:
    """What the page does; it keeps nothing of a visitor, whose `Found` comes with every call.

    Args:
        examples: which a visitor can take by their place.
        scratch: a folder for pictures and downloads.
    """

    def __init__(self, detector: Detector, examples: Sequence[Example], scratch: Path) -> None:
        self.detector, self.examples, self.scratch = detector, examples, scratch
        self.few_classes = len(detector.class_names) <= _MANY_CLASSES

    def run(self, path: Path, *view: Any) -> tuple[Found | None, str | None, str, str, str]:
        """A new image: what was found, then as `show`."""
        try:
            found = look(self.detector, path, path.name)
        except UserError as error:
            return None, None, problem(str(error)), "", ""
        except (RuntimeError, MemoryError) as error:  # such as a GPU's memory that is too small
            reason = str(error).partition("\n")[0]
            return None, None, problem(f"The model failed on {path.name}: {reason}"), "", ""
        return found, *self.show(found, *view)

    def show(self, found: Found | None, *view: Any) -> tuple[str | None, str, str, str]:
        """Picture file, and HTML of the message, the table of classes and that of objects."""
        if found is None:
            return None, note("Choose an image to begin."), "", ""
        seen = self.view(*view)
        size, wrong = self.pixel_size(seen.pixel_size)
        card = self.detector.card
        places = found.chosen(seen.score, self.classes(seen))
        picture = draw_found(found, places, card, seen.parts, LONG_SIDE)
        file = self.new_folder() / "found.jpg"
        Image.fromarray(picture).save(file, quality=92, subsampling=0)
        message = note(*summary(found, len(places), seen.score)) + (problem(wrong) if wrong else "")
        by_class = class_table(found, places, card, size)
        return str(file), message, by_class, object_table(found, places, card, size)

    def save(self, kind: str, found: Found | None, *view: Any) -> tuple[str | None, str]:
        """A file of what is shown, and HTML of what there is to say of it."""
        if found is None:
            return None, note("Choose an image first.")
        seen = self.view(*view)
        size, _ = self.pixel_size(seen.pixel_size)
        places = found.chosen(seen.score, self.classes(seen))
        folder = self.new_folder()
        try:
            path, remark = write_download(kind, folder, found, places, self.detector.card, size, seen.parts)
        except UserError as error:
            return None, problem(sentence(error))
        return str(path), note(f"{path.name} is ready: {count(len(places), 'object')}.", remark)

    def new_folder(self) -> Path:
        """For a file to hand over, under a name that no one guesses. Those of a while ago are deleted."""
        for old in self.scratch.glob("made_*"):
            with contextlib.suppress(OSError):  # another visitor's call deletes it at the same time
                if time.time() - old.stat().st_mtime > FILE_SECONDS:
                    shutil.rmtree(old)
        return Path(tempfile.mkdtemp(prefix="made_", dir=self.scratch))

    def view(self, score: float | None, *others: Any) -> View:
        """An emptied field of numbers gives None."""
        return View(START_SCORE if score is None else score, *others)

    def classes(self, view: View) -> list[int] | None:
        """None: all of them, as where nothing is taken from the list of many."""
        return view.classes if self.few_classes or view.classes else None

    @staticmethod
    def pixel_size(text: str | None) -> tuple[PixelSize | None, str]:
        """And what is wrong with the text."""
        if not text or not text.strip():
            return None, ""
        try:
            return parse_pixel_size(text), ""
        except UserError as error:
            return None, sentence(error)


def summary(found: Found, shown: int, score: float) -> list[str]:
    """What the message says of an image."""
    height, width = found.pixels.shape[:2]
    lines = [f"{count(shown, 'object')} in {found.name}, {width} x {height} pixels."]
    if max(height, width) > LONG_SIDE:
        share = LONG_SIDE / max(height, width)
        lines.append(f"The picture is reduced to {share:.0%}; numbers and files are of the full image.")
    if not shown:
        scores = found.objects.scores
        best = None if scores is None or not len(scores) else float(scores.max())
        if best is None:
            lines.append("The model sees nothing in it.")
        elif best < score:
            lines.append(f"The best score is {best:.2f}: move the slider to the left to see more.")
        else:
            lines.append("What was found is of classes that are not chosen.")
    return [*lines, *found.notes]


def note(*lines: str) -> str:
    return f'<div class="note" role="status">{escape(" ".join(line for line in lines if line))}</div>'


def problem(line: str) -> str:
    return f'<div class="problem" role="alert">{escape(line)}</div>'


def sentence(error: UserError) -> str:
    """Its line, with a capital."""
    line = str(error)
    return line[:1].upper() + line[1:]


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def import_gradio(scratch: Path) -> Any:
    """gradio, without its reports to its makers; uploads and pictures are kept in `scratch`.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(scratch)
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): pip install 'fastmrcnn[demo]'") from None
    return gradio


def build_page(
    gr: Any, detector: Detector, examples: Sequence[Example], scratch: Path, pixel_size: str, title: str
) -> Any:
    """gradio's Blocks.

    Args:
        gr: the module, of `import_gradio`.
        title: which model it is.
    """
    does = Handlers(detector, examples, scratch)
    card = detector.card
    model, names = card.config.model, detector.class_names
    parts = [MASKS] if model.mask_head.enabled else []
    parts += [POINTS] if card.keypoints is not None else []
    parts += [BOXES, NAMES]
    lowest = min(model.box_head.score_threshold, 0.99)
    with gr.Blocks(title="fastmrcnn", analytics_enabled=False, delete_cache=(60, FILE_SECONDS)) as page:
        found = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.HTML(_heading(title, names), elem_id="heading", padding=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=300, elem_id="left"):
                upload = gr.File(label="Your image", show_label=False, elem_id="upload", height=140)
                samples = gr.Dataset(
                    components=[gr.Image(visible=False, type="filepath")],
                    samples=[[str(one.small)] for one in examples],
                    type="index",
                    label="Or take an example",
                    elem_id="examples",
                    visible=bool(examples),
                )
                with gr.Group(elem_id="controls"):
                    score = gr.Slider(
                        lowest,
                        1,
                        max(START_SCORE, lowest),
                        step=0.01,
                        label="How sure must it be?",
                        info="Objects with a lower score are left out.",
                        elem_id="score",
                    )
                    drawn = gr.CheckboxGroup([*parts, NUMBERS], value=parts, label="Draw", elem_id="parts")
                    choices = [(name, label) for label, name in enumerate(names)]
                    if does.few_classes:
                        classes = gr.CheckboxGroup(
                            choices,
                            value=list(range(len(names))),
                            label="Show and count",
                            elem_id="classes",
                            visible=len(names) > 1,
                        )
                    else:
                        classes = gr.Dropdown(
                            choices,
                            value=[],
                            multiselect=True,
                            label="Show and count only",
                            info="Empty: all classes.",
                            elem_id="classes",
                        )
                    side = gr.Textbox(
                        pixel_size,
                        label="Size of a pixel",
                        info="Such as 0.25 µm. Empty: areas in pixels.",
                        elem_id="pixel-size",
                        max_lines=1,
                    )
            with gr.Column(scale=5, min_width=300, elem_id="right"):
                message = gr.HTML(note("Choose an image to begin."), elem_id="message", padding=False)
                picture = gr.Image(
                    show_label=False,
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="picture",
                    alt_text="The image, with what was found in it",
                    placeholder="The image and what was found in it will be here.",
                )
                gr.HTML("Save what is shown:", elem_id="save", padding=False)
                with gr.Row(elem_id="downloads"):
                    buttons = {
                        kind: gr.Button(label, size="sm", min_width=140, elem_id=f"save-{kind}")
                        for kind, label in _BUTTONS.items()
                        if kind != LABELS or model.mask_head.enabled
                    }
                saved = gr.HTML("", elem_id="saved", padding=False)
                by_class = gr.HTML("", elem_id="by-class", padding=False)
                by_object = gr.HTML("", elem_id="by-object", padding=False)
        made = gr.File(visible=False)

        view = [score, classes, drawn, side]
        shown = [picture, message, by_class, by_object]
        quiet = {"api_visibility": "private"}

        def take_upload(path: str, *values: Any) -> Any:
            return (None, "", *does.run(Path(path), *values))  # None: the place is free for the next one

        def take_example(place: int, *values: Any) -> Any:
            return (None, "", *does.run(examples[place].path, *values))

        # One image after the other: two at once would take twice the memory.
        alone = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress_on": [picture], **quiet}
        upload.upload(take_upload, [upload, *view], [upload, saved, found, *shown], **alone)
        samples.click(take_example, [samples, *view], [upload, saved, found, *shown], **alone)
        follow = {"show_progress": "hidden", "trigger_mode": "always_last", "concurrency_limit": 4, **quiet}
        for part in (score, classes, drawn):
            part.change(does.show, [found, *view], shown, **follow)
        gr.on([side.submit, side.blur], does.show, [found, *view], shown, **follow)
        for kind, button in buttons.items():

            def save(*values: Any, kind: str = kind) -> Any:
                return does.save(kind, *values)

            button.click(save, [found, *view], [made, saved], **quiet).then(
                None, [made], None, js=_FETCH, **quiet
            )
    return page


def _heading(title: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return (
        f"<h1>Find objects in your images</h1><p>The model <b>{escape(title)}</b> finds: {escape(listed)}. "
        "Images stay on the machine that this page comes from.</p>"
    )
