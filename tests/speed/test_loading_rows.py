"""What the benchmark says of decoding and of handing batches over is measured, of pixels that are right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.data import images, worker
from fastmrcnn.speed import decoding, handover
from fastmrcnn.speed.decoding import decoding_table, measure_decoding
from fastmrcnn.speed.handover import handover_table, measure_handover
from fastmrcnn.speed.step_workload import changed

HAS_LIBRARY = importlib.util.find_spec("simplejpeg") is not None


def small() -> Config:
    return changed(Config(), "data.short_side", [400])


def test_decoding_is_measured_beside_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    found = measure_decoding(small(), images=2, rounds=2)
    assert torch.get_num_threads() == threads
    assert [one["quality"] for one in found] == [75, 90]
    for one, (least, most) in zip(found, ((55, 90), (100, 150)), strict=True):
        assert least < one["kilobytes"] < most
        assert one["resized"] == [400, 533]
        assert one["simplejpeg"] == HAS_LIBRARY
        ways = [row["way"] for row in one["rows"]]
        assert ways == [decoding.USUAL, decoding.WORKER, decoding.DEVICE, decoding.ALONE]
        assert one["rows"][0]["ratio"] == 1
        for row in one["rows"]:
            assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
            assert f"{row['images_per_second']:.0f} | {row['ms']:.2f}" in decoding_table(found)


@pytest.mark.parametrize("resized", [True, False])
def test_wrong_pixels_are_not_timed(monkeypatch: pytest.MonkeyPatch, resized: bool) -> None:
    real = worker.read_image
    calls = []

    def wrong(record: Any, memory: Any = None) -> Any:
        pixels, note = real(record, memory)
        calls.append(memory is None)
        if memory is not None or resized:
            pixels[0, 0] ^= 255
        return pixels, note

    monkeypatch.setattr(worker, "read_image", wrong)
    with pytest.raises(
        RuntimeError, match="resize, pad: the pixels are not" if resized else "device: decode: the pixels"
    ):
        measure_decoding(small(), images=1, rounds=1)
    assert calls


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "decode_plain", lambda *_, **__: None)
    monkeypatch.setattr(decoding, "decode_plain", lambda *_, **__: None)
    assert "Pillow decoded for ours, too" in decoding_table(measure_decoding(small(), images=1, rounds=1))


def test_photographs_differ(tmp_path: Path) -> None:
    dataset = decoding.write_photographs(tmp_path, 2, 90)
    one, other = (images.read_image(record)[0] for record in dataset.records)
    assert one.shape == (480, 640, 3)
    assert np.abs(one.astype(int) - other).mean() > 20


def test_handing_over_is_measured_with_slots_and_without() -> None:
    found = measure_handover(batches=10, images=1, shape=(64, 96), workers=1)
    assert found["megabytes"] == pytest.approx(64 * 96 * 3e-6)
    by_slot, anew = found["rows"]
    assert (by_slot["by_slot"], anew["by_slot"]) == (10, 0)
    for row in found["rows"]:
        assert row["batches_per_second"] > 0
        assert row["workers_ms"] > 0
        assert f"| {row['way']} | {row['batches_per_second']:.1f} |" in handover_table(found)


def test_a_batch_that_was_overwritten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    load = handover.Filled.load

    def late(self: Any, plan: Any, memory: Any = None) -> Any:
        loaded = load(self, plan, memory)
        if plan.samples[0][1] == 3:
            loaded.batch.pixels.fill_(9)
        return loaded

    monkeypatch.setattr(handover.Filled, "load", late)
    with pytest.raises(RuntimeError, match="batch 3 was overwritten"):
        measure_handover(batches=5, images=1, shape=(64, 96), workers=0)
