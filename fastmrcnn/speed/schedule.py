"""The CUDA schedule of the training step, made without a GPU: kernels, bytes, and an estimate of the time.

It needs a CUDA build of torch, but neither a GPU nor its driver. In the driver's place stands a library of
empty functions, compiled when it is needed: torch asks which device is the current one, and is told the
first. See `schedule_trace` for the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.speed.markdown import table
from fastmrcnn.speed.step_estimate import estimate

KINDS = ("generated", "library", "ours")
LARGEST = 10
_ANSWERS = """\
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
"""


def cuda_schedule(config: Config, shape: tuple[int, int], images: int) -> dict[str, Any]:
    """Counts of a step of `images` images of this height and width, in bf16, and what it should take.

    Raises:
        UserError: this torch is not built for CUDA, there is no C compiler, or the trace failed.
    """
    if torch.version.cuda is None:
        raise UserError(
            f"--schedule cuda needs a CUDA build of torch, this is {torch.__version__}; it needs no GPU: "
            "pip install torch from PyPI on Linux, in an environment of its own"
        )
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise UserError(
            "--schedule cuda needs a C compiler for a stand-in of the driver's library: install gcc"
        )
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "found.json"
        question = {"config": config.model_dump(mode="json"), "shape": shape, "images": images}
        asked.write_text(json.dumps(question), encoding="utf-8")
        library = stand_in(Path(folder), compiler)
        command = [sys.executable, "-m", "fastmrcnn.speed.schedule_trace", str(asked), str(answer)]
        environment = {**os.environ, "LD_PRELOAD": str(library), "TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"--schedule cuda: torch {torch.__version__} could not schedule the step: {last}")
        return summary(json.loads(answer.read_text(encoding="utf-8")))


def stand_in(folder: Path, compiler: str) -> Path:
    """A library that answers in the place of the driver's, with the functions that this torch looks for."""
    loader = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    names = sorted(set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", loader.read_bytes())))
    source = folder / "driver.c"
    functions = "".join(f"int {name.decode()}(void) {{ return 0; }}\n" for name in names)
    source.write_text(_ANSWERS + functions, encoding="utf-8")
    library = folder / "libcuda.so.1"
    flags = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True, capture_output=True)
    return library


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a trace: counts by direction, the largest kernels, the estimate."""
    kernels = [
        {**kernel, "direction": direction}
        for direction in ("forward", "backward")
        for kernel in found[direction]
    ]
    largest = sorted(kernels, key=lambda kernel: -kernel["read"] - kernel["written"])[:LARGEST]
    return {
        "forward": counts(found["forward"]),
        "backward": counts(found["backward"]),
        "gigabytes": sum(gigabytes(kernel) for kernel in kernels),
        "teraflops": sum(kernel["flops"] for kernel in kernels) / 1e12,
        "saved_gigabytes": found["saved_bytes"] / 1e9,
        "largest": largest,
        "estimate": estimate(kernels, found["trained_numbers"]),
    }


def counts(kernels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **{kind: sum(kernel["kind"] == kind for kernel in kernels) for kind in KINDS},
        "gigabytes": sum(map(gigabytes, kernels)),
    }


def gigabytes(kernel: Mapping[str, Any]) -> float:
    moved: int = kernel["read"] + kernel["written"]
    return moved / 1e9


def schedule_tables(found: Mapping[str, Any], images: int) -> str:
    """What `cuda_schedule` found, as Markdown."""
    graphs = [
        [name, *(str(found[name][kind]) for kind in KINDS), f"{found[name]['gigabytes']:.1f}"]
        for name in ("forward", "backward")
    ]
    kernels = [
        [
            f"{1e3 * gigabytes(kernel):.0f}",
            f"{kernel['direction']}, {kernel['kind']}: {kernel['name']}",
            "; ".join(kernel["sources"]),
        ]
        for kernel in found["largest"]
    ]
    cases = found["estimate"]["step"].keys()
    total = {"whole step": found["estimate"]["step"]}
    parts = [
        [part, *(f"{row[case]:.1f}" for case in cases)]
        for part, row in [*found["estimate"]["parts"].items(), *total.items()]
    ]
    rates = ", ".join(
        f"{case} {1e3 * images / found['estimate']['step'][case]:.0f}" for case in list(cases)[2:]
    )
    return "\n\n".join(
        [
            table(["graph", *KINDS, "GB"], graphs),
            f"{found['gigabytes']:.1f} GB and {found['teraflops']:.1f} TFLOP in both, "
            f"{found['saved_gigabytes']:.2f} GB saved for backward.",
            table(["MB", "the largest kernels", "from"], kernels),
            table(["part", "GB", "TFLOP", *(f"{case}, ms" for case in list(cases)[2:])], parts),
            f"Not measured: {found['estimate']['formula']}. Images a second: {rates}.",
        ]
    )
