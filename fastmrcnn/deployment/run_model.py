"""Find objects with the exported model in this folder: python run_model.py IMAGE...

Needs numpy, Pillow, and onnxruntime for a .onnx file or torch for a .pt2 file. Prints a line of JSON for each
image. A .pt2 file can hold machine code: run those of people whom you trust.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model.onnx"


@functools.cache
def rule() -> dict[str, Any]:
    return json.loads((HERE / "preprocessing.json").read_text(encoding="utf-8"))


@functools.cache
def labels() -> list[str]:
    return (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()


def read(path: str) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits
        black, white = rule()["pixel_range"] or (0, 65535)
        grey = (np.asarray(image, np.float64) - black) / (white - black) * 255
        image = Image.fromarray((grey.clip(0, 255) + 0.5).astype(np.uint8))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def paste(mask: np.ndarray, box: np.ndarray, h: int, w: int) -> np.ndarray:
    """The mask in the pixels of the image, (h, w) bool: bilinear at their centres, zeros around it."""

    def weights(low: float, high: float, size: int) -> np.ndarray:
        place = (np.arange(size) + 0.5 - low) / (high - low) * len(mask) - 0.5
        return np.clip(1 - abs(place[:, None] - np.arange(len(mask))), 0, None)

    inside = weights(box[1], box[3], h) @ mask @ weights(box[0], box[2], w).T
    return inside >= rule()["mask_threshold"]


def load() -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """A function of pixels and sizes that gives the outputs by name."""
    if MODEL.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs() if output.name != "heatmaps"]
        return lambda pixels, sizes: dict(
            zip(names, session.run(names, {"pixels": pixels, "sizes": sizes}), strict=True)
        )
    import torch

    compiled, device = rule()["file"]["compiled"], rule()["file"]["device"]
    call = torch._inductor.aoti_load_package(str(MODEL)) if compiled else torch.export.load(MODEL).module()

    def run(pixels: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = call(torch.from_numpy(pixels).to(device), torch.from_numpy(sizes).to(device))
        return {name: value.cpu().numpy() for name, value in zip(rule()["outputs"], found, strict=True)}

    return run


def find(run: Callable[..., Any], image: Image.Image, score: float = 0.5) -> list[dict[str, Any]]:
    """Label, score, box in pixels of the image, and mask or keypoints where there are some, of each."""
    batch, height, width, _ = rule()["inputs"]["pixels"]["shape"]
    (w, h), how = image.size, rule()["resize"]
    scale = min(how["short_side"] / min(w, h), how["long_side_max"] / max(w, h), height / h, width / w)
    rows, columns = (max(1, min(int(a * scale + 0.5), most)) for a, most in ((h, height), (w, width)))
    pixels = np.zeros((batch, height, width, 3), np.uint8)
    pixels[:, :rows, :columns] = image.resize((columns, rows), Image.Resampling.BILINEAR)
    sizes = np.array([[rows, columns]] * batch, np.int32)
    found = {name: value[0] for name, value in run(pixels, sizes).items()}
    back, objects = np.array([w / columns, h / rows] * 2), []
    for index in np.flatnonzero(found["valid"] & (found["scores"] >= score)):
        box = np.clip(found["boxes"][index] * back, 0, [w, h, w, h])
        one = {"label": labels()[found["classes"][index]], "score": float(found["scores"][index])}
        objects.append({**one, "box": box.tolist()})
        if "masks" in found:
            objects[-1]["mask"] = paste(found["masks"][index], box, h, w)
        if "keypoints" in found:
            objects[-1]["keypoints"] = (found["keypoints"][index] * [*back[:2], 1]).tolist()
    return objects


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    run = load()
    for path in sys.argv[1:]:
        objects = find(run, read(path))
        for one in objects:  # of a mask its area in pixels is printed; `find` gives all of it
            one |= {"area": int(one.pop("mask").sum())} if "mask" in one else {}
        print(json.dumps({"image": path, "objects": objects}))
