"""Where figures come from: the machine, the versions, the commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The machine, the versions and the commit that figures come from; `gpu` is None on a CPU.

    Args:
        commit: of the code, where there is no git repository to ask.
    """
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("triton", "torchvision"):
        # Of the package, not of the module: one that was built for another torch does not import.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _driver_version() if gpu else None,
        "commit": commit or _git_commit(Path(__file__).parent),
        "versions": versions,
    }


def _driver_version() -> str | None:
    """Of the first NVIDIA GPU; None where there is no nvidia-smi."""
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _git_commit(folder: Path) -> str | None:
    """Hash of the checkout that a folder is in, with "-dirty" if files have changed; None outside of one."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", folder=folder)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str, folder: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
