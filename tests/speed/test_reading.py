"""The reader's own row of the benchmark, and a bound that holds on a busy machine."""

from __future__ import annotations

from pathlib import Path

from fastmrcnn.data.coco import read_coco
from fastmrcnn.speed.reading import measure_reading, reading_table, write_ellipses


def test_reading_grows_with_the_file_and_no_faster() -> None:
    found = measure_reading(5000)
    assert 0 < found["training"] < 2.5  # ten times what it takes
    assert 0 < found["evaluation"] < 2.5
    table = reading_table(found)
    assert "5,000 annotations" in table
    assert f"{found['training']:.2f}" in table


def test_the_set_that_is_timed_is_sound(tmp_path: Path) -> None:
    dataset = read_coco(tmp_path, write_ellipses(tmp_path, 50))
    assert dataset.summary() == ["set.json: 8 images, 50 objects, 7 classes"]
