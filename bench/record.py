"""The file of one GPU's results: what was measured, and on what."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch


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
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
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


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
