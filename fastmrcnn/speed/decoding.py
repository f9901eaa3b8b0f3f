"""What a loader process does for an image, beside what is usually done, on one core."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmrcnn.config.schema import Config
from fastmrcnn.data.buckets import resolve_buckets
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import MIN_MASK_BYTES, MIN_SLOTS
from fastmrcnn.data.jpeg import decode_plain
from fastmrcnn.data.order import BatchPlan
from fastmrcnn.data.pixel_range import MAX_PIXELS
from fastmrcnn.data.records import ImageRecord
from fastmrcnn.data.slot_sizes import pixel_bytes, table_bytes
from fastmrcnn.data.transforms import Augment, Size, resized_size
from fastmrcnn.data.worker import LoadedBatch, TrainSamples
from fastmrcnn.errors import UserError
from fastmrcnn.pixels import with_pixels
from fastmrcnn.speed.apart import Apart, GoneError
from fastmrcnn.speed.markdown import table

HEIGHT, WIDTH = 480, 640
QUALITIES = (75, 90)  # what most programs write, and what makes files about as large as COCO's
FALL = 0.35  # how much weaker fine texture is than coarse: with it files are of some 75 and 120 kB
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
USUAL = "Pillow: decode, resize, to-tensor"
WORKER = "ours, data.resize=worker: decode, resize, pad"
DEVICE = "ours, data.resize=device: decode"
ALONE = "of that, simplejpeg itself"


class Decoding:
    """`measure_decoding` for a process of its own."""

    def __init__(self, config: Config) -> None:
        self.config = config
        keep_memory()

    def measure(self) -> list[dict[str, Any]]:
        return measure_decoding(self.config)


def measure_decoding_apart(config: Config) -> list[dict[str, Any]]:
    """Raises UserError: what was raised there, or that the process died."""
    try:
        with Apart(Decoding, config) as apart:
            found: list[dict[str, Any]] = apart.ask("measure")
            return found
    except GoneError as error:
        raise UserError(f"decoding could not be measured: {error}") from None


def keep_memory() -> None:
    """Let glibc's malloc keep what is freed, for good.

    Otherwise the usual way, whose float32 images have 10 MB, may get them from the system each time, page by
    page, which on some machines takes as long as its work.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, 2**30)


def measure_decoding(config: Config, images: int = 12, rounds: int = 6) -> list[dict[str, Any]]:
    """Images a second and core of each way, which take turns, by processor time; for each quality.

    The images are textures of this program's own, photographs by their size as files, without objects. Ours
    are put into memory that is used again, as slots are. The usual way is torchvision's ToTensor: float32 in
    0..1, channels first.

    Raises:
        RuntimeError: the ways do not give the same pixels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            return [
                {"quality": quality, **_measure(config, write_photographs(folder, images, quality), rounds)}
                for quality in QUALITIES
            ]
    finally:
        torch.set_num_threads(threads)


def _measure(config: Config, dataset: CocoDataset, rounds: int) -> dict[str, Any]:
    images, data = len(dataset), config.data
    side, longest = data.short_side[-1], data.long_side_max
    size = resized_size(HEIGHT, WIDTH, side, longest)
    buckets = resolve_buckets(data.buckets, [(HEIGHT, WIDTH)], [side], longest, turns=False)
    plan = BatchPlan(buckets[0], [(index, index) for index in range(images)])
    room = max(pixel_bytes(dataset, images, buckets, raw) for raw in (False, True))
    memory = np.zeros(room + table_bytes(images, MIN_SLOTS, MIN_MASK_BYTES), np.uint8)

    def load(raw: bool) -> Callable[[], LoadedBatch]:
        samples = TrainSamples(dataset, [side], longest, Augment(), 0, MIN_SLOTS, MIN_MASK_BYTES, None, raw)
        samples.store.keep_pixels = False  # they are few, and would be decoded once

        def run() -> LoadedBatch:
            loaded = samples.load(plan, memory)
            assert isinstance(loaded, LoadedBatch)
            return loaded

        return run

    paths = [record.path for record in dataset.records]
    ways: dict[str, Callable[[], Any]] = {
        USUAL: lambda: [usual(path, size) for path in paths],
        WORKER: load(False),
        DEVICE: load(True),
        ALONE: lambda: [decode_plain(path, MAX_PIXELS, memory) for path in paths],
    }
    expected = [usual(path, size) for path in paths]
    for ours in (WORKER, DEVICE):
        _check(ours, expected, with_pixels(ways[ours]().batch).pixels, size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    usual_s = np.array(seconds[USUAL])
    return {
        "images": images,
        "height": HEIGHT,
        "width": WIDTH,
        "resized": list(size),
        "kilobytes": float(np.mean([path.stat().st_size for path in paths])) / 1e3,
        "rounds": rounds,
        "simplejpeg": decode_plain(paths[0], MAX_PIXELS) is not None,
        "rows": [
            {
                "way": name,
                "images_per_second": images / float(np.median(some)),
                "ms": 1e3 * float(np.median(some)) / images,
                "ratio": float(np.median(usual_s / np.array(some))),
            }
            for name, some in seconds.items()
        ],
    }


def usual(path: Path, size: Size) -> Tensor:
    """(3, *size) float32 in 0..1, as torchvision's Resize, of a PIL image, and ToTensor make it."""
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _check(way: str, expected: Sequence[Tensor], pixels: Tensor, size: Size) -> None:
    for one, other in zip(expected, pixels, strict=True):
        if not torch.equal((one * 255).round().to(torch.uint8), other[:, : size[0], : size[1]]):
            raise RuntimeError(f"{way}: the pixels are not those of Pillow")


def write_photographs(folder: Path, images: int, quality: int) -> CocoDataset:
    """JPEGs of noise at all scales, fine texture weaker than coarse and colours weaker than brightness."""
    random = np.random.default_rng(0)
    records = []
    for number in range(images):
        path = folder / f"{quality}-{number}.jpg"
        Image.fromarray(texture(random)).save(path, quality=quality)
        records.append(ImageRecord(number, path, path.name, WIDTH, HEIGHT, [], folder / "set.json"))
    return CocoDataset(records, ["none"], [1], folder / "set.json")


def texture(random: np.random.Generator) -> NDArray[np.uint8]:
    whole = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for scale in 2 ** np.arange(8):
        noise = random.normal(size=(HEIGHT // scale + 2, WIDTH // scale + 2, 3)).astype(np.float32)
        noise = noise.mean(axis=2, keepdims=True) * 1.2 + noise * 0.35
        for channel in range(3):
            grown = Image.fromarray(noise[:, :, channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            whole[:, :, channel] += np.asarray(grown) * scale**FALL
    return (whole / whole.std() * 55 + 120).clip(0, 255).astype(np.uint8)


def decoding_table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        size = f"{one['height']}x{one['width']}, {one['kilobytes']:.0f} kB"
        rows += [
            [size, row["way"], f"{row['images_per_second']:.0f}", f"{row['ms']:.2f}", f"{row['ratio']:.1f}"]
            for row in one["rows"]
        ]
    to = "x".join(map(str, found[0]["resized"]))
    head = ["JPEG", f"one core, to {to}", "images/s", "ms an image", "times the usual"]
    note = "" if found[0]["simplejpeg"] else "\n\nsimplejpeg is not installed: Pillow decoded for ours, too."
    return table(head, rows) + note
