"""Mask R-CNN in PyTorch: train, evaluate, predict. The kernels are in fastmrcnn.kernels."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmrcnn.detection.detector import Detector, load, load_checkpoint, predict
    from fastmrcnn.detection.prediction import Prediction
    from fastmrcnn.model.mask_rcnn import MaskRCNN

__all__ = ["Detector", "MaskRCNN", "Prediction", "load", "load_checkpoint", "predict"]

# Threads of OpenMP spin while they wait for each other. Where another program has one of the cores, they spin
# away the time that the one waited for would need, and a step takes ten times as long. Asleep they wait a
# few microseconds longer. The library reads this once, when torch loads it, so only a command of ours, which
# Python runs as `-m fastmrcnn.NAME`, can still say so; whoever imports the package has decided already.
_CHOSEN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
if sys.argv[:1] == ["-m"] and "torch" not in sys.modules and not _CHOSEN:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

_HOME = {
    "Detector": "fastmrcnn.detection.detector",
    "MaskRCNN": "fastmrcnn.model.mask_rcnn",
    "Prediction": "fastmrcnn.detection.prediction",
    "load": "fastmrcnn.detection.detector",
    "load_checkpoint": "fastmrcnn.detection.detector",
    "predict": "fastmrcnn.detection.detector",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the kernels alone need none of it, nor the packages that it needs.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
