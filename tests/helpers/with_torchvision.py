"""torchvision for the tests that are marked with its name; all are None, and those skipped, without it."""

from __future__ import annotations

from typing import Any

torchvision: Any
ops: Any
detection: Any
try:
    import torchvision
    from torchvision import ops
    from torchvision.models import detection
except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
    torchvision = ops = detection = None
