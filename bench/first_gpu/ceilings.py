"""python bench/first_gpu/ceilings.py FILE: the machine, the versions, and what the device gives at best."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fastmrcnn.device import choose_device
from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.timing import ceilings


def main(argv: list[str]) -> None:
    (file,) = argv
    device = choose_device("auto")
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    limits = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    free = shutil.disk_usage(".").free
    found = {**environment(device), **limits._asdict(), "disk_free_bytes": free}
    Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
