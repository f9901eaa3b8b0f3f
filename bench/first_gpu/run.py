"""The first hour on a GPU: every check and measurement in order, each under a time limit of its own.

    python bench/first_gpu/run.py FOLDER [--part N ...] [--steps NAME ...] [--seconds S] [--small]

A step that fails or is late is noted, and the next one begins. What each prints is in FOLDER/<step>.txt, what
it measured in FOLDER/<step>.json, how it ended in FOLDER/steps.json; FOLDER.tgz holds all of it after each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAST_S = 25  # with less left of the whole time, a step is not begun
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
BENCHMARK = ("-m", "fastmrcnn.benchmark")
JSON = "{json}"  # stands for the step's own file
# As large as a CPU can do in seconds: to see that everything runs.
NARROW = (
    "model.backbone.name=resnet18",
    "model.backbone.width=8",
    "model.fpn.channels=16",
    "model.rpn.pre_nms_top_n=64",
    "model.rpn.post_nms_top_n=64",
    "model.roi.batch_per_image=32",
    "model.roi.sampling_ratio=1",
    "model.box_head.hidden=32",
    "model.mask_head.channels=16",
)
SMALL = ("runtime.device=cpu", *NARROW)
SHAPE = ("--shape", "64", "96", "--batch", "1", "--steps", "1")


class Step(NamedTuple):
    name: str
    part: int
    limit_s: int
    lines: int  # of its output that are shown at once; the file has all
    words: tuple[str, ...]  # for Python
    small: tuple[str, ...]  # the same on a CPU
    measures: bool = True  # into a file of its own, besides what it prints


def row(name: str, part: int, limit_s: int, lines: int, rows: str | Sequence[str], *more: str) -> Step:
    """Rows of the benchmark."""
    rows = [rows] if isinstance(rows, str) else rows
    words = (*BENCHMARK, "--json", JSON, "--row-limit", str(limit_s - 15), *more, "--rows", *rows)
    small = (
        *BENCHMARK,
        "--json",
        JSON,
        *SHAPE,
        "--mask-slots",
        "16",
        "--rows",
        "+ batch norm folded",
        *SMALL,
    )
    return Step(name, part, limit_s, lines, words, small)


STEPS = [
    Step("environment", 1, 40, 12, (str(HERE / "ceilings.py"), JSON), (str(HERE / "ceilings.py"), JSON)),
    Step(
        "step_tests",
        1,
        70,
        14,
        (*PYTEST, "-m", "gpu", "tests/model/test_conv_relu.py", "tests/training/test_training_step.py"),
        (*PYTEST, "tests/model/test_conv_relu.py", "-k", "test_values_and_gradients"),
        measures=False,
    ),
    Step(
        "convolutions",
        1,
        70,
        62,
        (str(HERE / "convolutions.py"), JSON),
        (str(HERE / "convolutions.py"), JSON, "--small"),
    ),
    row("eager", 1, 60, 45, "+ batch norm folded", "--steps", "20", "--kernels", "40"),
    row("compiled", 1, 200, 8, "+ compiled", "--steps", "30"),
    Step(
        "kernel_tests",
        1,
        170,
        14,
        (*PYTEST, "-m", "gpu", "tests/kernels", "--numprocesses=6", "--maxfail=25"),
        (*PYTEST, "tests/kernels/test_level_assign.py", "-k", "borders"),
        measures=False,
    ),
    row("graphs", 2, 170, 100, "+ CUDA graphs", "--steps", "200", "--kernels", "90"),
    row("epilogues", 2, 140, 60, "+ epilogues in cuDNN", "--steps", "100", "--kernels", "50"),
    row(
        "torchvision",
        2,
        200,
        14,
        [
            "torchvision, eager AMP bf16",
            "torchvision, AMP bf16, channels_last",
            "torchvision, eager fp32 (TF32 in convolutions)",
        ],
        "--steps",
        "15",
    ),
    row("slots_128", 2, 150, 6, "+ CUDA graphs", "--steps", "60", "--mask-slots", "128"),
    Step(
        "inference",
        3,
        210,
        18,
        (*BENCHMARK, "--no-ladder", "--inference", "--steps", "30", "--json", JSON),
        (*BENCHMARK, "--no-ladder", "--inference", *SHAPE, "--json", JSON, *SMALL),
    ),
    Step("shapes", 3, 220, 8, (str(HERE / "shapes.py"), JSON), (str(HERE / "shapes.py"), JSON, "--small")),
    Step(
        "operators",
        3,
        150,
        40,
        (
            *PYTEST,
            "bench/",
            "--benchmark-only",
            "--seconds",
            "0.2",
            "-k",
            "not training_step",
            f"--benchmark-json={JSON}",
        ),
        (*PYTEST, "bench/bench_level_assign.py", "--benchmark-only", f"--benchmark-json={JSON}"),
    ),
    Step(
        "loader",
        3,
        70,
        8,
        (
            *BENCHMARK,
            "--no-ladder",
            "--loader",
            "--steps",
            "40",
            "--json",
            JSON,
            "data.workers=12",
            "train.compile=off",
            "train.cuda_graphs=off",
        ),
        (
            *BENCHMARK,
            "--no-ladder",
            "--loader",
            *SHAPE,
            "--json",
            JSON,
            *SMALL,
            "data.workers=0",
            "data.short_side=[64]",
            "data.long_side_max=96",
        ),
    ),
    Step(
        "patched",
        3,
        40,
        12,
        ("-m", "fastmrcnn.kernels.check"),
        ("-m", "fastmrcnn.kernels.check"),
        measures=False,
    ),
    row(
        "torchvision_more",
        4,
        280,
        10,
        [
            "torchvision, AMP bf16, channels_last, cuDNN's trials",
            "torchvision, AMP bf16, channels_last, compiled",
        ],
        "--steps",
        "30",
    ),
    row("autotuned", 4, 290, 10, "max-autotune, without epilogues in cuDNN", "--steps", "60"),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/first_gpu/run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the results")
    parser.add_argument("--part", type=int, nargs="+", help="1 to 4; without it, all of them")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help=", ".join(step.name for step in STEPS))
    parser.add_argument(
        "--seconds", type=float, help="of all steps together: late ones are shortened or skipped"
    )
    parser.add_argument(
        "--small", action="store_true", help="small shapes on a CPU, to see that everything runs"
    )
    args = parser.parse_args(argv)
    unknown = set(args.steps or ()) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}; see --help")
    chosen = [
        s
        for s in STEPS
        if (args.part is None or s.part in args.part) and (not args.steps or s.name in args.steps)
    ]
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds if args.seconds is not None else float("inf")
    file = args.folder / "steps.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for step in chosen:
        left = end - time.monotonic()
        if left < LEAST_S:
            print(f"=== {step.name}: skipped, {max(0, left):.0f} s left", flush=True)
            done[step.name] = {"ended": "skipped"}
        else:
            done[step.name] = perform(step, args.folder.resolve(), min(step.limit_s, left), args.small)
        file.write_text(json.dumps(done, indent=1) + "\n")
        pack(args.folder)
    return int(any(done[step.name]["ended"] != "well" for step in chosen))


def perform(step: Step, folder: Path, limit_s: float, small: bool) -> dict[str, Any]:
    """Run a step, show the end of its output, and say how it ended."""
    print(f"=== {step.name}, limit {limit_s:.0f} s", flush=True)
    own, printed = folder / f"{step.name}.json", folder / f"{step.name}.txt"
    own.unlink(missing_ok=True)
    words = [word.replace(JSON, str(own)) for word in (step.small if small else step.words)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = time.monotonic()
    with printed.open("w", encoding="utf-8") as output:
        # A group of its own: what a step has started ends with it, and lets go of the GPU.
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - started
    ended = "late" if code is None else "well" if code == 0 else f"with exit code {code}"
    lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
    print(
        *(line[:300] for line in lines[-step.lines :]),
        f"--- {step.name} ended {ended}, {seconds:.0f} s",
        sep="\n",
        flush=True,
    )
    return {"ended": ended, "seconds": round(seconds, 1), "command": ["python", *words]}


def pack(folder: Path) -> None:
    """Put all results into one file beside their folder, whole at any time."""
    archive = folder.with_name(f"{folder.name}.tgz")
    temporary = archive.with_suffix(".tmp")
    with tarfile.open(temporary, "w:gz") as packed:
        packed.add(folder, folder.name)
    temporary.replace(archive)


if __name__ == "__main__":
    raise SystemExit(main())
