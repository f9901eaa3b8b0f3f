"""The file of one GPU's results: what was measured, and on what."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.speed.environment import driver_version, git_commit


def environment(commit: str | None) -> dict[str, Any]:
    """Of this machine. `commit` is asked of git if it is not given."""
    from peers import torchvision_ops

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    if torchvision_ops() is not None:
        import torchvision

        versions["torchvision"] = torchvision.__version__
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "commit": commit or git_commit(Path(__file__).parent),
        "versions": versions,
    }


def write(folder: Path, facts: dict[str, Any], found: list[dict[str, Any]]) -> Path:
    """Write `<gpu>.json`, onto what an earlier run of the same commit and versions wrote."""
    name = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    path = folder / f"{name}.json"
    rows = {(row["operator"], row["pass"]): row for row in found}
    if path.exists():
        earlier = json.loads(path.read_text())
        kept = earlier.pop("results")
        if earlier == facts and facts["commit"] and not facts["commit"].endswith("-dirty"):
            rows = {(row["operator"], row["pass"]): row for row in kept} | rows
    path.write_text(json.dumps({**facts, "results": list(rows.values())}, indent=1) + "\n")
    return path
