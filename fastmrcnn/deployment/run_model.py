"""Find objects with the exported model in this folder: python run_model.py IMAGE...

Needs numpy, Pillow and onnxruntime. Prints a line of JSON for each image.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
RULE = json.loads((HERE / "preprocessing.json").read_text(encoding="utf-8"))
LABELS = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()


def read(path: str) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits
        black, white = RULE["pixel_range"] or (0, 65535)
        grey = (np.asarray(image, np.float64) - black) / (white - black) * 255
        image = Image.fromarray((grey.clip(0, 255) + 0.5).astype(np.uint8))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def paste(mask: np.ndarray, box: np.ndarray, h: int, w: int) -> np.ndarray:
    """The mask in the pixels of the image, (h, w) bool: bilinear at their centres, zeros around it."""

    def weights(low: float, high: float, size: int) -> np.ndarray:
        place = (np.arange(size) + 0.5 - low) / (high - low) * len(mask) - 0.5
        return np.clip(1 - abs(place[:, None] - np.arange(len(mask))), 0, None)

    inside = weights(box[1], box[3], h) @ mask @ weights(box[0], box[2], w).T
    return inside >= RULE["mask_threshold"]


def find(session: Any, image: Image.Image, score: float = 0.5) -> list[dict[str, Any]]:
    """Label, score, box in pixels of the image, and mask or keypoints where there are some, of each."""
    batch, height, width, _ = RULE["inputs"]["pixels"]["shape"]
    (w, h), how = image.size, RULE["resize"]
    scale = min(how["short_side"] / min(w, h), how["long_side_max"] / max(w, h), height / h, width / w)
    rows, columns = (max(1, min(int(a * scale + 0.5), most)) for a, most in ((h, height), (w, width)))
    pixels = np.zeros((batch, height, width, 3), np.uint8)
    pixels[:, :rows, :columns] = image.resize((columns, rows), Image.Resampling.BILINEAR)
    feeds = {"pixels": pixels, "sizes": np.array([[rows, columns]] * batch, np.int32)}
    names = [output.name for output in session.get_outputs() if output.name != "heatmaps"]
    found = {name: value[0] for name, value in zip(names, session.run(names, feeds), strict=True)}
    back, objects = np.array([w / columns, h / rows] * 2), []
    for index in np.flatnonzero(found["valid"] & (found["scores"] >= score)):
        box = np.clip(found["boxes"][index] * back, 0, [w, h, w, h])
        one = {"label": LABELS[found["classes"][index]], "score": float(found["scores"][index])}
        objects.append({**one, "box": box.tolist()})
        if "masks" in found:
            objects[-1]["mask"] = paste(found["masks"][index], box, h, w)
        if "keypoints" in found:
            objects[-1]["keypoints"] = (found["keypoints"][index] * [*back[:2], 1]).tolist()
    return objects


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    for path in sys.argv[1:]:
        objects = find(session, read(path))
        for one in objects:  # of a mask its area in pixels is printed; `find` gives all of it
            one |= {"area": int(one.pop("mask").sum())} if "mask" in one else {}
        print(json.dumps({"image": path, "objects": objects}))
