"""The Python blocks of the kernels' documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastmrcnn.kernels import unpatch
from fastmrcnn.kernels._library import interpreting

ROOT = Path(__file__).parents[2]
SECTION = "## Use the kernels in your detector"


NEEDS_TORCHVISION = 'patch("torchvision")'


def python_blocks() -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split(SECTION + "\n", 1)[1].split("\n## ", 1)[0]
    text = section + (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(interpreting(), reason="takes minutes when interpreted")
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=block.split("\n")[0],
            marks=[pytest.mark.torchvision] if NEEDS_TORCHVISION in block else [],
        )
        for block in python_blocks()
    ],
)
def test_block_runs(block: str) -> None:
    code = compile(block, "README.md", "exec")
    if "import detectron2" in block:
        pytest.importorskip("detectron2")
    try:
        exec(code, {})
    finally:
        unpatch("torchvision")


def test_there_is_a_block_for_each_kind_of_detector() -> None:
    blocks = python_blocks()
    for word in (
        NEEDS_TORCHVISION,
        "detectron2.layers",
        "multilevel_roi_align",
        "padded_nms",
        "mask_loss",
    ):
        assert any(word in block for block in blocks), word
