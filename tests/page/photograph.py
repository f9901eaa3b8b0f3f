"""Make docs/demo-page.png: `python tests/page/photograph.py RUN`, of a run of the demo."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from chromium import chromium, resize, wait_for
from places import ROOT

from fastmrcnn import load
from fastmrcnn.demo import HOST, open_page
from fastmrcnn.page.examples import find_examples
from fastmrcnn.page.layout import build_page, import_gradio

PORT = 7866
WIDTH, HEIGHT = 1100, 1130


def main(run: str, example: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        gr = import_gradio(scratch)
        detector = load(run, "cpu")
        examples = find_examples(None, detector, scratch)
        page = build_page(gr, detector, examples, scratch, "0.25 µm", Path(run).name)
        open_page(page, gr, PORT)
        with chromium(scratch) as window:
            resize(window, WIDTH, HEIGHT)
            window.get(f"http://{HOST}:{PORT}")
            buttons = wait_for(
                "the examples", lambda: window.find_elements("css selector", "#examples button")
            )
            buttons[example - 1].click()
            ready = "const image = document.querySelector('#picture img'); return image && image.complete"
            wait_for("the picture", lambda: window.execute_script(ready))
            wait_for("the table", lambda: window.find_elements("css selector", "#by-object tr"))
            picture = Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")
        page.close(verbose=False)
    # Few colours make a small file.
    picture.quantize(255, dither=Image.Dither.NONE).save(ROOT / "docs" / "demo-page.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
