"""Time per image: what is measured, and what the report says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from fastmrcnn.study import per_image
from fastmrcnn.study.document import Table
from fastmrcnn.study.per_image import NETWORKS, Network, measure_networks, per_image_section
from fastmrcnn.study.places import per_image_file

TINY = ("model.backbone.width=8", "model.rpn.post_nms_top_n=20", "model.rpn.post_nms_top_n_test=20")
MACHINE = {"gpu": None, "cpu": "a processor", "threads": 1, "versions": {"torch": "2"}, "commit": "abc1234"}


class Fake:
    """Stands in for a process that measures."""

    asked: ClassVar[list[str]] = []

    def __init__(self, make: Any, recipe: str, *_: object) -> None:
        self.recipe = recipe

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, method: str) -> Any:
        self.asked.append(f"{self.recipe} {method}")
        if method == "machine":
            return MACHINE
        return {"p50_ms": 2000.0, "images_per_second": 0.5}


def test_section_has_a_row_for_each_network_and_the_papers_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert per_image_section(tmp_path, "small", "en") == []
    monkeypatch.setattr(per_image, "Apart", Fake)
    lines: list[str] = []
    measure_networks(tmp_path, "small", lines.append)
    assert len(lines) == len(NETWORKS)
    assert Fake.asked[:3] == ["paper_r50_c4 inference", "paper_r50_c4 training", "paper_r50_c4 machine"]
    count = len(Fake.asked)
    measure_networks(tmp_path, "small", lines.append)  # it is there
    assert len(Fake.asked) == count
    (table,) = [b for b in per_image_section(tmp_path, "small", "en") if isinstance(b, Table)]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["R101-FPN"] == ["2000", "0.50", "195", "5.0", "2.00", ""]
    assert rows["R50-FPN"] == ["2000", "0.50", "", "", "2.00", "0.045"]
    assert per_image_section(tmp_path, "small", "zh")
    per_image_file(tmp_path, "small").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper_r50_c4", "paper_r50_fpn"])
def test_networks_are_timed(recipe: str) -> None:
    network = Network(recipe, (64, 96), 2, TINY)
    for found in (network.inference(), network.training()):
        assert 0 < found["p20_ms"] <= found["p50_ms"] <= found["p80_ms"]
    assert {"cpu", "commit", "versions"} <= network.machine().keys()
