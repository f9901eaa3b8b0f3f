"""The row of COCO's evaluation."""

from __future__ import annotations

from fastmrcnn.speed.judging import judging_table, measure_judging


def test_engines_are_timed_and_agree() -> None:
    found = measure_judging(images=30, detections=50)
    assert found["same"]
    assert found["detections"] == 1500
    assert 0 < found["auto"] < found["pycocotools"]  # ten times and more: no noise turns that around
    table = judging_table(found)
    assert "1,500 detections in 30 images, evaluate.engine=pycocotools" in table
    assert "differ" not in table
    assert "differ" in judging_table({**found, "same": False})
