"""The reader's own row of the benchmark, and a bound that holds on a busy machine."""

from __future__ import annotations

from pathlib import Path

from fastmrcnn.data.coco import read_coco
from fastmrcnn.speed.reading import measure_reading, reading_table, write_ellipses


def test_reading_grows_with_the_file_and_no_faster() -> None:
    found = measure_reading(30_000, images=100)
    assert 0 < found["training"] < 15  # ten times what it takes
    assert 0 < found["evaluation"] < 15
    table = reading_table(found)
    assert "30,000 annotations" in table
    assert f"{found['training']:.2f}" in table
    # The second start reads no JSON, and a loader process has little of the file in its memory.
    assert found["second"]["processor_s"] < found["first"]["processor_s"] / 3
    assert f"{found['second']['processor_s']:.2f} (" in table
    assert 16 < found["kept_mb"] < 20  # 60 coordinates of 8 bytes each, and what goes with them
    if found["worker_mb"] is not None:
        assert found["worker_mb"] < found["kept_mb"] / 2
        assert f"{found['worker_mb']:.0f} MB" in table


def test_the_set_that_is_timed_is_sound(tmp_path: Path) -> None:
    dataset = read_coco(tmp_path, write_ellipses(tmp_path, 50))
    assert dataset.summary() == ["set.json: 8 images, 50 objects, 7 classes"]
