"""What each random change costs a loader process: `python bench/augment.py`.

Processor time of one sample, and the most memory of its NumPy arrays, from decoded images of 640x480 with 8
objects each to pixels and targets; decoding is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.data.transforms import Augment
from fastmrcnn.data.worker import TrainSamples

CROP = {"crop": (800, 800)}
JITTER = {"crop": (1024, 1024), "scale": (0.1, 2.0)}
KINDS: dict[str, dict[str, Any]] = {
    "resize to a short side of 800": {},
    "+ flips and quarter turns": {"flip_horizontal": 0.5, "flip_vertical": 0.5, "rotate90": 0.5},
    "+ brightness, contrast": {"brightness": 0.2, "contrast": 0.2},
    "+ saturation, hue": {"saturation": 0.2, "hue": 0.1},
    "+ rotation": {"rotate": 10},
    "+ crop of 800x800": CROP,
    "+ copy-paste": {"copy_paste": 1},
    "jitter, crop of 1024x1024": JITTER,
    "jitter + saturation, hue": JITTER | {"saturation": 0.2, "hue": 0.1},
    "jitter + rotation": JITTER | {"rotate": 10},
    "jitter + copy-paste": JITTER | {"copy_paste": 1},
    "jitter + mosaic": JITTER | {"mosaic": 1},
}


def images(folder: Path, count: int) -> CocoDataset:
    """Noise that is smooth as a photograph is, with 8 polygons of 24 vertices each."""
    records = []
    for number in range(count):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        path = folder / f"{number}.png"
        small.resize((640, 480), Image.Resampling.BICUBIC).save(path)
        objects = []
        for each in range(8):
            angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            middle, radius = rng.uniform((90, 90), (550, 390)), rng.uniform(20, 85)
            around = middle + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            low, high = around.min(axis=0), around.max(axis=0)
            box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
            objects.append(ObjectRecord(number * 8 + each + 1, 0, box, False, [around.ravel()], 1.0))
        records.append(ImageRecord(number + 1, path, path.name, 640, 480, objects, folder / "set.json"))
    return CocoDataset(records, ["object"], [1], folder / "set.json")


def measure(dataset: CocoDataset, augment: Augment, samples: int) -> tuple[float, float]:
    """Milliseconds of processor time a sample, and its largest memory in MiB."""
    source = TrainSamples(dataset, [800], 1333, augment, 0, 8, 4096, None)
    source.store.original, source.store.keep_pixels = True, True  # time the change, not the decoder
    for index in range(len(dataset.records)):
        source.store.resized(index, (480, 640))
        source.store.objects(index)
    numbers = [(n % len(dataset.records), n) for n in range(samples)]
    bucket = augment.crop or (1088, 1088)
    started = time.process_time()
    for index, number in numbers:
        source._read(index, number, source._plan(index, number), bucket, {}, None)()
    seconds = time.process_time() - started
    tracemalloc.start()
    for index, number in numbers[:4]:
        source._read(index, number, source._plan(index, number), bucket, {}, None)()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return 1000 * seconds / samples, peak / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=40)
    samples = parser.parse_args(argv).samples
    print(f"{platform.machine()}, one thread, {samples} samples of each\n")
    print("| change | ms | MiB of arrays |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        dataset = images(Path(folder), 8)
        for name, values in KINDS.items():
            augment = dataclasses.replace(Augment(), **values)
            milliseconds, mebibytes = measure(dataset, augment, samples)
            print(f"| {name} | {milliseconds:.1f} | {mebibytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
