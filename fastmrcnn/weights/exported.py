"""Exported files as models: what they carry of the card, and a module that runs them in a model's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmrcnn.data.transforms import Size, resize
from fastmrcnn.device import choose_device
from fastmrcnn.errors import UserError
from fastmrcnn.structures import Batch, Detections
from fastmrcnn.weights.card import ModelCard, read_card
from fastmrcnn.weights.pt2_file import DEVICE, pt2_runner, read_metadata

CARD = "fastmrcnn"  # key of the card in a file's metadata
FORMAT_VERSION = 1
SUFFIXES = (".onnx", ".pt2")
Arrays = dict[str, NDArray[Any]]
Runner = Callable[[NDArray[np.uint8], NDArray[np.int32]], Arrays]
"""Runs a file on pixels (N, H, W, 3) and sizes (N, 2); gives its outputs by name."""


class ExportedCard(NamedTuple):
    """What an exported file says of itself."""

    card: ModelCard
    shape: Size  # height and width of its images
    batch: int
    half: bool  # in fp16


class ExportedModel(nn.Module):
    """A file in the place of a model in eval mode: `model(batch)` gives Detections.

    Images go in as they are padded in the file, in as many calls as it takes. One that is larger is resized
    to fit, and its boxes are brought back to the pixels of the batch.

    Args:
        run: the file.
        shape: height and width of its images.
        batch: images of a call.
    """

    place: Tensor

    def __init__(self, run: Runner, shape: Size, batch: int) -> None:
        super().__init__()
        self.run = run
        self.shape = shape
        self.batch = batch
        self.register_buffer("place", torch.zeros(()), persistent=False)  # tells the device of a batch

    def forward(self, batch: Batch) -> Detections:
        pixels, sizes, scales = self.padded(batch)
        parts = []
        for start in range(0, len(pixels), self.batch):
            part, own = pixels[start : start + self.batch], sizes[start : start + self.batch]
            real = len(part)
            if real < self.batch:
                spare = self.batch - real
                part = np.concatenate([part, np.repeat(part[-1:], spare, 0)])
                own = np.concatenate([own, np.repeat(own[-1:], spare, 0)])
            parts.append({name: value[:real] for name, value in self.run(part, own).items()})
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        device = self.place.device
        outputs = {name: torch.from_numpy(value).to(device) for name, value in found.items()}
        return Detections(
            boxes=outputs["boxes"] * torch.from_numpy(scales).to(device)[:, None],
            scores=outputs["scores"],
            classes=outputs["classes"],
            valid=outputs["valid"],
            cut=torch.zeros(len(pixels), dtype=torch.int64, device=device),
            masks=outputs.get("masks"),
            heatmaps=outputs.get("heatmaps"),
        )

    def padded(self, batch: Batch) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.float32]]:
        """The images as the file wants them, their sizes, and (N, 4) factors from there back to the batch."""
        height, width = self.shape
        images = batch.pixels.permute(0, 2, 3, 1).cpu()
        if images.dtype != torch.uint8:
            images = images.round().clamp(0, 255).to(torch.uint8)
        pixels = np.zeros((len(images), height, width, 3), np.uint8)
        sizes = batch.sizes.cpu().numpy().astype(np.int32)
        scales = np.ones((len(images), 4), np.float32)
        for index, (own_height, own_width) in enumerate(sizes.tolist()):
            image = images[index, :own_height, :own_width].numpy()
            factor = min(height / own_height, width / own_width)
            if factor < 1:
                size = max(1, int(own_height * factor)), max(1, int(own_width * factor))
                image = resize(image, size)
                back = own_width / size[1], own_height / size[0]
                scales[index], sizes[index] = (*back, *back), size
            pixels[index, : image.shape[0], : image.shape[1]] = image
        return pixels, sizes, scales


def as_text(exported: ExportedCard) -> str:
    """JSON, as a file carries it in its metadata."""
    card = exported.card
    try:
        own_version = version("fastmrcnn")
    except PackageNotFoundError:
        own_version = "unknown"
    tree = {
        "format_version": FORMAT_VERSION,
        "fastmrcnn_version": own_version,
        "shape": list(exported.shape),
        "batch": exported.batch,
        "half": exported.half,
        "config": card.config.model_dump(mode="json"),
        "class_names": card.class_names,
        "category_ids": card.category_ids,
        "keypoints": None if card.keypoints is None else card.keypoints._asdict(),
    }
    return json.dumps(tree)


def from_text(text: str | None, path: Path) -> ExportedCard:
    """Back from `as_text`. UserError if a file carries no such text, or one of a later version."""
    remedy = "python -m fastmrcnn.export writes files that do"
    if text is None:
        raise UserError(f"{path}: does not tell its classes and settings; {remedy}")
    try:
        tree: Mapping[str, Any] = json.loads(text)
        if tree["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path}: was written by fastmrcnn {tree['fastmrcnn_version']}, which is newer than this; "
                "upgrade fastmrcnn"
            )
        if (known := tree["keypoints"]) is not None:
            known["skeleton"] = [(first, second) for first, second in known["skeleton"]]
        height, width = tree["shape"]
        return ExportedCard(read_card(tree, path), (height, width), tree["batch"], tree["half"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: what it tells of itself is damaged ({error}); {remedy}") from None


def is_exported(path: str | Path) -> bool:
    """Whether a path has the suffix of an exported file."""
    return Path(path).suffix.lower() in SUFFIXES


def load_exported(path: Path, device: str) -> tuple[ExportedModel, ModelCard]:
    """An exported file as a model in eval mode, and its card.

    Raises:
        UserError: missing, damaged, without a card, not to be run here.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() == ".pt2":
        metadata = read_metadata(path)
        exported = from_text(metadata.get(CARD), path)
        run = pt2_runner(path, choose_device(metadata.get(DEVICE, device) if device == "auto" else device))
        return ExportedModel(run, exported.shape, exported.batch).eval(), exported.card
    session = open_session(path, device)
    exported = from_text(session.get_modelmeta().custom_metadata_map.get(CARD), path)
    model = ExportedModel(session_runner(session), exported.shape, exported.batch)
    return model.eval(), exported.card


def open_session(model: Path | bytes, device: str = "cpu") -> Any:
    """An onnxruntime session of a file, or of what is to become one.

    Raises:
        UserError: onnxruntime is missing, cannot read it, or does not know the device.
    """
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        raise UserError(
            "onnxruntime is not installed, which runs exported files: pip install onnxruntime"
        ) from None
    providers = ["CPUExecutionProvider"]
    known = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in known and choose_device(device).type == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    elif device not in ("auto", "cpu"):
        raise UserError(
            f"device '{device}': this onnxruntime runs on {', '.join(known)} alone; use auto or cpu, or "
            "install onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    name = model if isinstance(model, Path) else "the model"
    try:
        source = str(model) if isinstance(model, Path) else model
        return onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime has an exception of its own for each fault
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: onnxruntime cannot run it ({reason})") from None


def session_runner(session: Any) -> Runner:
    names = [output.name for output in session.get_outputs()]

    def run(pixels: NDArray[np.uint8], sizes: NDArray[np.int32]) -> Arrays:
        return dict(zip(names, session.run(names, {"pixels": pixels, "sizes": sizes}), strict=True))

    return run
